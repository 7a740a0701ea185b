"""The commands about one model: prune, evaluate, inspect, verify, push, merge."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from statprune.commands import console, display
from statprune.commands.options import (
    MODEL_SAMPLES,
    CalibrationOptions,
    DType,
    ModelOptions,
    Opened,
    RecipeOptions,
    WindowOptions,
)
from statprune.commands.streamed import prune_streamed, wants_stream
from statprune.errors import CalibrationError, NonFiniteError, RecipeError

if TYPE_CHECKING:
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
        memory: How much memory the weights may take, such as 20GB, before they are streamed. Default: what is free.
        restart: Begin anew where an earlier run of the same output ended early, and remove what it had done. Without it, the
            same command goes on where that one stopped.

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
    from statprune.recipe import Recipe, Search
    from statprune.selection import select

    how = recipe.read()
    checkpoint.check_output(output, overwrite=overwrite, source=model.model)
    checkpoint.check_shard_size(max_shard_size)
    if dry_run:
        seqlen = model.check(calibration)
        empty, layers = _look(model.model, model.dtype, lambda _: calibration.blank_batches(seqlen), model.revision)
        selection = select(layers.groups, layers.left_out, how)
        display.show_plan(empty, selection, how, layers.reason)
        display.show_dry_run(how)
        return display.plan_data(empty, selection, how)
    streams = wants_stream(model, stream, memory)
    if streams and isinstance(how, Search):
        raise RecipeError("--method auto tries methods out on the whole model, which is not streamed: name a method.")
    with checkpoint.reserve(
        output, overwrite=overwrite, source=model.model, say=console.say, resumes=streams, restarts=restart
    ) as place:
        if streams:
            assert isinstance(how, Recipe)
            return prune_streamed(model, place, how, calibration, max_shard_size or checkpoint.USUAL_SHARD_SIZE)
        return _prune(model, place, how, calibration, text, not no_compare, max_shard_size)


def _prune(
    model: ModelOptions,
    place: "Reserved",
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
    checkpoint.check_model(opened.model, place)
    held_out = opened.held_out(text) if text else None
    opened.tokenizer_for(calibration.calibration or ["generated"])  # one that is broken is refused before the export
    seconds: dict[str, float] = {}
    with timed(seconds, "trace"):
        console.say("exporting the model to a graph")
        layers = find_layers(opened.model, bind_batches(opened.model, calibration.blank_batches(opened.seqlen)))
    display.show_plan(opened.model, select(layers.groups, layers.left_out, how), how, layers.reason)
    drawn = calibration.places(opened, halves=isinstance(how, Search))
    windows = calibration.windows(opened, halves=isinstance(how, Search))
    perplexity: dict[str, Any] = {}
    if held_out is not None:
        perplexity["dense"] = _perplexity(opened, held_out, calibration.batch_size, "perplexity of the dense model")
        if compares and how.method not in _NOT_COMPARED:
            with timed(seconds, "compare"):
                perplexity["wanda"] = _wandas(opened, list(windows.split(calibration.batch_size)), held_out, how, layers)
    title = "pruning" if isinstance(how, Recipe) else "choosing and pruning"
    with console.progress(title) as progress, _said_already(layers.reason):
        report = prune_model(
            opened.model, list(windows.split(calibration.batch_size)), how, traced=layers, progress=progress, say=console.say
        )
    if held_out is not None:
        perplexity["pruned"] = _perplexity_or_none(opened, held_out, calibration.batch_size, "perplexity of the pruned model")
        report.perplexity = {**perplexity, "windows": len(held_out), "seqlen": opened.seqlen, "text": text}
    protocol = {
        "model": model.model, "calibration": calibration.calibration, "samples": calibration.samples, "seqlen": opened.seqlen,
        "seed": calibration.seed, **drawn, "batch_size": calibration.batch_size, **opened.place,
    }  # fmt: skip
    report.seconds["trace"] += seconds.pop("trace")
    report.seconds |= seconds
    console.say(f"saving to {place.output}, and verifying what was written")
    with timed(report.seconds, "save"):
        checkpoint.save(opened.model, report, place, protocol=protocol, source=model.model, max_shard_size=max_shard_size)
    display.show_report(report, str(place.output))
    return {"output": str(place.output), **report.to_dict(), "protocol": protocol}


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
        return evaluate_model(opened.model, windows, batch_size=batch_size, weights=weights, progress=progress)


def _look(
    path: str, dtype: DType, batches: Callable[[Any], Sequence[Any]], revision: str | None = None
) -> "tuple[Any, Layers]":
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


def evaluate(model: ModelOptions, text: list[str], windows: WindowOptions) -> dict[str, Any]:
    """Perplexity of a causal language model on text.

    The text is joined, tokenized whole and cut into windows that do not overlap; the last partial one is dropped (the field's
    WikiText-2 protocol). Perplexities at different --seqlen do not compare, nor do those of different tokenizers.

    Args:
        text: Text files, joined by blank lines (several: --text a.txt b.txt); a token file (FILE.safetensors:KEY); or
            wikitext2, from the hub.

    Examples:
        statprune evaluate MODEL --text held-out.txt
        statprune evaluate --text a.txt b.txt MODEL --seqlen 512 --batch-size 4 --json
    """
    from statprune.perplexity import evaluate as evaluate_model
    from statprune.versions import versions

    opened = model.open(windows)
    tokens, tokenizer = opened.held_out(text), opened.tokenizer_for(text)
    with console.progress("evaluating") as progress:
        perplexity = evaluate_model(opened.model, tokens, batch_size=windows.batch_size, progress=progress)
    result = {
        "perplexity": perplexity, "windows": len(tokens), "seqlen": opened.seqlen, "text": text, "model": model.model,
        **({"tokenizer": type(tokenizer).__name__, "vocabulary": len(tokenizer)} if tokenizer is not None else {}),
        **opened.place,
        "versions": versions(),
    }  # fmt: skip
    display.show_evaluation(result)
    return result


def inspect(model: str, recipe: RecipeOptions, revision: str | None = None) -> dict[str, Any]:
    """What could be pruned: linear layers, the input groups that share statistics, ties, and what is left out and why.

    With any option of a recipe, what that recipe would prune and leave dense, and the sizes to expect. Works on a
    configuration alone; no model is loaded.

    Of a sparse folder also the zeros of each layer, whether they are 2:4 or 4:8, and the recipe that pruning.json has for it.
    Zeros are counted from the files, one weight at a time; 'statprune verify' recomputes what else was promised.

    Args:
        model: Folder or hub name of the model; config.json is enough.

    Examples:
        statprune inspect MODEL
        statprune inspect MODEL --pattern 50% --ignore '*.down_proj' '*.0.*'
        statprune inspect MODEL --recipe recipe.yaml --json
        statprune inspect sparse
    """
    from statprune.model.inputs import example_inputs
    from statprune.recipe import Recipe
    from statprune.selection import select
    from statprune.zeros import count_zeros, looks_sparse, read_recorded

    how = recipe.read() if recipe.given() else Recipe(pattern="0%")
    empty, layers = _look(model, "auto", lambda found: [example_inputs(found)], revision)
    selection = select(layers.groups, layers.left_out, how)
    if recipe.given():
        display.show_plan(empty, selection, how, layers.reason)
        return display.plan_data(empty, selection, how)
    display.show_survey(model, selection)
    sites = [site for group in layers.groups for site in group.sites]
    recorded = read_recorded(model)
    if recorded is None and not looks_sparse(model, sites):
        return display.survey_data(selection)
    with console.progress("counting zeros") as progress:
        zeros = count_zeros(model, sites, recorded, progress=progress)
    display.show_zeros(zeros, recorded)
    return {**display.survey_data(selection), **display.zeros_data(zeros, recorded)}


def verify(folder: str, digest: str | None = None) -> dict[str, Any]:
    """Recompute every promise of a folder's pruning.json from the files on disk.

    Stops at the first one that is broken, with status 1. Recomputed are, for each weight, shape, zeros, pattern and energy; and
    the digest of each file. The folder holds nothing else. Prints the digest of the record, which can be published.

    Args:
        folder: What 'statprune prune' wrote.
        digest: The record's SHA-256 digest as its author has published it, to compare with.

    Examples:
        statprune verify sparse
        statprune verify sparse --digest 5ef5a4a2ef1bfd0a7b2ab0db3b10b4a1b2c3d4e5f60718293a4b5c6d7e8f9012
    """
    from statprune.verification import verify as verify_folder

    with console.progress("verifying") as progress:
        record = verify_folder(folder, progress, digest=digest)
    display.show_verified(folder, record)
    return display.verified_data(folder, record)


def report(folder: str, output: str | None = None) -> dict[str, Any]:
    """Show what was done to a model: its layers in a table, and report.html, the page to look at, made anew.

    The page is one file that needs no network. It is made from pruning.json and the weights, and 'statprune prune' has put one
    beside them.

    Args:
        folder: What 'statprune prune' wrote.
        output: File to write the page to; must not exist. Default: report.html in the folder, where that is one of the files
            that pruning.json has the digest of.

    Examples:
        statprune report sparse
        statprune report sparse --output somewhere.html
        statprune report sparse --json --quiet
    """
    from pathlib import Path

    from statprune.page import write_page
    from statprune.record import read_record

    record = read_record(Path(folder))
    display.show_layers(folder, record)
    page = write_page(record, folder, output)
    display.show_page(str(page))
    return {"folder": folder, "page": str(page), **display.layers_data(record)}


def push(folder: str, repository: str, private: bool = False) -> dict[str, Any]:
    """Verify a folder that statprune wrote, and upload it to the hub.

    Uploaded are exactly the files that pruning.json names, and itself; nothing is where a promise is broken. Log in first, with
    'hf auth login'.

    Args:
        folder: What 'statprune prune' wrote.
        repository: USER/NAME on the hub; made where it does not exist.
        private: Make the repository a private one.

    Examples:
        statprune push sparse USER/NAME --private
    """
    from statprune.hub import push as push_folder

    address = push_folder(folder, repository, private=private or None, say=console.say)
    display.show_pushed(folder, address)
    return {"folder": folder, "repository": repository, "address": address}


def merge(model: str, adapter: str, output: str, overwrite: bool = False, max_shard_size: str | None = None) -> dict[str, Any]:
    """Merge a LoRA adapter into a pruned model with its zeros kept, and save the result, verified.

    Only weights that are not zero are changed. During its training the adapter acted everywhere, so the result is not quite the
    model that was trained: measure it.

    Args:
        model: Folder that 'statprune prune' wrote, the one that the adapter was trained on.
        adapter: Folder that the adapter was saved to with save_pretrained (safetensors only).
        output: Folder to write; must not exist, but for --overwrite.
        overwrite: Replace an output that statprune wrote, when the new one is verified.
        max_shard_size: Of one file of weights, such as 5GB. Default: 50GB, as transformers has it.

    Examples:
        statprune merge sparse ADAPTER --output sparse-tuned
    """
    import statprune.checkpoint as checkpoint
    from statprune.loading import load_model
    from statprune.report import PruningReport
    from statprune.training.lora import check_adapter_folder, load_adapter, merge_adapters
    from statprune.training.masks import remeasure

    check_adapter_folder(adapter)
    checkpoint.check_shard_size(max_shard_size)
    with checkpoint.reserve(output, overwrite=overwrite, source=model, say=console.say) as place:
        with console.progress("verifying") as progress:
            record = checkpoint.verify(model, progress)
        before = PruningReport.from_dict(record)
        console.say(f"loading {model}, and merging {adapter}")
        sparse = load_model(model)
        checkpoint.check_model(sparse, place)
        merged = merge_adapters(load_adapter(sparse, adapter), before)
        after = remeasure(before, merged)
        protocol = {**record["protocol"], "merged_adapters": [*record["protocol"].get("merged_adapters", ()), adapter]}
        console.say(f"saving to {place.output}, and verifying what was written")
        checkpoint.save(merged, after, place, protocol=protocol, source=model, max_shard_size=max_shard_size)
    display.show_merged(before, after, output)
    return display.merged_data(before, after, output)
