"""A command in several processes: what torchrun starts is one command, which works on all ranks and speaks on the first.

    one_voice      around the command line: the others are silent, and do not end before the first has said why all do
    joined         around a command: torch.distributed, the rank's own device, and one rank's error told to all

The environment decides (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without it a command is a single process.
"""

import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from statprune.commands import endings
from statprune.errors import CalibrationError, RanksError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARED = ("prune", "evaluate")
"""Commands whose work several processes share."""

_LONGEST = timedelta(days=1)
"""How long ranks wait for each other once all have begun: the first one alone saves and verifies."""

_LAST_WORDS = 10.0
"""Seconds that a rank waits for the first one to say how the command ends, before it says so itself."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among those that run a command."""

    rank: int
    size: int
    local: int
    """Its rank on this machine."""

    on_machine: int
    """How many of them are on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether it speaks and writes."""
        return self.rank == 0


def place() -> Place:
    """This process's, as the environment says."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return Place(0, 1, 0, 1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, on_machine = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", size)
    return Place(rank, size, int(local), int(on_machine))


@contextlib.contextmanager
def one_voice() -> Iterator[bool]:
    """Whether this process speaks. What others would say is kept, and said where the first one cannot say it."""
    here = place()
    if here.size == 1:
        yield True
        return
    kept = io.StringIO()
    try:
        with contextlib.ExitStack() as silent:
            if not here.is_first:
                silent.enter_context(contextlib.redirect_stdout(io.StringIO()))
                silent.enter_context(contextlib.redirect_stderr(kept))
            yield here.is_first
    finally:
        if here.is_first:
            with contextlib.suppress(Exception):  # where the others are gone there is nobody to tell
                _store(here).set("spoken", "1")
        elif not _has_spoken(here) or endings.wants_traceback():
            sys.stderr.write(kept.getvalue())


@contextlib.contextmanager
def joined(command: str, given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The arguments of a command for this process. What fails inside on one rank is an error on all.

    Raises:
        RanksError: a command that does not share its work, or a device that is not this rank's; another rank failed.
    """
    here = place()
    if here.size == 1:
        yield given
        return
    if command not in SHARED:
        raise RanksError(
            f"statprune {command} in {here.size} processes: it would do the same in each. Only {' and '.join(SHARED)} share "
            "their work: run it without torchrun."
        )
    import torch

    from statprune.ranks import all_well, together

    distributed: Any = torch.distributed

    device = device_of(given["model"].device, here)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store = distributed.PrefixStore("ranks", _store(here))
    distributed.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=_LONGEST)
    try:
        with together(None, torch.device("cpu"), f"statprune {command}"):
            all_well(None, "the start")
            yield {**given, "model": dataclasses.replace(given["model"], device=str(device))}
    finally:
        distributed.destroy_process_group()


def device_of(device: str, here: Place) -> "torch.device":
    """The rank's own device, where a user asks for such a one.

    Raises:
        RanksError: there is none for this rank, or one is asked for by its number.
    """
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if device not in ("auto", "cuda"):
        raise RanksError(f"--device {device} in {here.size} processes: each takes its own. Expected auto, cpu or cuda.")
    if here.local >= torch.cuda.device_count():
        raise RanksError(
            f"--device {device} in {here.size} processes: this machine has {torch.cuda.device_count()} GPUs, and each process "
            "needs one. Expected as many processes on it (--nproc-per-node), or --device cpu."
        )
    return torch.device("cuda", here.local)


def available_memory(device: "torch.device") -> int | None:
    """Bytes that this process may take: of main memory, an equal part of what is free for those of this machine.

    None where the system does not tell.
    """
    from statprune.clock import available_memory as free_memory

    free = free_memory(device)
    return free // place().on_machine if free is not None and device.type == "cpu" else free


def check_windows(samples: int, *, halves: bool = False) -> None:
    """Raise CalibrationError where there are not enough calibration windows for all ranks."""
    least = place().size * (2 if halves else 1)
    if samples < least and place().size > 1:
        each = "two, one to prune on and one to score on" if halves else "one"
        raise CalibrationError(
            f"--samples {samples} in {place().size} processes: expected at least {least}, for each of them {each}."
        )


def share_of(windows: "Tensor", *, halves: bool = False) -> "Tensor":
    """This rank's of [windows, length]: they are dealt out in turns, with `halves` in pairs. All where there are too few."""
    import torch

    here, together = place(), 2 if halves else 1
    if len(windows) < here.size * together:
        return windows
    return windows[torch.arange(len(windows)) // together % here.size == here.rank]


def protocol() -> dict[str, int]:
    """What a record says of them, where there are several."""
    size = place().size
    return {"ranks": size} if size > 1 else {}


def _store(here: Place) -> Any:
    """What all processes can read and write; torchrun's own, or one that the first process holds."""
    import torch

    distributed: Any = torch.distributed
    if not _STORES:
        _STORES.append(next(distributed.rendezvous("env://", here.rank, here.size, timeout=timedelta(minutes=5)))[0])
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"statprune/{again}", _STORES[0])


_STORES: list[Any] = []


def _has_spoken(here: Place) -> bool:
    """Whether the first process has, after a while. Asked again and again, so that a signal can end it."""
    deadline = time.monotonic() + _LAST_WORDS
    with contextlib.suppress(Exception):  # it is gone, with the store that it held
        while time.monotonic() < deadline:
            if _store(here).check(["spoken"]):
                return True
            time.sleep(0.05)
    return False
