"""Compensations: change the weights that stay so that the layer does what it did.

Every compensation is a pure function `(original, pruned, keep, moments, *, settings) -> corrected`, or a frozen dataclass of
settings that is called as one. All weights are [..., out, in]; `pruned` is what the pruner, or the compensation before, left
(zeros at pruned places), `keep` is True where a weight stays. A compensation never revives a pruned weight.

One that may reach the mask itself is a function `(pruner, *, settings) -> pruner` instead, such as `gradual.least_squares`.
"""

from collections.abc import Callable
from typing import Annotated, Any

from torch import Tensor

from statprune.methods.bounds import Between, check
from statprune.methods.gradual import least_squares
from statprune.methods.loss_aware import loss_aware
from statprune.methods.rows import rows_alone
from statprune.methods.statistics import InputMoments, Statistic, needs


@rows_alone()
@needs(Statistic.NONE)
def none(original: Tensor, pruned: Tensor, keep: Tensor, moments: InputMoments | None = None) -> Tensor:
    """The pruned weight as it is.

    Returns:
        [..., out, in], float32.
    """
    return pruned.float()


@rows_alone(unless="column")
@needs(Statistic.NONE)
def energy(
    original: Tensor,
    pruned: Tensor,
    keep: Tensor,
    moments: InputMoments | None = None,
    *,
    column: bool = True,
    row: bool = True,
    eps: Annotated[float, Between(1e-30, 1e3)] = 1e-8,
    clamp: Annotated[tuple[float, float], Between(1e-30, 1e30)] = (0.5, 2.0),
    strength: Annotated[float, Between(0, 1)] = 1.0,
) -> Tensor:
    """Energy compensation: rescale columns, then rows, to the centred energy they had (the paper, section 3.2).

    `W <- (W - mu) * s + mu` with `s = clamp(sqrt(E_original / (E_pruned + eps)))`; mu and E_original come from the original
    weight, E_pruned is the centred energy of the masked weight *with its zeros*; the mask is applied again after each
    of the two steps, and the row step sees what the column step left.

    Args:
        original: [..., out, in], the weight before pruning, any float dtype.
        pruned: [..., out, in], the weight after pruning.
        keep: [..., out, in], bool, True = kept.
        moments: unused; every compensation has this signature.
        column: rescale each input channel (column).
        row: rescale each output channel (row).
        eps: added to E_pruned, which keeps an emptied column finite; in units of weight squared, summed over a column or a row.
            The paper does not state it.
        clamp: lowest and highest s. The paper clamps "to a fixed range" that it does not state.
        strength: the factor is `s ** strength`, so 0 does nothing. Ours, not the paper's.

    Returns:
        [..., out, in], float32, exactly 0 where `keep` is False.
    """
    _check("energy", energy, eps, clamp, strength)
    corrected = pruned.float()
    for summed_dim in ([-2] if column else []) + ([-1] if row else []):
        corrected = _rescale(original.float(), corrected, keep, summed_dim, None, eps, clamp, strength)
    return corrected


@rows_alone(unless="column")
@needs(Statistic.MOMENTS)
def activation_energy(
    original: Tensor,
    pruned: Tensor,
    keep: Tensor,
    moments: InputMoments,
    *,
    column: bool = True,
    row: bool = True,
    eps: Annotated[float, Between(1e-30, 1e3)] = 1e-8,
    clamp: Annotated[tuple[float, float], Between(1e-30, 1e30)] = (0.5, 2.0),
    strength: Annotated[float, Between(0, 1)] = 1.0,
) -> Tensor:
    """Energy compensation in which a weight counts by what flows through it: `a_j = E[x_j^2]`, divided by its mean.

    As `energy`, with `mu = sum_j a_j W_ij / sum_j a_j` and `E = sum_j a_j (W_ij - mu)^2` in the row step, so that a row's
    energy stands for the energy of its output. Within a column a is constant, and the column step is that of `energy`.
    Ours, not the paper's.

    Args:
        original: [..., out, in], the weight before pruning, any float dtype.
        pruned: [..., out, in], the weight after pruning.
        keep: [..., out, in], bool, True = kept.
        moments: of the layer's inputs.
        column: rescale each input channel (column).
        row: rescale each output channel (row).
        eps: as in `energy`.
        clamp: as in `energy`.
        strength: as in `energy`.

    Returns:
        [..., out, in], float32, exactly 0 where `keep` is False.
    """
    _check("activation-energy", activation_energy, eps, clamp, strength)
    share_I = moments.second_moment / moments.second_moment.mean(dim=-1, keepdim=True).clamp_min(_TINY)
    corrected = pruned.float()
    if column:
        corrected = _rescale(original.float(), corrected, keep, -2, None, eps, clamp, strength)
    if row:
        corrected = _rescale(original.float(), corrected, keep, -1, share_I.float()[..., None, :], eps, clamp, strength)
    return corrected


_TINY = 1e-300
"""Where every channel was always 0, 0 divided by this is 0."""


def _check(name: str, function: Callable[..., Tensor], eps: float, clamp: tuple[float, float], strength: float) -> None:
    check(name, function, eps=eps, clamp=clamp, strength=strength)
    if len(clamp) != 2 or clamp[0] > clamp[1]:
        raise ValueError(f"{name}(clamp={list(clamp)}): expected [low, high] with low <= high.")


def _rescale(
    original: Tensor,
    pruned: Tensor,
    keep: Tensor,
    summed_dim: int,
    share: Tensor | None,
    eps: float,
    clamp: tuple[float, float],
    strength: float,
) -> Tensor:
    """One step of energy compensation: along rows or columns, with a weight for each entry or without."""

    def summed(values: Tensor) -> Tensor:
        return (values if share is None else values * share).sum(dim=summed_dim, keepdim=True)

    if share is None:
        mean = original.mean(dim=summed_dim, keepdim=True)
    else:
        mean = summed(original) / share.sum(dim=summed_dim, keepdim=True).clamp_min(eps)
    centred = pruned - mean
    energy_original, energy_pruned = summed((original - mean).square_()), summed(centred.square())
    scale = (energy_original / (energy_pruned + eps)).sqrt_().clamp_(*clamp).pow_(strength)
    return centred.mul_(scale).add_(mean).masked_fill_(~keep, 0.0)


COMPENSATIONS: dict[str, Callable[..., Any]] = {
    "none": none,
    "energy": energy,
    "activation-energy": activation_energy,
    "least-squares": least_squares,
    "loss-aware": loss_aware,
}
"""Compensations by the name a recipe uses."""
