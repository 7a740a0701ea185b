"""Calibration batches: bind whatever the user has to the model's inputs, and refuse what cannot work.

A batch is a token tensor [batch, length], a dict of tensors (with an attention mask where there is padding), or a
tuple of the arguments of `forward`. Shapes may differ from batch to batch.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statprune.errors import CalibrationError, NonFiniteError

LABELS = ("labels", "future_values", "return_loss")
"""Inputs that only a loss needs; calibration has no loss."""


@dataclass(frozen=True)
class ModelInputs:
    """What one forward pass takes."""

    args: tuple[Any, ...]
    """Only for a `forward` that takes `*args`; otherwise everything has a name."""

    kwargs: dict[str, Any]

    def leaves(self) -> list[Any]:
        """The values in the order of the exported graph's placeholders."""
        return [*self.args, *self.kwargs.values()]


def is_transformers_model(model: nn.Module) -> bool:
    """Whether the model is a `transformers.PreTrainedModel`, asked without importing transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers") for base in type(model).__mro__
    )


def bind_batches(model: nn.Module, batches: Iterable[Any]) -> list[ModelInputs]:
    """Every batch as inputs of this model, on its device, all with the same names.

    Raises:
        CalibrationError: no batches; a batch of an unknown kind or with other inputs than the first; tokens beyond the
            vocabulary; sequences longer than the model's context.
        NonFiniteError: NaN or infinity in a floating-point input.
    """
    bound = [_bind(model, batch, index) for index, batch in enumerate(batches)]
    if not bound:
        raise CalibrationError(
            "prune(batches=...) is empty: expected at least one batch of calibration inputs. "
            "(A generator that was already used up is empty too.)"
        )
    first = bound[0]
    for index, inputs in enumerate(bound):
        if list(inputs.kwargs) != list(first.kwargs) or len(inputs.args) != len(first.args):
            raise CalibrationError(
                f"Calibration batch {index} has the inputs {list(inputs.kwargs) or len(inputs.args)}, the first batch had "
                f"{list(first.kwargs) or len(first.args)}: expected the same inputs in every batch."
            )
        _check(model, inputs, index)
    return bound


def dynamic_dims(batches: Sequence[ModelInputs]) -> list[set[int]]:
    """For each input, the dimensions whose size differs between batches."""
    dims: list[set[int]] = []
    for values in zip(*(inputs.leaves() for inputs in batches), strict=True):
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        if len({len(shape) for shape in shapes}) > 1:
            raise CalibrationError(f"A calibration input has {len(shapes[0])} dimensions in the first batch and others later.")
        dims.append({dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1})
    return dims


def example_batch(batches: Sequence[ModelInputs]) -> ModelInputs:
    """The batch to trace with: torch.export takes a size of 1 for a constant, so the largest one."""
    return max(batches, key=lambda inputs: sum(leaf.numel() for leaf in inputs.leaves() if isinstance(leaf, Tensor)))


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
    parameters = arguments.signature.parameters
    variadic = next((p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL and p.name in named), None)
    extra = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD and p.name in named), None)
    if variadic is None:
        args, kwargs = (), {**{key: value for key, value in named.items() if key != extra}, **named.get(extra or "", {})}
    return ModelInputs(
        tuple(_to_model(model, value, device) for value in args),
        {name: _to_model(model, value, device) for name, value in kwargs.items()},
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
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None)
    context = getattr(config, "max_position_embeddings", None)
    for name, value in [*enumerate(inputs.args), *inputs.kwargs.items()]:
        if not isinstance(value, Tensor) or value.is_meta:
            continue
        if value.numel() == 0:
            raise CalibrationError(f"Calibration batch {index}: the input {name!r} of shape {tuple(value.shape)} is empty.")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NonFiniteError(f"Calibration batch {index}: NaN or infinity in the input {name!r}. Nothing was changed.")
        if name in ("input_ids", "decoder_input_ids"):
            if isinstance(vocabulary, int) and not 0 <= int(value.min()) <= int(value.max()) < vocabulary:
                raise CalibrationError(
                    f"Calibration batch {index}: token ids from {int(value.min())} to {int(value.max())} in {name!r}, but the "
                    f"model's vocabulary has {vocabulary}. Was the text tokenized with another model's tokenizer?"
                )
            if isinstance(context, int) and value.shape[-1] > context:
                raise CalibrationError(
                    f"Calibration batch {index}: sequences of {value.shape[-1]} tokens in {name!r}, longer than the model's "
                    f"context of {context}. Cut them, or use a --seqlen of at most {context}."
                )
