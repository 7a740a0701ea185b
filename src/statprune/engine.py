"""One run: select, allocate, observe, prune, land. Everything that can be refused is refused before a weight changes.

for group, moments in layers.observe(...):      the statistics of a group's inputs are complete
    for site in group.sites:
        prune the weight, report it, put it     what is observed next has seen it
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from statprune.allocation import allocate
from statprune.clock import timed
from statprune.errors import SiteError, adding, number_of
from statprune.methods.pruner import PrunedWeight, WeightPruner
from statprune.methods.statistics import InputMoments
from statprune.model.inputs import ModelInputs
from statprune.model.layers import Layers
from statprune.model.observe import ForwardContext
from statprune.model.schedule import SEES_PRUNED
from statprune.model.sites import LinearSite
from statprune.model.undisturbed import undisturbed
from statprune.model.weights import Weights
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup, all_well
from statprune.recipe import Recipe
from statprune.report import PruningReport, SiteReport
from statprune.selection import select


def run(
    layers: Layers,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    weights: Weights,
    *,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> PruningReport:
    """Prune the weights that a recipe selects, and put them where `weights` says.

    Args:
        layers: of the model, whose weights are finite (`check_weights`); its modes, buffers and settings are left as they were.
        inputs: calibration data, on the model's device.
        recipe: how.
        weights: where weights are read from, and where pruned ones land.
        process_group: of the ranks that prune together, each with its own inputs.
        progress: called after each input group.
        forward_context: entered around model code.

    Raises:
        StatpruneError: before anything is changed, but for activations that are finite on the first batch and not on a later
            one, and weights that a method cannot prune; the message says how many are pruned already.
    """
    pruner = recipe.pruner()
    schedule = layers.schedule(recipe.schedule, pruner.needs)
    report = PruningReport(recipe.to_dict(), schedule, num_batches=len(inputs), fallback_reason=layers.reason)
    running: dict[str, Any] = {"process_group": process_group, "forward_context": forward_context}
    with undisturbed(layers.model), adding(lambda: _what_landed(report, weights)):
        selection = select(layers.groups, layers.left_out, recipe)
        with timed(report.seconds, "allocate"):
            allocation = allocate(layers, selection, inputs, recipe, weights, progress=progress, **running)
        selection = allocation.selection
        report.left_out = list(selection.left_out)
        own = {name: recipe.pruner(pattern) for name, pattern in allocation.patterns.items()}
        report.seconds |= {"prune": 0.0}
        if weights.is_in_place and schedule in SEES_PRUNED:
            with timed(report.seconds, "check"):  # else no weight changes before the last batch
                for _ in layers.observe(selection.groups, inputs[:1], weights=weights, **running):
                    pass
        with timed(report.seconds, "walk"):
            for group, moments in layers.observe(
                selection.groups, inputs, schedule=recipe.schedule, needs=pruner.needs, weights=weights, **running
            ):
                with timed(report.seconds, "prune"):
                    for site in group.sites:
                        weight = site.view(weights.get(site.parameter).detach())
                        pruned = _prune(own.get(site.parameter, pruner), site, weight, moments)
                        report.sites.append(SiteReport.of(site, weight, pruned, allocation.record(site)))
                        weights.put(site, pruned)
                if moments is not None and not report.num_tokens:
                    report.num_tokens = int(moments.num_tokens)
                progress(len(report.sites), len(selection.sites), group.sites[-1].name)
        all_well(process_group, "the end of the run")  # while a failure can still say what has landed here
    report.seconds["walk"] -= report.seconds["prune"]
    if not pruner.needs:
        del report.seconds["walk"]  # nothing was walked
    return report


def _prune(pruner: WeightPruner, site: LinearSite, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
    try:
        return pruner(weight, moments)
    except ValueError as e:
        raise SiteError(f"{site.name}: {e}") from e


def _what_landed(report: PruningReport, weights: Weights) -> str:
    """Whether the model has changed, for an error."""
    landed = number_of(len(report.sites), "weight") if weights.is_in_place and report.sites else ""
    return f"Pruned already: {landed} before it. Reload the model." if landed else "Nothing was changed."
