"""Criteria: how important is each weight? Higher is more important; only the order matters.

Every criterion is a pure function `(weight, moments, *, settings) -> score`. The weight is [..., out, in], the score
has its shape and is float32, and the settings are keyword-only: a recipe reads their names from the signature.
A criterion only scores; `patterns` selects.
"""

from typing import Annotated

import torch
from torch import Tensor

from statprune.methods.blockwise import by_columns
from statprune.methods.bounds import Between, check
from statprune.methods.gram import channel_freedom
from statprune.methods.rows import rows_alone
from statprune.methods.spread import Columns, columns_of
from statprune.methods.statistics import InputMoments, Statistic, needs

_TINY = torch.finfo(torch.float32).tiny
"""Where a row or column is all zeros, 0 divided by this is 0."""


def _magnitude(columns: Columns | None, moments: InputMoments | None) -> Tensor:
    return torch.tensor(1.0)


@by_columns(_magnitude)
@rows_alone()
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


def _wanda(columns: Columns | None, moments: InputMoments) -> Tensor:
    return moments.second_moment.sqrt().float()[..., None, :]


@by_columns(_wanda)
@rows_alone()
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
    return weight.float().abs() * _wanda(None, moments)


@needs(Statistic.MOMENTS)
def ria(weight: Tensor, moments: InputMoments, *, exponent: Annotated[float, Between(0, 4)] = 0.5) -> Tensor:
    """Relative importance and activations, `(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^exponent`.

    Args:
        weight: [..., out, in], any float dtype.
        moments: of the layer's inputs.
        exponent: of the channel's norm.

    Returns:
        [..., out, in], float32.

    From Zhang et al. 2024 (ICLR, "Plug-and-play"), without its channel permutation. Deviation: the norm is the root of the
    mean over tokens instead of the sum, which leaves the order within a layer as it is.
    """
    check("ria", ria, exponent=exponent)
    size = weight.float().abs()
    relative = sum(size / size.sum(dim=dim, keepdim=True).clamp_min(_TINY) for dim in (-2, -1))
    return relative * moments.second_moment.pow(exponent / 2).float()[..., None, :]


@needs(Statistic.MOMENTS)
def z_pruner(weight: Tensor, moments: InputMoments) -> Tensor:
    """`(a |z_row|^3 + (1 - a) |z_column|^3) * ||X_j||^1.5`, `a = 0.7 (1 - 0.3 share of small weights)`.

    z_row and z_column are the z-scores, over the whole matrix, of the weights divided by the L2 norm of their row or column;
    a weight is small where |W| is below a tenth of the mean |W|.

    Args:
        weight: [..., out, in], any float dtype.
        moments: of the layer's inputs.

    Returns:
        [..., out, in], float32.

    From Z-Pruner (arXiv 2508.15828), its own code's formula. Deviations: the norm is the root of the mean over tokens, which
    leaves the order as it is; a row or column of zeros scores as such and not as NaN.
    """
    weight = weight.float()
    size = weight.abs()
    is_small = size < 0.1 * size.mean(dim=(-2, -1), keepdim=True)
    row_share = 0.7 * (1 - 0.3 * is_small.float().mean(dim=(-2, -1), keepdim=True))
    row, column = (_z_score(weight / weight.norm(dim=dim, keepdim=True).clamp_min(_TINY)).abs_().pow_(3) for dim in (-1, -2))
    return (row_share * row + (1 - row_share) * column) * moments.second_moment.pow(0.75).float()[..., None, :]


def _z_score(values: Tensor) -> Tensor:
    """Over the whole matrix, with the sample standard deviation."""
    centred = values - values.mean(dim=(-2, -1), keepdim=True)
    # One weight alone has no sample deviation, and is its own mean.
    others = max(values.shape[-2] * values.shape[-1] - 1, 1)
    return centred / (centred.square().sum(dim=(-2, -1), keepdim=True) / others).sqrt().clamp_min(_TINY)


def _cvr(columns: Columns, moments: InputMoments, *, alpha: float, exponent: float, eps: float) -> Tensor:
    check("cvr", cvr, alpha=alpha, exponent=exponent, eps=eps)
    activation_factor = moments.variance.pow(exponent).float()[..., None, :]
    return activation_factor * (columns().variance.float() + eps).pow(-alpha / 2)


@by_columns(_cvr)
@needs(Statistic.MOMENTS)
def cvr(
    weight: Tensor,
    moments: InputMoments,
    *,
    alpha: Annotated[float, Between(0, 4)] = 0.5,
    exponent: Annotated[float, Between(0, 2)] = 0.25,
    eps: Annotated[float, Between(1e-12, 1e3)] = 1e-8,
) -> Tensor:
    """Column-variance reweighting, `|W_ij| * Var(x_j)^(1/4) * (Var_i(W_ij) + eps)^(-alpha/2)` (the paper, section 3.1).

    Args:
        weight: [..., out, in], any float dtype.
        moments: of the layer's inputs.
        alpha: strength of the weight factor; 0 leaves the activation factor alone. The paper does not state it.
        exponent: of the channel's variance. The paper's is 1/4, the square root of a standard deviation.
        eps: added to the variance of a weight column, which keeps a constant one finite; in units of weight squared. The paper
            does not state it.

    Returns:
        [..., out, in], float32.

    Both variances are population variances. A channel that never varies scores 0 whatever its mean, as the formula says.
    """
    return weight.float().abs() * _cvr(lambda: columns_of(weight), moments, alpha=alpha, exponent=exponent, eps=eps)


def _optimal_brain(columns: Columns | None, moments: InputMoments, *, damping: float) -> Tensor:
    check("optimal-brain", optimal_brain, damping=damping)
    if moments.gram is None:
        raise ValueError("optimal-brain needs the Gram of the layer's inputs: expected moments collected with `gram=True`.")
    alone_I = moments.gram.diagonal(dim1=-2, dim2=-1).sqrt() / channel_freedom(moments, damping).sqrt()
    return alone_I[..., None, :]


@by_columns(_optimal_brain)
@rows_alone()
@needs(Statistic.GRAM)
def optimal_brain(weight: Tensor, moments: InputMoments, *, damping: Annotated[float, Between(1e-30, 100)] = 0.01) -> Tensor:
    """`|W_ij| / sqrt([H^-1]_jj)`, H the Gram: what pruning one weight costs when all others adapt (optimal brain surgeon).

    Args:
        weight: [..., out, in], any float dtype.
        moments: of the layer's inputs, with the Gram.
        damping: added to H's diagonal, as a fraction of each entry; 0.001 at least, without which H may have no inverse.

    Returns:
        [..., out, in], float32; the root of Hassibi & Stork's (1993) saliency `W_ij^2 / (2 [H^-1]_jj)` but for a factor. A
        channel that was always 0 scores 0.

    Raises:
        ValueError: there is no Gram, or it cannot be factorised.

    Deviation: the saliency is that of a single weight; that many go together is left to a compensation such as least-squares.
    """
    return weight.float().abs() * _optimal_brain(None, moments, damping=damping)


CRITERIA = {
    "magnitude": magnitude,
    "wanda": wanda,
    "ria": ria,
    "z-pruner": z_pruner,
    "cvr": cvr,
    "optimal-brain": optimal_brain,
}
"""Criteria by the name a recipe uses."""
