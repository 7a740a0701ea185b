"""WeightPruner: one weight and the moments of its inputs in, one pruned weight out.

This is the wide seam. Most methods are a criterion, a pattern and a compensation in a row (`compose`); a method that
chooses and updates at once implements the protocol itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from statprune.patterns import Pattern
from statprune.statistics import InputMoments, Statistic


@dataclass(frozen=True)
class PrunedWeight:
    """What pruning one weight gave."""

    weight: Tensor
    """[..., out, in], the original weight's dtype; exactly 0 where `keep` is False."""

    keep: Tensor
    """[..., out, in], bool: True = kept."""


class WeightPruner(Protocol):
    """Chooses which weights stay and what they become."""

    @property
    def needs(self) -> Statistic:
        """What it must know about the inputs; the walk collects no more than that."""

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune [..., out, in]; `moments` is None where `needs` is none. The weight itself is not changed."""

    def fits(self, in_features: int) -> bool:
        """Whether rows of this width can be pruned."""


@dataclass(frozen=True)
class ComposedPruner:
    """Criterion, pattern, compensation, in this order."""

    criterion: Callable[..., Tensor]
    pattern: Pattern
    compensation: Callable[..., Tensor]
    needs: Statistic

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune [..., out, in]; the arithmetic is float32 and the result has the weight's dtype."""
        original = weight.float()
        keep = self.pattern(self.criterion(original, moments))
        pruned = original.masked_fill(~keep, 0.0)
        corrected = self.compensation(original, pruned, keep, moments)
        # The mask again, after the cast: what the file promises as zeros are zeros whatever the compensation did.
        # Not in place: a compensation that hands back `original` hands back the caller's own weight.
        return PrunedWeight(corrected.to(weight.dtype).masked_fill(~keep, 0.0), keep)

    def fits(self, in_features: int) -> bool:
        """Whether the pattern fits rows of this width."""
        return self.pattern.fits(in_features)


def compose(criterion: Callable[..., Tensor], pattern: Pattern, compensation: Callable[..., Tensor]) -> ComposedPruner:
    """A WeightPruner from its three parts; it needs what its criterion or its compensation needs."""
    # A functools.partial, which is how a recipe fixes settings, does not show its function's attributes.
    functions = [getattr(part, "func", part) for part in (criterion, compensation)]
    declared = [getattr(function, "needs", Statistic.MOMENTS) for function in functions]
    return ComposedPruner(
        criterion, pattern, compensation, Statistic.MOMENTS if Statistic.MOMENTS in declared else Statistic.NONE
    )


def energy_sq(weight: Tensor) -> float:
    """Sum of squared weights, accumulated in float64; the "energy" that reports and checkpoints quote."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64).square())
