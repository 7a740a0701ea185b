"""The zeros and the energy of a weight, counted in blocks of its rows that a cache holds: hardly more than reading it once.

block of rows -> is it zero, a byte for each element -> 2, 4 or 8 bytes are a word: fewer to add up
              -> float64 -> its product with itself
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_NARROW, _WIDE = 1 << 18, 1 << 24
"""Elements of a block on a CPU, and elsewhere."""

_WORDS = {
    1: (torch.uint8, 1, 0),
    2: (torch.int16, 0x0101, 8),
    4: (torch.int32, 0x01010101, 24),
    8: (torch.int64, 0x0101010101010101, 56),
}
"""By their bytes: what they are; what multiplies one, so that its highest byte is the sum of all; and how far up that is."""


def energy_sq(weight: Tensor) -> float:
    """Sum of squared weights, in float64; the "energy" that reports and checkpoints quote.

    Args:
        weight: any shape and floating-point dtype.

    Raises:
        TypeError: another dtype.
    """
    if not weight.is_floating_point():
        raise TypeError(f"energy_sq(weight of {weight.dtype}): expected floating-point numbers.")
    parts, wide = [], torch.empty(0, dtype=torch.float64, device=weight.device)
    for block in _blocks(_as_it_lies(weight)):
        if wide.numel() < block.numel():
            wide = wide.new_empty(block.numel())
        flat = wide[: block.numel()]
        flat.view(block.shape).copy_(block)
        parts.append(torch.dot(flat, flat))
    return float(torch.stack(parts).sum()) if parts else 0.0


def num_zeros(tensor: Tensor) -> int:
    """How many elements of a tensor of any shape and dtype are zero; False of a mask."""
    return int(zeros_by_row(_as_it_lies(tensor)).sum())


def zeros_by_row(tensor: Tensor) -> Tensor:
    """How many elements of each row are zero: [..., in] of any dtype to [...], int64."""
    width = tensor.shape[-1] if tensor.ndim else 1
    counts = [width - _ones_by_row(flags) for flags in _flags(tensor)]
    if not counts:
        return torch.zeros(tensor.shape[:-1], dtype=torch.int64, device=tensor.device)
    return torch.cat(counts).reshape(tensor.shape[:-1])


def most_in_group(weight: Tensor, of: int) -> int:
    """How many elements are other than zero in the group where most are.

    Args:
        weight: [..., in], any dtype.
        of: consecutive inputs that form a group; it divides their number.
    """
    size = math.gcd(of, 8)
    dtype, ones, shift = _WORDS[size]
    words, together = weight.shape[-1] // size, of // size
    most = []
    for flags in _flags(weight):
        counts = flags.view(dtype)[:, :words] * ones  # in the highest byte, which alone decides which word is the largest
        if together > 1:
            counts = (counts >> shift).unflatten(-1, (-1, together)).sum(dim=-1)
        most.append(counts.amax() >> (0 if together > 1 else shift))
    return int(torch.stack(most).amax()) if most else 0


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The transpose of one that is a transpose, where the order of the elements is all the same."""
    return tensor.mT if tensor.ndim >= 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous() else tensor


def _flags(tensor: Tensor) -> Iterator[Tensor]:
    """Blocks of rows as bytes [rows, columns], 1 where an element is other than zero and 0 where it is zero.

    There are columns of zeros behind the last one, up to a multiple of 8. Each block takes the place of the one before it.
    """
    memory = None
    for block in _blocks(tensor):
        rows, width = block.shape
        if memory is None:
            memory = torch.zeros(rows, -(-width // 8) * 8, dtype=torch.bool, device=tensor.device)
        # A conversion, since comparing with 0 goes element by element; that of float16 does as well.
        memory[:rows, :width] = block.float() if block.dtype is torch.float16 else block
        yield memory[:rows].view(torch.uint8)


def _ones_by_row(flags: Tensor) -> Tensor:
    """[rows, columns] to [rows], int64."""
    # A byte holds the sum of 255 words' bytes.
    parts = [words.sum(dim=-1, keepdim=True) for words in flags.view(torch.int64).split(255, dim=-1)]
    return torch.cat(parts, dim=-1).view(torch.uint8).sum(dim=-1)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """[rows, in] after [rows, in]; the first is the highest."""
    if not tensor.numel():
        return iter(())
    matrix = tensor.detach().reshape(1, 1) if not tensor.ndim else tensor.detach().reshape(-1, tensor.shape[-1])
    size = _NARROW if tensor.device.type == "cpu" else _WIDE
    return iter(matrix.split(max(1, size // matrix.shape[1])))
