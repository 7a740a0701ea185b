"""Prune a model that is larger than memory: read from its files segment by segment, and written into those of the output.

skeleton     the model without values, traced as it is               disk/skeleton
weights      read before a segment runs, let go behind it            disk/streamed
shards       the output's files: a pruned weight goes there at once  disk/shards
journal      what is finished, for a run that goes on after this     disk/journal

Several ranks share the work as in memory. Each reads what it computes with; the first one writes, and keeps the journal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from statprune.agreement import check_layers, check_streamed_start, device_of
from statprune.clock import available_memory, resident_memory, timed
from statprune.disk.journal import Journal, fingerprint
from statprune.disk.scratch import offloaded, remove_leftovers
from statprune.disk.shards import Shards
from statprune.disk.skeleton import Skeleton
from statprune.disk.streamed import Streamed
from statprune.engine import run
from statprune.errors import CheckpointError, SiteError, TracingError
from statprune.methods.pruner import is_by_blocks
from statprune.methods.statistics import Statistic
from statprune.methods.workspace import workspace, workspace_by_blocks
from statprune.model.accounting import expect
from statprune.model.expected import Expected, gigabytes
from statprune.model.inputs import ModelInputs
from statprune.model.layers import Layers
from statprune.model.offload import Place
from statprune.model.sites import LinearSite
from statprune.output import JOURNAL, Reserved, seen_by_all
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup, all_well, together
from statprune.ranks import place as place_among
from statprune.recipe import Recipe
from statprune.report import PruningReport
from statprune.selection import select


def check_streamed(skeleton: Skeleton, layers: Layers, recipe: Recipe) -> None:
    """Refuse what cannot be done with weights that are on disk.

    Raises:
        TracingError: the model has no graph.
        SiteError: a weight to prune is not in the files as it is computed with; or the method needs the whole model at once.
    """
    if layers.traced is None:
        raise TracingError(
            f"{type(skeleton.model).__name__} has no graph, so it cannot be streamed: {layers.reason} Prune it in memory."
        )
    if recipe.probes_whole_model:
        raise SiteError(
            f"The allocation {recipe.allocation} runs the whole model for each layer, which would read all weights as often. "
            "Stream with the allocation uniform or owl (or curves, where the method is loss-aware), or prune in memory."
        )
    for site in select(layers.groups, layers.left_out, recipe).sites:
        own = skeleton.canonical[site.parameter]
        if own not in skeleton.stored_as:
            raise SiteError(
                f"{site.name} is made of several tensors of the files, so it cannot be streamed: leave it dense with `ignore`, "
                "or prune in memory."
            )


def expected_memory(
    model: Any, layers: Layers, inputs: Sequence[ModelInputs], recipe: Recipe, values: Place = "device"
) -> Expected:
    """What pruning it from its files will take of memory on the model's device, with what the process has now.

    Args:
        model: its parameters may be without values.
        layers: of the model, with a graph.
        inputs: of the shapes of the calibration data.
        recipe: how.
        values: where those of the batches wait (`prune_streamed`).

    The perplexity before and after, and the backward pass of a loss-aware method, are not in it.
    """
    assert layers.traced is not None, "a model that is streamed has a graph"
    pruner = recipe.pruner()
    needs = pruner.needs | recipe.build_target().needs
    is_plain = is_by_blocks(pruner) and not Statistic.CROSS & needs
    if needs & ~Statistic.CURVATURE:
        needs |= Statistic.SAMPLE  # as `engine.run` has it
    names = recipe.criterion["name"], [_kind(one) for one in recipe.compensation]

    def to_prune(site: LinearSite) -> int:
        size: int = model.get_parameter(site.parameter).element_size()
        # Of a stack one matrix is worked on, while the others are there with their masks.
        others = (site.num_weights - math.prod(site.matrix)) * (size + 1)
        if is_plain:
            return others + workspace_by_blocks(*site.matrix, size)
        return others + workspace(*names, *site.matrix, needs)

    device = device_of(model)
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory("RssAnon")
    return expect(
        layers.traced, select(layers.groups, layers.left_out, recipe).groups, inputs,
        dict(model.named_parameters(remove_duplicate=False)),
        schedule=recipe.schedule, needs=needs, workspace=to_prune, values=values, base=base or 0,
    )  # fmt: skip


def choose_place(
    model: Any,
    layers: Layers,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    *,
    memory: int | None = None,
    available: Callable[[torch.device], int | None] = available_memory,
) -> Expected:
    """Where the values of the batches are to wait, and what a run so takes: on the device, where that fits into memory; in a
    GPU's host memory, where they fit into that; else in files.

    Args:
        model: as `expected_memory`, and so are the next three.
        memory: bytes that the run may take on the model's device, with what the process has; None: what is available.
        available: bytes that a device has, None where it does not tell.
    """
    device = device_of(model)
    expected = expected_memory(model, layers, inputs, recipe)
    if memory is None and (free := available(device)) is not None:
        memory = expected.base + free
    if memory is None or expected.total <= memory or not expected.widest.values:
        return expected
    if device.type == "cuda" and expected.widest.values <= (available(torch.device("cpu")) or 0):
        return expected_memory(model, layers, inputs, recipe, "host")
    return expected_memory(model, layers, inputs, recipe, "disk")


def check_room(skeleton: Skeleton, place: Reserved, max_shard_size: int | str, expected: Expected) -> None:
    """Raise CheckpointError where the disk has no room for the output's weights with values that are to wait in files, of as
    many processes as there are on this machine."""
    if expected.place == "disk":
        shards = lay_out(skeleton, place.folder, max_shard_size)
        room = 0 if shards.are_there() else shards.num_bytes
        size = expected.processes * expected.widest.values
        place.check_room(room + size, f"{gigabytes(size)} of it for the values of the batches while it runs")


def _kind(compensation: Mapping[str, Any]) -> str:
    """What it is among the methods whose workspace is known."""
    return f"{compensation['name']}, in steps" if compensation.get("steps") else str(compensation["name"])


def lay_out(skeleton: Skeleton, folder: Path, max_shard_size: int | str) -> Shards:
    """The files of an output in a folder, as they will be; nothing is written."""
    dtypes = {tensor: skeleton.model.get_parameter(own).dtype for own, tensor in skeleton.stored_as.items()}
    usual: torch.dtype = skeleton.model.dtype
    tensors = {
        name: (dtypes.get(name, usual if one.dtype.is_floating_point else one.dtype), one.shape)
        for name, one in skeleton.kept.items()
    }
    return Shards(folder, tensors, max_shard_size)


def prune_streamed(
    skeleton: Skeleton,
    layers: Layers,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    place: Reserved | None,
    *,
    max_shard_size: int | str,
    values: Place = "device",
    settings: dict[str, Any] | None = None,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    copied: Progress = silent,
    then: Callable[[Streamed], None] | None = None,
) -> tuple[PruningReport, dict[str, tuple[str, str]]]:
    """Prune a model from its files into those of its output, or go on with a run that has been ended.

    Args:
        skeleton: of the model.
        layers: of the skeleton, with a graph.
        inputs: calibration data, on the device.
        recipe: how.
        place: of the output; what another run has finished there is taken over, where it is of the same inputs. The first
            rank's, on a disk that all ranks see; None on the others.
        max_shard_size: of one file of weights.
        values: where those of the batches wait between two groups, which changes no bit; on the disk, in files beside the
            output.
        settings: what else two runs must have in common for one to go on with the other's work.
        process_group: of the ranks that prune together, each with its own inputs.
        progress: called after each input group.
        copied: called after each tensor that is copied as it is, at the end.
        then: called at the end with the pruned weights, before they are let go; on every rank.

    Returns:
        The report, and in which file and under which name each pruned parameter is.

    Raises:
        StatpruneError: as `prune`, `check_streamed` and `check_room`; the inputs of the run to go on with are others; the disk
            is full. What is finished stays in the place's hidden folder.
        RanksError: another rank failed, or does something else.
    """
    device = device_of(skeleton.model)
    with together(process_group, device, "statprune prune --stream"):
        check_streamed(skeleton, layers, recipe)
        assert layers.traced is not None, "a model that is streamed has a graph"
        check_streamed_start(skeleton, recipe, inputs, process_group)
        check_layers(layers, process_group)
        if place is not None:
            place.check_held()
            remove_leftovers(place.folder.parent)  # before the others go on, who wait for this rank next
        folder = seen_by_all(place.folder if place is not None else None, process_group)
        shards = lay_out(skeleton, folder, max_shard_size)
        identity = _identity(skeleton, inputs, recipe, shards, process_group, settings or {})
        weights = Streamed(skeleton, shards, device, writes=place is not None)
        try:
            journal = Journal(folder.with_name(JOURNAL), identity, weights, process_group)
            if place is not None and not shards.are_there():
                shards.create()
            rank, ranks = place_among(process_group)
            if place is not None and values == "disk":
                told = expected_memory(skeleton.model, layers, inputs, recipe, values)
                check_room(skeleton, place, max_shard_size, replace(told, processes=ranks))
            with offloaded(values, layers.traced, folder.parent, rank) as offload:
                report = run(
                    replace(layers, offload=offload), inputs, recipe, weights,
                    ledger=journal, process_group=process_group, progress=progress,
                )  # fmt: skip
            pruned = {site.parameter: skeleton.stored_as[skeleton.canonical[site.parameter]] for site in report.sites}
            if place is not None:
                with timed(report.seconds, "copy", report.memory):
                    _copy_rest(skeleton, shards, set(pruned.values()), copied)
                    shards.sync()
            all_well(process_group, "what is written")
            if then is not None:
                then(weights)
        except OSError as e:
            where = folder if place is None else place.output
            raise CheckpointError(f"The output {where} could not be written: {e.strerror}. Make room.") from e
        finally:
            weights.close()
    return report, {parameter: (shards.places[name].file.name, name) for parameter, name in pruned.items()}


def _identity(
    skeleton: Skeleton,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    shards: Shards,
    process_group: ProcessGroup,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What two runs have in common of which one can go on with the other's work: all that a result depends on."""
    files = {}
    for place in skeleton.kept.values():
        status = place.file.stat()
        files[place.file.name] = [status.st_size, status.st_mtime_ns]
    model = {"files": files, "dtype": str(skeleton.model.dtype), "device": str(device_of(skeleton.model))}
    layout = {place.file.name: place.start for place in shards.places.values()}
    return fingerprint(recipe.to_dict(), model, inputs, process_group, output=layout, **settings)


def _copy_rest(skeleton: Skeleton, shards: Shards, pruned: set[str], progress: Progress) -> None:
    """The tensors that were not pruned, from the model's files."""
    rest = [name for name in skeleton.kept if name not in pruned]
    for number, name in enumerate(rest):
        shards.copy(name, skeleton.kept[name])
        progress(number + 1, len(rest), name)
