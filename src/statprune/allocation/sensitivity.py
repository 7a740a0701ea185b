"""What `sensitivity` measures: what each layer pruned alone by the recipe's method does to its output and to the model."""

import torch
from torch import Tensor

from statprune.allocation.dense import DenseModel
from statprune.allocation.probes import Probes
from statprune.errors import SiteError
from statprune.methods.apportion import counted_at, least_loss_sparsities, marginal_rates
from statprune.methods.budget import Sensitivity
from statprune.methods.patterns import Pattern
from statprune.methods.pruner import PrunedWeight, error_energy
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.sites import LinearSite
from statprune.recipe import Recipe


def sensitivities(dense: DenseModel, rule: Sensitivity, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """How much the loss increases with each layer pruned alone, and the sparsities that cost the least loss.

    Returns:
        [layers] and [layers], float64; the latter 0 with an N:M pattern.
    """
    pattern = recipe.build_pattern()
    points = _points(pattern.sparsity, rule.spread) if pattern.is_unstructured else []
    probes = Probes(dense, dense.first(rule.probes), "sensitivity")
    errors: list[list[float]] = []
    for number, (site, moments) in enumerate(dense.observe(Statistic.MOMENTS | recipe.pruner().needs), start=1):
        weight = dense.weight(site)
        own = [counted_at(point, site.matrix, pattern) for point in points] if points else [None]
        trials = [_prune(recipe, one, site, weight, moments) for one in own]
        errors.append([error_energy(weight, pruned, moments) for pruned in trials] if points else [])
        probes.measure(site, trials[points.index(pattern.sparsity) if points else 0].weight)
        dense.progress(number, len(dense.sites), f"sensitivity of {site.name}")
    increases = probes.increases()
    if not points:
        return increases, torch.zeros_like(increases)
    found, at = torch.tensor(errors, dtype=torch.float64), torch.tensor(points, dtype=torch.float64)
    rates = marginal_rates(increases, found, found[:, points.index(pattern.sparsity)], at)
    sizes = torch.tensor([site.shape[0] * site.shape[1] for site in dense.sites])
    return increases, least_loss_sparsities(rates, at, sizes, pattern.sparsity)


def _points(target: float, spread: float) -> list[float]:
    """The sparsities at which errors are computed: the bounds, the target, and one on either side."""
    low, high = max(0.0, target - spread), min(1.0, target + spread)
    return [low, (low + target) / 2, target, (target + high) / 2, high]


def _prune(recipe: Recipe, pattern: Pattern | None, site: LinearSite, weight: Tensor, moments: InputMoments) -> PrunedWeight:
    try:
        return recipe.pruner(pattern)(weight, moments)
    except ValueError as e:
        raise SiteError(f"{site.name}: {e}") from e
