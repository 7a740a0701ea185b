"""Allocation: measure on the dense model what a recipe's allocation needs, before anything is pruned.

One pass over the calibration batches. A group's statistics are dropped as soon as its layers are known, so it holds no more
than the walk does. With `sensitivity`, each layer is then pruned alone and the probe batches are run; the model is untouched.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from statprune.divergence import total_divergence
from statprune.errors import CalibrationError, NonFiniteError, SiteError
from statprune.methods.budget import (
    Owl,
    Sensitivity,
    Uniform,
    budget,
    choose_layers,
    least_loss_sparsities,
    marginal_rates,
    outlier_share,
    owl_sparsities,
    whole_counts,
)
from statprune.methods.patterns import Counted, ModelPattern, Pattern
from statprune.methods.pruner import PrunedWeight, error_energy
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import is_causal, predictions_of
from statprune.model.layers import Layers
from statprune.model.observe import ForwardContext
from statprune.model.schedule import blocks
from statprune.model.sites import LeftOut, LinearSite
from statprune.model.weights import Weights
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup, share, sum_over_ranks
from statprune.recipe import Recipe
from statprune.selection import Selection


@dataclass(frozen=True)
class Allocation:
    """What to prune, and which layers have a pattern of their own."""

    selection: Selection
    patterns: dict[str, Counted] = field(default_factory=dict)
    """By parameter name; the recipe's pattern holds for all others."""

    def record(self, site: LinearSite) -> dict[str, Any] | None:
        """A site's own pattern as plain data."""
        own = self.patterns.get(site.parameter)
        return None if own is None else {"name": "counted", **asdict(own)}


@torch.no_grad()
def allocate(
    layers: Layers,
    selection: Selection,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    weights: Weights,
    *,
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
        process_group: of the ranks that allocate together.
        progress: called after each layer that was measured.
        forward_context: entered around model code.

    Raises:
        NonFiniteError: NaN or infinity in activations, or in the loss with one layer pruned.
        CalibrationError: `sensitivity` on a model without a tensor among its outputs, or with nothing to predict.
        SiteError: a layer cannot be pruned.
    """
    rule, pattern = recipe.build_allocation(), recipe.build_pattern()
    if isinstance(rule, Uniform):
        return Allocation(selection)
    needs = Statistic.MOMENTS | (recipe.pruner().needs if isinstance(rule, Sensitivity) else Statistic.NONE)
    observing: dict[str, Any] = {
        "needs": needs, "weights": weights, "process_group": process_group, "forward_context": forward_context,
    }  # fmt: skip
    sizes = torch.tensor([rows * columns for rows, columns in (site.shape for site in selection.sites)])
    target = pattern.sparsity if pattern.is_unstructured else 0.0
    sparsities = torch.full(sizes.shape, target, dtype=torch.float64)
    harms = torch.zeros(sizes.shape, dtype=torch.float64)
    if isinstance(rule, Owl):
        root_mean_square: dict[str, Tensor] = {}
        for group, moments in layers.observe(selection.groups, inputs, **observing):
            assert moments is not None
            root_mean_square.update({site.parameter: moments.second_moment.sqrt().float() for site in group.sites})
        harms = _outlier_shares(weights, selection, root_mean_square, rule.threshold)
        sparsities = owl_sparsities(harms, sizes, target, rule.spread)
    elif not pattern.is_unstructured or (target and rule.spread):
        device = next(layers.model.parameters()).device
        probes = inputs[: share(rule.probes, len(inputs), device, process_group)]
        probe = _Probe(layers.model, probes, forward_context)
        found = _Sensitivities(weights, recipe, _points(target, rule), probe, len(selection.sites), progress)
        # Nothing is pruned on the way, so that every layer's statistics are the dense model's.
        for group, moments in layers.observe(selection.groups, inputs, **observing):
            assert moments is not None
            for site in group.sites:
                found.measure(site, moments)
        increases = found.increases(process_group)
        harms = increases / sizes
        if found.points:
            points = torch.tensor(found.points, dtype=torch.float64)
            errors = torch.tensor(found.errors, dtype=torch.float64)
            rates = marginal_rates(increases, errors, errors[:, found.points.index(target)], points)
            sparsities = least_loss_sparsities(rates, points, sizes, target)
    if pattern.is_unstructured:
        counts = whole_counts(sparsities, [site.shape for site in selection.sites], target, rule.spread)
        pairs = zip(selection.sites, counts, strict=True)
        return Allocation(selection, {site.parameter: pattern.counted(count, site.shape[1]) for site, count in pairs})
    assert rule.sparsity is not None, "a recipe with an N:M pattern and an allocation has a sparsity"
    return Allocation(_dense_layers(selection, pattern, harms, rule.sparsity, recipe))


def _outlier_shares(weights: Weights, selection: Selection, root_mean_square: Mapping[str, Tensor], threshold: float) -> Tensor:
    """[sites], float64: the share of outliers in the block that each site is in."""
    share_of = {}
    for block in blocks(selection.groups):
        sites = [site for group in block for site in group.sites]
        entries = [_weight(weights, site).float().abs() * root_mean_square[site.parameter] for site in sites]
        share_of.update(dict.fromkeys((site.parameter for site in sites), outlier_share(entries, threshold)))
    return torch.tensor([share_of[site.parameter] for site in selection.sites], dtype=torch.float64)


def _points(target: float, rule: Sensitivity) -> list[float]:
    """The sparsities at which errors are computed: the bounds, the target, and one on either side; none with N:M patterns."""
    if not target:
        return []
    low, high = max(0.0, target - rule.spread), min(1.0, target + rule.spread)
    return [low, (low + target) / 2, target, (target + high) / 2, high]


class _Sensitivities:
    """Prunes one layer after the other on its own, and keeps what that does to its output and to the model's loss."""

    def __init__(
        self, weights: Weights, recipe: Recipe, points: list[float], probe: "_Probe", num_sites: int, progress: Progress
    ) -> None:
        self.weights, self.recipe, self.points, self.probe = weights, recipe, points, probe
        self.num_sites, self.progress = num_sites, progress
        self.errors: list[list[float]] = []
        self.names: list[str] = []
        self.losses: list[Tensor] = []

    def measure(self, site: LinearSite, moments: InputMoments) -> None:
        """Prune the site alone, at every point, and run the probe batches with it at the target."""
        weight, pattern = _weight(self.weights, site), self.recipe.build_pattern()
        if self.points:
            trials = [self._prune(site, weight, moments, _at(point, site, pattern)) for point in self.points]
            self.errors.append([error_energy(weight, pruned, moments) for pruned in trials])
            at_target = trials[self.points.index(pattern.sparsity)]
        else:
            at_target = self._prune(site, weight, moments, None)
        self.losses.append(self.probe({site.parameter: site.view(at_target.weight).contiguous()}))
        self.names.append(site.name)
        self.progress(len(self.names), self.num_sites, f"sensitivity of {site.name}")

    def _prune(self, site: LinearSite, weight: Tensor, moments: InputMoments, pattern: Pattern | None) -> PrunedWeight:
        try:
            return self.recipe.pruner(pattern)(weight, moments)
        except ValueError as e:
            raise SiteError(f"{site.name}: {e}") from e

    def increases(self, process_group: ProcessGroup) -> Tensor:
        """[sites], float64: the loss that each layer's pruning makes, over all ranks (see `_Probe`)."""
        totals = torch.stack(self.losses)
        sum_over_ranks([totals], process_group, "the losses of the probes")
        totals = totals.cpu()
        if not bool(totals[0, 1] > 0):
            raise CalibrationError(
                "Allocation 'sensitivity': on the probe batches the model's output is 0 everywhere, or all padding. Expected "
                "other batches first, or more `probes`. Nothing was changed."
            )
        losses = totals[:, 0] / totals[:, 1]
        for name, loss in zip(self.names, losses, strict=True):
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"Allocation 'sensitivity': the loss on the probe batches is {float(loss)} with {name} pruned. In float16, "
                    "try bfloat16 or float32. Nothing was changed."
                )
        return losses


class _Probe:
    """Measures the model with some weights replaced, as (numerator, denominator) of a mean over tokens or outputs.

    A causal language model: the divergence of its next-token distribution from the dense model's, per token. Any other: the
    energy of the output's error over the energy of the dense output. The dense model's predictions on the probe batches are
    kept: batch x length x vocabulary numbers for each.
    """

    def __init__(self, model: nn.Module, batches: Sequence[ModelInputs], forward_context: ForwardContext) -> None:
        self.model, self.batches, self.forward_context = model, batches, forward_context
        self.is_language = is_causal(model)
        self.dense = [self._predict(batch, {}) for batch in batches]

    def __call__(self, weights: dict[str, Tensor]) -> Tensor:
        """[2], float64."""
        if not self.batches:  # the other ranks have them all
            return torch.zeros(2, dtype=torch.float64, device=next(self.model.parameters()).device)
        return torch.stack([self._measure(number, batch, weights) for number, batch in enumerate(self.batches)]).sum(0)

    def _measure(self, number: int, batch: ModelInputs, weights: dict[str, Tensor]) -> Tensor:
        expected, predicted = self.dense[number], self._predict(batch, weights)
        mask = batch.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == predicted.shape[:-1]:
            expected, predicted = (values[mask != 0] for values in (expected, predicted))
        if self.is_language:
            num_tokens = predicted.numel() // predicted.shape[-1]
            return torch.stack([total_divergence(expected, predicted), torch.tensor(num_tokens).to(predicted.device).double()])
        expected = expected.double()
        return torch.stack([(predicted.double() - expected).square().sum(), expected.square().sum()])

    def _predict(self, batch: ModelInputs, weights: dict[str, Tensor]) -> Tensor:
        with self.forward_context():
            found = predictions_of(functional_call(self.model, weights, batch.args, batch.kwargs))
        if found is None:
            raise CalibrationError(
                f"Allocation 'sensitivity': {type(self.model).__name__} returns no tensor to compare. Use 'owl', which looks "
                "at weights and inputs alone. Nothing was changed."
            )
        return found


def _weight(weights: Weights, site: LinearSite) -> Tensor:
    return site.view(weights.get(site.parameter).detach())


def _at(sparsity: float, site: LinearSite, pattern: ModelPattern) -> Counted:
    """The site at this sparsity, one weight in every row being kept."""
    rows, columns = site.shape
    return pattern.counted(min(round(sparsity * rows * columns), rows * (columns - 1)), columns)


def _dense_layers(selection: Selection, pattern: ModelPattern, harms: Tensor, sparsity: float, recipe: Recipe) -> Selection:
    """The selection without the layers that need not be pruned for this sparsity."""
    sites = selection.sites
    counts = [round(rows * columns * pattern.sparsity) for rows, columns in (site.shape for site in sites)]
    num_weights = sum(rows * columns for rows, columns in (site.shape for site in sites))
    chosen = {sites[index].parameter for index in choose_layers(harms.tolist(), counts, budget(sparsity, num_weights))}
    reached = sum(count for site, count in zip(sites, counts, strict=True) if site.parameter in chosen) / num_weights
    name = recipe.allocation.partition(":")[0]
    reason = (
        f"dense by the allocation {name}: {pattern} in the other layers makes {100 * reached:.4g} % of the weights in scope "
        f"zero, {100 * sparsity:.4g} % were asked for"
    )
    groups = [
        replace(group, sites=tuple(site for site in group.sites if site.parameter in chosen)) for group in selection.groups
    ]
    dense = [LeftOut(site.name, site.shape, reason) for site in sites if site.parameter not in chosen]
    return Selection(tuple(group for group in groups if group.sites), (*selection.left_out, *dense))
