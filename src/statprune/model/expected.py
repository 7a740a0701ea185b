"""What a run is expected to take of memory, and how that is told; `accounting` computes it."""

from dataclasses import dataclass
from typing import Any

from statprune.model.offload import Place

_WAIT: dict[Place, str] = {"device": "in memory", "host": "in host memory", "disk": "in files beside the output"}


@dataclass(frozen=True)
class Moment:
    """What is in memory at one point of a run, in bytes."""

    where: str
    """The group whose statistics are being completed, or the weight that is being pruned."""

    weights: int = 0
    values: int = 0
    running: int = 0
    statistics: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.values + self.running + self.statistics + self.workspace


@dataclass(frozen=True)
class Expected:
    """What a run will take, in bytes."""

    base: int
    """What the process has before it."""

    peak: Moment
    """The highest one."""

    widest: Moment
    """Where most of the batches' values wait, wherever they do."""

    narrowest: int
    """Bytes of values at the cut where fewest wait: the residual stream, and what a model carries beside it."""

    place: Place = "device"
    """Where values wait; elsewhere than on the device they are not among `peak.values`."""

    recomputing: float = 0.0
    """What it would take to keep only the narrowest cut's values and to compute those of the others again: multiplications with
    weights, as a share of those that the run makes."""

    processes: int = 1
    """How many take as much each of the same memory."""

    @property
    def total(self) -> int:
        """The highest that memory is expected to go."""
        return self.base + self.peak.total

    @property
    def machine(self) -> int:
        """Of all processes together."""
        return self.processes * self.total

    def lines(self) -> list[str]:
        """For the plan."""
        parts = {
            "before the run": self.base,
            "weights of two segments": self.peak.weights,
            "values at a cut": self.peak.values,
            "one batch": self.peak.running,
            "statistics": self.peak.statistics,
            "pruning one weight": self.peak.workspace,
        }
        told = [f"{what} {gigabytes(size)}" for what, size in parts.items() if size]
        lines = [f"Memory to expect: {gigabytes(self.total)}, at {self.peak.where}: {', '.join(told)}."]
        if self.processes > 1:
            lines.append(f"Each of {self.processes} processes of this machine takes that: {gigabytes(self.machine)} in all.")
        if self.widest.values:
            times = f", {self.widest.values / self.narrowest:.1f} times the narrowest cut's" if self.narrowest else ""
            lines.append(
                f"Between two layers the values of the batches wait {_WAIT[self.place]}: at most "
                f"{gigabytes(self.widest.values)}, at {self.widest.where}{times}."
            )
        if self.recomputing:
            lines[-1] += (
                " To keep the narrowest cut's alone and compute the others again would take "
                f"{100 * self.recomputing:.0f} % more multiplications with weights."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As data."""
        peak = {key: value for key, value in vars(self.peak).items() if key != "where"}
        return {
            "total": self.total, "at": self.peak.where, "base": self.base, **peak,
            "widest": self.widest.values, "widest_at": self.widest.where, "narrowest": self.narrowest,
            "place": self.place, "recomputing": self.recomputing, "processes": self.processes, "machine": self.machine,
        }  # fmt: skip


def gigabytes(size: int) -> str:
    """A number of bytes, for people."""
    if size < 5e6:
        return f"{size / 1e6:.3f} MB"
    return f"{size / 1e9:.2f} GB" if size < 10e9 else f"{size / 1e9:,.1f} GB"
