"""Open what a command names: a causal language model, and the numbers that go with it, checked before a weight is read."""

from typing import Any, Literal

import torch

from statprune.checkpoint import load_config, load_model
from statprune.errors import CalibrationError, ModelError

DType = Literal["auto", "float32", "bfloat16", "float16"]
DEFAULT_SEQLEN = 2048


def open_causal(model: str, dtype: str, device: str, seqlen: int | None, **numbers: int) -> tuple[Any, int]:
    """(the model, tokens in a window); numbers that cannot be are refused before any weight is read.

    Args:
        model: folder or hub name.
        dtype: a name of `DType`.
        device: `"auto"`, or what torch calls it.
        seqlen: tokens in a window; None for 2048, or the model's context if that is shorter.
        numbers: other options that must be at least 1, by name.

    Raises:
        CalibrationError: a number is below 1, or the windows are longer than the model's context.
        ModelError: there is no such model or device, or it is no causal language model.
    """
    length = window_length(load_config(model), seqlen)
    check_positive(seqlen=length, **numbers)
    return load_causal(model, dtype, device), length


def window_length(config: Any, seqlen: int | None) -> int:
    """Tokens in a window for the model of this configuration; errors as for `open_causal`."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, context) if isinstance(context, int) else DEFAULT_SEQLEN
    if isinstance(context, int) and seqlen > context:
        raise CalibrationError(f"--seqlen {seqlen} is longer than the model's context: expected at most {context}.")
    return seqlen


def check_positive(**numbers: int) -> None:
    """Raise CalibrationError for an option below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise CalibrationError(f"--{name} {number}: expected at least 1.")


def load_causal(model: str, dtype: str, device: str) -> Any:
    """A causal language model on its device; errors as for `open_causal`."""
    device = choose_device(device)
    try:
        loaded = load_model(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device)
    except (RuntimeError, AssertionError) as e:
        raise ModelError(f"--device {device}: {str(e).splitlines()[0]}") from e
    if loaded.config.is_encoder_decoder or not loaded.can_generate():
        raise ModelError(
            f"{model} is a {type(loaded).__name__}, not a causal language model, and text alone does not calibrate it: "
            "use statprune.prune(model, batches, recipe) in Python, with batches of its own inputs."
        )
    return loaded


def choose_device(device: str) -> str:
    """`"auto"` as the GPU, or the CPU where there is none; any other name as it is."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
