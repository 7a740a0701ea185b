"""The highest scores of each row, or of each small group: exactly so many, whatever the ties, and fast: solvers ask often."""

import torch
from torch import Tensor

from statprune.methods.network import selection_network

FEW = 32
"""Scores in a group, up to which minima and maxima of lanes are faster than a partition, and counting than `topk`."""

_AT_ONCE = 1 << 17
"""Scores that a CPU chooses from at once: they stay in a core's cache."""


def keep_highest(score: Tensor, num_kept: int) -> Tensor:
    """Keep exactly `num_kept` highest scores along the last dimension; of equal ones some stay, never all or none.

    Args:
        score: [..., n], any float dtype, without NaN.
        num_kept: from 0 to n.

    Returns:
        [..., n], bool: True = kept.
    """
    size = score.shape[-1]
    if num_kept >= size or num_kept <= 0:
        return torch.full_like(score, num_kept > 0, dtype=torch.bool)
    exactly = _by_counting if size <= FEW else keep_highest_by_sorting
    if score.device.type != "cpu" or score.dtype is not torch.float32:
        return exactly(score, num_kept)
    keep = torch.empty(score.shape, dtype=torch.bool)
    parts = (matrix.reshape(-1, size).split(max(1, _AT_ONCE // size)) for matrix in (score.detach(), keep))
    for some, kept in zip(*parts, strict=True):
        _above_threshold(some, num_kept, kept)
        if int(kept.count_nonzero()) != num_kept * len(some):  # no row has too few, so that none has too many
            is_tied = kept.count_nonzero(-1) != num_kept
            kept[is_tied] = exactly(some[is_tied], num_kept)
    return keep


def _above_threshold(score: Tensor, num_kept: int, keep: Tensor) -> None:
    """Fill in all that are as high as the lowest one to keep: too many where there are ties.

    NumPy's partition, minima and maxima take a fraction of the time of torch's on a CPU.
    """
    import numpy as np

    rows, position = score.numpy(), score.shape[-1] - num_kept
    if rows.shape[-1] > FEW:
        lowest = np.partition(rows, position, axis=-1)[:, position]
    else:
        lanes = list(np.ascontiguousarray(rows.T))
        for low, high, needed in selection_network(len(lanes), position):
            first, second = lanes[low], lanes[high]
            if needed != "high":
                lanes[low] = np.minimum(first, second)
            if needed != "low":
                lanes[high] = np.maximum(first, second)
        lowest = lanes[position]
    np.greater_equal(rows, lowest[:, None], out=keep.numpy())


def _by_counting(score: Tensor, num_kept: int) -> Tensor:
    """A score stays if fewer than `num_kept` of its group are ahead of it: higher, or the same further left."""
    lanes = score.movedim(-1, 0).contiguous()
    num_ahead = torch.zeros_like(lanes, dtype=torch.uint8)
    for distance in range(1, len(lanes)):
        is_left_ahead = lanes[:-distance] >= lanes[distance:]
        num_ahead[distance:] += is_left_ahead
        num_ahead[:-distance] += is_left_ahead.logical_not_()
    return (num_ahead < num_kept).movedim(0, -1)


def keep_highest_by_sorting(score: Tensor, num_kept: int) -> Tensor:
    """As `keep_highest`, by `topk`, which of few numbers is the fastest; which of equal ones stay is its choice."""
    keep = torch.zeros_like(score, dtype=torch.bool)
    return keep.scatter_(-1, score.topk(num_kept, dim=-1, sorted=False).indices, True)
