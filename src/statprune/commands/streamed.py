"""`prune --stream` and `evaluate --stream`: a model that is larger than memory, read from its files, block by block."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from statprune.commands import console, display, processes
from statprune.commands.options import CalibrationOptions, ModelOptions, Opened, WindowOptions
from statprune.errors import CalibrationError, ModelError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from statprune.disk.skeleton import Skeleton
    from statprune.disk.streamed import Streamed
    from statprune.model.expected import Expected
    from statprune.model.inputs import ModelInputs
    from statprune.model.layers import Layers
    from statprune.output import Reserved
    from statprune.recipe import Recipe

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)i?B?", re.IGNORECASE)


def read_size(text: str) -> int:
    """`"20GB"` as bytes.

    Raises:
        ModelError: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    if size < 1:
        raise ModelError(f"--memory {text}: expected a size such as 20GB or 800MB.")
    return int(size)


def wants_stream(model: ModelOptions, windows: WindowOptions, stream: bool, memory: str | None) -> bool:
    """Whether to stream: it is asked for, or the weights take more than the memory that there is, or that is allowed.

    Several processes come to the same answer: where they do not fit into the memory of one, all stream.
    """
    from statprune.ranks import gather

    budget = read_size(memory) if memory is not None else None
    model.check(windows)
    return stream or any(gather(_is_too_large(model, budget), None, "whether the weights fit into memory"))


def _is_too_large(model: ModelOptions, budget: int | None) -> bool:
    import torch

    from statprune.configuration import empty_model
    from statprune.loading import choose_device

    if budget is None:
        budget = processes.available_memory(torch.device(choose_device(model.device)))
    if budget is None:
        return False
    empty = empty_model(model.model, model.dtype if model.dtype == "auto" else getattr(torch, model.dtype), model.revision)
    size = sum(one.numel() * one.element_size() for one in empty.parameters())
    if size > budget:
        each = f" by each of {processes.place().size} processes" if processes.place().size > 1 else ""
        console.say(
            f"{model.model} has {size / 1e9:,.1f} GB of weights, and {budget / 1e9:,.1f} GB may be used{each}: it is streamed"
        )
    return bool(size > budget)


def open_streamed(model: ModelOptions, windows: WindowOptions, scratch: Path | None = None) -> "tuple[Opened, Skeleton]":
    """The model without values, and where they are; errors as for `ModelOptions.open`."""
    import torch

    from statprune.disk.skeleton import open_skeleton
    from statprune.loading import choose_device, refuse_unless_causal

    seqlen = model.check(windows)
    console.say(f"opening {model.model}, whose weights stay in its files")
    skeleton = open_skeleton(
        model.model,
        dtype=model.dtype if model.dtype == "auto" else getattr(torch, model.dtype),
        device=choose_device(model.device),
        revision=model.revision,
        scratch=scratch,
    )
    refuse_unless_causal(model.model, skeleton.model)
    return Opened(skeleton.model, model.model, model.revision, seqlen), skeleton


def perplexity(
    opened: Opened, layers: "Layers | None", weights: "Streamed", held_out: "Tensor", batch_size: int, title: str
) -> float:
    """Of the model with these weights, each process on its share of the windows.

    What lies between two blocks is held for so many windows at once as `_HELD` allows.
    """
    from statprune.perplexity import evaluate_streamed

    traced = layers.traced if layers is not None else None
    width = opened.model.config.get_text_config().hidden_size * 4
    with console.progress(title) as progress:
        return evaluate_streamed(
            opened.model, processes.share_of(held_out), weights, batch_size=batch_size, traced=traced, progress=progress,
            tokens_per_round=_HELD // width,
        )  # fmt: skip


_HELD = 1 << 30
"""Bytes of the residual streams that are held between two blocks while a perplexity is measured."""


def show_memory(model: Any, layers: "Layers", inputs: "Sequence[ModelInputs]", how: "Recipe", memory: str | None) -> "Expected":
    """Decides where this process's values wait, and shows what pruning the model from its files will take of memory in it.

    The model's parameters may be without values.
    """
    from statprune.agreement import device_of
    from statprune.streaming import choose_place

    budget = read_size(memory) if memory is not None else None
    chosen = choose_place(model, layers, inputs, how, memory=budget, available=processes.available_memory)
    sharing = 1 if device_of(model).type == "cuda" else processes.place().on_machine  # each GPU is its process's own
    expected = replace(chosen, processes=sharing)
    lines = expected.lines()
    if budget is not None and expected.total > budget:
        lines[0] += f" That is more than --memory {memory}."
    for line in lines:
        console.console.tell(escape(line))
    return expected


def evaluate_streamed(model: ModelOptions, windows: WindowOptions, text: list[str]) -> "tuple[Opened, Tensor, float]":
    """The model, the windows of the text and the perplexity on them."""
    from statprune.agreement import device_of
    from statprune.disk.streamed import Streamed

    opened, skeleton = open_streamed(model, windows)
    held_out = opened.held_out(text)
    weights = Streamed(skeleton, None, device_of(skeleton.model))
    try:
        return opened, held_out, perplexity(opened, None, weights, held_out, windows.batch_size, "evaluating")
    finally:
        weights.close()


def prune_streamed(
    model: ModelOptions,
    place: "Reserved | None",
    how: "Recipe",
    calibration: CalibrationOptions,
    text: list[str] | None,
    max_shard_size: str,
    memory: str | None,
) -> dict[str, Any]:
    """`prune` with the model on disk; the place is the first process's, and None in the others."""
    import statprune.checkpoint as checkpoint
    from statprune import streaming
    from statprune.agreement import device_of
    from statprune.clock import timed
    from statprune.disk.streamed import Streamed
    from statprune.model.inputs import bind_batches
    from statprune.model.layers import find_layers
    from statprune.output import seen_by_all
    from statprune.selection import select

    if calibration.calibration == ["generated"]:
        raise CalibrationError(
            "--stream: the model's own samples would read all weights for each token. Give --calibration: text files, a token "
            "file (FILE.safetensors:KEY) or a data set's name."
        )
    seconds: dict[str, float] = {}
    scratch = seen_by_all(place.folder.parent if place is not None else None)
    with timed(seconds, "open"):
        opened, skeleton = open_streamed(model, calibration, scratch)
    held_out = opened.held_out(text) if text else None
    opened.tokenizer_for(calibration.calibration or [])  # one that is broken is refused before the export
    with timed(seconds, "trace"):
        console.say("exporting the model to a graph")
        blank = bind_batches(skeleton.model, calibration.blank_batches(opened.seqlen))
        layers = find_layers(skeleton.model, blank)
    streaming.check_streamed(skeleton, layers, how)
    display.show_plan(skeleton.model, select(layers.groups, layers.left_out, how), how, layers.reason)
    expected = show_memory(skeleton.model, layers, blank, how, memory)
    if place is not None:
        streaming.check_room(skeleton, place, max_shard_size, expected)
    drawn = calibration.places(opened)
    inputs = bind_batches(skeleton.model, calibration.batches(opened))
    if place is not None and place.journal.exists():
        console.say(f"going on with what a run that ended early has left in {place.journal.parent}")
    measured: dict[str, float | None] = {}

    def measure(weights: Streamed, which: str) -> None:
        if held_out is not None:
            title = f"perplexity of the {which} model"
            measured[which] = perplexity(opened, layers, weights, held_out, calibration.batch_size, title)

    dense = Streamed(skeleton, None, device_of(skeleton.model))
    try:
        measure(dense, "dense")
    finally:
        dense.close()

    def measure_pruned(weights: Streamed) -> None:
        try:
            measure(weights, "pruned")
        except NonFiniteError:
            measured["pruned"] = None  # the result of a pruning is not lost for it

    with console.progress("pruning") as progress, console.progress("copying") as copied:
        report, stored_in = streaming.prune_streamed(
            skeleton, layers, inputs, how, place,
            max_shard_size=max_shard_size, values=expected.place, progress=progress, copied=copied, then=measure_pruned,
        )  # fmt: skip
    if place is None:
        return {}
    if held_out is not None:
        report.perplexity = {**measured, "windows": len(held_out), "seqlen": opened.seqlen, "text": text}
    report.seconds = {**seconds, **report.seconds}
    protocol = {
        "model": model.model, "calibration": calibration.calibration, "samples": calibration.samples, "seqlen": opened.seqlen,
        "seed": calibration.seed, **drawn, "batch_size": calibration.batch_size, **opened.place, "streamed": True,
        **processes.protocol(),
    }  # fmt: skip
    console.say(f"finishing {place.output}, and verifying what was written")
    with timed(report.seconds, "save"):
        checkpoint.finish(skeleton.model, report, place, stored_in, protocol=protocol, source=model.model)
    display.show_report(report, str(place.output))
    return {"output": str(place.output), **report.to_dict(), "protocol": protocol}
