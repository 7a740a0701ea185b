"""Whether all of a tensor is finite, without a mask or a magnitude of it: a weight or a Gram may fill a gigabyte."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element of a tensor of any floating-point dtype is NaN or infinite."""
    return bool(finite_flag(tensor))


def finite_flag(tensor: Tensor) -> Tensor:
    """The same as a scalar (bool) on the tensor's device, which nobody waits for.

    The least and the largest tell, in one pass and without memory: both are NaN where one element is.
    """
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.element_size() < 2:  # of eight bits, which have no order in torch
        tensor = tensor.float()
    return torch.isfinite(torch.stack(tensor.detach().aminmax())).all()


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
