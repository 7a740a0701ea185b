"""`prune --stream`: a model that is larger than memory, read from its files and written into those of the output."""

import re
from typing import TYPE_CHECKING, Any

from statprune.commands import console, display
from statprune.commands.options import CalibrationOptions, ModelOptions, Opened
from statprune.errors import CalibrationError, ModelError

if TYPE_CHECKING:
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


def wants_stream(model: ModelOptions, stream: bool, memory: str | None) -> bool:
    """Whether to stream: it is asked for, or the weights take more than the memory that there is, or that is allowed."""
    from statprune.clock import available_memory
    from statprune.configuration import empty_model
    from statprune.loading import choose_device

    budget = read_size(memory) if memory is not None else None
    if stream:
        return True
    import torch

    free = available_memory(torch.device(choose_device(model.device)))
    budget = budget if budget is not None else free
    if budget is None:
        return False
    empty = empty_model(model.model, model.dtype if model.dtype == "auto" else getattr(torch, model.dtype), model.revision)
    size = sum(one.numel() * one.element_size() for one in empty.parameters())
    if size <= budget:
        return False
    console.say(f"{model.model} has {size / 1e9:,.1f} GB of weights, and {budget / 1e9:,.1f} GB may be used: it is streamed")
    return True


def prune_streamed(
    model: ModelOptions,
    place: "Reserved",
    how: "Recipe",
    calibration: CalibrationOptions,
    max_shard_size: str,
) -> dict[str, Any]:
    """`prune` with the model on disk."""
    import torch

    import statprune.checkpoint as checkpoint
    from statprune import streaming
    from statprune.clock import timed
    from statprune.disk.skeleton import open_skeleton
    from statprune.loading import choose_device
    from statprune.model.inputs import bind_batches
    from statprune.model.layers import find_layers
    from statprune.selection import select

    if calibration.calibration == ["generated"]:
        raise CalibrationError(
            "--stream: the model's own samples would read all weights for each token. Give --calibration: text files, a token "
            "file (FILE.safetensors:KEY) or a data set's name."
        )
    seqlen = model.check(calibration)
    seconds: dict[str, float] = {}
    console.say(f"reading {model.model}, without keeping its weights")
    with timed(seconds, "open"):
        skeleton = open_skeleton(
            model.model,
            dtype=model.dtype if model.dtype == "auto" else getattr(torch, model.dtype),
            device=choose_device(model.device),
            revision=model.revision,
            scratch=place.folder.parent,
        )
    opened = Opened(skeleton.model, model.model, model.revision, seqlen)
    opened.tokenizer_for(calibration.calibration or [])  # one that is broken is refused before the export
    with timed(seconds, "trace"):
        console.say("exporting the model to a graph")
        layers = find_layers(skeleton.model, bind_batches(skeleton.model, calibration.blank_batches(seqlen)))
    streaming.check_streamed(skeleton, layers, how)
    display.show_plan(skeleton.model, select(layers.groups, layers.left_out, how), how, layers.reason)
    drawn = calibration.places(opened)
    inputs = bind_batches(skeleton.model, list(calibration.windows(opened).split(calibration.batch_size)))
    if place.journal.exists():
        console.say(f"going on with what a run that ended early has left in {place.journal.parent}")
    with console.progress("pruning") as progress, console.progress("copying") as copied:
        report, stored_in = streaming.prune_streamed(
            skeleton, layers, inputs, how, place, max_shard_size=max_shard_size, progress=progress, copied=copied
        )
    report.seconds = {**seconds, **report.seconds}
    protocol = {
        "model": model.model, "calibration": calibration.calibration, "samples": calibration.samples, "seqlen": seqlen,
        "seed": calibration.seed, **drawn, "batch_size": calibration.batch_size, **opened.place, "streamed": True,
    }  # fmt: skip
    console.say(f"finishing {place.output}, and verifying what was written")
    with timed(report.seconds, "save"):
        checkpoint.finish(skeleton.model, report, place, stored_in, protocol=protocol, source=model.model)
    display.show_report(report, str(place.output))
    return {"output": str(place.output), **report.to_dict(), "protocol": protocol}
