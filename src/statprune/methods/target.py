"""The target: what a layer is to come as near to as it can, when what enters it comes from layers that are pruned already.

    pruned   W x_p               what the dense weight makes of the pruned inputs
    dense    W x_d + h_d - h_p   what the dense model has there: so that a layer makes good what those before it did

x_p and x_d are a layer's inputs behind the pruned and the dense layers before it; h_p and h_d, for a layer whose output is
added to a residual stream, what it is added to. No mask and no method is concerned: the weight that comes nearest to the dense
target, with nothing pruned in it yet, takes the place of the dense one, and criteria, SparseGPT and least squares work on that.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from statprune.methods.bounds import Between, check
from statprune.methods.finite import is_finite
from statprune.methods.gram import normalised_gram
from statprune.methods.least_squares import Damping
from statprune.methods.precision import full_precision
from statprune.methods.statistics import InputMoments, Statistic

Share = Annotated[float, Between(0, 1)]


@dataclass(frozen=True)
class PrunedTarget:
    """What the dense weight makes of the pruned inputs."""

    @property
    def needs(self) -> Statistic:
        """Nothing."""
        return Statistic.NONE

    def __call__(self, weight: Tensor, moments: InputMoments | None, parameter: str) -> Tensor:
        """The weight itself."""
        return weight


@dataclass(frozen=True)
class DenseTarget:
    """What the dense model has there, so that each layer makes good what pruning did before it."""

    share: Share = 1.0
    """How far to go, from the pruned target (0) to the dense one (1)."""

    damping: Damping = 0.3
    """Added to H's diagonal, as a fraction of each entry; holds the weight near the dense one where few tokens decide. What the
    pruned inputs say of the missing part is weak, and a solver's damping lets it follow noise: SmolLM2 at 2:4, 32 x 512 tokens,
    under `best`, loses .55 of SparseGPT's loss with 0.01, .44 with 0.3 and with 1 (.64 with the pruned target)."""

    def __post_init__(self) -> None:
        check("dense", DenseTarget, **vars(self))

    @property
    def needs(self) -> Statistic:
        """The Gram and the cross products with the dense model, unless its share is 0."""
        return Statistic.GRAM | Statistic.CROSS if self.share else Statistic.NONE

    def __call__(self, weight: Tensor, moments: InputMoments | None, parameter: str) -> Tensor:
        """`toward_dense` with these settings."""
        return toward_dense(weight, moments, parameter, share=self.share, damping=self.damping)


Target = PrunedTarget | DenseTarget

TARGETS: dict[str, type[Target]] = {"pruned": PrunedTarget, "dense": DenseTarget}
"""By the name a recipe uses."""


def toward_dense(
    weight: Tensor, moments: InputMoments | None, parameter: str, *, share: Share = 1.0, damping: Damping = 0.3
) -> Tensor:
    """The weight that makes of the pruned inputs what comes nearest to the dense model's.

    With H = sum of x_p x_p^T, T = sum of (W x_d + h_d - h_p) x_p^T and D = damping * diag(H), it is

        (share T + (1 - share) W H + W D) (H + D)^-1  =  W + share (T - W H) (H + D)^-1

    in units in which H has ones on its diagonal. T is the layer's own (`moments.targets`), or W C (`moments.cross`).

    Args:
        weight: [out, in], dense, any float dtype.
        moments: of the layer's inputs, collected with `Statistic.CROSS`.
        parameter: the weight's name, for `moments.targets`.
        share: how far to go, from 0 (the weight as it is) to 1.
        damping: added to H's diagonal, as a fraction of each entry.

    Returns:
        [out, in], float32. The weight itself where the statistics have nothing of a dense model, because pruned and dense
        inputs are the same: in the first layers, under the one-shot schedule, and with module hooks. A channel that was
        always 0 keeps its weights.

    Raises:
        ValueError: H cannot be factorised with this damping, or is too large for float32.
    """
    check("dense", DenseTarget, share=share, damping=damping)
    original = weight.float()
    if not share or moments is None or moments.gram is None:
        return original
    with full_precision(weight.device.type):
        if parameter in moments.targets:
            missing_OI = moments.targets[parameter] - original @ moments.gram
        elif moments.cross is not None:
            missing_OI = original @ (moments.cross - moments.gram)
        else:
            return original
        gram_II, scale_1I = normalised_gram(moments, damping)
        factor_II = moments.derive(("target", damping), lambda: _factor(gram_II, damping))
        change_IO = torch.cholesky_solve((missing_OI * scale_1I).t().to(factor_II.dtype), factor_II)
    nearest = original + share * change_IO.t().float() * scale_1I
    if not is_finite(nearest):
        raise ValueError(
            "the dense target is too large for float32. Are there absurdly large activations? Leave the layer dense with "
            "`ignore`, or take the target pruned."
        )
    return nearest


def _factor(gram_II: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor; channels that were always 0 stay out of it.

    With a trained LLaMA's layers, what float32 solves is within 0.06 % of the exact change where the damping is 0.001 or more,
    and 1.4 % off without damping: there it is float64, as where float32 fails.
    """
    for dtype in (torch.float32, torch.float64) if damping >= 1e-3 else (torch.float64,):
        damped_II = gram_II.to(dtype, copy=True)
        diagonal_I = damped_II.diagonal()
        diagonal_I.masked_fill_(diagonal_I == 0, 1.0)
        factor_II: Tensor
        factor_II, info = torch.linalg.cholesky_ex(damped_II)
        if not bool(info.any()) and is_finite(factor_II):
            return factor_II
    raise ValueError(
        f"the dense target: the Gram of its inputs cannot be factorised with a damping of {damping:g}. Are there too few "
        "tokens, or absurdly large activations? Try a larger damping, as in dense:damping=0.1, or the target pruned."
    )
