"""Seconds and peak memory of a stretch of work, on the CPU and on a GPU."""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statprune.clock import give_back_memory, peak_memory, resident_memory


@dataclass
class Cost:
    """What a stretch of work took; complete when it has ended."""

    seconds: float = 0.0

    peak_memory: int | None = None
    """Bytes at the highest point, beyond what was held at the start. On a GPU what torch allocated there; else resident main
    memory, which only Linux tells, and which misses what fits into memory that the process holds already. None elsewhere."""


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Measure what runs inside; a GPU's queue is empty before and after, so that its work counts and nobody else's."""
    cost = Cost()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held: int | None = torch.cuda.memory_allocated(device)
    else:
        held = _reset_resident_peak()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        if is_cuda:
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - started
        peak = peak_memory(device)
        if held is not None and peak is not None:
            cost.peak_memory = max(0, peak - held)


def peak_of_tensors(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of the tensors that the work makes, at the highest point; those of before do not count.

    On a GPU the allocator tells. Elsewhere each operation's results are counted while they live, which finds every tensor but
    not what an operation needs inside of itself, and makes the work slower: do not time it.
    """
    if device.type == "cuda":
        with measured(device) as cost:
            work()
        return cost.peak_memory or 0
    live = _LiveTensors()
    with live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the memory of results as long as any tensor uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: int = 0
        self._held = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                memory = leaf.untyped_storage()
                if memory not in self._seen and memory._cdata not in given:
                    self._seen.add(memory)
                    self._held += memory.nbytes()
                    weakref.finalize(memory, self._release, memory.nbytes())
        self.peak = max(self.peak, self._held)
        return result

    def _release(self, num_bytes: int) -> None:
        self._held -= num_bytes


def _reset_resident_peak() -> int | None:
    """Make the peak of resident memory start anew, and return what is resident now; None where the system cannot."""
    give_back_memory()  # what was freed and is still held would hide what the work needs
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident_memory("VmRSS")
