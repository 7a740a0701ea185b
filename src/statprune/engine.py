"""One run: select, allocate, observe, prune, land. Everything that can be refused is refused before a weight changes.

for group, moments in layers.observe(...):      the statistics of a group's inputs are complete
    for site in group.sites:
        prune the weight, report it, put it     several ranks share the work; what is observed next has seen it
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from statprune.allocation import Allocation, allocate
from statprune.clock import timed
from statprune.errors import adding, number_of
from statprune.methods.experts import ExpertMoments, sample_energies
from statprune.methods.pruner import PrunedWeight
from statprune.methods.statistics import Statistic
from statprune.model.backward import output_grams_streamed
from statprune.model.gradients import Loss, output_grams
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import has_values
from statprune.model.layers import Layers
from statprune.model.observe import ForwardContext, Moments
from statprune.model.schedule import SEES_PRUNED
from statprune.model.sites import LinearSite
from statprune.model.storage import is_sharded
from statprune.model.undisturbed import undisturbed
from statprune.model.weights import Weights
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup, all_well, sum_over_ranks
from statprune.recipe import Recipe
from statprune.report import FinishedSite, Ledger, PruningReport, SiteReport
from statprune.selection import refuse_unfit_for_experts, select
from statprune.sharing import Task, prune_shared


def run(
    layers: Layers,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    weights: Weights,
    *,
    loss: Loss | None = None,
    ledger: Ledger | None = None,
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
        loss: of a batch, where the recipe is loss-aware; by default the next-token loss of a causal language model.
        ledger: of what is finished: it is not pruned again, and what is pruned goes there.
        process_group: of the ranks that prune together, each with its own inputs.
        progress: called after each input group.
        forward_context: entered around model code.

    Raises:
        StatpruneError: before anything is changed, but for activations that are finite on the first batch and not on a later
            one, and weights that a method cannot prune; the message says how many are pruned already.
    """
    pruner, target = recipe.pruner(), recipe.build_target()
    needs = pruner.needs | target.needs
    schedule = layers.schedule(recipe.schedule, needs)
    is_loss_aware, needs = Statistic.CURVATURE in needs, needs & ~Statistic.CURVATURE
    needs |= Statistic.SAMPLE if needs else Statistic.NONE  # a sample alone is not worth a walk
    done: list[FinishedSite] = []
    device = next((tensor.device for tensor in inputs[0].tensors()), None)
    report = PruningReport(recipe.to_dict(), schedule, num_batches=len(inputs), fallback_reason=layers.reason)
    running: dict[str, Any] = {"process_group": process_group, "forward_context": forward_context}
    with undisturbed(layers.model), adding(lambda: _what_landed(report, weights)):
        selection = select(layers.groups, layers.left_out, recipe)
        refuse_unfit_for_experts(selection, recipe)
        curvature = None
        if is_loss_aware:
            with timed(report.seconds, "gradients", report.memory, device):
                if has_values(layers.model) and not is_sharded(layers.model):
                    curvature = output_grams(layers.model, selection.sites, inputs, loss=loss, progress=progress, **running)
                else:
                    curvature = output_grams_streamed(
                        layers, selection.sites, inputs, weights, loss=loss, progress=progress, **running
                    )
        with timed(report.seconds, "allocate", report.memory, device):
            allocation = allocate(layers, selection, inputs, recipe, weights, curvature=curvature, progress=progress, **running)
        selection = allocation.selection
        report.left_out = list(selection.left_out)
        own = {name: recipe.pruner(pattern) for name, pattern in allocation.patterns.items()}
        finished = ledger.finished() if ledger is not None else {}
        report.seconds |= {"prune": 0.0}
        if weights.is_in_place and schedule in SEES_PRUNED:
            with timed(report.seconds, "check", report.memory, device):  # else no weight changes before the last batch
                for _ in layers.observe(selection.groups, inputs[:1], weights=weights, **running):
                    pass
        with timed(report.seconds, "walk", report.memory, device):
            for group, moments in layers.observe(
                selection.groups, inputs, schedule=recipe.schedule, needs=needs, weights=weights, finished=finished, **running
            ):
                with timed(report.seconds, "prune", report.memory, device):
                    landed = [site for site in group.sites if ledger is not None and site.parameter in finished]
                    for site in landed:
                        assert ledger is not None
                        ledger.land(site)
                        done.append(finished[site.parameter])
                    tasks = [
                        Task(
                            site, site.view(weights.get(site.parameter).detach()), own.get(site.parameter, pruner), target,
                            moments, curvature,
                        )
                        for site in group.sites if site not in landed
                    ]  # fmt: skip
                    del moments
                    fresh = _prune_group(tasks, allocation, report, weights, process_group)
                    tasks.clear()  # neither dense weights nor statistics are in memory while the next group's are collected
                    if ledger is not None and fresh:
                        ledger.add(fresh)
                    done += fresh
                progress(len(done), len(selection.sites), group.sites[-1].name)
            report.num_tokens = done[0].num_tokens if done else 0
            report.sites = _with_output_errors(done, device, process_group)
        all_well(process_group, "the end of the run")  # while a failure can still say what has landed here
    report.seconds["walk"] -= report.seconds["prune"]
    if not needs:
        del report.seconds["walk"]  # nothing was walked
        report.memory.pop("walk", None)
    return report


def _prune_group(
    tasks: Sequence[Task], allocation: Allocation, report: PruningReport, weights: Weights, process_group: ProcessGroup
) -> list[FinishedSite]:
    """Prune weights, report them and put them where they land."""
    fresh: list[FinishedSite] = []
    for task, pruned in prune_shared(tasks, process_group):
        fresh.append(_finished(task.site, task.weight, pruned, task.moments, allocation))  # before the weight changes
        report.sites.append(fresh[-1].report)
        weights.put(task.site, pruned)
    return fresh


def _finished(
    site: LinearSite, weight: Tensor, pruned: PrunedWeight, moments: Moments | None, allocation: Allocation
) -> FinishedSite:
    """What is known of a pruned weight; its energies are zeros where no token came."""
    tokens = tuple(moments.num_tokens.tolist()) if isinstance(moments, ExpertMoments) else None
    report = SiteReport.of(site, weight, pruned, allocation.record(site), tokens)
    if moments is None:
        return FinishedSite(report, None, 0)
    energies = sample_energies(weight, pruned.weight, moments)
    return FinishedSite(report, (0.0, 0.0) if energies is None else tuple(energies.tolist()), int(moments.num_tokens.sum()))


def _with_output_errors(
    done: Sequence[FinishedSite], device: torch.device | None, process_group: ProcessGroup
) -> list[SiteReport]:
    """The reports with their output errors over all ranks, where there are energies."""
    energies = [one.energies for one in done if one.energies is not None]
    if not energies:
        return [one.report for one in done]
    totals = torch.tensor(energies, dtype=torch.float64, device=device)
    sum_over_ranks([totals], process_group, "the output errors")
    errors = [(changed / dense) ** 0.5 if dense else math.nan for changed, dense in totals.tolist()]
    return [
        replace(one.report, output_error=error if math.isfinite(error) else None)
        for one, error in zip(done, errors, strict=True)
    ]


def _what_landed(report: PruningReport, weights: Weights) -> str:
    """Whether the model has changed, for an error."""
    landed = number_of(len(report.sites), "weight") if weights.is_in_place and report.sites else ""
    return f"Pruned already: {landed} before it. Reload the model." if landed else "Nothing was changed."
