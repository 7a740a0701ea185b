"""`accelerate`: 2:4 layers onto packed weights, where that is faster and gives the same, and back again."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import nn

from statprune.acceleration.candidates import Candidate, Kind, find_candidates
from statprune.acceleration.float8 import float8_kernels
from statprune.acceleration.forward import Passes, passes
from statprune.acceleration.measuring import DeviceStopwatch, Stopwatch, Timings
from statprune.acceleration.packing import KERNELS, Kernel, pack_undoably
from statprune.acceleration.report import Accelerated, AccelerationReport, Measured, Whole
from statprune.errors import AccelerationError
from statprune.model.sites import LeftOut
from statprune.model.storage import compute_device, refuse_sharded
from statprune.model.swapped import Swapped
from statprune.progress import Progress, silent

TOLERANCES = {torch.float16: 0.01, torch.bfloat16: 0.05}
"""How far predictions may be off, relative to their norm, where nothing else is said: what is left of rounding in each layer,
since packed kernels add up in another order. A wrong kernel is off by about 1."""

QUANTIZED_TOLERANCE = 0.25

SPEEDUP = 1.05
"""Less is within what measurements differ by."""


class Acceleration:
    """What `accelerate` did to a model; a context manager too, at whose end it is undone."""

    def __init__(self, report: AccelerationReport, swapped: Swapped) -> None:
        self.report = report
        self._swapped = swapped

    def undo(self) -> None:
        """Give the model its dense weights back, bit for bit, in the parameters that it had."""
        self._swapped.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        return str(self.report)


def accelerate(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    inputs: Any = None,
    compiled: bool = False,
    speedup: float = SPEEDUP,
    tolerance: float | None = None,
    quantize: Literal["float8"] | None = None,
    kernels: Sequence[Kernel] = KERNELS,
    stopwatch: Stopwatch | None = None,
    progress: Progress = silent,
) -> Acceleration:
    """Run the 2:4 linear layers of a model on packed weights, where a measurement on its GPU says that they are faster.

    Packed are weights of `nn.Linear` in float16 and bfloat16 of which every four inputs have at most two that are not zero. Of
    each shape one is measured, dense and with each sparse kernel that torch has; layers whose fastest kernel is not faster at
    every number of tokens stay dense. So does the whole model, if a forward pass is not faster for all that. Nothing is
    rounded: `undo` gives the same bits back, which is checked when a weight is packed.

    The model is for inference then: undo before it is trained, moved or saved.

    Args:
        model: any module on a CUDA GPU. On anything else nothing is measured or changed, and the report says why.
        tokens: numbers of tokens in a forward pass, batch times length, that it will be used with: 1 is what `generate` does
            for each token of one text, 2048 is reading a long one.
        inputs: batches as `prune` takes them, on which the whole model is compared and timed. None makes tokens up.
        compiled: measure what `torch.compile` makes of dense and packed layers, and of the model; the model itself is not
            compiled.
        speedup: how many times faster a layer has to be, at every number of tokens.
        tolerance: how far predictions may be off, relative to the norm of the dense model's. None: 0.01 in float16, 0.05 in
            bfloat16, 0.25 where it is rounded to float8.
        quantize: "float8" rounds weights and inputs to float8 besides, by rows, with torchao 0.18 or later on a Hopper GPU. It
            has to be faster than float8 without 2:4, too. The dense weights are kept in host memory. There is no int8: torch's
            int8 kernels take int8 inputs, and torchao has 2:4 for float8 only.
        kernels: ways to pack a weight, where nothing is quantized.
        stopwatch: measures; None: CUDA events, on the device that the model computes on.
        progress: called after each kind of layer that was measured.

    Returns:
        With `.report`: what was measured, what runs packed, what stays dense and why. And `.undo()`.

    Raises:
        AccelerationError: a number that cannot be; there is no torchao for float8; the model does not run on packed weights,
            or gives other predictions: it is dense again.
        CalibrationError: the inputs do not fit.
        NonFiniteError: the dense model predicts NaN or infinity.
        SiteError: the weights are sharded.
    """
    counts = check(tokens, speedup, tolerance)
    if quantize is not None:
        kernels = quantized(quantize)
    refuse_sharded(model)
    candidates, left_out = find_candidates(model, kernels)
    device = compute_device(model)
    stopwatch = stopwatch or DeviceStopwatch(device, compiled)
    usual = [QUANTIZED_TOLERANCE if quantize else TOLERANCES.get(one.kind.dtype, 0.01) for one in candidates]
    allowed = tolerance or max(usual, default=None)
    given = {"compiled": compiled, "speedup": speedup, "tolerance": tolerance, "quantize": quantize}
    options = {key: value for key, value in given.items() if value != (accelerate.__kwdefaults__ or {})[key]}
    run = _Run(counts, options, speedup, allowed, _device_name(device), left_out)
    timings = _measure(candidates, counts, stopwatch, progress)
    chosen = run.choose(candidates, timings)
    swapped = Swapped()
    if not chosen:
        return Acceleration(run.report(), swapped)
    whole = Passes(model, passes(model, counts, inputs), compiled=compiled)
    dense_seconds = whole.seconds(stopwatch)
    try:
        run.swap(chosen, swapped)
        errors = whole.errors()
        run.check_errors(errors)
        sparse_seconds = whole.seconds(stopwatch)
    except BaseException:
        swapped.undo()
        raise
    if run.accelerated:
        run.whole = [
            Whole(one.tokens, dense, sparse, error)
            for one, dense, sparse, error in zip(whole.passes, dense_seconds, sparse_seconds, errors, strict=True)
        ]
        run.judge_whole(swapped)
    return Acceleration(run.report(), swapped)


def choose(timings: Timings, speedup: float) -> tuple[Kernel | None, str]:
    """The kernel that is faster at every number of tokens by this factor, the fastest on the whole; or None, and why.

    On the whole is the geometric mean over the numbers of tokens.
    """
    ratios = {kernel: timings.ratios(kernel) for kernel in timings.packed if not kernel.is_reference}
    if not ratios:
        return None, "no kernel runs here"
    fast = [kernel for kernel, found in ratios.items() if min(found.values()) >= speedup]
    if fast:
        return max(fast, key=lambda kernel: statistics.geometric_mean(ratios[kernel].values())), ""
    best = max(ratios, key=lambda kernel: min(ratios[kernel].values()))
    tokens = min(ratios[best], key=lambda count: ratios[best][count])
    return None, f"not faster: {ratios[best][tokens]:.2f} times dense at {tokens} tokens, by {best.name}"


def check(tokens: Sequence[int], speedup: float, tolerance: float | None) -> tuple[int, ...]:
    """The numbers of tokens, each once.

    Raises:
        AccelerationError: a number that cannot be.
    """
    is_list = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    if not is_list or not tokens or not all(type(one) is int and one > 0 for one in tokens):
        raise AccelerationError(
            f"tokens={tokens!r}: expected the numbers of tokens in a forward pass that the model will be used with, such as "
            "[1, 64, 2048]."
        )
    if not (math.isfinite(speedup) and speedup >= 1):
        raise AccelerationError(f"speedup={speedup!r}: expected 1 or more; 1.05 takes layers that are at least 5 % faster.")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise AccelerationError(f"tolerance={tolerance!r}: expected a number above 0, relative to the norm of the predictions.")
    return tuple(dict.fromkeys(tokens))


def quantized(quantize: str) -> tuple[Kernel, ...]:
    """The kernels that round.

    Raises:
        AccelerationError: there are none, or none for what is installed.
    """
    if quantize != "float8":
        raise AccelerationError(
            f"quantize={quantize!r}: expected 'float8' or None. There is no int8: torch's int8 kernels take int8 inputs, and "
            "torchao has 2:4 for float8 only."
        )
    return float8_kernels()


def check_device(device: str) -> None:
    """Raise AccelerationError where there is no GPU, or another device was asked for."""
    if not torch.cuda.is_available():
        raise AccelerationError(
            "There is no GPU here that torch can use, and 2:4 runs faster on NVIDIA GPUs of compute capability 8.0 and later "
            "only. Run this on the machine that the model will run on; `statprune inspect` tells anywhere which layers are 2:4."
        )
    if device != "auto" and not device.startswith("cuda"):
        raise AccelerationError(f"--device {device}: expected a GPU, such as cuda; nothing runs faster for zeros elsewhere.")


def _measure(
    candidates: Sequence[Candidate], tokens: Sequence[int], stopwatch: Stopwatch, progress: Progress
) -> dict[Kind, Timings]:
    firsts: dict[Kind, Candidate] = {}
    for one in candidates:
        firsts.setdefault(one.kind, one)
    found = {}
    for kind, first in firsts.items():
        found[kind] = stopwatch.layer(first.module.weight.detach(), first.module.bias, first.kernels, tokens)
        progress(len(found), len(firsts), f"{kind.shape[0]} x {kind.shape[1]}")
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Run:
    """What becomes the report."""

    def __init__(
        self, tokens: tuple[int, ...], options: dict[str, Any], speedup: float, tolerance: float | None, device: str,
        left_out: list[LeftOut],
    ) -> None:  # fmt: skip
        self.tokens, self.options, self.speedup, self.tolerance, self.device = tokens, options, speedup, tolerance, device
        self.left_out = list(left_out)
        self.measured: list[Measured] = []
        self.failed: dict[str, str] = {}
        self.whole: list[Whole] = []
        self.accelerated: list[Accelerated] = []

    def choose(self, candidates: Sequence[Candidate], timings: dict[Kind, Timings]) -> list[tuple[Candidate, Kernel]]:
        """The layers that are faster with a kernel, and that kernel; the others stay dense."""
        chosen = []
        for kind, found in timings.items():
            own = [one for one in candidates if one.kind == kind]
            best, why = choose(found, self.speedup)
            self.failed.update(found.failed)
            self.measured += [
                Measured(
                    kind.shape, str(kind.dtype).removeprefix("torch."), kind.has_bias, len(own), kernel.name, count,
                    found.dense[count], took[count], kernel is best,
                )
                for kernel, took in found.packed.items()
                for count in self.tokens
            ]  # fmt: skip
            if best is not None:
                chosen += [(one, best) for one in own]
            else:
                self.left_out += [LeftOut(one.name, kind.shape, why) for one in own]
        return chosen

    def swap(self, chosen: Sequence[tuple[Candidate, Kernel]], swapped: Swapped) -> None:
        """Onto packed weights, one after another, so that memory holds one weight twice."""
        for one, kernel in chosen:
            shape, undoable = one.kind.shape, pack_undoably(kernel, one.module.weight)
            if undoable is None:
                self.left_out.append(LeftOut(one.name, shape, f"{kernel.name} does not give its bits back"))
                continue
            self.accelerated.append(Accelerated(one.name, shape, kernel.name))
            swapped.put(one.module, *undoable)

    def check_errors(self, errors: Sequence[float]) -> None:
        """Raise AccelerationError for predictions that are off by more than the tolerance."""
        worst = max(errors)
        if self.tolerance is not None and worst > self.tolerance:
            raise AccelerationError(
                f"On packed weights the model's predictions are off by {100 * worst:.3g} % of their norm, more than the "
                f"{100 * self.tolerance:g} % that are allowed. It is dense again. A higher tolerance=... takes that."
            )

    def judge_whole(self, swapped: Swapped) -> None:
        """Undo it all where the model as a whole is not faster for it."""
        slowest = min(self.whole, key=lambda one: one.ratio)
        if slowest.ratio <= 1:
            swapped.undo()
            why = f"the whole model is not faster: {slowest.ratio:.2f} times dense at {slowest.tokens} tokens"
            self.left_out += [LeftOut(one.name, one.shape, why) for one in self.accelerated]
            self.accelerated = []

    def report(self) -> AccelerationReport:
        """As it is now."""
        return AccelerationReport(
            self.device, self.tokens, self.options, self.speedup, self.tolerance if self.whole else None, tuple(self.measured),
            dict(self.failed), tuple(self.whole), tuple(self.accelerated), tuple(self.left_out),
        )  # fmt: skip
