"""Pruning a weight by blocks of its rows, which stay in a core's cache from the score to the weight that is written.

    criterion      |W| times a factor of each column       of the columns' spread, and the moments     `by_columns`
    pattern        rows that do not compete                                                            `of_rows`
    compensation   a step for any rows                     of the columns' spreads before and after    `by_columns`

A criterion or a compensation that is made so is the same function of a whole weight and of its blocks: what it has to know of
all rows is the spread of the columns, which is always added up by blocks. What is not made so sees the whole weight at once.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from statprune.methods.finite import check_scores
from statprune.methods.rows import Rows, of_rows
from statprune.methods.spread import Columns, columns_of, row_blocks
from statprune.methods.statistics import InputMoments

Declared = TypeVar("Declared", bound=Callable[..., Any])

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(original, pruned, keep) of any rows [..., rows, in] to what they become; all float32, the mask 1 and 0."""


def by_columns(prepare: Callable[..., Any]) -> Callable[[Declared], Declared]:
    """Declare what a criterion or a compensation has to know of all rows at once.

    Args:
        prepare: for a criterion `(columns, moments, *, settings) -> factor` of |W|, a number or [..., 1, in]; for a
            compensation `(columns, columns_pruned, moments, *, settings) -> Step`.
    """

    def declare(declared: Declared) -> Declared:
        declared.by_columns = prepare  # type: ignore[attr-defined]
        return declared

    return declare


def is_blockwise(part: Any) -> bool:
    """Whether a criterion or a compensation is declared so."""
    return hasattr(_function(part), "by_columns")


def mask_by_blocks(
    weight: Tensor, columns: Columns, moments: InputMoments | None, criterion: Any, pattern: Any
) -> tuple[Tensor, Tensor] | None:
    """A weight [..., out, in] with its mask applied, in its dtype, and the mask; None where rows have to be seen together.

    Raises:
        ValueError: as `check_scores`.
    """
    rows, width = weight.shape[-2:]
    if not is_blockwise(criterion) or of_rows(pattern, Rows(0, rows, (rows, width))) is None:
        return None
    factor = _function(criterion).by_columns(columns, moments, **_settings(criterion))
    keep, pruned = torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight)
    for block in row_blocks(weight):
        part = weight[..., block, :].float()
        score = check_scores(part.abs().mul_(factor))
        kept = of_rows(pattern, Rows(block.start, block.stop, (rows, width)))(score)
        keep[..., block, :] = kept
        # In a few passes that a CPU's vectors take, as `where` is not; the sum makes 0 of -0.
        pruned[..., block, :] = torch.mul(part, kept.float()).add_(0.0)
    return pruned, keep


def correct_by_blocks(
    original: Tensor, columns: Columns, pruned: Tensor, keep: Tensor, moments: InputMoments | None, compensation: Any
) -> None:
    """Apply a compensation that is declared `by_columns`; the result takes the place of `pruned`.

    Args:
        original: [..., out, in], dense, any float dtype.
        columns: of the same.
        pruned: the same with its mask applied, in the dtype that the result shall have; it is overwritten.
        keep: the mask.
        moments: of the inputs.
        compensation: a function, or a partial of one.
    """
    step = _function(compensation).by_columns(columns, lambda: columns_of(pruned), moments, **_settings(compensation))
    for block in row_blocks(original):
        before, after = (matrix[..., block, :].float() for matrix in (original, pruned))
        pruned[..., block, :] = step(before, after, keep[..., block, :].float())


def _function(part: Any) -> Any:
    """What a partial is of, which is how a recipe fixes settings."""
    return getattr(part, "func", part)


def _settings(part: Any) -> dict[str, Any]:
    """All settings: those that a partial fixes, and the defaults of the others."""
    parameters = inspect.signature(_function(part)).parameters.values()
    usual = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    return usual | getattr(part, "keywords", {})
