"""Criteria: how important is each weight? Higher is more important; only the order matters.

Every criterion is a pure function `(weight, moments, *, settings) -> score`. The weight is [..., out, in], the score
has its shape and is float32, and the settings are keyword-only: a recipe reads their names from the signature.
A criterion only scores; `patterns` selects.
"""

from torch import Tensor

from statprune.statistics import InputMoments, Statistic, needs


@needs(Statistic.NONE)
def magnitude(weight: Tensor, moments: InputMoments | None = None) -> Tensor:
    """`|W|`.

    Args:
        weight: [..., out, in], any float dtype.
        moments: unused; every criterion has this signature.

    Returns:
        [..., out, in], float32.
    """
    return weight.float().abs()


@needs(Statistic.MOMENTS)
def wanda(weight: Tensor, moments: InputMoments) -> Tensor:
    """`|W_ij| * sqrt(E[x_j^2])` (Sun et al. 2024, arXiv 2306.11695).

    Args:
        weight: [..., out, in], any float dtype.
        moments: of the layer's inputs.

    Returns:
        [..., out, in], float32.

    Deviation: the mean is over tokens, where Wanda's own code divides by sequences; within a layer the order is the same.
    """
    return weight.float().abs() * moments.second_moment.sqrt().float()[..., None, :]


@needs(Statistic.MOMENTS)
def cvr(weight: Tensor, moments: InputMoments, *, alpha: float = 0.5, eps: float = 1e-8) -> Tensor:
    """Column-variance reweighting, `|W_ij| * Var(x_j)^(1/4) * (Var_i(W_ij) + eps)^(-alpha/2)` (the paper, section 3.1).

    Args:
        weight: [..., out, in], any float dtype.
        moments: of the layer's inputs.
        alpha: strength of the weight factor, >= 0; 0 leaves the activation factor alone. The paper does not state it.
        eps: added to the variance of a weight column, > 0; in units of weight squared. The paper does not state it.

    Returns:
        [..., out, in], float32.

    Both variances are population variances. A channel that never varies scores 0 whatever its mean, as the formula says.
    """
    if not alpha >= 0:
        raise ValueError(f"cvr(alpha={alpha}): expected alpha >= 0.")
    if not eps > 0:
        raise ValueError(f"cvr(eps={eps}): expected eps > 0, it keeps a constant weight column finite.")
    weight = weight.float()
    activation_factor = moments.variance.pow(0.25).float()
    weight_factor = (weight.var(dim=-2, correction=0) + eps).pow(-alpha / 2)
    return weight.abs() * (activation_factor * weight_factor)[..., None, :]


CRITERIA = {"magnitude": magnitude, "wanda": wanda, "cvr": cvr}
"""Criteria by the name a recipe uses."""
