"""A run that is killed, again and again, at any point, gives what an undisturbed one gives."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers.utils import logging

import statprune
from statprune import checkpoint
from statprune.errors import RanksError
from statprune.recipe import Recipe
from test_streamed_ranks import same_files, stream_shared
from test_streaming import stream
from tiny_models import llama, tokens

RECIPE = Recipe("sparsegpt", schedule="block")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model and tokens; a run of it is made, so that those to come have its graph."""
    folder = tmp_path_factory.mktemp("killed")
    llama(num_hidden_layers=4).save_pretrained(folder / "model", max_shard_size="12KB")
    torch.manual_seed(1)
    save_file({"tokens": tokens(6, 12)}, folder / "tokens.safetensors")
    stream(folder / "model", batches_of(folder, 0, 1), RECIPE, folder / "warm")
    return folder


def batches_of(folder, rank, ranks):
    return load_file(folder / "tokens.safetensors")["tokens"].split(2)[rank::ranks]


def ended(children, seconds):
    """How processes ended; those that have not by then are killed."""
    deadline = time.monotonic() + seconds
    codes = dict.fromkeys(children)
    while None in codes.values():
        is_late = time.monotonic() >= deadline
        for child in [child for child, code in codes.items() if code is None]:
            if is_late:
                os.kill(child, signal.SIGKILL)
            if (found := os.waitpid(child, 0 if is_late else os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0 if is_late else 0.002)
    return list(codes.values())


class Runs:
    """Runs in processes of their own, one for each rank, and what an undisturbed one makes, in how many seconds."""

    def __init__(self, folder, ranks):
        self.folder, self.ranks = folder, ranks
        self.whole = folder / f"whole{ranks}"
        started = time.monotonic()
        self.finish(self.whole)
        self.seconds = time.monotonic() - started

    def start(self, output):
        """The processes of a run. They are forks: an import and an export would take longer than all else."""
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if self.ranks > 1 else None
        return [os.fork() or self._run(output, rank, store) for rank in range(self.ranks)], store

    def _run(self, output, rank, store):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            logging.disable_progress_bar()  # all forks share its lock, which one that is killed would hold for ever
            batches = batches_of(self.folder, rank, self.ranks)
            if store is None:
                stream(self.folder / "model", batches, RECIPE, output)
            else:
                own = distributed.TCPStore("127.0.0.1", store.port, is_master=False)
                distributed.init_process_group("gloo", store=own, rank=rank, world_size=self.ranks)
                stream_shared(rank, self.folder / "model", batches, RECIPE, output)
            os._exit(0)
        except checkpoint.CheckpointError as e:
            os._exit(3 if "exists" in str(e) else 1)
        except RanksError:  # another one was killed before
            os._exit(4)
        finally:
            os._exit(1)

    def finish(self, output):
        """A run that nobody disturbs."""
        children, _ = self.start(output)
        assert ended(children, 300) == [0] * self.ranks

    def kill(self, output, seconds):
        """Whether a run was killed so long after its start; one that ends before has succeeded."""
        children, _ = self.start(output)
        codes = ended(children, seconds)
        assert set(codes) <= {0, 3, 4, -signal.SIGKILL}
        return codes != [0] * self.ranks

    def kill_and_finish(self, output, kills, seed):
        """Kill runs of one output at random points until so many were, or one was too quick; then let one end."""
        draw = random.Random(seed)
        count = 0
        while count < kills and not output.exists():
            count += self.kill(output, draw.uniform(0, 1.1 * self.seconds))
        if not output.exists():
            self.finish(output)
        statprune.verify(output)
        assert same_files(output, self.whole)
        return count

    def kill_often(self, folder, kills):
        """Kill so many runs, of one output after another: where the machine has become quick, some end before."""
        count, outputs = 0, 0
        while count < kills:
            count += self.kill_and_finish(folder / f"out{outputs}", 4, seed=outputs)
            outputs += 1
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"out{number}" for number in range(outputs))


@pytest.mark.parametrize(("ranks", "kills"), [(1, 3), (2, 2)])
def test_a_killed_run_is_gone_on_with(tmp_path, made, ranks, kills):
    Runs(made, ranks).kill_often(tmp_path, kills)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 200), (2, 50)])
def test_hundreds_of_kills(tmp_path, made, ranks, kills):
    Runs(made, ranks).kill_often(tmp_path, kills)


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(tmp_path, made):
    command = [
        sys.executable, "-m", "statprune", "prune", str(made / "model"), "--output", str(tmp_path / "out"), "--stream",
        "--calibration", f"{made / 'tokens.safetensors'}:tokens", "--samples", "6", "--seqlen", "12",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        for line in running.stderr:
            if "pruning: 1" in line:
                break
        running.kill()
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "going on with" in again.stderr
    subprocess.run([*command[:6], str(tmp_path / "whole"), *command[7:]], check=True, capture_output=True)
    assert same_files(tmp_path / "out", tmp_path / "whole")
