"""Whether all of a tensor is finite, without a mask or a magnitude of it: a Gram may fill a gigabyte."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: the least and the largest tell, in one pass and without memory."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def check_scores(score: Tensor) -> Tensor:
    """The scores of a criterion, which have an order.

    Raises:
        ValueError: some are NaN or infinite, and what would be kept for them is arbitrary.
    """
    if not is_finite(score):
        raise ValueError(
            "the criterion's scores are not all finite in float32. Are there settings (an exponent, an alpha) that are too "
            "large for these weights and inputs? Take smaller ones, or leave the layer dense with `ignore`."
        )
    return score
