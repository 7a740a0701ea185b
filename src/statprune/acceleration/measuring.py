"""What a layer takes dense and packed, on the device that it is to run on.

Calls follow each other without waiting, each with another copy of the weight, as the layers of a model do: so none finds its
weight in the cache of the one before, and the time that Python takes for a call counts where the GPU waits for it, and only
there. Dense and packed take turns; a time is the median of the rounds.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from statprune.acceleration.packing import Kernel
from statprune.errors import first_line

DENSE = "dense"

WARM_UPS, ROUNDS = 3, 20
FORWARDS = 5
MOST_COPIES, FEWEST_CALLS = 16, 8
CPU_CACHE = 32 * 2**20


@dataclass
class Timings:
    """Microseconds of a call of one kind of layer, by the number of tokens."""

    dense: dict[int, float] = field(default_factory=dict)
    packed: dict[Kernel, dict[int, float]] = field(default_factory=dict)
    """Of kernels that ran, and gave what the dense layer gives."""

    failed: dict[str, str] = field(default_factory=dict)
    """Why the others did not, by name."""

    def ratios(self, kernel: Kernel) -> dict[int, float]:
        """How many times faster than dense, and than any reference, by the number of tokens."""
        others = [took for one, took in self.packed.items() if one.is_reference]
        return {
            tokens: min([self.dense[tokens], *(other[tokens] for other in others)]) / took
            for tokens, took in self.packed[kernel].items()
        }


class Stopwatch(Protocol):
    """Measures."""

    def layer(self, weight: Tensor, bias: Tensor | None, kernels: Sequence[Kernel], tokens: Sequence[int]) -> Timings:
        """A layer with this weight [out, in], dense and with each kernel, for each number of tokens."""

    def forward(self, run: Callable[[], Any]) -> float:
        """Seconds of one run."""


@dataclass(frozen=True)
class DeviceStopwatch:
    """On a device: with CUDA events on a GPU, with the clock elsewhere."""

    device: torch.device

    compiled: bool = False
    """Whether what is measured goes through `torch.compile` first, where a packed weight costs no Python for each call."""

    @torch.no_grad()
    def layer(self, weight: Tensor, bias: Tensor | None, kernels: Sequence[Kernel], tokens: Sequence[int]) -> Timings:
        """As the protocol; with the settings that the kernels find for these numbers of tokens."""
        found = Timings()
        tuned: list[Kernel] = []
        for kernel in kernels:
            try:
                tuned += kernel.tuned(weight, tokens)
            except RuntimeError as e:
                _note_failure(found, kernel, e)
        num_copies = copies(weight.numel() * weight.element_size() // 2, self._cache_size())
        packed = {kernel: [kernel.pack(weight) for _ in range(num_copies)] for kernel in tuned}
        dense = [weight.detach().clone() for _ in range(num_copies)]
        calls = torch.compile(_calls, dynamic=False) if self.compiled else _calls
        with many_graphs() if self.compiled else contextlib.nullcontext():
            for count in tokens:
                inputs = torch.randn(1, count, weight.shape[1], dtype=weight.dtype, device=weight.device)
                expected = functional.linear(inputs, weight, bias)
                for kernel in list(packed):
                    if (why := _why_not_right(kernel, calls, inputs, packed[kernel], bias, expected)) is not None:
                        found.failed[kernel.name] = why
                        found.packed.pop(kernel, None)
                        del packed[kernel]
                runs = [_Calls(calls, inputs, some, bias) for some in (dense, *packed.values())]
                found.dense[count], *times = self._in_turns(runs)
                for kernel, took in zip(packed, times, strict=True):
                    found.packed.setdefault(kernel, {})[count] = took
        return found

    def forward(self, run: Callable[[], Any]) -> float:
        """The median of some runs, after two that do not count."""
        return statistics.median([self._elapsed(run) for _ in range(2 + FORWARDS)][2:])

    def _in_turns(self, runs: "Sequence[_Calls]") -> list[float]:
        """Microseconds of one call of each."""
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(WARM_UPS + ROUNDS):
            for run, own in zip(runs, times, strict=True):
                own.append(1e6 * self._elapsed(run) / run.count)
        return [statistics.median(own[WARM_UPS:]) for own in times]

    def _elapsed(self, run: Callable[[], Any]) -> float:
        """Seconds from an empty queue to an empty queue."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def _cache_size(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size) if self.device.type == "cuda" else CPU_CACHE


def copies(num_bytes: int, cache_size: int) -> int:
    """How many copies of so many bytes it takes to fill a cache twice; 2 at least, and no more than `MOST_COPIES`."""
    return min(MOST_COPIES, max(2, math.ceil(2 * cache_size / max(1, num_bytes))))


def many_graphs() -> contextlib.AbstractContextManager[None]:
    """Inside, torch.compile makes as many graphs of one function as there are kernels and numbers of tokens."""
    import torch._dynamo

    limits: Any = torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096)
    return limits  # type: ignore[no-any-return]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference beside the norm of what is expected, [..., channels] each; infinite where it is no number."""
    off = norm = 0.0
    width = expected.shape[-1]
    for one, other in zip(found.reshape(-1, width).split(256), expected.reshape(-1, width).split(256), strict=True):
        off += float((one.float() - other.float()).square().sum(dtype=torch.float64))
        norm += float(other.float().square().sum(dtype=torch.float64))
    error = math.sqrt(off / norm) if norm else math.inf if off else 0.0
    return error if math.isfinite(error) else math.inf


def _calls(inputs: Tensor, weights: list[Tensor], bias: Tensor | None) -> list[Tensor]:
    return [functional.linear(inputs, weight, bias) for weight in weights]


@dataclass(frozen=True)
class _Calls:
    """Enough calls for the first one's start not to matter."""

    calls: Callable[[Tensor, list[Tensor], Tensor | None], list[Tensor]]
    inputs: Tensor
    weights: list[Tensor]
    bias: Tensor | None

    @property
    def count(self) -> int:
        """How many there are."""
        return self._repeats * len(self.weights)

    @property
    def _repeats(self) -> int:
        return math.ceil(FEWEST_CALLS / len(self.weights))

    def __call__(self) -> None:
        for _ in range(self._repeats):
            self.calls(self.inputs, self.weights, self.bias)


def _why_not_right(
    kernel: Kernel, calls: Callable[..., list[Tensor]], inputs: Tensor, weights: list[Tensor], bias: Tensor | None,
    expected: Tensor,
) -> str | None:  # fmt: skip
    try:
        error = relative_error(calls(inputs, weights, bias)[0], expected)
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        return first_line(e)
    if error > kernel.tolerance:
        return f"off by {100 * error:.2g} % at {inputs.shape[1]} tokens, more than {100 * kernel.tolerance:g} %"
    return None


def _note_failure(timings: Timings, kernel: Kernel, error: RuntimeError) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    timings.failed[kernel.name] = first_line(error)
