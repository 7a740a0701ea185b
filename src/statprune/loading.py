"""A model, its tokenizer and its fingerprint, from a folder or the hub: safetensors only, and no code that came with it.

What cannot be is refused before a weight is read.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from statprune.completeness import check_loaded, check_stored, other_shapes, some, unconverted, without_report, wrong_shapes
from statprune.configuration import empty_model, load_config, model_class, model_folder
from statprune.errors import CalibrationError, ModelError, first_line, number_of
from statprune.record import file_digest
from statprune.weight_files import Stored, read_headers

DEFAULT_SEQLEN = 2048
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
    "vocab.txt", "tekken.json",
)  # fmt: skip
"""One of these lies beside a model that has a tokenizer."""


def window_length(config: Any, seqlen: int | None) -> int:
    """Tokens in a window for the model of this configuration: `seqlen`, or 2048 and at most the model's context.

    Raises:
        CalibrationError: the windows are longer than the model's context.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, context) if isinstance(context, int) else DEFAULT_SEQLEN
    if isinstance(context, int) and seqlen > context:
        raise CalibrationError(f"--seqlen {seqlen} is longer than the model's context: expected at most {context}.")
    return seqlen


def load_causal(model: str, dtype: str, device: str, revision: str | None = None) -> Any:
    """A causal language model on its device.

    Args:
        model: folder or hub name.
        dtype: `"auto"`, or what torch calls it.
        device: `"auto"`, or what torch calls it.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: there is no such model or device, or it is no causal language model.
    """
    device = choose_device(device)
    try:
        loaded = load_model(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device, revision=revision)
    except (RuntimeError, AssertionError) as e:
        raise ModelError(f"--device {device}: {first_line(e)}") from e
    refuse_unless_causal(model, loaded)
    return loaded


def refuse_unless_causal(path: str, loaded: Any) -> None:
    """Raise ModelError for a model that is no causal language model."""
    if loaded.config.is_encoder_decoder or not loaded.can_generate():
        raise ModelError(
            f"{path} is a {type(loaded).__name__}, not a causal language model, and text alone does not calibrate it: "
            "use statprune.prune(model, batches, recipe) in Python, with batches of its own inputs."
        )


def choose_device(device: str) -> str:
    """`"auto"` as the GPU, or the CPU where there is none; any other name as it is."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_model(path: str, *, dtype: torch.dtype | str = "auto", device: str = "cpu", revision: str | None = None) -> Any:
    """A transformers model from a folder or the hub: safetensors only, whole, and no code that came with it.

    Every tensor of the model must be in the files, with its shape, but for those that are tied to another; and every tensor
    of the files in the model. Left out with a warning are heads for other tasks (`HEADS`), and weights that transformers
    itself leaves out of this class, such as those that predict a second token. Left out without a word are the buffers that
    old checkpoints hold and transformers computes.

    Args:
        path: folder or hub name.
        dtype: a torch dtype; `"auto"` takes the checkpoint's.
        device: where it goes, as torch calls it.
        revision: branch, tag or commit on the hub.

    Returns:
        The model, in eval mode; its `config._commit_hash` is the commit of a model of the hub.

    Raises:
        ModelError: not a model, quantized, only pickled weights, or an adapter beside it; tensors that are missing, that
            belong to another model, have another shape or are not floating point.
    """
    config = load_config(path, revision)
    folder = model_folder(path, revision, with_weights=True)
    stored = read_headers(folder, getattr(config, "transformers_weights", None))
    empty = empty_model(path, config=config)
    left_out = check_stored(path, stored, empty)
    kind, part = model_class(config)
    try:
        with without_report() as reports:
            model, found = kind.from_pretrained(
                folder, config=part, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as e:  # whatever a model class, safetensors and torch raise on weights that do not fit
        raise ModelError(_why_not_loaded(path, stored, empty, reports, e)) from e
    left_out += check_loaded(path, kind.__name__, found)
    if left_out:
        warnings.warn(
            f"Of {path}, {number_of(len(left_out), 'tensor')} that {kind.__name__} has no use for will not be in what is "
            f"saved: {some(left_out)}.",
            stacklevel=2,
        )
    model.config._commit_hash, model.config.name_or_path, model.name_or_path = config._commit_hash, path, path
    return model.to(device).eval()


def _why_not_loaded(path: str, stored: Mapping[str, Stored], empty: Any, reports: Sequence[str], error: Exception) -> str:
    """The message. Wrong shapes are looked for in the headers: transformers may fail on them before it can report them."""
    if names := unconverted(reports):
        return (
            f"{path}: {some(names)} cannot be made of what the files hold for it: a part is missing, or has another shape. "
            "Was the checkpoint saved whole, and is this its config.json?"
        )
    if other := other_shapes(stored, empty):
        return wrong_shapes(path, type(empty).__name__, other)
    return f"The weights in {path} cannot be loaded: {first_line(error)}"


def has_tokenizer(path: str, revision: str | None = None) -> bool:
    """Whether a tokenizer lies beside a model."""
    folder = model_folder(path, revision)
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer beside a model.

    Args:
        path: folder or hub name.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: there is none, or it is broken.
    """
    if not has_tokenizer(path, revision):
        raise ModelError(
            f"No tokenizer in {path}: expected tokenizer.json, as save_pretrained writes it. Without one, calibrate on the "
            "model's own samples (--calibration generated), or on token files (FILE.safetensors:KEY)."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(path, revision), trust_remote_code=False)
        tokenizer("a b", verbose=False)  # settings of the wrong type show at the first text
    except Exception as e:  # tokenizers raises Exception itself
        raise ModelError(f"The tokenizer in {path} cannot be loaded: {first_line(e)}") from e
    return tokenizer


def fingerprint(path: str, config: Any) -> str:
    """What tells one version of a model from another: its commit on the hub, or a digest of the folder's weight files."""
    if not Path(path).is_dir():
        return str(getattr(config, "_commit_hash", None))
    digests = json.dumps(file_digests(Path(path)), sort_keys=True)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def file_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 digest of each of the folder's weight files, by file name; errors as for `file_digest`."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
