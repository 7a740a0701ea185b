"""What `curves` measures: the errors of a sample of each layer's rows at several sparsities or patterns, by a fast method."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from statprune.allocation.dense import DenseModel
from statprune.allocation.probes import Probes
from statprune.errors import NonFiniteError, SiteError
from statprune.methods.apportion import FLOOR, budget, choose, counted_at, least_error_sparsities
from statprune.methods.budget import Curves
from statprune.methods.patterns import ModelPattern, Pattern
from statprune.methods.precision import full_precision
from statprune.methods.pruner import PrunedWeight, WeightPruner
from statprune.methods.registry import build_pruner
from statprune.methods.statistics import InputMoments
from statprune.model.sites import LinearSite
from statprune.ranks import sum_over_ranks

STEP = 0.1
"""The greatest distance between two sparsities at which a curve is measured."""

ROWS = 8
"""One row in so many is in the sample, and `LEAST_ROWS` at least. Rows are pruned apart, so that a sample is what it is."""

LEAST_ROWS = 32

BATCHES = 4
"""One calibration batch in so many goes into the Gram."""


class Curvature(Protocol):
    """What is known of the loss's gradients with respect to the outputs of the dense model's layers."""

    def diagonal(self, parameter: str) -> Tensor:
        """[out], 0 or more: the mean over tokens of the squared gradient of the summed token loss, by the weight's name."""


def curve_sparsities(dense: DenseModel, rule: Curves, pattern: ModelPattern, curvature: Curvature | None) -> Tensor:
    """The sparsities of an unstructured pattern's layers at which their errors together cost the least: [layers], float64."""
    target = pattern.sparsity
    at = points(target, rule.spread)

    def tried(site: LinearSite) -> list[Pattern]:
        shape = (num_sampled(site.shape[0]), site.shape[1])
        return [counted_at(point, shape, pattern) for point in at]

    errors = torch.tensor(error_curves(dense, pattern, tried, at.index(target), curvature, rule.probes), dtype=torch.float64)
    sizes = torch.tensor([rows * columns for rows, columns in (site.shape for site in dense.sites)])
    return least_error_sparsities(errors, torch.tensor(at, dtype=torch.float64), sizes, target)


def curve_choices(
    dense: DenseModel, rule: Curves, pattern: ModelPattern, sparsity: float, curvature: Curvature | None
) -> list[ModelPattern | None]:
    """An N:M pattern for each layer, or None for one that stays dense, so that together they are at least this sparse."""
    milder = pattern.milder() if rule.mixed else ()
    fitting = [[*(one for one in milder if one.fits(site.shape[1])), pattern] for site in dense.sites]
    patterns = {site.parameter: own for site, own in zip(dense.sites, fitting, strict=True)}
    errors = error_curves(dense, pattern, lambda site: patterns[site.parameter], -1, curvature, rule.probes)
    counts = [[one.pruned_of(*site.shape) for one in patterns[site.parameter]] for site in dense.sites]
    total = budget(sparsity, sum(rows * columns for rows, columns in (site.shape for site in dense.sites)))
    chosen = choose([[0.0, *own] for own in errors], [[0, *own] for own in counts], total)
    return [own[number - 1] if number else None for own, number in zip(fitting, chosen, strict=True)]


def error_curves(
    dense: DenseModel,
    pattern: ModelPattern,
    tried: Callable[[LinearSite], Sequence[Pattern]],
    usual: int,
    curvature: Curvature | None,
    probes: int,
) -> list[list[float]]:
    """The errors of each layer with several patterns, in one unit for all layers, and equal on all ranks.

    Args:
        dense: the model.
        pattern: the recipe's; without gradients, whole layers are pruned with it.
        tried: the patterns for a layer's sampled rows.
        usual: which of them stands for the recipe's.
        curvature: gradients; None: a layer's error with the recipe's pattern is what the probes measure.
        probes: how many, where there are no gradients.

    Raises:
        SiteError: the Gram of a layer's inputs cannot be factorised.
        NonFiniteError: an error, or a probe's loss, is NaN or infinite.
        CalibrationError: without gradients, as `Probes`.
    """
    probing = Probes(dense, dense.sequences(probes), "curves") if curvature is None else None
    found: list[list[Tensor]] = []
    for number, (site, moments) in enumerate(dense.observe(fast_pruner(pattern).needs, dense.one_in(BATCHES)), start=1):
        weight = dense.weight(site)
        rows = sampled_rows(site.shape[0]).to(weight.device)
        share = torch.full((len(rows),), site.shape[0] / len(rows), dtype=torch.float64, device=weight.device)
        if curvature is not None:
            share *= curvature.diagonal(site.parameter).to(share)[rows]
        sample = weight[rows].float()
        changes = (_prune(one, site, sample, moments).weight.sub_(sample) for one in tried(site))
        found.append([(row_errors(change, moments) * share).sum() for change in changes])
        if probing is not None:
            probing.measure(site, _prune(pattern, site, weight, moments).weight)
        dense.progress(number, len(dense.sites), f"error curve of {site.name}")
    totals = torch.stack([error for errors in found for error in errors])
    # The same sums everywhere, but for the last digit of one machine's arithmetic, which must not decide.
    sum_over_ranks([totals], dense.process_group, "the error curves")
    numbers = iter(totals.tolist())
    curves = [[next(numbers) for _ in errors] for errors in found]
    for site, curve in zip(dense.sites, curves, strict=True):
        if not all(map(math.isfinite, curve)):
            raise NonFiniteError(
                f"Allocation 'curves': the error of {site.name} is not finite. Are there absurdly large activations or "
                "gradients? Leave the layer dense with `ignore`, or take another allocation. Nothing was changed."
            )
    return curves if probing is None else _scaled(curves, usual, probing.increases())


def points(target: float, spread: float) -> list[float]:
    """Sparsities within (0, 1), increasing: the bounds, the target, and so many between them that no two are far apart."""
    low, high = max(target - spread, target / 10), min(target + spread, 1 - (1 - target) / 10)
    below, above = (max(1, math.ceil(length / STEP - 1e-6)) for length in (target - low, high - target))
    return [
        *(low + (target - low) * step / below for step in range(below)),
        target,
        *(target + (high - target) * step / above for step in range(1, above + 1)),
    ]


def sampled_rows(num_rows: int) -> Tensor:
    """Numbers of the rows that stand for all, increasing; the same in every process."""
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randperm(num_rows, generator=generator)[: num_sampled(num_rows)].sort().values


def num_sampled(num_rows: int) -> int:
    """How many rows stand for so many."""
    return min(num_rows, max(LEAST_ROWS, num_rows // ROWS))


def row_errors(change: Tensor, moments: InputMoments) -> Tensor:
    """[rows], float64: the energy d H d^T of what each row's change [rows, in] does to the layer's output."""
    assert moments.gram is not None, "the fast pruner needs it too"
    with full_precision(change.device.type):
        return ((change @ moments.gram) * change).sum(dim=-1, dtype=torch.float64)


def fast_pruner(pattern: Pattern) -> WeightPruner:
    """What a layer is pruned with for its curve, whatever the recipe's method is: its criterion looks at one row at a time."""
    return build_pruner({"name": "optimal-brain"}, pattern, [{"name": "least-squares", "steps": 5, "iterations": 4}])


def _prune(pattern: Pattern, site: LinearSite, weight: Tensor, moments: InputMoments) -> PrunedWeight:
    try:
        return fast_pruner(pattern)(weight, moments)
    except ValueError as e:
        raise SiteError(f"{site.name}: {e}") from e


def _scaled(curves: list[list[float]], usual: int, increases: Tensor) -> list[list[float]]:
    """The curves such that each is the measured increase at the usual pattern; less than a little counts as a little."""
    measured = increases.clamp_min(FLOOR * float(increases.clamp_min(0).mean())).tolist()
    at_usual = [curve[usual] for curve in curves]
    if not sum(measured):  # nothing is felt in the predictions: the errors decide
        return curves
    mean = sum(measured) / sum(at_usual) if sum(at_usual) else 1.0
    factors = [increase / error if error > 0 else mean for increase, error in zip(measured, at_usual, strict=True)]
    return [[factor * error for error in curve] for factor, curve in zip(factors, curves, strict=True)]
