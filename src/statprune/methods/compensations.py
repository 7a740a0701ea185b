"""Compensations: change the weights that stay so that the layer does what it did.

Every compensation is a pure function `(original, pruned, keep, moments, *, settings) -> corrected`, or a frozen dataclass of
settings that is called as one. All weights are [..., out, in]; `pruned` is what the pruner, or the compensation before, left
(zeros at pruned places), `keep` is True where a weight stays. A compensation never revives a pruned weight.

One that may reach the mask itself is a function `(pruner, *, settings) -> pruner` instead, such as `gradual.least_squares`.
"""

from collections.abc import Callable
from typing import Annotated, Any

from torch import Tensor

from statprune.methods.blockwise import Step, by_columns
from statprune.methods.bounds import Between, check
from statprune.methods.gradual import least_squares
from statprune.methods.loss_aware import loss_aware
from statprune.methods.rows import rows_alone
from statprune.methods.spread import Columns, Spread, columns_of
from statprune.methods.statistics import InputMoments, Statistic, needs


@rows_alone()
@needs(Statistic.NONE)
def none(original: Tensor, pruned: Tensor, keep: Tensor, moments: InputMoments | None = None) -> Tensor:
    """The pruned weight as it is.

    Returns:
        [..., out, in], float32.
    """
    return pruned.float()


def _energy(columns: Columns, columns_pruned: Columns, moments: InputMoments | None, **settings: Any) -> Step:
    return _steps(energy, columns, columns_pruned, None, **settings)


@by_columns(_energy)
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
    settings = {"column": column, "row": row, "eps": eps, "clamp": clamp, "strength": strength}
    step = _energy(lambda: columns_of(original), lambda: columns_of(pruned), moments, **settings)
    return step(original.float(), pruned.float(), keep.float())


def _activation_energy(columns: Columns, columns_pruned: Columns, moments: InputMoments, **settings: Any) -> Step:
    share_I = moments.second_moment / moments.second_moment.mean(dim=-1, keepdim=True).clamp_min(_TINY)
    return _steps(activation_energy, columns, columns_pruned, share_I.float()[..., None, :], **settings)


@by_columns(_activation_energy)
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
    settings = {"column": column, "row": row, "eps": eps, "clamp": clamp, "strength": strength}
    step = _activation_energy(lambda: columns_of(original), lambda: columns_of(pruned), moments, **settings)
    return step(original.float(), pruned.float(), keep.float())


_TINY = 1e-300
"""Where every channel was always 0, 0 divided by this is 0."""


def _scale(original: Spread, pruned: Spread, eps: float, clamp: tuple[float, float], strength: float) -> Tensor:
    """The factor of each column or row, float64; what is pruned counts with its zeros, around the mean of what was."""
    return (original.energy / (pruned.around(original.mean) + eps)).sqrt_().clamp_(*clamp).pow_(strength)


def _steps(
    function: Callable[..., Tensor],
    columns: Columns,
    columns_pruned: Columns,
    share: Tensor | None,
    *,
    column: bool,
    row: bool,
    **settings: Any,
) -> Step:
    """Energy compensation of any rows: first the columns, whose spreads over all rows are asked for, then the rows.

    Args:
        function: whose settings these are, for what is wrong with them.
        columns: of the original weight.
        columns_pruned: of the pruned one.
        share: what each input counts for in a row, [..., 1, in]; None: all the same.
        column: whether to rescale columns.
        row: whether to rescale rows.
        settings: `eps`, `clamp` and `strength`.
    """
    name, clamp = function.__name__.replace("_", "-"), settings["clamp"]
    check(name, function, **settings)
    if len(clamp) != 2 or clamp[0] > clamp[1]:
        raise ValueError(f"{name}(clamp={list(clamp)}): expected [low, high] with low <= high.")
    if column:
        dense = columns()
        column_mean, column_scale = dense.mean, _scale(dense, columns_pruned(), **settings)

    def step(original: Tensor, pruned: Tensor, kept: Tensor) -> Tensor:
        corrected = _around(pruned, kept, column_mean, column_scale) if column else pruned
        if row:
            own, left = (Spread.of(values, -1, share) for values in (original, corrected))
            corrected = _around(corrected, kept, own.mean, _scale(own, left, **settings))
        return corrected

    return step


def _around(values: Tensor, kept: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """`(values - mean) * scale + mean` where a weight is kept, and 0 elsewhere, where the values are 0 already."""
    return values.mul(scale.float()).addcmul_(kept, (mean * (1 - scale)).float())


COMPENSATIONS: dict[str, Callable[..., Any]] = {
    "none": none,
    "energy": energy,
    "activation-energy": activation_energy,
    "least-squares": least_squares,
    "loss-aware": loss_aware,
}
"""Compensations by the name a recipe uses."""
