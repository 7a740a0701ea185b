"""The Gram of a layer's inputs with ones on its diagonal, and what solvers derive of it, once for all layers that share it."""

from collections.abc import Callable

import torch
from torch import Tensor

from statprune.methods.finite import is_finite
from statprune.methods.rows import ALONE, Team
from statprune.methods.statistics import InputMoments
from statprune.methods.triangles import cholesky_, inverse_diagonal, inverse_of_matrix

_LEAST_DAMPING = 1e-3
"""What `channel_freedom` adds at least: without any, a Gram of few tokens has no inverse."""


def normalised_gram(moments: InputMoments | None, damping: float) -> tuple[Tensor, Tensor]:
    """The Gram [..., in, in] with ones on its diagonal, plus the damping; and the weights' scale [..., 1, in] beside it.

    A channel that was always 0 gets the scale 1 and stays 0 in the Gram: nothing moves its weights.

    Raises:
        ValueError: the statistics have no Gram.
    """
    if moments is None or moments.gram is None:
        raise ValueError("least-squares needs the Gram of the layer's inputs: expected moments collected with Statistic.GRAM.")
    gram = moments.gram
    found: tuple[Tensor, Tensor] = moments.derive(("normalised gram", damping), lambda: _normalised(gram, damping))
    return found


def channel_freedom(moments: InputMoments, damping: float) -> Tensor:
    """[..., in], float32: the diagonal of the inverse of the normalised Gram, damped.

    Near 1 for a channel that is like no other, larger the better the others can stand in for it. Divided by the squared scale,
    it is the diagonal of the Gram's own inverse: what the optimal brain surgeon (Hassibi & Stork 1993) divides by.

    Raises:
        ValueError: there is no Gram, or it cannot be factorised.
    """
    found: Tensor = moments.derive(
        ("channel freedom", damping),
        lambda: _freedom(normalised_gram(moments, damping)[0], max(0.0, _LEAST_DAMPING - damping), moments.team),
    )
    return found


def inverse_(matrix: Tensor, team: Team = ALONE) -> Tensor:
    """The inverse of a symmetric positive definite [..., n, n], in its dtype.

    Args:
        matrix: float32 or float64; its memory is worked in, and holds something else afterwards.
        team: who computes it together.

    Raises:
        ValueError: it has none.
    """
    return _finite_(matrix, inverse_of_matrix, team)


def _finite_(matrix: Tensor, compute: Callable[[Tensor, Team], Tensor], team: Team) -> Tensor:
    lower = cholesky_(matrix, team)
    if lower is not None:
        found = compute(lower, team)
        if is_finite(found):
            return found
    raise ValueError(
        "the Gram of its inputs cannot be factorised. Are there infinite or absurdly large activations? Leave the layer dense "
        "with `ignore`, or use a method without the Gram, such as wanda."
    )


def _normalised(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    diagonal_I = gram.diagonal(dim1=-2, dim2=-1)
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
    gram_II = (gram * scale_I[..., :, None]).mul_(scale_I[..., None, :])
    gram_II.diagonal(dim1=-2, dim2=-1).mul_(1 + damping)
    return gram_II, scale_I[..., None, :]


def _freedom(gram_II: Tensor, more: float, team: Team) -> Tensor:
    wide_II = gram_II.double()  # the damping alone bounds how ill-conditioned it is
    diagonal_I = wide_II.diagonal(dim1=-2, dim2=-1)
    diagonal_I.add_(more).masked_fill_(diagonal_I == more, 1.0)  # channels that were always 0
    return _finite_(wide_II, inverse_diagonal, team).float()
