"""SparseGPT: choose and update at once, column by column, with the products of all pairs of input channels.

Frantar & Alistarh 2023 (arXiv 2301.00774). With H the Gram of the inputs and U the upper factor of its inverse,
H^-1 = U^T U, a pruned weight w of column j leaves the error e = w / U_jj, and the columns to the right take it over:
W_k <- W_k - e U_jk. Weights compete by (w / U_jj)^2.

    columns      | block of 128         | rest                  |
    each block:  | choose the mask, 16 columns at a time ->     |   rank-1 updates within 16 columns,
                 | ################     |                       |   one product for the rest of the block,
                 |                      | one product at last   |   one product for the rest of the matrix

Deviations from the authors' own code, which do not change the algorithm: U comes from one Cholesky factorisation and one
triangular inverse, where theirs factorises, inverts and factorises again; layers that share their inputs share U; the
matrix is worked on as [in, out], so that a column is one stretch of memory; exactly the asked number of weights is
pruned, where a threshold takes one more from every block, or all of them on ties; U is computed in float64, because in float32
the choice of weights hangs on the order in which H was added up; more damping where H cannot be factorised.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from statprune.methods.bounds import Between, Count, check
from statprune.methods.inverse import inverse_factor
from statprune.methods.patterns import Pattern
from statprune.methods.precision import full_precision
from statprune.methods.pruner import PrunedWeight
from statprune.methods.rows import Rows, of_rows
from statprune.methods.statistics import InputMoments, Statistic

NARROW = 16
"""Columns between two matrix products within a block. Rank-1 updates of more columns would move more memory than they must."""


@dataclass(frozen=True)
class SparseGPT:
    """Chooses and updates at once, by the products of all pairs of input channels (Frantar & Alistarh 2023)."""

    pattern: Pattern
    """Unstructured: weights compete within a block of columns, with all rows (`rank_over="layer"`, the authors' choice) or
    by row. N:M as everywhere."""

    block_size: Annotated[int, Count(1, 65_536)] = 128
    """Columns whose unstructured mask is chosen together, before any of them is updated."""

    damping: Annotated[float, Between(1e-30, 100)] = 0.01
    """Added to the diagonal of H, as a fraction of its mean; without it H may have no inverse."""

    def __post_init__(self) -> None:
        check("sparsegpt", SparseGPT, **vars(self))

    @property
    def needs(self) -> Statistic:
        """The Gram."""
        return Statistic.GRAM

    def fits(self, in_features: int) -> bool:
        """Whether the pattern fits rows of this width."""
        return self.pattern.fits(in_features)

    def of_rows(self, rows: Rows) -> "SparseGPT | None":
        """The same for a stretch of rows; None where all rows of a block of columns compete."""
        pattern = of_rows(self.pattern, rows)
        return None if pattern is None else replace(self, pattern=pattern)

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune and update [..., out, in]; the arithmetic is float32 and the result has the weight's dtype.

        Raises:
            ValueError: the statistics have no Gram, or it cannot be factorised.
        """
        if moments is None or moments.gram is None:
            raise ValueError("SparseGPT(weight, moments): expected moments with a Gram, InputMoments.zeros(..., gram=True).")
        with full_precision(weight.device.type):
            return self._prune(weight, moments, moments.gram)

    def _prune(self, weight: Tensor, moments: InputMoments, gram: Tensor) -> PrunedWeight:
        factor_II = moments.derive(("inverse factor", self.damping), lambda: inverse_factor(gram, self.damping, moments.team))
        # A channel that is always 0 carries nothing: its weights go first, and those that must stay are 0.
        is_dead_I = gram.diagonal(dim1=-2, dim2=-1) == 0
        weight_IO = weight.float().mT.contiguous().masked_fill(is_dead_I[..., None], 0.0)
        keep_IO = torch.empty_like(weight_IO, dtype=torch.bool)
        for start, end in _ranges(weight_IO.shape[-2], _at_most(self.block_size, self.pattern)):
            block = (weight_IO[..., start:end, :], keep_IO[..., start:end, :], factor_II[..., start:end, start:end])
            errors_IO = _prune_block(*block, self.pattern, start)
            weight_IO[..., end:, :] -= factor_II[..., start:end, end:].mT @ errors_IO
        return PrunedWeight(weight_IO.mT.to(weight.dtype).masked_fill(~keep_IO.mT, 0.0), keep_IO.mT)


def _prune_block(weight_IO: Tensor, keep_IO: Tensor, factor_II: Tensor, pattern: Pattern, start: int) -> Tensor:
    """Prune a block of columns in place and write its mask; returns the errors [..., in, out] for the columns behind it."""
    num_columns = weight_IO.shape[-2]
    chosen_together = pattern.group_size or num_columns
    diagonal_I = factor_II.diagonal(dim1=-2, dim2=-1)
    errors_IO, scale_IO = torch.empty_like(weight_IO), torch.empty_like(weight_IO)
    for low, high in _ranges(num_columns, _at_most(NARROW, pattern)):
        for column in range(low, high):
            if column % chosen_together == 0:
                chosen = slice(column, column + chosen_together)
                score_IO = (weight_IO[..., chosen, :] / diagonal_I[..., chosen, None]).square_()
                keep_IO[..., chosen, :] = pattern.slice(score_IO.mT, start + column).mT
                # What turns a column into its errors: 1 / U_jj where a weight goes, 0 where it stays.
                torch.div(~keep_IO[..., chosen, :], diagonal_I[..., chosen, None], out=scale_IO[..., chosen, :])
            error_O, later = errors_IO[..., column, :], slice(column + 1, high)
            torch.mul(weight_IO[..., column, :], scale_IO[..., column, :], out=error_O)
            weight_IO[..., later, :].addcmul_(factor_II[..., column, later, None], error_O[..., None, :], value=-1)
        weight_IO[..., high:, :] -= factor_II[..., low:high, high:].mT @ errors_IO[..., low:high, :]
    weight_IO.masked_fill_(~keep_IO, 0.0)
    return errors_IO


def _at_most(num_columns: int, pattern: Pattern) -> int:
    """The largest number of columns up to this one that holds whole groups of the pattern; one group at least."""
    size = pattern.group_size
    return num_columns if size is None else num_columns - num_columns % size or size


def _ranges(end: int, width: int) -> Iterator[tuple[int, int]]:
    """(0, width), (width, 2 width) ... up to the end."""
    for start in range(0, end, width):
        yield start, min(start + width, end)
