"""The highest scores of each row, or of each small group: exactly so many, whatever the ties, and fast: solvers ask often."""

import torch
from torch import Tensor

FEW = 32
"""Scores in a group, up to which counting is faster than `topk`: five times for 4, a third for 32."""


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
    if size <= FEW:
        return _by_counting(score, num_kept)
    if score.device.type != "cpu" or score.dtype is not torch.float32:
        return keep_highest_by_sorting(score, num_kept)
    keep = _by_threshold(score, num_kept)
    is_tied = keep.count_nonzero(-1) != num_kept
    if bool(is_tied.any()):
        keep[is_tied] = keep_highest_by_sorting(score[is_tied], num_kept)
    return keep


def _by_threshold(score: Tensor, num_kept: int) -> Tensor:
    """All that are as high as the lowest one to keep: too many where there are ties.

    NumPy's partition takes a tenth of the time of `topk` and `kthvalue` on a CPU.
    """
    import numpy as np

    position = score.shape[-1] - num_kept
    lowest = np.partition(score.detach().numpy(), position, axis=-1)[..., position : position + 1]
    return score >= torch.from_numpy(np.ascontiguousarray(lowest))


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
