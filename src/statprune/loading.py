"""A model, its tokenizer and its fingerprint, from a folder or the hub: safetensors only, and no code that came with it.

What cannot be is refused before a weight is read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from statprune.errors import CalibrationError, ModelError, first_line
from statprune.record import file_digest

DEFAULT_SEQLEN = 2048


def open_causal(model: str, dtype: str, device: str, seqlen: int | None, **numbers: int) -> tuple[Any, int]:
    """(the model, tokens in a window); numbers that cannot be are refused before any weight is read.

    Args:
        model: folder or hub name.
        dtype: `"auto"`, or what torch calls it.
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
    """Raise CalibrationError for an option below 1, or beyond what counts anything."""
    for name, number in numbers.items():
        option = f"--{name.replace('_', '-')} {number}"
        if number >= 1 << 31:
            raise CalibrationError(f"{option}: expected less than {1 << 31:,}.")
        if number < 1:
            raise CalibrationError(f"{option}: expected at least 1.")


def load_causal(model: str, dtype: str, device: str) -> Any:
    """A causal language model on its device; errors as for `open_causal`."""
    device = choose_device(device)
    try:
        loaded = load_model(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device)
    except (RuntimeError, AssertionError) as e:
        raise ModelError(f"--device {device}: {first_line(e)}") from e
    if loaded.config.is_encoder_decoder or not loaded.can_generate():
        raise ModelError(
            f"{model} is a {type(loaded).__name__}, not a causal language model, and text alone does not calibrate it: "
            "use statprune.prune(model, batches, recipe) in Python, with batches of its own inputs."
        )
    return loaded


def choose_device(device: str) -> str:
    """`"auto"` as the GPU, or the CPU where there is none; any other name as it is."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_config(path: str) -> Any:
    """A model's configuration.

    Raises:
        ModelError: the folder is no model.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{path} is not a model folder: expected config.json and *.safetensors in it, as save_pretrained writes them."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"No model at {path!r}, neither a folder nor a name on the hub: {first_line(e)}") from e
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{path} is quantized: prune the model that it was made from, and quantize afterwards.")
    return config


def model_class(config: Any) -> Any:
    """The transformers class that the configuration names, or the one for causal language models where it names none."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def load_model(path: str, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
    """A transformers model from a folder or the hub: safetensors only, and no code that came with it.

    Args:
        path: folder or hub name.
        dtype: a torch dtype; `"auto"` takes the checkpoint's.
        device: where it goes, as torch calls it.

    Returns:
        The model, in eval mode.

    Raises:
        ModelError: not a model, quantized, or only pickled weights.
    """
    config = load_config(path)
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        raise ModelError(
            f"{path} has no *.safetensors"
            + (f", only {', '.join(pickled)}: a pickle can run code when it is read. Convert it with save_pretrained "
               "on a machine where you trust it." if pickled else ": a configuration without weights.")
        )  # fmt: skip
    try:
        model = model_class(config).from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError, RuntimeError) as e:
        raise ModelError(f"The weights in {path} cannot be loaded: {first_line(e)}") from e
    return model.to(device).eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside a model.

    Args:
        path: folder or hub name.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"No tokenizer in {path}: {first_line(e)}") from e


def fingerprint(path: str, config: Any) -> str:
    """What tells one version of a model from another: its commit on the hub, or a digest of the folder's weight files."""
    if not Path(path).is_dir():
        return str(getattr(config, "_commit_hash", None))
    digests = json.dumps(file_digests(Path(path)), sort_keys=True)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def file_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 digest of each of the folder's weight files, by file name; errors as for `file_digest`."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
