"""The inverse of a Gram, as a factor: what SparseGPT updates with, and what the optimal-brain criterion scores with."""

import torch
from torch import Tensor

from statprune.methods.finite import is_finite
from statprune.methods.rows import ALONE, Team
from statprune.methods.triangles import cholesky_, inverse_of_factor

ESCALATION = (1.0, 10.0, 100.0)
"""How many times the damping, one after the other, where H plus the damping cannot be factorised."""


def inverse_factor(gram: Tensor, damping: float, team: Team = ALONE) -> Tensor:
    """U, upper triangular, with `(H + damping * mean diagonal)^-1 = U^T U`, where H is the Gram divided by its mean diagonal.

    The division changes neither an order nor an update, and keeps float32 in its range. More damping is tried where H has no
    factorisation, up to 100 times as much. The arithmetic is float64: in float32 the factor of a trained layer's Gram differs
    in its third digit with the order in which the tokens were added up.

    Args:
        gram: [..., in, in], sum of x x^T over tokens.
        damping: fraction of the mean diagonal, over the channels that are ever other than 0.
        team: who computes it together.

    Returns:
        [..., in, in], float32.

    Raises:
        ValueError: H is not positive definite whatever is done.
    """
    diagonal_I = gram.diagonal(dim1=-2, dim2=-1)
    is_dead_I = diagonal_I == 0
    # In float64: the sum may be beyond float32 where no element is.
    total = diagonal_I.sum(-1, keepdim=True, dtype=torch.float64)
    mean = (total / (~is_dead_I).sum(-1, keepdim=True).clamp_min(1)).to(gram.dtype)[..., None]
    mean = torch.where(mean == 0, 1.0, mean)
    for times in ESCALATION:
        # The factor of the matrix turned upside down, inverted and turned back, is the upper factor of the inverse.
        turned_II = (gram / mean).flip(-2, -1).double()
        turned_II.diagonal(dim1=-2, dim2=-1).masked_fill_(is_dead_I.flip(-1), 1.0).add_(damping * times)
        lower_II = cholesky_(turned_II, team)
        if lower_II is not None:
            found_II = inverse_of_factor(lower_II, team)
            del turned_II, lower_II  # a gigabyte, where a layer has eleven thousand inputs
            factor_II = found_II.flip(-2, -1)
            if is_finite(factor_II):
                return factor_II
    raise ValueError(
        f"the Gram of its inputs cannot be factorised, with damping {damping:g} to {damping * ESCALATION[-1]:g} of its mean "
        "diagonal. Are there infinite or absurdly large activations? Try a larger damping, as in "
        f"sparsegpt:damping={min(10 * ESCALATION[-1] * damping, 100):g}, or leave the layer dense with `ignore`."
    )
