"""Calibration batches: bind whatever the user has to the model's inputs, and refuse what cannot work.

A batch is a token tensor [batch, length], a dict of tensors (with an attention mask where there is padding), or a
tuple of the arguments of `forward`. Shapes may differ from batch to batch.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from statprune.errors import CalibrationError, NonFiniteError, TracingError
from statprune.model.kinds import is_transformers_model, vocabulary_and_context

LABELS = ("labels", "future_values", "return_loss")
"""Inputs that only a loss needs; calibration has no loss."""

_EXAMPLE_LENGTH = 8


@dataclass(frozen=True)
class ModelInputs:
    """What one forward pass takes."""

    args: tuple[Any, ...]
    """Only for a `forward` with arguments that have no name; otherwise everything has one."""

    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """In the order of the exported graph's placeholders; those inside lists and dicts too."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def bind_batches(model: nn.Module, batches: Iterable[Any]) -> list[ModelInputs]:
    """Every batch as inputs of this model, on its device, all with the same names.

    Raises:
        CalibrationError: no batches; a batch of an unknown kind or with other inputs than the first; nothing but padding;
            tokens beyond the vocabulary; sequences longer than the model's context.
        NonFiniteError: NaN or infinity in a floating-point input.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"The calibration batches are a {type(batches).__name__}: expected several, such as a list or a DataLoader. "
            "Wrap a single batch in a list."
        )
    bound = [_bind(model, batch, index) for index, batch in enumerate(batches)]
    if not bound:
        raise CalibrationError(
            "There are no calibration batches: expected at least one. (A generator that was already used up has none either.)"
        )
    first = bound[0]
    for index, inputs in enumerate(bound):
        if inputs.kwargs.keys() == first.kwargs.keys():
            inputs = bound[index] = replace(inputs, kwargs={name: inputs.kwargs[name] for name in first.kwargs})
        if _frame(inputs) != _frame(first):
            raise CalibrationError(
                f"Calibration batch {index} has the inputs {_describe(inputs)}, the first batch had {_describe(first)}: "
                "expected the same inputs in every batch, with the same value where an input is not a tensor."
            )
        _check(model, inputs, index)
    for name in first.kwargs:
        if name.endswith("attention_mask") and not any(bool(inputs.kwargs[name].any()) for inputs in bound):
            raise CalibrationError(f"The calibration batches are all padding: {name!r} is 0 everywhere, and 1 marks a token.")
    return bound


def dynamic_dims(batches: Sequence[ModelInputs]) -> list[set[int]]:
    """For each of `ModelInputs.tensors()`, the dimensions whose size differs between batches."""
    dims: list[set[int]] = []
    for tensors in zip(*(inputs.tensors() for inputs in batches), strict=True):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len({len(shape) for shape in shapes}) > 1:
            raise CalibrationError(f"A calibration input has {len(shapes[0])} dimensions in the first batch and others later.")
        dims.append({dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1})
    return dims


def example_batch(batches: Sequence[ModelInputs]) -> ModelInputs:
    """Inputs to trace with: torch.export takes a size of 1 for a constant, so no size that varies may be 1 here."""
    dims = dynamic_dims(batches)

    def preference(inputs: ModelInputs) -> tuple[int, int]:
        sizes = [tensor.shape[dim] for tensor, varying in zip(inputs.tensors(), dims, strict=True) for dim in varying]
        return -sizes.count(1), sum(tensor.numel() for tensor in inputs.tensors())

    best = max(batches, key=preference)
    varying = iter(dims)

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            for dim in next(varying):
                leaf = leaf.repeat_interleave(2, dim) if leaf.shape[dim] == 1 else leaf
        return leaf

    return replace(best, args=tree_map(widen, best.args), kwargs=tree_map(widen, best.kwargs))


def _frame(inputs: ModelInputs) -> tuple[Any, list[Any]]:
    """The inputs without their tensors: what one graph of the model holds as constants."""
    leaves, structure = tree_flatten((inputs.args, inputs.kwargs))
    return structure, ["a tensor" if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _describe(inputs: ModelInputs) -> str:
    def name_kind(leaf: Any) -> Any:
        return "tensor" if isinstance(leaf, Tensor) else leaf

    return str([*tree_map(name_kind, inputs.args), tree_map(name_kind, inputs.kwargs)])


def _bind(model: nn.Module, batch: Any, index: int) -> ModelInputs:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        kwargs = {str(name): value for name, value in batch.items() if value is not None}
        if is_transformers_model(model):
            kwargs = _without_labels(model, kwargs)
        args: tuple[Any, ...] = ()
    elif isinstance(batch, Tensor):
        args, kwargs = (batch,), {}
    elif isinstance(batch, tuple | list):
        args, kwargs = tuple(batch), {}
    else:
        raise CalibrationError(
            f"Calibration batch {index} is a {type(batch).__name__}: expected a tensor of tokens, a dict of tensors, "
            f"or a tuple of the arguments of {type(model).__name__}.forward."
        )
    try:
        arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    except TypeError as e:
        raise CalibrationError(f"Calibration batch {index} does not fit {type(model).__name__}.forward: {e}.") from e
    named = dict(arguments.arguments)
    kinds = {name: arguments.signature.parameters[name].kind for name in named}
    if any(kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY) for kind in kinds.values()):
        args, kwargs = arguments.args, arguments.kwargs
    else:
        extra = next((name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD), None)
        args, kwargs = (), {**{name: value for name, value in named.items() if name != extra}, **named.get(extra or "", {})}
    return ModelInputs(
        tree_map(lambda value: _to_model(model, value, device), args),
        tree_map(lambda value: _to_model(model, value, device), kwargs),
    )


def _without_labels(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Labels give a loss, which calibration does not need; an encoder-decoder makes its decoder inputs of them."""
    make_decoder_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    has_decoder_inputs = any(name in kwargs for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if make_decoder_inputs is not None and not has_decoder_inputs and "labels" in kwargs:
        kwargs = {**kwargs, "decoder_input_ids": make_decoder_inputs(labels=kwargs["labels"])}
    return {name: value for name, value in kwargs.items() if name not in LABELS}


def _to_model(model: nn.Module, value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = getattr(model, "dtype", None)
    if value.is_floating_point() and is_transformers_model(model) and isinstance(dtype, torch.dtype):
        return value.to(device=device, dtype=dtype)
    if not value.is_floating_point() and value.dtype in (torch.int32, torch.int16, torch.uint8) and value.ndim == 2:
        value = value.long()  # token files store int32 to be small; some models index with it, which wants int64
    return value.to(device)


def _check(model: nn.Module, inputs: ModelInputs, index: int) -> None:
    if not inputs.tensors():
        raise CalibrationError(f"Calibration batch {index} has no tensor in it: {_describe(inputs)}. Convert lists and arrays.")
    vocabulary, context = vocabulary_and_context(model)
    for name, value in [*enumerate(inputs.args), *inputs.kwargs.items()]:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                _check_tensor(str(name), tensor, index)
        if name not in ("input_ids", "decoder_input_ids") or not isinstance(value, Tensor) or value.is_meta:
            continue
        if vocabulary is not None and not 0 <= int(value.min()) <= int(value.max()) < vocabulary:
            raise CalibrationError(
                f"Calibration batch {index}: token ids from {int(value.min())} to {int(value.max())} in {name!r}, but the "
                f"model's vocabulary has {vocabulary}. Was the text tokenized with another model's tokenizer?"
            )
        if context is not None and value.shape[-1] > context:
            raise CalibrationError(
                f"Calibration batch {index}: sequences of {value.shape[-1]} tokens in {name!r}, longer than the model's "
                f"context of {context}. Cut them, or use a --seqlen of at most {context}."
            )


def _check_tensor(name: str, tensor: Tensor, index: int) -> None:
    if tensor.numel() == 0:
        raise CalibrationError(f"Calibration batch {index}: the input {name!r} of shape {tuple(tensor.shape)} is empty.")
    if not tensor.is_floating_point():
        return
    # A mask that is added to attention scores has -inf in it, and rightly.
    is_bad = torch.isnan(tensor) if "mask" in name else ~torch.isfinite(tensor)
    if is_bad.any():
        raise NonFiniteError(f"Calibration batch {index}: NaN or infinity in the input {name!r}. Nothing was changed.")


def example_inputs(model: Any) -> dict[str, Tensor]:
    """Zeros of the right shapes for the inputs that a transformers model names as its main one.

    Raises:
        TracingError: the main input is of an unknown kind.
    """
    config = model.config
    tokens = torch.zeros(2, _EXAMPLE_LENGTH, dtype=torch.int64)
    inputs: dict[str, Tensor] = {}
    vision = getattr(config, "vision_config", config)
    is_text_too = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if model.main_input_name == "input_ids" or is_text_too:
        inputs["input_ids"] = tokens
    if model.main_input_name == "pixel_values" or is_text_too:
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(2, getattr(vision, "num_channels", 3), height, width)
    if model.main_input_name == "input_features":
        inputs["input_features"] = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
    if not inputs:
        raise TracingError(
            f"{type(model).__name__} takes {model.main_input_name}, for which no example can be made up. "
            "Use statprune.plan(model, batches) in Python, with batches of its own inputs."
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs
