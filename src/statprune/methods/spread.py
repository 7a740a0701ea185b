"""Spread: how many values, their mean, and how far they are from it; that of two parts together follows from theirs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = {"cpu": 1 << 18}
"""Weights of a block of rows: what is made of one stays in a core's cache."""

_BLOCK_ELSEWHERE = 1 << 25
"""On a GPU, which wants much to do at once; what is made of a block takes memory there."""


@dataclass(frozen=True)
class Spread:
    """Of values along one dimension, each counted once or by a share.

    Merged as by Chan, Golub and LeVeque (1979): no difference of large sums, so that what is nearly constant has its own small
    energy and not the rounding of a large one.
    """

    count: Tensor
    """How many values, or the sum of their shares; float64, [..., 1] or no dimension."""
    mean: Tensor
    """[..., n], float64."""
    energy: Tensor
    """[..., n], float64: the sum of the squared distances from the mean."""

    @classmethod
    def of(cls, values: Tensor, dim: int, share: Tensor | None = None, near: Tensor | None = None) -> "Spread":
        """Along a dimension, whose size `n` is kept as 1 and is not 0.

        Args:
            values: any shape, float32.
            dim: negative.
            share: what each value counts for, float32, to be broadcast along the other dimensions; else all the same.
            near: about the mean, [..., n], where that is known, which saves looking for it.
        """

        def summed(terms: Tensor) -> Tensor:
            return (terms if share is None else terms * share).sum(dim=dim, keepdim=True)

        if share is None:
            count = torch.tensor(values.shape[dim], dtype=torch.float64, device=values.device)
        else:
            count = share.sum(dim=dim, keepdim=True, dtype=torch.float64)
        divisor = count.clamp_min(_TINY)
        centre = (summed(values).double() / divisor if near is None else near).float()
        centred = values - centre  # exact in float32 for what is close by; of the sums none is large beside the energy
        off = summed(centred).double() / divisor
        energy = summed(centred.square_()).double() - count * off.square()
        return cls(count, centre.double() + off, energy.clamp_min_(0.0))

    def joined(self, other: "Spread") -> "Spread":
        """Of the values of both."""
        count = self.count + other.count
        apart = other.mean - self.mean
        part = other.count / count.clamp_min(_TINY)
        return Spread(count, self.mean + apart * part, self.energy + other.energy + apart.square() * (self.count * part))

    def around(self, centre: Tensor) -> Tensor:
        """The sum of the squared distances from somewhere else, [..., n], float64."""
        return self.energy + self.count * (self.mean - centre).square()

    @property
    def variance(self) -> Tensor:
        """[..., n], float64, of the population."""
        return self.energy / self.count.clamp_min(_TINY)


_TINY = torch.finfo(torch.float64).tiny
"""Where nothing counts, 0 divided by this is 0."""


Columns = Callable[[], Spread]
"""The spread of a weight's columns [..., 1, in], for those who ask."""


def columns_of(matrix: Tensor) -> Spread:
    """Of the columns of a matrix [..., out, in], any float dtype, by blocks of its rows: [..., 1, in]."""
    total: Spread | None = None
    for block in row_blocks(matrix):
        own = Spread.of(matrix[..., block, :].float(), -2, near=None if total is None else total.mean)
        total = own if total is None else total.joined(own)
    return total if total is not None else Spread.of(matrix.float(), -2)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Its rows [..., rows, in] in stretches that a cache holds."""
    rows = matrix.shape[-2]
    size = _BLOCK.get(matrix.device.type, _BLOCK_ELSEWHERE)
    step = max(1, size * rows // max(1, matrix.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
