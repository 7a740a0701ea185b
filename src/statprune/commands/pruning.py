"""`statprune prune`: from a model to a verified sparse one."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from statprune.commands import console, display, processes
from statprune.commands.options import (
    MODEL_SAMPLES,
    CalibrationOptions,
    DType,
    ModelOptions,
    Opened,
    RecipeOptions,
)
from statprune.commands.streamed import prune_streamed, show_memory, wants_stream
from statprune.errors import CalibrationError, NonFiniteError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from statprune.model.layers import Layers
    from statprune.output import Reserved
    from statprune.recipe import Recipe, Search


def prune(
    model: ModelOptions,
    output: str,
    recipe: RecipeOptions,
    calibration: CalibrationOptions = MODEL_SAMPLES,
    text: list[str] | None = None,
    no_compare: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    stream: bool = False,
    memory: str | None = None,
    restart: bool = False,
) -> dict[str, Any]:
    """Prune a causal language model and save it, verified.

    First it shows what will be pruned, what stays dense and why, and the size to expect. What it writes is dense safetensors
    with exact zeros, which every runtime loads, and beside it pruning.json: the recipe, the protocol and, for each weight,
    what 'statprune verify' can recompute.

    Args:
        output: Folder to write; must not exist, but for --overwrite.
        text: Measure the perplexity before and after on text files (several: --text a.txt b.txt), a token file or wikitext2, as
            'statprune evaluate' does, and keep it in the record. It should not be the calibration text. Wanda's mask is
            measured there too, and where that would leave the model better, it is said.
        no_compare: With --text, leave Wanda's mask out. It takes two forward passes over the calibration windows and one over
            the text, and while it is measured a second copy of the pruned weights.
        dry_run: Show what would be done, and stop: no weights are read, nothing is calibrated, nothing is written.
        overwrite: Replace an output that statprune wrote, when the new one is verified.
        max_shard_size: Of one file of weights, such as 5GB. Default: 50GB, as transformers has it.
        stream: Read the weights from their files while they are computed with, and write pruned ones into the output at once,
            so that no more than two segments of the model are in memory. By itself where the weights do not fit.
        memory: How much memory the weights may take, such as 20GB, before they are streamed; and how much a run that streams
            may take, before the values of the calibration windows wait in a GPU's host memory or in files beside the output.
            Default: what is free.
        restart: Begin anew where an earlier run of the same output ended early, and remove what it had done. Without it, the
            same command goes on where that one stopped, in as many processes.

    Examples:
        statprune prune MODEL --output sparse --dry-run
        statprune prune MODEL --output sparse --pattern 2:4 --calibration train.txt --text held-out.txt
        statprune prune MODEL --output sparse --method best --calibration train.txt
        statprune prune MODEL --output sparse --method paper --calibration train.txt
        statprune prune MODEL --output sparse --pattern 50% --method sparsegpt --schedule block --calibration c4
        statprune prune MODEL --output sparse --recipe tuned/recipe.yaml --pattern 4:8
        statprune prune MODEL --output sparse --method auto:minutes=5 --calibration train.txt
        statprune prune MODEL --output sparse --stream --calibration train.txt
    """
    import statprune.checkpoint as checkpoint
    from statprune.contents import USUAL_SHARD_SIZE
    from statprune.model.inputs import bind_batches
    from statprune.recipe import Recipe, Search
    from statprune.selection import select

    how = recipe.read()
    processes.check_windows(calibration.samples, halves=isinstance(how, Search))
    is_first = processes.place().is_first  # what is written, the first rank writes
    if is_first:
        checkpoint.check_output(output, overwrite=overwrite, source=model.model)
        checkpoint.check_shard_size(max_shard_size)
    if dry_run:
        if not is_first:
            return {}
        seqlen = model.check(calibration)
        empty, layers = look(model.model, model.dtype, lambda _: calibration.blank_batches(seqlen), model.revision)
        selection = select(layers.groups, layers.left_out, how)
        display.show_plan(empty, selection, how, layers.reason)
        memory_data = {}
        if stream and layers.traced is not None and isinstance(how, Recipe):
            inputs = bind_batches(empty, calibration.blank_batches(seqlen))
            memory_data["memory"] = show_memory(empty, layers, inputs, how, memory).to_dict()
        display.show_dry_run(how)
        return display.plan_data(empty, selection, how) | memory_data
    with contextlib.ExitStack() as held:
        place = None
        if is_first:
            resumes = isinstance(how, Recipe)
            place = held.enter_context(
                checkpoint.reserve(
                    output, overwrite=overwrite, source=model.model, say=console.say, resumes=resumes, restarts=restart
                )
            )
            held.enter_context(_kept(place))
        if wants_stream(model, calibration, stream, memory):
            if isinstance(how, Search):
                raise RecipeError("--method auto tries methods out on the whole model, which is not streamed: name a method.")
            return prune_streamed(model, place, how, calibration, text, max_shard_size or USUAL_SHARD_SIZE, memory)
        return _prune(model, place, how, calibration, text, not no_compare, max_shard_size)


@contextlib.contextmanager
def _kept(place: "Reserved") -> Iterator[None]:
    """Where the run ends early, it is said what becomes of what was done."""
    try:
        yield
    except BaseException:
        if place.has_work:
            console.say("What was finished is kept: the same command goes on with it, and --restart begins anew.")
        raise


def _prune(
    model: ModelOptions,
    place: "Reserved | None",
    how: "Recipe | Search",
    calibration: CalibrationOptions,
    text: list[str] | None,
    compares: bool,
    max_shard_size: str | None,
) -> dict[str, Any]:
    import statprune.checkpoint as checkpoint
    from statprune.api import prune as prune_model
    from statprune.clock import timed
    from statprune.model.inputs import bind_batches
    from statprune.model.layers import find_layers
    from statprune.recipe import Recipe, Search
    from statprune.selection import select

    opened = model.open(calibration)
    if place is not None:
        checkpoint.check_model(opened.model, place)
    held_out = opened.held_out(text) if text else None
    opened.tokenizer_for(calibration.calibration or ["generated"])  # one that is broken is refused before the export
    seconds: dict[str, float] = {}
    halves = isinstance(how, Search)
    with timed(seconds, "trace"):
        console.say("exporting the model to a graph")
        blank = calibration.blank_batches(opened.seqlen, halves=halves)
        layers = find_layers(opened.model, bind_batches(opened.model, blank))
    display.show_plan(opened.model, select(layers.groups, layers.left_out, how), how, layers.reason)
    drawn = calibration.places(opened, halves=halves)
    batches = calibration.batches(opened, halves=halves)
    perplexity: dict[str, Any] = {}
    if held_out is not None:
        perplexity["dense"] = _perplexity(opened, held_out, calibration.batch_size, "perplexity of the dense model")
        if compares and how.method not in _NOT_COMPARED:
            with timed(seconds, "compare"):
                perplexity["wanda"] = _wandas(opened, batches, held_out, how, layers)
    if place is not None and place.journal.exists():
        console.say(f"going on with what a run that ended early has left in {place.journal.parent}")
    title = "pruning" if isinstance(how, Recipe) else "choosing and pruning"
    journal = None if halves else _journal_folder(place)
    with console.progress(title) as progress, _said_already(layers.reason):
        report = prune_model(
            opened.model, batches, how, traced=layers, progress=progress, say=console.say,
            journal=journal,
        )  # fmt: skip
    if held_out is not None:
        perplexity["pruned"] = _perplexity_or_none(opened, held_out, calibration.batch_size, "perplexity of the pruned model")
        report.perplexity = {**perplexity, "windows": len(held_out), "seqlen": opened.seqlen, "text": text}
    if place is None:
        return {}
    protocol = {
        "model": model.model, "calibration": calibration.calibration, "samples": calibration.samples, "seqlen": opened.seqlen,
        "seed": calibration.seed, **drawn, "batch_size": calibration.batch_size, **opened.place,
        **processes.protocol(),
    }  # fmt: skip
    report.seconds["trace"] += seconds.pop("trace")
    report.seconds |= seconds
    console.say(f"saving to {place.output}, and verifying what was written")
    with timed(report.seconds, "save"):
        checkpoint.save(opened.model, report, place, protocol=protocol, source=model.model, max_shard_size=max_shard_size)
    display.show_report(report, str(place.output))
    return {"output": str(place.output), **report.to_dict(), "protocol": protocol}


def _journal_folder(place: "Reserved | None") -> "Path | None":
    """Where to keep what is finished; None where not all processes see the first one's disk, and a run begins anew."""
    from statprune.output import who_sees

    folder, blind = who_sees(place.journal.parent if place is not None else None)
    if blind:
        console.say(f"not all processes see {folder.parent}: a run that ends early begins anew")
    return None if blind else folder


_NOT_COMPARED = ("wanda", "magnitude")
"""Methods that are Wanda's mask, or are asked for because they need no calibration."""


def _wandas(
    opened: Opened, batches: "Sequence[Tensor]", held_out: "Tensor", how: "Recipe | Search", layers: "Layers"
) -> float | None:
    """The perplexity that Wanda's mask alone would leave, at the same pattern and as its authors calibrate it."""
    from statprune.api import plan
    from statprune.recipe import Recipe

    recipe = Recipe("wanda", how.pattern, "block", how.targets, how.ignore, how.on_indivisible)
    with console.progress("Wanda's mask, to compare with") as progress, _said_already(layers.reason):
        twin = plan(opened.model, batches, recipe, traced=layers, progress=progress)
    return _perplexity_or_none(opened, held_out, len(batches[0]), "perplexity with Wanda's mask", twin.weights)


@contextlib.contextmanager
def _said_already(reason: str | None) -> Iterator[None]:
    """Without the warning of why there is no graph."""
    with warnings.catch_warnings():
        if reason is not None:
            warnings.filterwarnings("ignore", message=re.escape(reason))
        yield


def _perplexity_or_none(
    opened: Opened, windows: "Tensor", batch_size: int, title: str, weights: "Mapping[str, Tensor] | None" = None
) -> float | None:
    """As `_perplexity`; None where it is no number, which the result of a pruning is not lost for."""
    try:
        return _perplexity(opened, windows, batch_size, title, weights)
    except NonFiniteError:
        return None


def _perplexity(
    opened: Opened, windows: "Tensor", batch_size: int, title: str, weights: "Mapping[str, Tensor] | None" = None
) -> float:
    """Of the model as it is now, or with other weights in the place of its own."""
    from statprune.perplexity import evaluate as evaluate_model

    with console.progress(title) as progress:
        return evaluate_model(
            opened.model, processes.share_of(windows), batch_size=batch_size, weights=weights, progress=progress
        )


def look(path: str, dtype: DType, batches: Callable[[Any], Sequence[Any]], revision: str | None = None) -> "tuple[Any, Layers]":
    """A model and its layers. Its weights are read only where there is no graph and it cannot be run without values."""
    import torch

    from statprune.configuration import empty_model
    from statprune.loading import load_model
    from statprune.model.inputs import bind_batches
    from statprune.model.layers import find_layers

    console.say(f"exporting {path} to a graph, without its weights")
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    model = empty_model(path, torch_dtype, revision)
    try:
        return model, find_layers(model, bind_batches(model, batches(model)))
    except CalibrationError:
        model = load_model(path, dtype=torch_dtype, revision=revision)
        return model, find_layers(model, bind_batches(model, batches(model)))
