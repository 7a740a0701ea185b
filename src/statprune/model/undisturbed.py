"""Leave a model as it was: its modes, its cache settings and its buffers."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model can be traced and calibrated; afterwards its modes, buffers and cache settings are what they were."""
    # Lightning validates in inference mode; parameters and statistics that outlive it must be ordinary tensors.
    with torch.inference_mode(False), torch.no_grad(), eval_mode(model), without_cache(model), _buffers_kept(model):
        yield


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and afterwards exactly the modes there were (some submodules may be frozen)."""
    training = [module for module in model.modules() if module.training]
    # Not model.eval(): some modules do more than set the flag there (merge a LoRA), and nothing here would undo it.
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, transformers models return no key-value cache: a k_proj whose result is an output would pass for an lm_head."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    cached = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """A forward pass may write to buffers (a counter, a cache); calibration leaves them as they were."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy in before:
            module._buffers[name] = buffer
            if not buffer.is_meta and not torch.equal(buffer, copy):
                buffer.copy_(copy)
