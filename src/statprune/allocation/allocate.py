"""A rule in, the patterns of the layers out."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from statprune.allocation.curves import Curvature, curve_choices, curve_sparsities
from statprune.allocation.dense import DenseModel
from statprune.allocation.sensitivity import sensitivities
from statprune.methods.apportion import budget, choose, outlier_share, owl_sparsities, whole_counts
from statprune.methods.budget import Curves, Owl, Uniform
from statprune.methods.patterns import PATTERNS, SITE_PATTERNS, ModelPattern, Pattern
from statprune.methods.statistics import Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.layers import Layers
from statprune.model.observe import ForwardContext
from statprune.model.schedule import blocks
from statprune.model.sites import LeftOut, LinearSite
from statprune.model.weights import Weights
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup
from statprune.recipe import Recipe
from statprune.selection import Selection

_NAMES = {kind: name for name, kind in {**PATTERNS, **SITE_PATTERNS}.items()}


@dataclass(frozen=True)
class Allocation:
    """What to prune, and which layers have a pattern of their own."""

    selection: Selection
    patterns: dict[str, Pattern] = field(default_factory=dict)
    """By parameter name; the recipe's pattern holds for all others."""

    def record(self, site: LinearSite) -> dict[str, Any] | None:
        """A site's own pattern as plain data."""
        own: Any = self.patterns.get(site.parameter)
        return None if own is None else {"name": _NAMES[type(own)], **asdict(own)}


@torch.no_grad()
def allocate(
    layers: Layers,
    selection: Selection,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    weights: Weights,
    *,
    curvature: Curvature | None = None,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Allocation:
    """Carry out a recipe's allocation; `uniform` costs nothing. All ranks come to the same one.

    Args:
        layers: of the model, which is dense, and left so.
        selection: the layers that share the budget.
        inputs: calibration data, on the model's device.
        recipe: its `allocation` and its pattern; with `sensitivity` its whole pruner is tried out.
        weights: of the model; nothing is put there.
        curvature: gradients of the loss, which weigh the errors of `curves`; None: that measures what pruning does to the
            model's predictions instead.
        process_group: of the ranks that allocate together.
        progress: called after each layer that was measured.
        forward_context: entered around model code.

    Raises:
        NonFiniteError: NaN or infinity in activations, in an error, or in the loss with one layer pruned.
        CalibrationError: `sensitivity`, or `curves` without gradients, on a model without a tensor among its outputs, or with
            nothing to predict.
        SiteError: a layer cannot be pruned.
    """
    rule, pattern = recipe.build_allocation(), recipe.build_pattern()
    if isinstance(rule, Uniform):
        return Allocation(selection)
    dense = DenseModel(layers, selection, inputs, weights, process_group, progress, forward_context)
    sizes = torch.tensor([rows * columns for rows, columns in (site.shape for site in dense.sites)])
    if pattern.is_unstructured:
        target = pattern.sparsity
        if isinstance(rule, Owl):
            sparsities = owl_sparsities(_outlier_shares(dense, rule.threshold), sizes, target, rule.spread)
        elif not (target and rule.spread):
            sparsities = torch.full(sizes.shape, target, dtype=torch.float64)
        elif isinstance(rule, Curves):
            sparsities = curve_sparsities(dense, rule, pattern, curvature)
        else:
            _, sparsities = sensitivities(dense, rule, recipe)
        counts = whole_counts(sparsities, [site.matrix for site in dense.sites], target, rule.spread)
        pairs = zip(dense.sites, counts, strict=True)
        return Allocation(selection, {site.parameter: pattern.counted(count, site.shape[1]) for site, count in pairs})
    assert rule.sparsity is not None, "a recipe with an N:M pattern and an allocation has a sparsity"
    if isinstance(rule, Curves):
        chosen = curve_choices(dense, rule, pattern, rule.sparsity, curvature)
    else:
        harms = (
            _outlier_shares(dense, rule.threshold) if isinstance(rule, Owl) else sensitivities(dense, rule, recipe)[0] / sizes
        )
        pruned = [pattern.pruned_of(*site.shape) for site in dense.sites]
        costs = [[0.0, harm * count] for harm, count in zip(harms.tolist(), pruned, strict=True)]
        numbers = choose(costs, [[0, count] for count in pruned], budget(rule.sparsity, int(sizes.sum())))
        chosen = [pattern if number else None for number in numbers]
    return _of_choices(selection, chosen, pattern, rule.sparsity, recipe)


def _outlier_shares(dense: DenseModel, threshold: float) -> Tensor:
    """[layers], float64: the share of outliers in the block that each layer is in."""
    root_mean_square = {
        site.parameter: moments.second_moment.sqrt().float() for site, moments in dense.observe(Statistic.MOMENTS)
    }
    share_of = {}
    for block in blocks(dense.selection.groups):
        sites = [site for group in block for site in group.sites]
        entries = [dense.weight(site).float().abs() * root_mean_square[site.parameter] for site in sites]
        share_of.update(dict.fromkeys((site.parameter for site in sites), outlier_share(entries, threshold)))
    return torch.tensor([share_of[site.parameter] for site in dense.sites], dtype=torch.float64)


def _of_choices(
    selection: Selection, chosen: Sequence[ModelPattern | None], pattern: ModelPattern, sparsity: float, recipe: Recipe
) -> Allocation:
    """The allocation in which each layer has its pattern, or stays dense with None."""
    sites = selection.sites
    own = {site.parameter: one for site, one in zip(sites, chosen, strict=True) if one is not None}
    weights = sum(rows * columns for rows, columns in (site.shape for site in sites))
    reached = sum(own[site.parameter].pruned_of(*site.shape) for site in sites if site.parameter in own) / weights
    name = recipe.allocation.partition(":")[0]
    kinds = sorted(set(own.values()), key=lambda one: (-one.sparsity, one.group_size or 0))
    reason = (
        f"dense by the allocation {name}: {' and '.join(map(str, kinds))} in the other layers makes {100 * reached:.4g} % of "
        f"the weights in scope zero, {100 * sparsity:.4g} % were asked for"
    )
    groups = [replace(group, sites=tuple(site for site in group.sites if site.parameter in own)) for group in selection.groups]
    dense = [LeftOut(site.name, site.shape, reason) for site in sites if site.parameter not in own]
    return Allocation(
        Selection(tuple(group for group in groups if group.sites), (*selection.left_out, *dense)),
        {name: one for name, one in own.items() if one != pattern},
    )
