"""A sparse model on disk: its place is taken before work begins, and it is saved with a record of what was done.

What is saved is what every runtime reads: dense safetensors with exact zeros, no `quantization_config`, no
`sparsity_config`. What we know beyond that goes into a side file:

    OUTPUT/model.safetensors    the weights, zeros included
    OUTPUT/config.json ...      whatever save_pretrained and the tokenizer write, and what else lay beside the model
    OUTPUT/README.md ...        for people, made from the record and the weights: `contents.PAGES`
    OUTPUT/pruning.json         the recipe, the versions, for each weight what can be recomputed, and a digest of every file
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from statprune.contents import USUAL_SHARD_SIZE, complete, write, write_configuration, write_weights
from statprune.errors import CheckpointError, first_line
from statprune.hub import check_repository, push
from statprune.methods.finite import is_finite
from statprune.model.kinds import adapter_parameters, unwrapped
from statprune.output import Reserved, refuse_existing, warn
from statprune.plain import finite
from statprune.progress import Say
from statprune.record import FORMAT, RECORD, read_json
from statprune.report import PruningReport
from statprune.verification import names, verify

__all__ = [
    "RECORD",
    "Reserved",
    "check_model",
    "check_output",
    "check_shard_size",
    "push",
    "refuse_existing",
    "rescue",
    "reserve",
    "save",
    "verify",
]


def check_output(output: str | Path, *, overwrite: bool = False, source: str | Path | None = None) -> None:
    """Raise CheckpointError where something stands in the place of an output that may not be replaced; as for `reserve`."""
    refuse_existing(output, is_replaceable=_replaceable(source) if overwrite else None)


def reserve(
    output: str | Path,
    *,
    model: nn.Module | None = None,
    overwrite: bool = False,
    source: str | Path | None = None,
    say: Say = warn,
    resumes: bool = False,
    restarts: bool = False,
) -> Reserved:
    """Take the place of an output before work begins, so that nothing has been computed in vain when it cannot be written.

    The hidden folder that the output is written into is made at once, and what a killed process left of that output before is
    removed. Give the result to `save` in the place of the output, and `release()` it where there will be no output after all
    (it is a context manager, which does; `save` does as well).

        with statprune.checkpoint.reserve("sparse", model=model) as place:
            report = statprune.prune(model, batches)
            statprune.save(model, report, place)

    A callback reserves in `setup`, without the model where it is built later, calls `check_model(model, place)` in
    `on_fit_start`, saves in `on_train_end` (or calls `rescue` where pruning fails there), and releases in `teardown` and
    `on_exception`. Of several ranks one reserves.

    Args:
        output: a folder that does not exist yet.
        model: what will be saved, where it is known already; see `check_model`.
        overwrite: whether a folder that statprune wrote may stand there; it is replaced when the new one is verified.
        source: the model's folder, which is never replaced.
        say: called with what was removed, in words.
        resumes: as for `Reserved`.
        restarts: as for `Reserved`.

    Raises:
        CheckpointError: something stands in its place, it cannot be written there, or as for `check_model`.
    """
    is_replaceable = _replaceable(source) if overwrite else None
    place = Reserved(output, is_replaceable=is_replaceable, say=say, resumes=resumes, restarts=restarts)
    try:
        if model is not None:
            check_model(model, place)
    except BaseException:
        place.release()
        raise
    return place


def check_model(model: nn.Module, place: Reserved) -> None:
    """Refuse, before work begins, a model that could not be saved at this place in the end.

    Raises:
        CheckpointError: its state holds something else than plain tensors (quantized, sharded, on the meta device), it has
            adapters, or the disk has no room for its weights.
    """
    inner, _ = unwrapped(model)
    name = type(inner).__name__
    if getattr(inner, "_hf_peft_config_loaded", False) or adapter_parameters(inner):
        raise CheckpointError(
            f"{name} has adapters, and a pruned model is saved without. Merge them first (`merge_and_unload` of peft), or save "
            "it yourself with `save_pretrained`."
        )
    seen: dict[tuple[torch.device, int], int] = {}
    for key, value in inner.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: {key} is a {type(value).__name__} and no tensor, and safetensors hold only those.")
        if is_lazy(value):
            continue  # gets its shape in the first batch
        if value.is_meta or value.layout != torch.strided or isinstance(value, DTensor):
            kind = "on the meta device" if value.is_meta else "no dense tensor that this process holds whole"
            raise CheckpointError(f"{name}: {key} is {kind}, so it cannot be saved. Load the model whole, on one device.")
        try:
            pointer = value.untyped_storage().data_ptr()
            safetensors.torch.save({key: torch.zeros(1, dtype=value.dtype)})
        except (KeyError, RuntimeError, NotImplementedError, ValueError, SafetensorError) as e:
            raise CheckpointError(f"{name}: safetensors cannot hold {key}, a {value.dtype}: {first_line(e)}") from e
        if value.numel() and not pointer:
            raise CheckpointError(
                f"{name}: {key} is a {type(value).__name__} without a memory of its own, as quantized weights are. Prune the "
                "model that it was made from."
            )
        seen[value.device, pointer] = max(seen.get((value.device, pointer), 0), value.numel() * value.element_size())
    place.check_room(sum(seen.values()))


def check_shard_size(max_shard_size: int | str | None) -> None:
    """Raise CheckpointError for a size of files that is none, such as `"5 apples"`; None is transformers' own."""
    from huggingface_hub import split_torch_state_dict_into_shards

    problem = ""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=USUAL_SHARD_SIZE if max_shard_size is None else max_shard_size)
    except (ValueError, TypeError, ArithmeticError) as e:
        problem = f" ({first_line(e)})"
    is_positive = max_shard_size is None or float(str(max_shard_size).rstrip("TGMKBtgmkb") or 0) > 0 if not problem else False
    if not is_positive:
        raise CheckpointError(
            f"max_shard_size={max_shard_size!r}: expected a size above 0 in bytes, or a text such as '5GB' or '500MB'{problem}."
        )


def save(
    model: nn.Module,
    report: PruningReport,
    output: str | Path | Reserved,
    *,
    tokenizer: Any = None,
    protocol: dict[str, Any] | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Write a pruned model, verify what was written, and only then give it its name.

    A transformers model is written by `save_pretrained`, and `from_pretrained` reads it. The state of any other module is
    written as `model.safetensors`; `safetensors.torch.load_model(module, file)` reads it, tied weights included. Everything is
    written into a hidden folder beside the output, so that an interrupted save leaves nothing that looks finished. Where saving
    fails, what was computed is not lost: the weights are put elsewhere, and the error says where.

    Args:
        model: any `nn.Module`; in `torch.compile` or DistributedDataParallel, what is inside.
        report: what `prune` returned for it.
        output: a folder that does not exist yet, or the place that `reserve` took for it.
        tokenizer: saved beside it.
        protocol: what the calibration was (source, samples, seqlen, seed ...), for the record.
        source: folder or hub name that the model came from: licence, generation configuration, chat templates and whatever else
            a user of the model needs are copied from there, and its card's licence is quoted.
        overwrite: as for `reserve`; a place that was reserved knows it already.
        max_shard_size: of one file of weights, in bytes or such as `"5GB"`. None: 50 GB, as transformers has it.
        push_to_hub: name of a repository on the hub, `"USER/NAME"`, that it is then uploaded to; see `push`.

    Returns:
        The output.

    Raises:
        CheckpointError: the output exists or cannot be written; a weight is NaN or infinite; what was written does not keep a
            promise; or the upload failed, and then the output is there.
    """
    if push_to_hub is not None:
        check_repository(push_to_hub)
    if not isinstance(output, Reserved):
        check_shard_size(max_shard_size)
        output = reserve(output, model=model, overwrite=overwrite, source=source)
    inner, prefix = unwrapped(model)
    beyond = finite({"protocol": protocol or {}, "perplexity": report.perplexity})
    record = {**report.to_dict(), **beyond}
    with output as place:
        try:
            place.check_held()
            check_shard_size(max_shard_size)
            _refuse_non_finite(inner)
            write(inner, prefix, record, place.folder, tokenizer, source, max_shard_size)
            verify(place.folder)
        except Exception as e:
            raise _rescued(inner, record, place, e) from e
        try:
            place.publish()
        except CheckpointError as e:
            raise CheckpointError(f"{e} What was to be saved is whole and verified, in {place.keep()}: rename it.") from e
    if push_to_hub is not None:
        push(place.output, push_to_hub)
    return place.output


def finish(
    model: nn.Module,
    report: PruningReport,
    place: Reserved,
    stored_in: Mapping[str, tuple[str, str]],
    *,
    protocol: dict[str, Any] | None = None,
    source: str | Path | None = None,
) -> Path:
    """`save` for a run that has written its weights already (`statprune.streaming`): what else belongs to an output.

    Args:
        model: of transformers; the values of its weights are not looked at.
        report: of the run.
        place: with the weights in its folder.
        stored_in: (file, tensor) of each pruned parameter.
        protocol: as for `save`.
        source: as for `save`.

    Raises:
        CheckpointError: as `save`. What was done stays in the place's hidden folder, and the same run goes on with it.
    """
    record = {**report.to_dict(), **finite({"protocol": protocol or {}, "perplexity": report.perplexity})}

    def place_of(parameter: str, _: str) -> dict[str, str]:
        return dict(zip(("file", "tensor"), stored_in[parameter], strict=True))

    with place:
        try:
            place.check_held()
            write_configuration(model, place.folder)
            complete(model, "", record, place.folder, None, source, place_of)
            verify(place.folder)
            return place.publish()
        except OSError as e:
            raise CheckpointError(f"The output {place.output} could not be finished: {e.strerror or first_line(e)}.") from e


def rescue(model: nn.Module, place: Reserved, reason: object, *, report: PruningReport | None = None) -> Path | None:
    """Put a model's weights somewhere else, as safetensors, since there will be no output: work that was done is not lost.

    Args:
        model: any `nn.Module`.
        place: of the output. The weights get a folder beside it, `OUTPUT.rescued`, or one in the system's temporary folder.
        reason: why, for `pruning.json`; `verify` says it, and refuses.
        report: what was done, for `pruning.json`.

    Returns:
        The folder; None where the weights could be written nowhere.
    """
    inner, _ = unwrapped(model)
    return _rescue(inner, report.to_dict() if report is not None else {}, place, reason)


def _rescue(inner: nn.Module, record: Mapping[str, Any], place: Reserved, reason: object) -> Path | None:
    def write(folder: Path) -> None:
        try:
            write_weights(inner, folder, None)
        except (OSError, SafetensorError):
            raise  # the disk's
        except Exception:
            # Whatever save_pretrained stumbles over: the values alone.
            state = {name: value.detach().cpu().contiguous().clone() for name, value in inner.state_dict().items()}
            safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with contextlib.suppress(TypeError, OSError):
            kept = finite({"format": FORMAT, "unfinished": str(reason), **record})
            (folder / RECORD).write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")

    return place.rescue(write)


def _rescued(inner: nn.Module, record: Mapping[str, Any], place: Reserved, error: Exception) -> CheckpointError:
    """The error to raise where saving failed, when the weights are safe."""
    reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {first_line(error)}"
    reason = reason.rstrip(".").replace(str(place.folder), str(place.output))
    folder = _rescue(inner, record, place, reason)
    if folder is None:
        kept = "The weights could be written nowhere else either; the model object still holds them."
    else:
        kept = f"The weights are in {folder} (safetensors, not verified), with what was done in {RECORD}: nothing is lost."
    return CheckpointError(f"The output {place.output} could not be saved: {reason}. {kept}")


def _refuse_non_finite(model: nn.Module) -> None:
    """NaN and infinity in a parameter, and NaN in a buffer, where infinity may be meant (a mask)."""
    bad = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not is_finite(value):
            has_nan = bool(torch.isnan(value).any())
            if has_nan or name in parameters:
                bad[name] = "NaN" if has_nan else "infinity"
    if bad:
        (first, what), more = next(iter(bad.items())), len(bad) - 1
        others = f" and in {more} other{'s' if more > 1 else ''}" if more else ""
        raise CheckpointError(
            f"{what} in {first}{others}: the model predicts nothing any more. Did the training diverge? A lower "
            "learning rate or clipped gradients help"
        )


def _replaceable(source: str | Path | None) -> Callable[[Path], None]:
    """What `Reserved` asks before it replaces a folder: it holds what statprune wrote and nothing else, and not the model."""

    def check(output: Path) -> None:
        if source is not None and Path(source).exists():
            model = Path(source).resolve()
            if model == output.resolve() or output.resolve() in model.parents:
                raise CheckpointError(
                    f"The output {output} is the model itself, or holds it, and is not overwritten. Choose another name."
                )
        try:
            record = read_json(output / RECORD)
            known = record["files"].keys() if record["format"] == FORMAT and "recipe" in record else None
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            known = None
        if known is None:
            raise CheckpointError(
                f"The output {output} exists and has no {RECORD} of format {FORMAT}, so it is not overwritten: only a folder "
                "that statprune wrote is. Choose another name, or remove it first."
            )
        if others := sorted(set(names(output)) - known):
            raise CheckpointError(
                f"The output {output} exists and holds {', '.join(others[:3])}, which statprune did not write, so it is not "
                "overwritten. Choose another name, or put that elsewhere first."
            )

    return check
