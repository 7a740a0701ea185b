"""Whether all of a tensor is finite, without a mask or a magnitude of it: a Gram may fill a gigabyte."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: the least and the largest tell, in one pass and without memory."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
