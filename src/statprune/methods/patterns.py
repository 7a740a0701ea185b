"""Patterns: which weights stay? A pattern turns scores into a boolean keep mask (True = kept).

It keeps *exactly* the number it promises, ties or not. A threshold (`score <= t`) does not: with all weights equal
it prunes everything, which is how several published implementations behave.

    2:4 on one row        | 9 1 3 4 | 2 2 2 2 |     scores
    NM(keep=2, of=4)      | T . . T | T T . . |     two stay in each four consecutive inputs
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from statprune.methods.bounds import Between, Count, check
from statprune.methods.counting import most_in_group, zeros_by_row
from statprune.methods.rows import Rows
from statprune.methods.select import keep_highest, keep_highest_by_sorting
from statprune.methods.turns import SomeRows, lose


class Pattern(Protocol):
    """Turns scores [..., out, in] into a keep mask of the same shape, True = kept.

    One in which rows do not compete may have `of_rows(rows) -> Pattern | None` besides (see `rows`).
    """

    @property
    def group_size(self) -> int | None:
        """Consecutive inputs whose mask hangs together, such as the 4 of 2:4; None where columns may be cut anywhere."""

    def __call__(self, score: Tensor) -> Tensor:
        """The keep mask."""

    def slice(self, score: Tensor, start: int) -> Tensor:
        """The keep mask of some columns [..., out, width] chosen on their own, `start` being the first one's number.

        Chosen slice after slice from column 0 on, the whole matrix has the pattern.
        """

    def partly(self, score: Tensor, share: float) -> Tensor:
        """The keep mask on the way to the pattern: a share in [0, 1] of the weights to prune is gone, the lowest scores."""

    def pruned_of(self, rows: int, columns: int) -> int:
        """How many weights of a matrix [rows, columns] go."""

    def fits(self, in_features: int) -> bool:
        """Whether rows of this width can have the pattern."""

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight [..., out, in] has at least the zeros that the pattern asks for, in every group."""


class ModelPattern(Pattern, Protocol):
    """A pattern for all layers of a model, as a recipe has it."""

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that it prunes."""

    @property
    def is_unstructured(self) -> bool:
        """Whether zeros may stand anywhere, so that layers may differ in sparsity."""

    def counted(self, num_pruned: int, in_features: int) -> "Counted":
        """The same with an exact number of weights, for one matrix of this width.

        Raises:
            ValueError: the pattern leaves no choice of the number.
        """

    def milder(self) -> "tuple[ModelPattern, ...]":
        """Patterns of other kinds of groups that cost a layer less, the mildest first; they prune as many weights, or fewer."""


@dataclass(frozen=True)
class Unstructured:
    """Prune a fraction of the weights, wherever they stand: as `Counted`, once the matrix and with it the number is known."""

    sparsity: Annotated[float, Between(0, 1, without=(1,))]
    """Fraction of the weights to prune. A matrix loses this share of its weights, rounded down once. 0 prunes nothing, for the
    left end of a curve."""

    rank_over: Literal["row", "layer"] = "row"
    """Weights compete within their output row (Wanda's choice), where rows differ by one at most and each keeps a weight, or
    within the whole layer."""

    def __post_init__(self) -> None:
        check("Unstructured", Unstructured, sparsity=self.sparsity)
        if self.rank_over not in ("row", "layer"):
            raise ValueError(f"Unstructured(rank_over={self.rank_over!r}): expected 'row' or 'layer'.")

    @property
    def group_size(self) -> None:
        """Columns may be cut anywhere."""

    @property
    def is_unstructured(self) -> bool:
        """Zeros may stand anywhere."""
        return True

    def counted(self, num_pruned: int, in_features: int) -> "Counted":
        """The same with an exact number of weights, for one matrix."""
        return Counted(num_pruned, in_features, self.rank_over)

    def milder(self) -> "tuple[ModelPattern, ...]":
        """None: `counted` has any number of weights."""
        return ()

    def __call__(self, score: Tensor) -> Tensor:
        """[..., out, in] scores to a keep mask with exactly `pruned_of(out, in)` False in each matrix."""
        return self._for(score)(score)

    def partly(self, score: Tensor, share: float) -> Tensor:
        """[..., out, in] scores to a keep mask with `floor(share * pruned_of(out, in))` False in each matrix."""
        return self._for(score).partly(score, share)

    def slice(self, score: Tensor, start: int) -> Tensor:
        """[..., out, width] scores to a keep mask; weights compete within the slice, by row or all together."""
        rows, width = score.shape[-2:]
        # Counted from column 0, so that what one slice rounds off the next makes up for.
        return lose(score, self.pruned_before(rows, start), self.pruned_before(rows, start + width), self.rank_over)

    def of_rows(self, rows: Rows) -> SomeRows | None:
        """What it takes of these rows; None where all weights of the layer compete."""
        return SomeRows(self, rows) if self.rank_over == "row" else None

    def pruned_before(self, rows: int, column: int) -> int:
        """As many as a matrix of these columns would lose."""
        return self.pruned_of(rows, column)

    def pruned_of(self, rows: int, columns: int) -> int:
        """The share of the matrix, rounded down, but for one weight that stays in each row, or of all."""
        num_weights, num_staying = rows * columns, rows if self.rank_over == "row" else 1
        # 0.29 * 100 is 28.999999999999996 in floating point; nobody who asks for 29 % means 28.
        return max(0, min(math.floor(self.sparsity * num_weights + 1e-6), num_weights - num_staying))

    def fits(self, in_features: int) -> bool:
        """Any width will do."""
        return True

    def holds(self, weight: Tensor) -> bool:
        """Whether every row, or the whole matrix, has at least the zeros asked for."""
        return self._for(weight).holds(weight)

    def _for(self, matrix: Tensor) -> "Counted":
        return self.counted(self.pruned_of(*matrix.shape[-2:]), matrix.shape[-1])

    def __str__(self) -> str:
        return f"{100 * self.sparsity:.6g}%"


@dataclass(frozen=True)
class Counted:
    """Prune an exact number of one matrix's weights: what an allocation gives a layer in place of `Unstructured`.

    By row, the k-th weight that goes is row k's, round and round: rows differ by one at most, and the first ones lose it. Not
    those in which it costs least: scores of different rows need not be comparable, and a mask that is chosen slice after slice,
    or reached in steps, would have to know which ones these were. And whoever checks zeros knows how many each row must have.
    """

    num_pruned: int
    """How many weights of the matrix go; at least one stays in each row."""

    in_features: int
    """The matrix's width, which tells a slice of columns how much of the number is its own."""

    rank_over: Literal["row", "layer"] = "row"
    """As for `Unstructured`."""

    @property
    def group_size(self) -> None:
        """Columns may be cut anywhere."""

    def __call__(self, score: Tensor) -> Tensor:
        """[..., out, in] scores to a keep mask with exactly `num_pruned` False in each matrix."""
        return lose(score, 0, self.num_pruned, self.rank_over)

    def partly(self, score: Tensor, share: float) -> Tensor:
        """[..., out, in] scores to a keep mask with `floor(share * num_pruned)` False."""
        return lose(score, 0, math.floor(share * self.num_pruned), self.rank_over)

    def slice(self, score: Tensor, start: int) -> Tensor:
        """[..., out, width] scores to a keep mask; weights compete within the slice, by row or all together."""
        before, after = (self.pruned_before(score.shape[-2], column) for column in (start, start + score.shape[-1]))
        return lose(score, before, after, self.rank_over)

    def of_rows(self, rows: Rows) -> SomeRows | None:
        """What it takes of these rows; None where all weights of the layer compete."""
        return SomeRows(self, rows) if self.rank_over == "row" else None

    def pruned_before(self, rows: int, column: int) -> int:
        """The columns' share of the number, rounded down."""
        return self.num_pruned * column // self.in_features

    def pruned_of(self, rows: int, columns: int) -> int:
        """The number that it was made with."""
        return self.num_pruned

    def fits(self, in_features: int) -> bool:
        """Whether it was made for this width."""
        return in_features == self.in_features

    def holds(self, weight: Tensor) -> bool:
        """Whether every row, or the whole matrix, has at least the zeros asked for."""
        num_zeros_O = zeros_by_row(weight)
        if self.rank_over == "layer":
            return bool((num_zeros_O.sum(dim=-1) >= self.num_pruned).all())
        rounds, turn = divmod(self.num_pruned, weight.shape[-2])
        return bool((num_zeros_O[..., :turn] > rounds).all() and (num_zeros_O >= rounds).all())

    def __str__(self) -> str:
        return f"{self.num_pruned} weights, by {self.rank_over}"


_LONG = 8
"""Inputs in a group from which on twice as many would not make it much milder."""

_LONGEST = 1024


@dataclass(frozen=True)
class NM:
    """Keep `keep` of every `of` consecutive inputs: `NM(keep=2, of=4)` is 2:4.

    Both numbers have names because projects disagree: in some, the N of N:M is what stays, in others what goes.
    """

    keep: Annotated[int, Count(1, _LONGEST)]
    """How many weights stay in each group; with all of them, as in 4:4, nothing is pruned."""

    of: Annotated[int, Count(1, _LONGEST)]
    """How many consecutive inputs form a group."""

    def __post_init__(self) -> None:
        check("NM", NM, keep=self.keep, of=self.of)
        if not self.keep <= self.of:
            raise ValueError(f"NM(keep={self.keep}, of={self.of}): expected keep <= of, such as NM(keep=2, of=4).")

    @property
    def sparsity(self) -> float:
        """`1 - keep / of`."""
        return 1 - self.keep / self.of

    @property
    def group_size(self) -> int:
        """`of`."""
        return self.of

    @property
    def is_unstructured(self) -> bool:
        """Every group has its zeros."""
        return False

    def counted(self, num_pruned: int, in_features: int) -> Counted:
        """There is no choice of the number."""
        raise ValueError(f"{self} prunes the same fraction of every layer: expected an unstructured pattern, such as 50%.")

    def milder(self) -> "tuple[NM, ...]":
        """Half of its zeros, and where the groups are short as many zeros in groups of twice the size.

        6:8 and 4:8 beside 2:4; 6:8 beside 4:8. Halves are taken in groups of at least 8, or where they would not be whole in
        groups of twice the size.
        """
        times = 1 if self.of >= _LONG and (self.of - self.keep) % 2 == 0 else 2
        if self.keep == self.of or times * self.of > _LONGEST:
            return ()
        keep, of = times * self.keep, times * self.of
        half = NM(keep + (of - keep) // 2, of)
        return (half,) if self.of >= _LONG else (half, NM(keep, of))

    def __call__(self, score: Tensor) -> Tensor:
        """[..., out, in] scores to a keep mask with exactly `keep` True in each `of` consecutive inputs.

        Raises:
            ValueError: `of` does not divide the number of inputs.
        """
        if not self.fits(score.shape[-1]):
            raise ValueError(f"{self} on rows of {score.shape[-1]} inputs: expected a width that {self.of} divides.")
        return keep_highest(score.unflatten(-1, (-1, self.of)), self.keep).flatten(-2)

    def partly(self, score: Tensor, share: float) -> Tensor:
        """[..., out, in] scores to a keep mask with a share of what the pattern prunes False in each row: its lowest scores.

        The groups do not go in step: one may be whole where another has its pattern already.
        """
        keep = self(score)
        if share == 1:
            return keep
        num_pruned = math.floor(share * (score.shape[-1] // self.of) * (self.of - self.keep))
        return keep_highest(torch.where(keep, math.inf, score), score.shape[-1] - num_pruned)

    def slice(self, score: Tensor, start: int) -> Tensor:
        """As the whole, but for which of equal scores stay; `start` and the width are multiples of `of`."""
        # For a slice of one group, as SparseGPT has them, one call counts for more than what it does.
        return keep_highest_by_sorting(score.unflatten(-1, (-1, self.of)), self.keep).flatten(-2)

    def of_rows(self, rows: Rows) -> "NM":
        """The same: each group stands for itself."""
        return self

    def pruned_of(self, rows: int, columns: int) -> int:
        """As many of each group."""
        return rows * (columns // self.of) * (self.of - self.keep)

    def fits(self, in_features: int) -> bool:
        """Whether `of` divides the width."""
        return in_features % self.of == 0

    def holds(self, weight: Tensor) -> bool:
        """Whether each group has at most `keep` non-zeros; a kept weight may be zero by itself."""
        if not self.fits(weight.shape[-1]):
            return False
        return most_in_group(weight, self.of) <= self.keep

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


PATTERNS: dict[str, Callable[..., ModelPattern]] = {"unstructured": Unstructured, "nm": NM}
"""Patterns by the name a recipe uses."""

SITE_PATTERNS = {"counted": Counted}
"""Patterns of single layers, which an allocation makes, by the name that `pruning.json` uses."""

SHORTHAND_HELP = "'50%' for half of the weights anywhere, '2:4' for two of every four"


def parse_shorthand(text: str) -> ModelPattern | None:
    """`"50%"` or `"2:4"` as a pattern; None where the text is neither."""
    if found := re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", text):
        return Unstructured(float(Decimal(found[1]) / 100))  # in decimals, so that every fraction has a percentage
    if found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return NM(keep=int(found[1]), of=int(found[2]))
    return None
