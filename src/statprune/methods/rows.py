"""Rows of a weight that are pruned apart from the others, so that several processes can prune one weight.

A method whose rows do not look at each other, once there are statistics, prunes a stretch of them as it prunes the whole. What
says so is a method `of_rows` of a pruner or a pattern, and `rows_alone` above a function or a class of settings. Whatever says
nothing is taken to need the whole matrix.

Those who prune the stretches are a `Team`: what is the same for all of them, such as the inverse of a Gram, they compute
together, and what has to be summed up over all rows they sum up.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Declared = TypeVar("Declared", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rows:
    """A stretch of a matrix's rows."""

    first: int
    """Number of the stretch's first row."""

    end: int
    """Number of the first row behind it."""

    of: tuple[int, int]
    """(out, in) of the matrix."""


@dataclass(frozen=True)
class Piece:
    """A part of a computation that one of a team does for all."""

    compute: Callable[[], Tensor]
    cost: int
    """How much work it is beside the others."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Team(Protocol):
    """Those who prune stretches of one weight. Each calls the same methods at the same places."""

    def total(self, sums: Tensor) -> Tensor:
        """What is a sum over one's own rows in, the sum over all rows of the weight out; the same bits for all."""

    def gather(self, pieces: Sequence[Piece]) -> Iterable[Tensor]:
        """Every piece, of which each computes a few; all of them have one dtype."""


class Alone:
    """Who prunes whole weights."""

    def total(self, sums: Tensor) -> Tensor:
        """There are no other rows."""
        return sums

    def gather(self, pieces: Sequence[Piece]) -> Iterable[Tensor]:
        """All of them, each when it is asked for."""
        return (piece.compute() for piece in pieces)


ALONE = Alone()


def rows_alone(unless: str | None = None) -> Callable[[Declared], Declared]:
    """Declare that a criterion or a compensation does with a row what it would without the others.

    Args:
        unless: a setting with which it does not, where it is true.
    """

    def declare(declared: Declared) -> Declared:
        declared.rows_alone_unless = unless  # type: ignore[attr-defined]
        return declared

    return declare


def of_rows(part: Any, rows: Rows) -> Any:
    """A pruner, a pattern, a criterion or a compensation for a stretch of rows; None where a row needs the others."""
    if hasattr(part, "of_rows"):
        return part.of_rows(rows)
    declared = getattr(part, "func", part)  # of a functools.partial, which is how a recipe fixes settings
    if not hasattr(declared, "rows_alone_unless"):
        return None
    unless = declared.rows_alone_unless
    if unless is None:
        return part
    usual = inspect.signature(declared).parameters[unless].default
    return None if getattr(part, "keywords", {}).get(unless, usual) else part
