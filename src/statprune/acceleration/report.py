"""What was measured, what runs on packed weights now, and what stays dense and why: plain data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from statprune.errors import number_of
from statprune.markdown import table
from statprune.model.sites import LeftOut


@dataclass(frozen=True)
class Measured:
    """A kind of layer with one kernel, at one number of tokens."""

    shape: tuple[int, int]
    """(out, in)."""

    dtype: str
    bias: bool

    layers: int
    """How many of this kind the model has."""

    kernel: str
    tokens: int

    dense: float
    """Microseconds of a call."""

    sparse: float
    """Microseconds of a call with the packed weight."""

    is_chosen: bool
    """Whether layers of this kind were to run on this kernel."""

    @property
    def ratio(self) -> float:
        """How many times faster than dense."""
        return self.dense / self.sparse


@dataclass(frozen=True)
class Whole:
    """A forward pass of the whole model."""

    tokens: int

    dense: float
    """Seconds."""

    sparse: float
    """Seconds, on packed weights."""

    error: float
    """How far the predictions are off, relative to the norm of the dense model's."""

    @property
    def ratio(self) -> float:
        """How many times faster than dense."""
        return self.dense / self.sparse


@dataclass(frozen=True)
class Accelerated:
    """A layer that runs on a packed weight."""

    name: str
    shape: tuple[int, int]
    kernel: str


@dataclass(frozen=True)
class AccelerationReport:
    """Of one call of `accelerate`."""

    device: str
    """What it was measured on."""

    tokens: tuple[int, ...]

    options: dict[str, Any]
    """What else was given to `accelerate`, where it is not the default."""

    speedup: float
    """What a layer had to reach at every number of tokens."""

    tolerance: float | None
    """What predictions were allowed to be off by; None where nothing was compared."""

    measured: tuple[Measured, ...]
    failed: dict[str, str]
    """Kernels that did not run here, or gave something else, by name."""

    whole: tuple[Whole, ...]
    accelerated: tuple[Accelerated, ...]
    stays_dense: tuple[LeftOut, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the ratios."""
        return {
            **asdict(self),
            "measured": [{**asdict(one), "ratio": one.ratio} for one in self.measured],
            "whole": [{**asdict(one), "ratio": one.ratio} for one in self.whole],
        }

    @property
    def conclusion(self) -> str:
        """What came of it, in a sentence or two."""
        if not self.accelerated:
            return "Nothing is faster on packed weights here, and nothing was changed."
        worst = max((one.error for one in self.whole), default=0.0)
        total = len(self.accelerated) + len(self.stays_dense)
        return (
            f"{number_of(len(self.accelerated), 'weight')} of {total} are packed now; "
            f"the predictions are off by {100 * worst:.2g} % of their norm at most."
        )

    @property
    def call(self) -> str:
        """The line of Python that does the same again."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"statprune.accelerate(model, tokens={list(self.tokens)}{options})"

    def rows(self) -> list[list[str]]:
        """Of the table of what was measured: a kind of layer, a kernel and a number of tokens each."""
        return [
            [
                f"{one.layers} of {one.shape[0]} x {one.shape[1]}{' + bias' if one.bias else ''}", one.kernel, str(one.tokens),
                f"{one.dense:.1f}", f"{one.sparse:.1f}", f"{one.ratio:.2f}", "*" if one.is_chosen else "",
            ]
            for one in self.measured
        ]  # fmt: skip

    def reasons(self) -> list[tuple[str, int]]:
        """Why weights stay dense, and how many for that reason, the most frequent first."""
        counts: dict[str, int] = {}
        for one in self.stays_dense:
            counts[one.reason] = counts.get(one.reason, 0) + 1
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    def __str__(self) -> str:
        parts = [self.conclusion]
        if self.measured:
            parts.append(table(HEADS, self.rows(), num_left=2))
        if self.whole:
            parts.append(table(WHOLE_HEADS, self.whole_rows(), num_left=0))
        lines = [f"stays dense: {number_of(count, 'weight')}, {reason}" for reason, count in self.reasons()]
        lines += [f"cannot be used here: {name}, {why}" for name, why in self.failed.items()]
        return "\n\n".join([*parts, "\n".join(lines)])

    def whole_rows(self) -> list[list[str]]:
        """Of the table of the whole model."""
        return [
            [
                str(one.tokens), f"{one.tokens / one.dense:,.0f}", f"{one.tokens / one.sparse:,.0f}", f"{one.ratio:.2f}",
                f"{100 * one.error:.2g}",
            ]
            for one in self.whole
        ]  # fmt: skip


HEADS: Sequence[str] = ("layers of out x in", "kernel", "tokens", "dense us", "2:4 us", "ratio", "")
WHOLE_HEADS: Sequence[str] = ("tokens", "dense tokens/s", "2:4 tokens/s", "ratio", "off by %")
