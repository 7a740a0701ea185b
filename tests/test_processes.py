"""A command in several processes, as torchrun starts them: one command with one voice, and the result of one process."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

import statprune
from statprune.checkpoint import verify
from statprune.commands import processes
from statprune.commands.cli import main
from statprune.errors import CalibrationError, RanksError

TEXT = "to be or not to be, that is the question\n" * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def port():
    """Of a store that outlives the processes, as torchrun's does."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def _breaks(where, rank):
    """What fails on one rank alone."""
    if where == "load" and rank == 1:
        return "statprune.loading.load_causal", OSError("the disk is gone")
    if where == "save" and rank == 0:
        return "statprune.checkpoint.save", OSError("the disk is full")
    if where == "finish" and rank == 0:
        return "statprune.checkpoint.finish", OSError("the disk is full")
    if where == "measure" and rank == 1:
        return "statprune.perplexity.Perplexity.update_next_token", MemoryError("no room for logits")
    return None


def _commands(rank, port, calls):
    """(status, standard output, standard error) of each (command line, what breaks)."""
    distributed.destroy_process_group()  # a command makes its own
    found = []
    for words, breaks in calls:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("MASTER_PORT", str(port))
            monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(len(found)))
            monkeypatch.setattr(processes, "_STORES", [])
            monkeypatch.setattr(processes, "_LAST_WORDS", 5.0)
            if broken := _breaks(breaks, rank):
                name, error = broken

                def fails(*_, error=error, **__):
                    raise error

                monkeypatch.setattr(name, fails)
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    status = main(words)
                except SystemExit as e:
                    status = e.code
            found.append((status, out.getvalue(), " ".join(err.getvalue().split())))
    return found


def test_a_command_in_two_processes_gives_what_it_gives_in_one(two_ranks, tiny_model_folder, tmp_path, text, port, capsys):
    options = ["--seqlen", "16", "--samples", "5", "--calibration", text, "--text", text, "--method", "wanda", "--json"]

    def prune(folder):
        return ["prune", tiny_model_folder, "--output", str(tmp_path / folder), *options]

    evaluate = ["evaluate", tiny_model_folder, "--text", text, "--seqlen", "16", "--json"]
    dry = ["prune", tiny_model_folder, "--output", str(tmp_path / "none"), "--dry-run", "--quiet", "--json"]
    first, second = two_ranks(_commands, port, [(words, "") for words in (prune("two"), evaluate, dry)])
    assert [status for status, _, _ in first + second] == [0] * 6
    assert [said for _, *said in second] == [["", ""]] * 3
    alone = []
    for words in (prune("one"), evaluate, dry):
        assert main(words) == 0
        alone.append(json.loads(capsys.readouterr().out))
    (pruned, measured, planned), (one, measured_alone, planned_alone) = [json.loads(out) for _, out, _ in first], alone
    assert planned == planned_alone
    assert measured["windows"] == measured_alone["windows"]
    assert measured["perplexity"] == pytest.approx(measured_alone["perplexity"], rel=1e-12)
    verify(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    assert (pruned["num_tokens"], pruned["num_batches"], one["num_batches"]) == (one["num_tokens"], 3, 5)
    assert pruned["protocol"] == {**one["protocol"], "ranks": 2}
    assert pruned["perplexity"]["pruned"] == pytest.approx(one["perplexity"]["pruned"], rel=1e-5)
    two_files, one_file = (load_file(tmp_path / folder / "model.safetensors") for folder in ("two", "one"))
    for name, weight in one_file.items():
        torch.testing.assert_close(two_files[name], weight)
        assert torch.equal(two_files[name] == 0, weight == 0), name


def test_the_command_streams_in_two_processes(two_ranks, tiny_model_folder, tmp_path, text, port, capsys):
    options = ["--seqlen", "16", "--samples", "5", "--calibration", text, "--method", "sparsegpt", "--json"]

    def prune(name, *more):
        return ["prune", tiny_model_folder, "--output", str(tmp_path / name), *options, *more]

    evaluate = ["evaluate", tiny_model_folder, "--text", text, "--seqlen", "16", "--json", "--memory", "1KB"]
    streamed = prune("streamed", "--text", text, "--stream")
    calls = [
        (prune("memory", "--text", text, "--no-compare"), ""),
        (streamed, "finish"),
        (streamed, ""),
        (prune("first", "--memory", "1KB"), ""),
        (evaluate, ""),
        (prune("refused", "--stream", "--calibration", "generated"), ""),
        (prune("dry", "--stream", "--dry-run"), ""),
    ]
    first, second = two_ranks(_commands, port, calls)
    assert [status for status, _, _ in first] == [status for status, _, _ in second] == [0, 1, 0, 0, 0, 1, 0], first
    assert [said for _, *said in second] == [["", ""]] * len(calls)
    in_memory, broken, again, by_itself, measured, refused, planned = (json.loads(out) for _, out, _ in first)
    assert broken["error"] == "The system refused: the disk is full."
    assert "the same command goes on with it" in first[1][2]
    assert "going on with" in first[2][2]
    assert "may be used by each of 2 processes: it is streamed" in first[3][2]
    assert "the model's own samples would read all weights for each token" in refused["error"]
    assert planned["memory"]["machine"] == 2 * planned["memory"]["total"]
    assert planned["memory"]["processes"] == 2
    for result in (again, by_itself):
        assert result["sites"] == in_memory["sites"]
        assert result["protocol"] == {**in_memory["protocol"], "streamed": True}
    for name in ("streamed", "first"):
        verify(tmp_path / name)
        streamed, memory = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, "memory"))
        assert streamed.keys() == memory.keys()
        assert all(torch.equal(streamed[key], memory[key]) for key in memory)
    assert again["perplexity"] == in_memory["perplexity"]
    assert main(evaluate) == 0
    alone = json.loads(capsys.readouterr().out)
    assert measured["windows"] == alone["windows"]
    assert measured["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-12)


def test_what_fails_in_one_process_ends_both_with_one_message(two_ranks, tiny_model_folder, tmp_path, text, port):
    base = ["prune", tiny_model_folder, "--output", str(tmp_path / "out"), "--seqlen", "16"]
    few, drawn = ["--samples", "1"], ["--samples", "4", "--calibration", text, "--method", "wanda"]
    calls = {
        "load": ([*base, *drawn], 1, "statprune prune: rank 1 failed: OSError: the disk is gone."),
        "save": ([*base, *drawn], 1, "error: The system refused: the disk is full."),
        "measure": (
            [*base, *drawn, "--text", text],
            1,
            "statprune prune: rank 1 failed: MemoryError: no room for logits.",
        ),
        "few": ([*base, *few], 1, "--samples 1 in 2 processes: expected at least 2, for each of them one."),
        "pairs": ([*base, "--samples", "3", "--method", "auto"], 1, "expected at least 4, for each of them two, one to prune"),
        "device": ([*base, "--device", "cuda:1"], 1, "--device cuda:1 in 2 processes: each takes its own. Expected auto, cpu"),
        "inspect": (["inspect", tiny_model_folder], 1, "statprune inspect in 2 processes: it would do the same in each. Only "),
        "option": ([*base, "--sample", "x"], 2, "--samples x: expected"),
    }
    first, second = two_ranks(_commands, port, [(words, name) for name, (words, _, _) in calls.items()])
    for (name, (_, expected, message)), (status, _, err), (other, *silent) in zip(calls.items(), first, second, strict=True):
        assert (status, other) == (expected, expected), (name, err, silent)
        assert message in err, (name, err)
        assert err.count("error:") == 1, (name, err)
        assert silent == ["", ""], name
    assert not (tmp_path / "out").exists()


def _speaks_alone(rank, port):
    """The second rank, where the first one never says anything."""
    distributed.destroy_process_group()
    said = io.StringIO()
    if rank == 1:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("MASTER_PORT", str(port))
            monkeypatch.setattr(processes, "_STORES", [distributed.HashStore()])
            monkeypatch.setattr(processes, "_LAST_WORDS", 0.2)
            with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
                main(["prune"])
    return said.getvalue()


def test_a_rank_that_the_first_one_does_not_speak_for_speaks_itself(two_ranks):
    first, second = two_ranks(_speaks_alone, 0)
    assert first == ""
    assert "the following arguments are required: MODEL, --output" in second


def _environment(monkeypatch, rank, size):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "here", "MASTER_PORT": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_windows_are_dealt_out_in_turns_and_for_a_search_in_pairs(monkeypatch, size):
    windows = torch.arange(14)[:, None]
    shares, pairs = [], []
    for rank in range(size):
        _environment(monkeypatch, rank, size)
        shares.append(processes.share_of(windows).flatten().tolist())
        pairs.append(processes.share_of(windows, halves=True).flatten().tolist())
        assert processes.share_of(windows[: size - 1]).tolist() == windows[: size - 1].tolist()
    assert shares == [list(range(rank, 14, size)) for rank in range(size)]
    assert sorted(window for pair in pairs for window in pair) == list(range(14))
    for mine in pairs:
        assert [window % 2 for window in mine] == [0, 1] * (len(mine) // 2)


def test_the_environment_says_how_many_there_are_and_each_takes_its_own_device(monkeypatch):
    assert processes.place() == processes.Place(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a scheduler sets it, for others
    assert processes.place().size == 1
    _environment(monkeypatch, 3, 4)
    assert processes.place() == processes.Place(3, 4, 0, 4)
    with pytest.raises(CalibrationError, match="--samples 3 in 4 processes: expected at least 4"):
        processes.check_windows(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    here = processes.Place(5, 8, 1, 2)
    assert [str(processes.device_of(one, here)) for one in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(RanksError, match="this machine has 2 GPUs, and each process needs one"):
        processes.device_of("auto", processes.Place(2, 4, 2, 4))


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("statprune.clock.available_memory", lambda device: {"cpu": 1000, "cuda": 800}.get(device.type))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert [processes.available_memory(device) for device in (cpu, gpu)] == [1000, 800]
    for name, value in {"RANK": 3, "WORLD_SIZE": 8, "MASTER_ADDR": "here", "MASTER_PORT": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert [processes.available_memory(device) for device in (cpu, gpu, torch.device("meta"))] == [250, 800, None]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processes.available_memory(cpu) == 125


@pytest.mark.slow
def test_torchrun_prunes_with_auto_and_ends_with_one_message(tiny_model_folder, tmp_path, text):
    def torchrun(*words):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "statprune", *words]
        environment = {**os.environ, "PYTHONPATH": str(Path(statprune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)

    output = str(tmp_path / "out")
    prune = ["prune", tiny_model_folder, "--output", output, "--seqlen", "16", "--samples", "8", "--calibration", text]
    result = torchrun(*prune, "--method", "auto:minutes=0.05", "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["chosen_by"] is not None
    verify(output)
    again = torchrun(*prune)
    assert again.returncode == 1
    assert again.stderr.count(f"error: The output {output} exists") == 1
