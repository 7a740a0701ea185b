"""Turns: how rows share a number of weights that go, of a whole matrix or of a stretch of it."""

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from statprune.methods.rows import Rows
from statprune.methods.select import keep_highest


class ByTurns(Protocol):
    """A pattern that takes an exact number of a matrix's weights, from one row after the other."""

    def pruned_of(self, rows: int, columns: int) -> int:
        """How many weights of a matrix [rows, columns] go."""

    def pruned_before(self, rows: int, column: int) -> int:
        """How many of them stand before this column."""

    def fits(self, in_features: int) -> bool:
        """Whether rows of this width can have the pattern."""


def lose(score: Tensor, before: int, after: int, rank_over: str, rows: Rows | None = None) -> Tensor:
    """[..., out, width] scores to a keep mask: where `before` weights went in columns further left, and `after` with these.

    With `rows`, both are numbers of the whole matrix, of which the scores are a stretch; `rank_over` is then "row".
    """
    size, width = score.shape[-2:]
    if rank_over == "layer":
        return keep_highest(score.flatten(-2), size * width - (after - before)).view_as(score)
    first, count = (0, size) if rows is None else (rows.first, rows.of[0])
    (rounds, turn), (rounds_after, turn_after) = divmod(before, count), divmod(after, count)
    # A row's turn has come `rounds` times, and once more where the row is before `turn`: three stretches of rows lose alike.
    low, high = sorted((turn, turn_after))
    outer, inner = rounds_after - rounds, rounds_after - rounds + (1 if turn < turn_after else -1)
    edges = [min(max(edge - first, 0), size) for edge in (0, low, high, count)]
    stretches = [
        (end - start, gone) for (start, end), gone in zip(itertools.pairwise(edges), (outer, inner, outer), strict=True)
    ]
    parts = zip(score.split([length for length, _ in stretches], dim=-2), stretches, strict=True)
    return torch.cat([keep_highest(part, width - gone) for part, (length, gone) in parts if length], dim=-2)


@dataclass(frozen=True)
class SomeRows:
    """The pattern of a stretch of rows of a matrix: what the whole matrix's pattern takes there."""

    whole: ByTurns
    rows: Rows

    @property
    def group_size(self) -> None:
        """Columns may be cut anywhere."""

    def __call__(self, score: Tensor) -> Tensor:
        """[..., rows, in] scores to a keep mask."""
        return lose(score, 0, self._total, "row", self.rows)

    def partly(self, score: Tensor, share: float) -> Tensor:
        """[..., rows, in] scores to a keep mask on the way to the pattern."""
        return lose(score, 0, math.floor(share * self._total), "row", self.rows)

    def slice(self, score: Tensor, start: int) -> Tensor:
        """[..., rows, width] scores to a keep mask; weights compete within the slice."""
        before, after = (self.whole.pruned_before(self.rows.of[0], column) for column in (start, start + score.shape[-1]))
        return lose(score, before, after, "row", self.rows)

    def pruned_of(self, rows: int, columns: int) -> int:
        """How many weights of the stretch go."""
        rounds, turn = divmod(self._total, self.rows.of[0])
        return rounds * rows + min(max(turn - self.rows.first, 0), rows)

    def fits(self, in_features: int) -> bool:
        """Whether the whole matrix's pattern fits."""
        return self.whole.fits(in_features)

    def holds(self, weight: Tensor) -> bool:
        """Whether every row has at least the zeros asked for."""
        rounds, turn = divmod(self._total, self.rows.of[0])
        row_O = torch.arange(self.rows.first, self.rows.end, device=weight.device)
        return bool(((weight == 0).sum(dim=-1) >= rounds + (row_O < turn).long()).all())

    @property
    def _total(self) -> int:
        return self.whole.pruned_of(*self.rows.of)
