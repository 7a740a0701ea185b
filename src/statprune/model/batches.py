"""What a batch is: whatever data loaders, tokenizers and `datasets` give, as the arguments of a model's `forward`.

    dict, BatchEncoding     by name; names that `forward` does not have are left out, and so are the labels of a loss
    tensor, array           the first argument; a single row of tokens becomes a batch of one
    tuple, list of tensors  by position, as far as `forward` requires arguments: `(x, y)` gives x
    list of dicts           rows of `datasets`, stacked
    list of ints            a row of tokens; a list of such lists is several rows

Several batches are any iterable of these. A bare tensor [rows, ...] is cut along its first dimension.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from statprune.errors import CalibrationError, first_line
from statprune.model.kinds import is_transformers_model, unwrapped

LABELS = ("labels", "label", "label_ids", "future_values", "return_loss")
"""Inputs that only a loss needs; calibration has no loss."""

ROWS = 8
"""Rows of a bare tensor that run at once. Statistics are sums over tokens, so the number is about memory alone."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a call: positional ones, and those by name."""


def several(batches: Any) -> Iterable[Any]:
    """What was given as batches, one after the other.

    Raises:
        CalibrationError: it is a single batch, or nothing of the kind.
    """
    if isinstance(batches, Tensor) and batches.ndim >= 2:
        return batches.split(ROWS) if len(batches) else ()
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        shape = f" of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else ""
        raise CalibrationError(
            f"The calibration batches are a {type(batches).__name__}{shape}: expected several, such as a list, a DataLoader, "
            "or a tensor of windows [windows, length]. Wrap a single batch in a list."
        )
    return batches


def read_batch(model: nn.Module, batch: Any, index: int = 0, *, has_targets: bool = False) -> Arguments:
    """The arguments of `model.forward` in a batch of any kind.

    Args:
        model: any module; one that is compiled or wrapped for several devices is seen through.
        batch: of one of the kinds above.
        index: its number, for messages.
        has_targets: whether it comes from a loader to train on, where a tuple ends in targets.

    Raises:
        CalibrationError: another kind; no input in it that `forward` has; a name that looks misspelled; rows of unequal
            lengths; a tuple with something that may be a target, or an argument that `forward` does not require.
    """
    model = unwrapped(model)[0]
    if isinstance(batch, Mapping):
        return (), _one_row_as_batch(model, _by_name(model, batch, index))
    if isinstance(batch, list) and batch and all(isinstance(row, Mapping) for row in batch):
        return (), _stack([_by_name(model, row, index) for row in batch], index)
    if isinstance(batch, list) and batch and all(_is_tokens(row) for row in batch):
        return _by_position(model, (_to_tensor(batch, "the rows", index),), index, has_targets)
    if _is_tokens(batch):
        return _by_position(model, (torch.tensor([batch]),), index, has_targets)
    if isinstance(batch, Tensor | np.ndarray):
        return _by_position(model, (batch,), index, has_targets)
    if isinstance(batch, tuple | list):
        return _by_position(model, tuple(batch), index, has_targets)
    raise CalibrationError(
        f"Calibration batch {index} is a {type(batch).__name__}: expected a tensor of tokens, a dict of tensors, rows of "
        f"tokens, or a tuple of the arguments of {type(model).__name__}.forward."
    )


def _by_name(model: nn.Module, batch: Mapping[Any, Any], index: int) -> dict[str, Any]:
    given = {str(name): value for name, value in batch.items() if value is not None}
    parameters = inspect.signature(model.forward).parameters
    named = {
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and not (name in LABELS and (parameter.default is not parameter.empty or is_transformers_model(model)))
    }
    rest = next((parameter for parameter in parameters.values() if parameter.kind is parameter.VAR_KEYWORD), None)
    if rest is not None:
        # **kwargs: Unpack[TransformersKwargs] says what goes in there; a plain **kwargs may take anything.
        typed = {name for kind in get_args(rest.annotation) for name in getattr(kind, "__annotations__", {})}
        is_open = not typed and not is_transformers_model(model)
        named |= {
            name
            for name, value in given.items()
            if name in typed or (is_open and name not in parameters and _holds_tensors(value))
        }
    decoder_inputs = _decoder_inputs(model, given, index)
    chosen = {name: _to_tensor(value, name, index) for name, value in given.items() if name in named}
    for name in given.keys() - named - set(LABELS):
        for meant in difflib.get_close_matches(name, sorted(named - given.keys()), n=1, cutoff=0.85):
            raise CalibrationError(
                f"Calibration batch {index} does not fit {type(model).__name__}.forward: it has {name!r}, which forward does "
                f"not take. Did you mean {meant!r}? Rename it, or leave it out."
            )
    if not chosen:
        raise CalibrationError(
            f"Calibration batch {index} does not fit {type(model).__name__}.forward: it has {_words(given)}, and forward takes "
            f"{_words(named)}."
        )
    return {**chosen, **decoder_inputs}


def _decoder_inputs(model: nn.Module, given: Mapping[str, Any], index: int) -> dict[str, Any]:
    """An encoder-decoder of transformers makes its decoder's inputs of labels, where it has no others."""
    make: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    has_them = any(name in given for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if make is None or has_them or "labels" not in given or not is_transformers_model(model):
        return {}
    labels = _to_tensor(given["labels"], "labels", index)
    made = make(labels=labels[None] if labels.ndim == 1 else labels)
    return {"decoder_input_ids": made[0] if labels.ndim == 1 else made}


def _by_position(model: nn.Module, values: Sequence[Any], index: int, has_targets: bool) -> Arguments:
    parameters = list(inspect.signature(model.forward).parameters.values())
    values = tuple(
        _to_tensor(value, f"argument {place}", index) if isinstance(value, np.ndarray) else value
        for place, value in enumerate(values)
    )
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        parameters = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        required = max(1, sum(parameter.default is parameter.empty for parameter in parameters))
        for parameter, value in zip(parameters[required:], values[required:], strict=False):
            if _may_be_meant(parameter, value, has_targets or is_transformers_model(model)):
                raise CalibrationError(
                    f"Calibration batch {index} is a tuple of {len(values)}, and whether {parameter.name!r} of "
                    f"{type(model).__name__}.forward or a target comes after the first {required} cannot be told. Give a dict, "
                    f"such as {{{parameters[0].name!r}: ..., {parameter.name!r}: ...}}, or the first {required} alone."
                )
            break  # a target, and what comes after it has no place in forward
        values = values[:required]
    if values and is_transformers_model(model) and isinstance(first := values[0], Tensor):
        if first.is_floating_point() and model.main_input_name in {parameter.name for parameter in parameters}:
            return (), {str(model.main_input_name): first}
        if first.ndim == 1:
            values = (first[None], *values[1:])
    return values, {}


def _one_row_as_batch(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """A row of tokens [length], as `datasets` gives them, is a batch of one."""
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or not is_transformers_model(model):
        return inputs
    return {name: value[None] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _stack(rows: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    stacked: dict[str, Any] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        if not all(isinstance(value, Tensor) for value in values):
            stacked[name] = values[0]
            if any(value != values[0] for value in values if not isinstance(value, Tensor)):
                raise CalibrationError(f"Calibration batch {index}: the rows have {name!r} in part only, or with other values.")
            continue
        if len(shapes := {tuple(value.shape) for value in values if isinstance(value, Tensor)}) > 1:
            raise _uneven(index, repr(name), sorted(shapes))
        stacked[name] = torch.stack([value for value in values if isinstance(value, Tensor)])
    return stacked


def _to_tensor(value: Any, name: str, index: int) -> Any:
    """Arrays and lists of numbers as a tensor; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        try:
            tensor = torch.as_tensor(value)
        except TypeError as e:
            raise CalibrationError(f"Calibration batch {index}: the input {name!r}: {first_line(e)}") from e
        return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
    if not isinstance(value, list | tuple) or not value or not _is_number(_first_leaf(value)):
        return value
    lengths = {len(row) for row in value if isinstance(row, list | tuple)}
    if len(lengths) > 1:
        raise _uneven(index, repr(name), sorted(lengths))
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise CalibrationError(f"Calibration batch {index}: no tensor can be made of {name!r}: {first_line(e)}") from e


def _uneven(index: int, name: str, found: Sequence[Any]) -> CalibrationError:
    return CalibrationError(
        f"Calibration batch {index}: the rows of {name} have different lengths, from {found[0]} to {found[-1]}. Give each row "
        "as a batch of its own (shapes may differ from batch to batch), or pad them with the tokenizer, which makes an "
        "attention_mask too."
    )


def _is_tokens(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(one, int) and not isinstance(one, bool) for one in row)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _first_leaf(value: Any) -> Any:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | int | float) or _is_number(_first_leaf(value))


def _may_be_meant(parameter: inspect.Parameter, value: Any, is_usually_target: bool) -> bool:
    """Whether a value in the place of an optional parameter may be for it, and not the target that a loss compares with."""
    if not isinstance(value, Tensor) or parameter.default is not None or parameter.name in LABELS or value.is_meta:
        return False
    # A mask of ones masks nothing, so that it does not matter what is meant; and a class for each row has one dimension.
    may_be_mask = value.ndim > 1 and bool(((value == 0) | (value == 1)).all()) and not bool(value.all())
    return may_be_mask or not (is_usually_target or "mask" in parameter.name)


def _words(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "nothing by name"
