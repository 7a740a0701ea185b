"""Cholesky factors and inverses of symmetric matrices, block by block, so that those who prune with them can share the work.

    panel after panel of columns:  update its rows with the panels before it | factorise | solve      the updates are shared
    inverse of the factor:         columns that begin at row k need the factor from row k on alone    blocks are shared
    inverse of the matrix:         the same, solved twice; of symmetric columns the part below

The blocks are the same whoever computes them, so the results are, bit for bit.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from statprune.methods.rows import ALONE, Piece, Team

NARROW, WIDE = 256, 1024
"""Columns of a block on a CPU, and elsewhere, where few large products are faster than many small ones. As many rows are
solved for at a time."""

LONG = 4096
"""Columns of a matrix from which on blocks of its inverse are twice as wide: there are enough of them to share out."""

Solve = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]

STRETCHES = 8
"""That the rows of a panel are updated in."""

LEAST = 1024
"""Rows of a matrix from which on it takes longer to compute than to send around."""


def cholesky_(matrix: Tensor, team: Team = ALONE) -> Tensor | None:
    """The lower factor [..., n, n] of a symmetric matrix, of which the lower half is read; None if not positive definite.

    Args:
        matrix: [..., n, n], float32 or float64. The factor takes its place: there are layers whose Gram fills a gigabyte.
        team: who computes it together.
    """
    size = matrix.shape[-1]
    for start, end in _blocks(matrix):
        pieces = [
            Piece(
                partial(_updated, matrix, rows, slice(start, end)),
                len(rows),
                _shape(matrix, len(rows), end - start),
                matrix.dtype,
            )
            for rows in _stretches(start, size)
        ]
        panel_IP = torch.cat(list((_worth(team, size) if start else ALONE).gather(pieces)), dim=-2)
        corner_PP, info = torch.linalg.cholesky_ex(panel_IP[..., : end - start, :])
        if bool(info.any()):
            return None
        matrix[..., start:end, start:end] = corner_PP
        matrix[..., start:end, end:] = 0
        below_IP = panel_IP[..., end - start :, :]
        matrix[..., end:, start:end] = torch.linalg.solve_triangular(corner_PP.mT, below_IP, upper=True, left=False)
    return matrix


def inverse_diagonal(lower: Tensor, team: Team = ALONE) -> Tensor:
    """The diagonal [..., n] of the inverse of the matrix with this Cholesky factor [..., n, n]."""

    def squares(columns: Callable[[], Tensor]) -> Tensor:
        return columns().square_().sum(dim=-2)

    pieces = [
        Piece(partial(squares, columns), cost, (*lower.shape[:-2], end - start), lower.dtype)
        for start, end, cost, columns in _columns(lower, _of_factor)
    ]
    return torch.cat(list(_worth(team, lower.shape[-1]).gather(pieces)), dim=-1)


def inverse_of_factor(lower: Tensor, team: Team = ALONE) -> Tensor:
    """The inverse of a lower triangle, [..., n, n], computed in its dtype and given as float32."""

    def narrow(columns: Callable[[], Tensor]) -> Tensor:
        return columns().float()

    return _gathered(lower, team, _of_factor, narrow, torch.float32)


def inverse_of_matrix(lower: Tensor, team: Team = ALONE) -> Tensor:
    """The inverse [..., n, n] of the matrix with this Cholesky factor, in its dtype."""

    def as_they_are(columns: Callable[[], Tensor]) -> Tensor:
        return columns()

    whole_II = _gathered(lower, team, _of_matrix, as_they_are, lower.dtype)
    for start, end in _blocks(whole_II):  # what is below the diagonal, above it as well
        corner_PP = whole_II[..., start:end, start:end]
        corner_PP.copy_(corner_PP.tril() + corner_PP.tril(-1).mT)
        whole_II[..., start:end, end:] = whole_II[..., end:, start:end].mT
    return whole_II


def _updated(matrix: Tensor, rows: range, columns: slice) -> Tensor:
    """Rows of a panel, less what the panels before it, which are factors already, have of them."""
    before, stretch = slice(0, columns.start), slice(rows.start, rows.stop)
    return matrix[..., stretch, columns] - matrix[..., stretch, before] @ matrix[..., columns, before].mT


def _of_factor(triangle: Tensor, corners: Sequence[Tensor], right: Tensor) -> Tensor:
    """Solve `triangle @ x = right`, in the memory of `right`, block after block of rows.

    A solver of the whole copies a triangle that is a part of another one; for each block of columns that would be a gigabyte.

    Args:
        triangle: lower, [..., n, n].
        corners: the inverses of the blocks on its diagonal. A product with one is faster than a solver, and as exact: this is
            how an inverse is computed block by block.
        right: [..., n, columns].
    """
    for (start, end), corner_PP in zip(_blocks(triangle), corners, strict=True):
        rows = right[..., start:end, :]
        rows -= triangle[..., start:end, :start] @ right[..., :start, :]
        rows.copy_(corner_PP @ rows)
    return right


def _of_matrix(triangle: Tensor, corners: Sequence[Tensor], right: Tensor) -> Tensor:
    """Solve `triangle @ triangle^T @ x = right`, likewise."""
    right = _of_factor(triangle, corners, right)
    for (start, end), corner_PP in reversed(list(zip(_blocks(triangle), corners, strict=True))):
        rows = right[..., start:end, :]
        rows -= triangle[..., end:, start:end].mT @ right[..., end:, :]
        rows.copy_(corner_PP.mT @ rows)
    return right


def _gathered(
    lower: Tensor,
    team: Team,
    solve: Solve,
    finish: Callable[[Callable[[], Tensor]], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """[..., n, n] of blocks of columns, each from its first row on that is on the diagonal."""
    size = lower.shape[-1]
    blocks = list(_columns(lower, solve))
    pieces = [
        Piece(partial(finish, columns), cost, _shape(lower, size - start, end - start), dtype)
        for start, end, cost, columns in blocks
    ]
    whole_II = torch.zeros_like(lower, dtype=dtype)
    for (start, end, _, _), columns_II in zip(blocks, _worth(team, size).gather(pieces), strict=True):
        whole_II[..., start:, start:end] = columns_II
    return whole_II


def _columns(lower: Tensor, solve: Solve) -> Iterator[tuple[int, int, int, Callable[[], Tensor]]]:
    """(first column, the one behind the last, the work, what computes them [..., n - first, columns])."""
    size = lower.shape[-1]
    blocks = list(_blocks(lower))
    step = 2 if size >= LONG else 1
    corners = [
        torch.linalg.solve_triangular(lower[..., start:end, start:end], _identity(lower, end - start, end - start), upper=False)
        for start, end in blocks
    ]

    def compute(first: int, start: int, end: int) -> Tensor:
        return solve(lower[..., start:, start:], corners[first:], _identity(lower, size - start, end - start))

    for first in range(0, len(blocks), step):
        start, end = blocks[first][0], blocks[min(first + step, len(blocks)) - 1][1]
        yield start, end, (size - start) ** 2 * (end - start), partial(compute, first, start, end)


def _identity(like: Tensor, rows: int, columns: int) -> Tensor:
    """The first columns of one, for each matrix of a stack."""
    return torch.eye(rows, columns, dtype=like.dtype, device=like.device).repeat(*like.shape[:-2], 1, 1)


def _blocks(matrix: Tensor) -> Iterator[tuple[int, int]]:
    size, width = matrix.shape[-1], NARROW if matrix.device.type == "cpu" else WIDE
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _stretches(start: int, size: int) -> Iterator[range]:
    edges = [start + (size - start) * index // STRETCHES for index in range(STRETCHES + 1)]
    return (range(first, end) for first, end in itertools.pairwise(edges) if first < end)


def _shape(matrix: Tensor, rows: int, columns: int) -> tuple[int, ...]:
    return (*matrix.shape[:-2], rows, columns)


def _worth(team: Team, size: int) -> Team:
    return team if size >= LEAST else ALONE
