"""The commands that write a folder, or check one: what they refuse before any work, replace, print and upload."""

import json
import shutil
from collections import namedtuple

import huggingface_hub
import pytest

from statprune.commands.cli import main
from statprune.record import RECORD
from statprune.verification import verify
from test_card import Hub


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, " ".join(printed.out.split()), " ".join(printed.err.split())


def prune(capsys, model, output, *options):
    return run(capsys, "prune", model, "--output", output, "--seqlen", 16, "--samples", 2, *options)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, tiny_model_folder):
    home = tmp_path_factory.mktemp("sparse")
    model = shutil.copytree(tiny_model_folder, home / "model")
    (model / "LICENSE").write_text("free")
    words = ["prune", model, "--output", home / "out", "--seqlen", 16, "--samples", 2, "--max-shard-size", "4KB"]
    assert main([str(word) for word in words]) == 0
    return home / "out"


def test_what_cannot_be_written_is_refused_before_the_model_is_opened(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for output in (tmp_path / "file" / "out", tmp_path / "link", tmp_path / ("o" * 256), "/proc/out"):
        status, _, err = prune(capsys, "no/such/model", output)
        assert status == 1
        assert f"error: The output {output} is" in err or f"error: The output '{output}' cannot be written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_full_disk_is_refused_before_the_calibration(capsys, tmp_path, tiny_model_folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 40_000))
    status, out, err = prune(capsys, tiny_model_folder, tmp_path / "out")
    assert (status, out) == (1, "")
    assert "and its disk has 40,000 bytes left" in err
    assert list(tmp_path.iterdir()) == []


def test_what_lies_beside_the_model_is_copied_and_the_weights_are_in_shards(sparse):
    record = verify(sparse)
    assert {"LICENSE", "README.md", "model.safetensors.index.json"} <= record["files"].keys()
    assert not (sparse / "model.safetensors").exists()


def test_only_an_output_of_ours_is_overwritten_and_only_when_asked(capsys, sparse, tmp_path, tiny_model_folder):
    output = shutil.copytree(sparse, tmp_path / "out")
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    for target, options, message in (
        (output, [], "exists. Choose another name"),
        (model, ["--overwrite"], "is the model itself"),
        (output, ["--overwrite", "--max-shard-size", "much"], "max_shard_size='much'"),
    ):
        status, _, err = prune(capsys, model, target, *options)
        assert status == 1
        assert message in err
    assert verify(output) == verify(sparse)
    status, *_ = prune(capsys, model, output, "--overwrite", "--pattern", "1:4")
    assert status == 0
    assert verify(output)["sparsity"] == 0.75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    status, _, err = prune(capsys, output, output, "--overwrite")
    assert status == 1
    assert "is the model itself" in err


def test_what_a_killed_run_left_is_removed_and_said(capsys, tmp_path, tiny_model_folder):
    left = tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    (left / "lock").write_text("")
    status, _, err = prune(capsys, tiny_model_folder, tmp_path / "out")
    assert status == 0
    assert f"{left} was left behind by a process that ended early; it was removed." in err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verify_prints_the_digest_to_publish_and_compares_a_published_one(capsys, sparse):
    digest = json.loads((sparse / RECORD).read_text())["digest"]
    status, out, _ = run(capsys, "verify", sparse)
    assert status == 0
    assert digest in out
    assert run(capsys, "verify", sparse, "--digest", digest)[0] == 0
    status, _, err = run(capsys, "verify", sparse, "--digest", "0" * 64)
    assert status == 1
    assert "is not the record that was published" in err


def test_push_uploads_a_verified_folder(capsys, sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", hub := Hub())
    status, out, _ = run(capsys, "push", sparse, "user/name", "--private")
    assert status == 0
    assert "https://hub/commit/1" in out
    assert hub.calls[1] == ("create_repo", ("user/name",), {"private": True, "exist_ok": True})
    status, _, err = run(capsys, "push", tmp_path, "user/name")
    assert status == 1
    assert "has no readable pruning.json" in err
