"""What lies beside a model's weights and goes with it wherever it goes: licence, templates, preprocessors, the tokenizer.

Never copied: code, pickles, weights, adapters, hidden files, and links that lead out of the model's folder.
"""

import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

from statprune.errors import CheckpointError
from statprune.record import TEMPLATES, check_name
from statprune.verification import stays_inside

COMPANIONS = (
    "licen[sc]e*", "*licen[sc]e*.md", "*licen[sc]e*.txt", "*licen[sc]e*.pdf", "copying*", "notice*", "*use_policy*",
    "generation_config.json", "chat_template*", f"{TEMPLATES}/*.jinja",
    "*processor_config.json", "*processor.json", "feature_extract*.json",
)  # fmt: skip
"""Globs on names, whatever their case."""

TOKENIZERS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece*",
    "source.spm", "target.spm", "*.tiktoken", "tekken.json",
)  # fmt: skip
"""The same for files of tokenizers, which are copied where no tokenizer was opened."""


def source_folder(source: str | Path | None, revision: str | None) -> Path | None:
    """The folder of a model; of a name on the hub its snapshot in the cache, where it is there. Nothing is downloaded.

    Args:
        source: folder or hub name.
        revision: the commit on the hub that was loaded, if known.
    """
    if source is None:
        return None
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(source), "config.json", revision=revision)
    except (HFValidationError, OSError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def copy_companions(source: Path, target: Path, *, with_tokenizer: bool) -> list[str]:
    """Copy what goes with a model, except what is there already.

    Args:
        source: the model's folder.
        target: the folder that is written.
        with_tokenizer: copy the files of its tokenizer, too.

    Returns:
        The names of what was copied.
    """
    wanted = (*COMPANIONS, *TOKENIZERS) if with_tokenizer else COMPANIONS
    copied = []
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        if not any(fnmatch.fnmatchcase(name.lower(), glob) for glob in wanted) or (target / name).exists():
            continue
        if name.lower().endswith((".safetensors", ".index.json", ".gguf", ".onnx")) or not _may_be_recorded(name):
            continue
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
        copied.append(name)
    return copied


def _files(source: Path) -> Iterator[Path]:
    for path in sorted([*source.iterdir(), *(source / TEMPLATES).glob("*")]):
        if path.is_file() and not path.name.startswith(".") and (not path.is_symlink() or stays_inside(source, path)):
            yield path


def _may_be_recorded(name: str) -> bool:
    try:
        check_name(name)
    except CheckpointError:
        return False
    return True
