"""Compensations: change the weights that stay so that the layer does what it did.

Every compensation is a pure function `(original, pruned, keep, moments, *, settings) -> corrected`. All weights are
[..., out, in]; `pruned` is what the pruner left (zeros at pruned places), `keep` is True where a weight stays.
A compensation never revives a pruned weight.
"""

from torch import Tensor

from statprune.statistics import InputMoments, Statistic, needs


@needs(Statistic.NONE)
def none(original: Tensor, pruned: Tensor, keep: Tensor, moments: InputMoments | None = None) -> Tensor:
    """The pruned weight as it is.

    Returns:
        [..., out, in], float32.
    """
    return pruned.float()


@needs(Statistic.NONE)
def energy(
    original: Tensor,
    pruned: Tensor,
    keep: Tensor,
    moments: InputMoments | None = None,
    *,
    column: bool = True,
    row: bool = True,
    eps: float = 1e-8,
    clamp: tuple[float, float] = (0.5, 2.0),
    strength: float = 1.0,
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
        eps: added to E_pruned, > 0; in units of weight squared, summed over a column or a row. The paper does not state it.
        clamp: lowest and highest s. The paper clamps "to a fixed range" that it does not state.
        strength: in [0, 1]; the factor is `s ** strength`, so 0 does nothing. Ours, not the paper's.

    Returns:
        [..., out, in], float32, exactly 0 where `keep` is False.
    """
    low, high = clamp
    if not eps > 0:
        raise ValueError(f"energy(eps={eps}): expected eps > 0, it keeps an emptied column finite.")
    if not 0 < low <= high:
        raise ValueError(f"energy(clamp={list(clamp)}): expected [low, high] with 0 < low <= high.")
    if not 0 <= strength <= 1:
        raise ValueError(f"energy(strength={strength}): expected a number in [0, 1].")
    original, corrected = original.float(), pruned.float()
    for summed_dim in ([-2] if column else []) + ([-1] if row else []):
        mean = original.mean(dim=summed_dim, keepdim=True)
        energy_original = (original - mean).square_().sum(dim=summed_dim, keepdim=True)
        centred = corrected - mean
        energy_pruned = centred.square().sum(dim=summed_dim, keepdim=True)
        scale = (energy_original / (energy_pruned + eps)).sqrt_().clamp_(low, high).pow_(strength)
        corrected = centred.mul_(scale).add_(mean).masked_fill_(~keep, 0.0)
    return corrected


COMPENSATIONS = {"none": none, "energy": energy}
"""Compensations by the name a recipe uses."""
