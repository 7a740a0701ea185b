"""Calibration batches: bind whatever the user has to the model's inputs, and refuse what cannot work.

What a batch may be is said and decided in `batches`. Shapes may differ from batch to batch.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from statprune.errors import CalibrationError, NonFiniteError, TracingError
from statprune.model.batches import LABELS, read_batch, several
from statprune.model.kinds import is_transformers_model, unwrapped, vocabulary_and_context
from statprune.model.storage import compute_device

__all__ = ["LABELS", "ModelInputs", "bind_batches", "dynamic_dims", "example_batch", "example_inputs", "read_inputs"]

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


def bind_batches(model: nn.Module, batches: Any) -> list[ModelInputs]:
    """Every batch as inputs of this model, on its device, all with the same names.

    Args:
        model: any module.
        batches: an iterable of batches as `read_inputs` takes them, or a tensor [rows, ...], which is cut into batches.

    Raises:
        CalibrationError: no batches; a batch of an unknown kind or with other inputs than the first; nothing but padding;
            tokens of another dtype than whole numbers, or beyond the vocabulary; a mask of another shape than the tokens;
            sequences longer than the model's context.
        NonFiniteError: NaN or infinity in a floating-point input.
    """
    bound = [read_inputs(model, batch, index) for index, batch in enumerate(several(batches))]
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


def read_inputs(model: nn.Module, batch: Any, index: int = 0, *, has_targets: bool = False) -> ModelInputs:
    """One batch as inputs of this model, on its device.

    Args:
        model: any module.
        batch: a `ModelInputs`, whose arguments are taken as they are, or one of the kinds that `batches` lists.
        index: its number, for messages.
        has_targets: whether it comes from a loader to train on, where a tuple ends in targets.

    Raises:
        CalibrationError: as `batches.read_batch`; or `forward` does not take these arguments.
    """
    if isinstance(batch, ModelInputs):
        args, kwargs = batch.args, batch.kwargs
    else:
        args, kwargs = read_batch(model, batch, index, has_targets=has_targets)
    forward = unwrapped(model)[0].forward
    device = compute_device(model)
    try:
        arguments = inspect.signature(forward).bind_partial(*args, **kwargs)
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


def _to_model(model: nn.Module, value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = getattr(model, "dtype", None)
    if value.is_floating_point() and is_transformers_model(model) and isinstance(dtype, torch.dtype):
        return value.to(device=device, dtype=dtype)
    if (
        not value.is_floating_point()
        and value.dtype in (torch.int32, torch.int16, torch.uint16, torch.uint8)
        and value.ndim == 2
    ):
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
        if value.dtype not in (torch.int64, torch.int32):
            raise CalibrationError(
                f"Calibration batch {index}: {name!r} is of dtype {value.dtype}, and token ids are whole numbers: expected "
                "torch.int64. Convert them with .long()."
            )
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
        mask = inputs.kwargs.get(str(name).replace("input_ids", "attention_mask"))
        if isinstance(mask, Tensor) and mask.ndim == 2 and value.ndim == 2 and mask.shape != value.shape:
            raise CalibrationError(
                f"Calibration batch {index}: the attention mask of shape {tuple(mask.shape)} does not belong to {name!r} of "
                f"shape {tuple(value.shape)}: expected the same shape, with 1 for a token and 0 for padding."
            )


def _check_tensor(name: str, tensor: Tensor, index: int) -> None:
    if tensor.numel() == 0:
        raise CalibrationError(f"Calibration batch {index}: the input {name!r} of shape {tuple(tensor.shape)} is empty.")
    if not tensor.is_floating_point():
        return
    if tensor.itemsize < 2:
        raise CalibrationError(
            f"Calibration batch {index}: the input {name!r} is of dtype {tensor.dtype}, which torch does not compute with. "
            "Convert it to the model's dtype."
        )
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
