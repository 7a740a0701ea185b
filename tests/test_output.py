"""The place of an output: taken before work begins, and what becomes of it."""

import errno
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from statprune import checkpoint
from statprune.errors import CheckpointError
from statprune.output import Reserved
from tiny_models import classifier, llama


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_reserved_place_is_written_and_gets_its_name(tmp_path):
    with Reserved(tmp_path / "deep" / "out") as place:
        (hidden,) = (tmp_path / "deep").iterdir()
        assert hidden.name.startswith(".out.")
        (place.folder / "file").write_text("x")
        assert place.publish() == tmp_path / "deep" / "out"
    assert tree(tmp_path) == ["deep", "deep/out", "deep/out/file"]


def test_a_released_place_leaves_nothing_not_even_the_folders_made_for_it(tmp_path):
    with Reserved(tmp_path / "deep" / "er" / "out") as place:
        (place.folder / "file").write_text("x")
    assert tree(tmp_path) == []
    place.release()


@pytest.mark.parametrize("name", ["o" * 255, "ö" * 127])
def test_the_longest_names_will_do(tmp_path, name):
    Reserved(tmp_path / name).publish()
    assert tree(tmp_path) == [name]


def on_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


def a_broken_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    return tmp_path / "link"


def existing(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (on_a_file, "cannot be written: Not a directory"),
        (a_broken_link, "is a symbolic link to .*gone, which does not exist"),
        (existing, "exists. Choose another name"),
        (lambda path: path / ("o" * 256), "File name too long.* at most 255 bytes"),
        (lambda path: path / "a\0b", "cannot be written: .*null"),
        (lambda path: "/proc/out", r"cannot be written: .*\(/proc/\.out"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(tmp_path, make, message):
    output = make(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Reserved(output)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_file_system_that_refuses_is_named(tmp_path, monkeypatch, code):
    def refuse(self, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=f"cannot be written: {os.strerror(code)}"):
        Reserved(tmp_path / "out")


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match=r"needs \d\d,\d\d\d bytes, and its disk has 1,000 bytes left\. Make room"):
        checkpoint.reserve(tmp_path / "out", model=llama())
    assert tree(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_said(tmp_path):
    code = "import os, sys; from statprune.output import Reserved; r = Reserved(sys.argv[1]); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    (tmp_path / f".other{left.name.removeprefix('.out')}").mkdir()
    told = []
    with Reserved(tmp_path / "out", say=told.append):
        assert not left.exists()
        assert told == [f"{left} was left behind by a process that ended early; it was removed."]
    assert [path.name[:7] for path in tmp_path.iterdir()] == [".other."]


def test_a_process_that_ends_in_an_error_leaves_nothing(tmp_path):
    code = "import sys; from statprune.output import Reserved; r = Reserved(sys.argv[1]); 1 / 0"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, check=False).returncode == 1
    assert tree(tmp_path) == []


def test_the_folder_of_a_living_process_is_no_leftover(tmp_path):
    told = []
    with Reserved(tmp_path / "out") as first, Reserved(tmp_path / "out", say=told.append) as second:
        first.publish()
        with pytest.raises(CheckpointError, match="exists"):
            second.publish()
        kept = second.keep()
    assert told == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", kept.name] == ["out", "out.rescued"]


def test_a_hidden_folder_that_is_being_made_is_no_leftover(tmp_path):
    young, old = (tmp_path / f".out.0000000{n}.partial" for n in (1, 2))
    young.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    with pytest.warns(UserWarning, match="00000002.partial was left behind"):
        place = Reserved(tmp_path / "out")
    assert young.exists()
    assert not old.exists()
    place.release()


def test_a_folder_that_was_being_replaced_comes_back(tmp_path):
    left = tmp_path / ".out.00000001.partial"
    (left / "old").mkdir(parents=True)
    (left / "old" / "weights").write_text("precious")
    (left / "lock").write_text("")
    told = []
    with pytest.raises(CheckpointError, match="exists"):
        Reserved(tmp_path / "out", say=told.append)
    assert told[0].endswith("is back.")
    assert (tmp_path / "out" / "weights").read_text() == "precious"
    assert not left.exists()


def test_replacing_keeps_the_old_folder_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    place = Reserved(tmp_path / "out", is_replaceable=lambda path: None)
    (place.folder / "new").write_text("")
    rename = os.rename

    def fails_once(source, target):
        if Path(source) == place.folder:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(CheckpointError, match="Input/output error"):
        place.publish()
    assert tree(tmp_path / "out") == ["old"]
    monkeypatch.undo()
    place.publish()
    assert tree(tmp_path) == ["out", "out/new"]


def test_what_is_rescued_lies_beside_or_else_in_the_temporary_folder(tmp_path, monkeypatch):
    def write(folder):
        if folder.parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "weights").write_text("x")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with Reserved(tmp_path / "out") as place:
        beside = place.rescue(lambda folder: (folder / "weights").write_text("x"))
        elsewhere = place.rescue(write)
        assert place.rescue(lambda folder: 1 / 0) is None
    assert beside == tmp_path / "out.rescued"
    assert elsewhere.parent == tmp_path / "tmp"
    assert (elsewhere / "weights").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rescued", "tmp"]


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: ExtraState(2, 2), "_extra_state is a dict and no tensor"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex32), "cannot hold weight, a torch.complex32"),
    ],
)
def test_a_model_that_cannot_be_saved_is_refused_before_the_work(tmp_path, model, message):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Complex")
        built = model()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.reserve(tmp_path / "out", model=built)
    assert tree(tmp_path) == []


def test_a_compiled_model_and_a_lazy_one_can_be_saved(tmp_path):
    for model in (torch.compile(classifier(), backend="eager"), nn.DataParallel(classifier()), nn.LazyLinear(3)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.reserve(tmp_path / "out", model=model).release()
