"""What kind of model it is: of transformers, causal, with which vocabulary and context, of which architecture."""

import hashlib
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor


def is_transformers_model(model: nn.Module) -> bool:
    """Whether the model is a `transformers.PreTrainedModel`, asked without importing transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers") for base in type(model).__mro__
    )


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """(the module inside of `torch.compile`, DataParallel and DistributedDataParallel, what its names begin with outside)."""
    prefix = ""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model, prefix = inner, f"{prefix}_orig_mod."
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model, prefix = model.module, f"{prefix}module."
        else:
            return model, prefix


def has_values(model: nn.Module) -> bool:
    """Whether the parameters hold numbers; those of a model that is streamed from its files do not."""
    return not any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in model.parameters())


def is_causal(model: nn.Module) -> bool:
    """Whether logits at a position are for the next token."""
    if not is_transformers_model(model):
        return False
    return bool(model.can_generate() and not model.config.is_encoder_decoder)  # type: ignore[operator,union-attr]


def vocabulary_and_context(model: nn.Module) -> tuple[int | None, int | None]:
    """Of the transformers model that this is, or that is somewhere inside it; None where not known."""

    def positive(limit: Any) -> int | None:
        return limit if isinstance(limit, int) and limit > 0 else None  # XLNet's context is -1: no limit

    config: Any = next((module.config for module in model.modules() if is_transformers_model(module)), None)
    if hasattr(config, "get_text_config"):
        try:
            config = config.get_text_config()
        except ValueError:  # several texts, as Musicgen has, which reads one and writes another
            return None, None
    return positive(getattr(config, "vocab_size", None)), positive(getattr(config, "max_position_embeddings", None))


def predictions_of(output: Any) -> Tensor | None:
    """The tensor that a model predicts with: its logits, its only tensor, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits", next(iter(output.values()), None))
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    return logits if isinstance(logits, Tensor) else None


def adapter_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that belong to adapters of peft, by name, and which part of which module each is."""
    found = {}
    for path, module in model.named_modules():
        if any(base.__name__ == "BaseTunerLayer" and base.__module__.startswith("peft.") for base in type(module).__mro__):
            for part in getattr(module, "adapter_layer_names", ()):
                prefix = f"{path}.{part}".removeprefix(".")
                owned = getattr(module, part, None)
                names = [name for name, _ in owned.named_parameters()] if isinstance(owned, nn.Module) else []
                found.update({f"{prefix}.{name}": f"{part} of {path}" for name in names})
    return found


def architecture(model: nn.Module) -> str:
    """16 hexadecimal digits that differ where the graph of a forward pass may.

    Counted are the classes of all modules, their plain attributes (numbers, texts, functions, tensors that are no buffers), the
    configurations of transformers, and names, shapes, dtypes, devices and ties of parameters and buffers; not their values.
    """
    found = hashlib.sha256()
    configurations: set[int] = set()
    first_name: dict[int, str] = {}
    for path, module in model.named_modules():
        found.update(f"{path} {type(module).__module__}.{type(module).__qualname__}\n".encode())
        for key, value in sorted(vars(module).items()):
            if not key.startswith("_") and key not in _NOT_OF_THE_GRAPH:
                found.update(f" {key}={_describe(value)}\n".encode())
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in configurations:
            configurations.add(id(config))
            settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_GRAPH}
            found.update(f" {sorted(settings.items(), key=str)} {getattr(config, '_attn_implementation', None)}\n".encode())
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        tied = first_name.setdefault(id(tensor), name)
        found.update(f"{name} {tied} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}\n".encode())
    return found.hexdigest()[:16]


_NOT_OF_THE_GRAPH = {
    "training", "forward", "name_or_path", "_name_or_path", "transformers_version", "architectures", "use_cache",
    "warnings_issued",
}  # fmt: skip
"""Attributes of modules and keys of configurations that say where a model comes from, or that tracing sets by itself."""


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        stored = b"" if value.is_meta else value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(stored).hexdigest()}"
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return str({str(key): _describe(one) for key, one in value.items()})
    if isinstance(value, tuple | list):
        return str([_describe(one) for one in value])
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device):
        return repr(value)
    return type(value).__qualname__
