"""WeightPruner: one weight and the moments of its inputs in, one pruned weight out.

This is the wide seam. Most methods are a criterion, a pattern and a compensation in a row (`compose`); a method that
chooses and updates at once (`sparsegpt`), or step by step (`gradual`), implements the protocol itself, and a compensation may
follow it as well.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from statprune.methods.blockwise import correct_by_blocks, is_blockwise, mask_by_blocks
from statprune.methods.finite import check_scores
from statprune.methods.patterns import Pattern
from statprune.methods.precision import full_precision, product_dtype
from statprune.methods.rows import Rows, of_rows
from statprune.methods.spread import Columns, columns_of, row_blocks
from statprune.methods.statistics import InputMoments, Statistic


@dataclass(frozen=True)
class PrunedWeight:
    """What pruning one weight gave."""

    weight: Tensor
    """[..., out, in], the original weight's dtype; exactly 0 where `keep` is False."""

    keep: Tensor
    """[..., out, in], bool: True = kept."""


class WeightPruner(Protocol):
    """Chooses which weights stay and what they become.

    One whose rows do not need each other may have `of_rows(rows) -> WeightPruner | None` besides (see `rows`).
    """

    @property
    def needs(self) -> Statistic:
        """What it must know about the inputs; the walk collects no more than that."""

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune [..., out, in]; `moments` is None where `needs` is none. The weight itself is not changed."""

    def fits(self, in_features: int) -> bool:
        """Whether rows of this width can be pruned."""


@dataclass(frozen=True)
class MaskPruner:
    """A criterion and a pattern: what stays is as it was."""

    criterion: Callable[..., Tensor]
    pattern: Pattern

    @property
    def needs(self) -> Statistic:
        """What the criterion needs."""
        return needs_of(self.criterion)

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune [..., out, in].

        Raises:
            ValueError: the criterion scores a weight with NaN or infinity, as with settings that float32 cannot hold.
        """
        return self.knowing(lambda: columns_of(weight), weight, moments)

    def knowing(self, columns: Columns, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """The same for those who may ask for the weight's columns as well."""
        if (done := mask_by_blocks(weight, columns, moments, self.criterion, self.pattern)) is not None:
            return PrunedWeight(*done)
        keep = self.pattern(check_scores(self.criterion(weight, moments)))
        return PrunedWeight(weight.masked_fill(~keep, 0.0), keep)

    def fits(self, in_features: int) -> bool:
        """Whether the pattern fits rows of this width."""
        return self.pattern.fits(in_features)

    def of_rows(self, rows: Rows) -> "MaskPruner | None":
        """The same for a stretch of rows; None where the criterion or the pattern compares rows."""
        criterion, pattern = of_rows(self.criterion, rows), of_rows(self.pattern, rows)
        return None if criterion is None or pattern is None else MaskPruner(criterion, pattern)


@dataclass(frozen=True)
class CompensatedPruner:
    """Any pruner, and a compensation of what it left, against the original weight."""

    pruner: WeightPruner
    compensation: Callable[..., Tensor]

    @property
    def needs(self) -> Statistic:
        """What the pruner and the compensation need."""
        return self.pruner.needs | needs_of(self.compensation)

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune [..., out, in]; the arithmetic is float32 and the result has the weight's dtype."""
        if isinstance(self.pruner, MaskPruner) and is_blockwise(self.compensation):
            # A mask in a narrow dtype rounds nothing, and what it left is nobody else's.
            columns = functools.cache(lambda: columns_of(weight))
            pruned = self.pruner.knowing(columns, weight, moments)
            correct_by_blocks(weight, columns, pruned.weight, pruned.keep, moments, self.compensation)
            return pruned
        original = weight.float()
        pruned = self.pruner(original, moments)
        corrected = self.compensation(original, pruned.weight, pruned.keep, moments)
        # The mask again, after the cast: what the file promises as zeros are zeros whatever the compensation did.
        # Not in place: a compensation that hands back `original` hands back the caller's own weight.
        return PrunedWeight(corrected.to(weight.dtype).masked_fill(~pruned.keep, 0.0), pruned.keep)

    def fits(self, in_features: int) -> bool:
        """Whether rows of this width can be pruned."""
        return self.pruner.fits(in_features)

    def of_rows(self, rows: Rows) -> "CompensatedPruner | None":
        """The same for a stretch of rows; None where a row needs the others."""
        pruner, compensation = of_rows(self.pruner, rows), of_rows(self.compensation, rows)
        return None if pruner is None or compensation is None else CompensatedPruner(pruner, compensation)


def compose(criterion: Callable[..., Tensor], pattern: Pattern, compensation: Callable[..., Tensor]) -> CompensatedPruner:
    """A WeightPruner from a criterion, a pattern and a compensation, in this order."""
    return CompensatedPruner(MaskPruner(criterion, pattern), compensation)


def is_by_blocks(pruner: WeightPruner) -> bool:
    """Whether it goes through a weight by blocks of rows, and takes no more memory than what it gives."""
    if isinstance(pruner, CompensatedPruner) and isinstance(pruner.pruner, MaskPruner):
        return is_blockwise(pruner.compensation) and is_by_blocks(pruner.pruner)
    if not isinstance(pruner, MaskPruner) or not is_blockwise(pruner.criterion):
        return False
    return of_rows(pruner.pattern, Rows(0, 1, (1, 1))) is not None


def needs_of(function: Callable[..., Any]) -> Statistic:
    """What a criterion or a compensation declares to need; the moments where it declares nothing."""
    # A functools.partial, which is how a recipe fixes settings, does not show its function's attributes.
    declared: Statistic = getattr(getattr(function, "func", function), "needs", Statistic.MOMENTS)
    return declared


def error_energy(weight: Tensor, pruned: PrunedWeight, moments: InputMoments) -> float:
    """The energy of what pruning changes in a layer's output, summed over tokens and outputs.

    With a Gram it is exact. Without one channels count as uncorrelated, and only the weights that went are counted: what a
    compensation does with the mean of a channel is not to be seen in a diagonal.

    Args:
        weight: [out, in], dense.
        pruned: the same, pruned.
        moments: of the inputs.
    """
    if moments.gram is not None:
        change = weight.float() - pruned.weight.float()
        return float(((change @ moments.gram) * change).sum(dtype=torch.float64))
    gone = weight.float().masked_fill(pruned.keep, 0.0)
    return float((gone.square().sum(dim=0, dtype=torch.float64) * moments.sum_sq).sum())


def output_energies(weight: Tensor, pruned: Tensor, rows: Tensor) -> Tensor:
    """The energy of what pruning changes in a layer's output, and of the dense output, summed over some tokens and all outputs.

    Args:
        weight: [out, in], dense, without its bias, which pruning does not change.
        pruned: [out, in].
        rows: [tokens, in], inputs of the layer, any float dtype.

    Returns:
        [2], float64: the sums of ((pruned - weight) x)**2 and of (weight x)**2.
    """
    # Narrow ones will do, where they are fast: what is rounded is small beside what is summed up.
    dtype = product_dtype(weight)
    rows_TI = rows.to(dtype)
    energies = torch.zeros(2, dtype=torch.float64, device=weight.device)
    with full_precision(rows.device.type):
        for block in row_blocks(weight):
            dense_OI = weight[block].to(dtype)
            for index, matrix_OI in enumerate((pruned[block].to(dtype) - dense_OI, dense_OI)):
                energies[index] += torch.linalg.vector_norm(rows_TI @ matrix_OI.t(), dtype=torch.float64).square()
    return energies
