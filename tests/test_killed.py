"""A run that is killed, again and again, at any point, gives what an undisturbed one gives."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import statprune
from statprune import checkpoint
from statprune.recipe import Recipe
from test_streaming import in_files, stream
from tiny_models import llama, tokens


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, calibration batches, and what an undisturbed run makes of them, in how many seconds."""
    folder = tmp_path_factory.mktemp("killed")
    llama(num_hidden_layers=4).save_pretrained(folder / "model", max_shard_size="12KB")
    torch.manual_seed(1)
    batches = [tokens(2, 12) for _ in range(3)]
    save_file({"tokens": torch.cat(batches)}, folder / "tokens.safetensors")
    stream(folder / "model", batches, Recipe("sparsegpt", schedule="block"), folder / "warm")
    started = time.monotonic()
    stream(folder / "model", batches, Recipe("sparsegpt", schedule="block"), folder / "whole")
    return folder, batches, time.monotonic() - started


def run_and_kill(work, output, seconds):
    """Whether the run was killed; one that ends before has succeeded."""
    folder, batches, _ = work
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            stream(folder / "model", batches, Recipe("sparsegpt", schedule="block"), output)
            os._exit(0)
        except checkpoint.CheckpointError as e:
            os._exit(3 if "exists" in str(e) else 1)
        except BaseException:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 3), f"ended with {status}"
    return os.WIFSIGNALED(status)


def killed_and_finished(work, output, kills, seed):
    """Kill runs of one output at random points until so many were, or one was too quick; then let one end."""
    folder, batches, seconds = work
    draw = random.Random(seed)
    count = 0
    while count < kills and not output.exists():
        count += run_and_kill(work, output, draw.uniform(0, 1.1 * seconds))
    if not output.exists():
        stream(folder / "model", batches, Recipe("sparsegpt", schedule="block"), output)
    statprune.verify(output)
    found, wanted = in_files(output), in_files(folder / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    return count


def test_a_killed_run_is_gone_on_with(tmp_path, work):
    assert killed_and_finished(work, tmp_path / "out", 3, seed=0)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path, work):
    count, outputs = 0, 0
    while count < 200:
        count += killed_and_finished(work, tmp_path / f"out{outputs}", 4, seed=outputs + 1)
        outputs += 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"out{number}" for number in range(outputs))


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(tmp_path, work):
    folder, _, _ = work
    command = [
        sys.executable, "-m", "statprune", "prune", str(folder / "model"), "--output", str(tmp_path / "out"), "--stream",
        "--calibration", f"{folder / 'tokens.safetensors'}:tokens", "--samples", "6", "--seqlen", "12",
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
    found, wanted = in_files(tmp_path / "out"), in_files(tmp_path / "whole")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
