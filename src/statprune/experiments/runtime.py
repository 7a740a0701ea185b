"""What one block costs: collecting its statistics, and choosing and correcting its weights (table 3 of the paper).

The forward pass is the same for every method and is not counted. Each time is taken several times, and the median counts.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from statprune.errors import ExperimentError
from statprune.experiments.cost import measured, peak_of_tensors
from statprune.methods.statistics import InputMoments
from statprune.model.inputs import ModelInputs
from statprune.model.layers import Layers
from statprune.model.schedule import blocks
from statprune.model.sites import InputGroup, LinearSite
from statprune.model.undisturbed import undisturbed
from statprune.recipe import Recipe
from statprune.selection import select


@torch.no_grad()
def measure_block(
    layers: Layers, inputs: Sequence[ModelInputs], recipe: Recipe, *, rounds: int
) -> tuple[dict[str, float], int]:
    """Time the first block of what a recipe prunes; the model is left as it is.

    Args:
        layers: of a model whose first block consists of linear modules.
        inputs: calibration data, on the model's device.
        recipe: its pruner is timed.
        rounds: how often each time is taken, after one round that measures the memory.

    Returns:
        Seconds of `statistics`, `pruning` and their `total`, and bytes: the statistics, and the tensors of pruning at
        the highest point, beyond the model.

    Raises:
        ExperimentError: a layer of the block is no module of its own.
        SiteError: as `select`.
    """
    model, pruner = layers.model, recipe.pruner()
    block = first_block(layers, recipe)
    device = next(model.parameters()).device
    weights = {site.parameter: weight for group in block for site, weight in weights_of(model, group)}

    def prune(moments: dict[str, InputMoments]) -> None:
        for group in block:
            for site in group.sites:
                pruner(weights[site.parameter], moments.get(group.name))

    def statistics_of_inputs() -> tuple[dict[str, InputMoments], float]:
        if not pruner.needs:
            return {}, 0.0
        moments = {group.name: InputMoments.zeros(group.in_features, pruner.needs, device=device) for group in block}
        return moments, show_inputs(model, block, inputs, {name: one.add for name, one in moments.items()})

    moments, _ = statistics_of_inputs()
    size = sum(total.nbytes for one in moments.values() for total in one.totals())
    peak_memory = size + peak_of_tensors(lambda: prune(moments), device)
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        moments, seconds = statistics_of_inputs()
        with measured(device) as cost:
            prune(moments)
        times.append((seconds, cost.seconds))
    collected, pruned = (statistics.median(column) for column in zip(*times, strict=True))
    return {"statistics": collected, "pruning": pruned, "total": collected + pruned}, peak_memory


def first_block(layers: Layers, recipe: Recipe) -> list[InputGroup]:
    """Of what a recipe prunes, but stacks of experts, whose inputs no module shows; SiteError as `select`."""
    groups = select(layers.groups, layers.left_out, recipe).groups
    return list(blocks([group for group in groups if group.routing is None])[0])


def weights_of(model: nn.Module, group: InputGroup) -> list[tuple[LinearSite, Tensor]]:
    """A group's sites, each with its weight [out, in]."""
    return [(site, site.view(model.get_parameter(site.parameter).detach())) for site in group.sites]


def show_inputs(
    model: nn.Module,
    block: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    show: Mapping[str, Callable[[Tensor], object]],
) -> float:
    """Run batches as far as the block, and show each group's inputs to what stands under its name: the seconds that it took.

    Raises:
        ExperimentError: a layer is no module of its own.
    """
    seconds = 0.0
    missing: set[str] = set()
    device = next(model.parameters()).device

    def hook_for(group: InputGroup) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal seconds
            with measured(device) as cost:
                show[group.name](args[0])
            seconds += cost.seconds
            missing.discard(group.name)
            if not missing:
                raise _BlockDone

        return add

    handles = [module_of(model, group.sites[0]).register_forward_pre_hook(hook_for(group)) for group in block]
    try:
        with undisturbed(model):
            for batch in batches:
                missing |= show.keys()
                try:
                    model(*batch.args, **batch.kwargs)
                except _BlockDone:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return seconds


def module_of(model: nn.Module, site: LinearSite) -> nn.Module:
    """The module whose weight it is; ExperimentError where there is none."""
    module = model.get_submodule(site.parameter.rpartition(".")[0])
    if getattr(module, "weight", None) is not model.get_parameter(site.parameter):
        raise ExperimentError(f"Only modules are timed, and {site.name} is no linear module of its own.")
    return module


class _BlockDone(Exception):
    """Every group of the block has seen the batch: no error, but the way out of a forward pass."""
