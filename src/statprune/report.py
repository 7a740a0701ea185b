"""What a run did, as data: the record that goes into `pruning.json`, and a text of it for people."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from statprune.errors import number_of
from statprune.methods.counting import energy_sq, num_zeros
from statprune.methods.experts import LEAST_TOKENS
from statprune.methods.pruner import PrunedWeight
from statprune.model.sites import LeftOut, LinearSite
from statprune.versions import versions


@dataclass(frozen=True)
class SiteReport:
    """What happened to one weight."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    """(out, in), or (experts, out, in)."""
    stored: str
    """`out_in` or `in_out`: which of the two comes first in the parameter, behind a stack's experts."""
    num_pruned: int
    """Weights that the mask took away."""
    num_zeros: int
    """Zeros in the weight now: those, and kept ones that were zero anyway."""
    energy_before: float
    """Sum of squared weights, dense."""
    energy_after: float
    """Sum of squared weights now."""
    pattern: dict[str, Any] | None = None
    """The layer's own pattern, where an allocation gave it one."""
    output_error: float | None = None
    """How far the layer's output is off, relative root mean square: the root of the sum of ((pruned - dense) x)**2 over that of
    (dense x)**2, over a sample of the calibration tokens x that entered it (at most `SAMPLE_SIZE` on each rank). Measured when
    it was pruned: nobody can recompute it from the files. None where no inputs were observed (magnitude), or where the weight
    was trained afterwards."""
    tokens: tuple[int, ...] | None = None
    """Calibration tokens that came to each expert of a stack. One that saw fewer than `LEAST_TOKENS` is pruned by statistics
    that are filled up with average tokens of its layer. None of a single matrix, and where no inputs were observed."""

    @classmethod
    def of(
        cls,
        site: LinearSite,
        dense: Tensor,
        pruned: PrunedWeight,
        pattern: dict[str, Any] | None = None,
        tokens: tuple[int, ...] | None = None,
    ) -> "SiteReport":
        """Count what pruning did to a weight.

        Args:
            site: whose weight it is.
            dense: [..., out, in], before.
            pruned: the same, after.
            pattern: its own, where an allocation gave it one.
            tokens: of each expert of a stack.
        """
        return cls(
            name=site.name,
            parameter=site.parameter,
            shape=site.shape,
            stored=site.layout,
            num_pruned=num_zeros(pruned.keep),
            num_zeros=num_zeros(pruned.weight),
            energy_before=energy_sq(dense),
            energy_after=energy_sq(pruned.weight),
            pattern=pattern,
            tokens=tokens,
        )

    @property
    def num_weights(self) -> int:
        """How many weights there are, in all matrices of a stack."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.num_zeros / self.num_weights


@dataclass(frozen=True)
class FinishedSite:
    """What a run knows of a weight that it has pruned: enough to go on after it without pruning it again."""

    report: SiteReport
    energies: tuple[float, ...] | None
    """Of the output, what pruning changed and the dense one (`output_energies`), of this rank; None without statistics."""

    num_tokens: int
    """That entered the layer."""


class Ledger(Protocol):
    """What a run has finished, kept for another run of the same that goes on after it."""

    def finished(self) -> Mapping[str, FinishedSite]:
        """The weights that an earlier run has pruned and whose values are there, by parameter."""

    def land(self, site: LinearSite) -> None:
        """Have one of them in the place of the dense weight from now on, as `Weights.put` has."""

    def add(self, finished: Sequence[FinishedSite]) -> None:
        """Keep what has been pruned and put."""


@dataclass
class PruningReport:
    """What a run did to a model."""

    recipe: dict[str, Any]
    schedule: str
    """The recipe's; without a graph `block (module hooks)`, or `one-shot (module hooks)` if its blocks cannot
    be run by themselves or the recipe asks for it; `no statistics` where none are needed."""
    sites: list[SiteReport] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    num_batches: int = 0
    num_tokens: int = 0
    """Calibration tokens that the first layer saw; padding does not count."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`trace`, `allocate`, `check`, `walk`, `prune`; before them `tune`, where a search chose the recipe; a command adds
    `compare`, for Wanda's mask, and `save`."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes, by the same names: how high memory has gone by the end of each step (`clock.peak_memory`), whoever used it; of the
    first rank. Empty where the system does not tell."""
    fallback_reason: str | None = None
    """Why module hooks were used instead of the graph."""
    finetuning_steps: int = 0
    """Optimizer steps taken after pruning, with the pruned weights held at zero."""
    chosen_by: dict[str, Any] | None = None
    """Where a search chose the recipe: that search, what was tried, and on what; else None."""
    perplexity: dict[str, Any] | None = None
    """Where it was measured before and after: `dense` and `pruned` (None where that is no number), on so many `windows` of
    `seqlen` tokens of `text` (a list of names); and perhaps `wanda`, what Wanda's mask alone would have left there."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PruningReport":
        """The report that `to_dict` gave this data, with or without what a `pruning.json` adds to it.

        Raises:
            KeyError: the recipe, the schedule or a value of a weight is missing.
        """
        own = {one.name: data[one.name] for one in fields(cls) if one.name in data or one.name in ("recipe", "schedule")}
        own["sites"] = [site_report(site) for site in data["sites"]]
        own["left_out"] = [LeftOut(**_pick(one, LeftOut)) for one in data["left_out"]]
        return cls(**own)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned weights."""
        return sum(site.num_zeros for site in self.sites) / max(1, self.num_weights)

    @property
    def energy_ratio(self) -> float:
        """Sum of squared weights after over before, over all pruned weights."""
        return sum(site.energy_after for site in self.sites) / max(1e-300, sum(site.energy_before for site in self.sites))

    @property
    def output_errors(self) -> list[float]:
        """The output errors of the layers that have one, in execution order."""
        return [site.output_error for site in self.sites if site.output_error is not None]

    @property
    def num_weights(self) -> int:
        """Weights in all sites."""
        return sum(site.num_weights for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sites = [{**asdict(site), "sparsity": site.sparsity} for site in self.sites]
        return {
            **asdict(self),
            "sites": sites,
            "sparsity": self.sparsity,
            "energy_ratio": self.energy_ratio,
            "versions": versions(),
        }

    @property
    def few_tokens(self) -> str:
        """How many experts saw few tokens or none, in words; empty where all saw enough."""
        counts = [count for site in self.sites for count in site.tokens or ()]
        few, none = (sum(count < least for count in counts) for least in (LEAST_TOKENS, 1))
        if not few:
            return ""
        return f"of {len(counts)} expert matrices {few} saw fewer than {LEAST_TOKENS} calibration tokens, {none} saw none"

    def __str__(self) -> str:
        took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        shares = [100 * site.sparsity for site in self.sites if site.pattern]
        by_layer = f"{min(shares):.1f} to {max(shares):.1f} % of a layer, " if shares else ""
        errors = [100 * error for error in self.output_errors]
        few = f"{self.few_tokens}; " if self.few_tokens else ""
        outputs = f"outputs off by {statistics.median(errors):.1f} %, at most {max(errors):.1f} %; " if errors else ""
        return (
            f"{number_of(len(self.sites), 'weight')}, {number_of(self.num_weights, 'parameter')}: "
            f"{100 * self.sparsity:.2f} % are zero now, {by_layer}"
            f"energy {100 * self.energy_ratio:.1f} % of dense; {outputs}schedule {self.schedule}, "
            f"{number_of(self.num_tokens, 'calibration token')}; {few}{took}"
            + (f"; {number_of(self.finetuning_steps, 'step')} of fine-tuning" if self.finetuning_steps else "")
        )


def site_report(data: Mapping[str, Any]) -> SiteReport:
    """The report of a weight that `asdict` gave this data; KeyError where a value is missing."""
    return SiteReport(**_pick(data, SiteReport))


def _pick(data: Mapping[str, Any], kind: type[SiteReport] | type[LeftOut]) -> dict[str, Any]:
    """The values of its fields, of which an older record may lack those with a default; lists, JSON's tuples, as tuples."""
    names = [one.name for one in fields(kind) if one.name in data or one.default is MISSING]
    return {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names}
