"""The weight files of a model's folder: which ones transformers would read, and what their headers say. No weight is read.

    model.safetensors                  all tensors; or
    model.safetensors.index.json       {"metadata": {...}, "weight_map": {tensor: file}}, and the files that it names

A name never leads out of the folder. (A link in the folder may: the hub's cache is made of links.)
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from statprune.errors import ModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = ("F64", "F32", "F16", "BF16")
"""What a weight can be stored as, in the words of safetensors."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OF_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, by its header."""

    file: str
    """The file's name, without its folder."""

    dtype: str
    """In the words of safetensors: F32, BF16, I8, F8_E4M3 ..."""

    shape: tuple[int, ...]


def read_headers(folder: Path, named: str | None = None) -> dict[str, Stored]:
    """Every tensor that transformers would read from a model's folder, by its name in the files.

    Args:
        folder: the model's.
        named: the file or index that its configuration names (`transformers_weights`); None for the usual names.

    Raises:
        ModelError: there are no safetensors; the index is broken, leads out of the folder, or promises what is not there; a
            file is damaged.
    """
    ranks = sorted(file.name for file in folder.glob("shard-*.safetensors") if _OF_RANKS.fullmatch(file.name))
    if ranks:
        raise ModelError(
            f"{folder} holds a distributed checkpoint ({ranks[0]} ...), parts of tensors that ranks have written: expected "
            f"{WHOLE} or {INDEX}, as save_pretrained writes them from one process."
        )
    if named is not None:
        _check_name(f"transformers_weights in {folder / 'config.json'}", named)
    first = next((name for name in ([named] if named else [WHOLE, INDEX]) if (folder / name).is_file()), None)
    if first is None:
        raise ModelError(_no_weights(folder, named))
    if not first.endswith(".json"):
        return dict(_headers(folder, first))
    promised = read_index(folder / first)
    stored: dict[str, Stored] = {}
    for file in sorted(set(promised.values())):
        if not (folder / file).is_file():
            raise ModelError(f"{folder / first} names {file}, which is not there. Was the model downloaded or copied whole?")
        for name, one in _headers(folder, file):
            if name in stored:
                raise ModelError(f"{folder}: {name} is both in {stored[name].file} and in {file}: expected in one file.")
            stored[name] = one
    for name, file in promised.items():
        if name not in stored or stored[name].file != file:
            raise ModelError(f"{folder / first} promises {name} in {file}, where it is not. Was the model saved whole?")
    return stored


def read_index(path: Path) -> dict[str, str]:
    """In which file of the same folder each tensor is, as an index says.

    Raises:
        ModelError: it is no index, or names a file that is not of its folder, or that is no safetensors file.
    """
    index = read_json(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ModelError(
            f'{path} has no "weight_map": expected the file of each tensor by its name, as save_pretrained writes it.'
        )
    if not isinstance(index.get("metadata"), dict):
        raise ModelError(f'{path} has no "metadata", without which transformers cannot read it: expected {{}} at least.')
    for name, file in places.items():
        _check_name(f"{path}: the place of {name}", file)
        if not file.endswith(".safetensors"):
            raise ModelError(f"{path} has {name} in {file}: expected a *.safetensors file; others can run code when read.")
    return places


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        ModelError: the file cannot be read, or is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not JSON: {e}. Was it saved whole?") from e
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a {type(data).__name__}: expected a JSON object, {{...}}.")
    return data


def _check_name(where: str, name: object) -> None:
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise ModelError(f"{where} is {name!r}: expected a file's name, in the model's own folder. Nothing else is read.")


def _no_weights(folder: Path, named: str | None) -> str:
    if named is not None:
        return f"{folder} has no {named}, which config.json names as its weights."
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if found:
        return f"{folder} has no {WHOLE} and no {INDEX}, which transformers reads, only {', '.join(found[:3])}."
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    return f"{folder} has no *.safetensors" + (
        f", only {', '.join(pickled)}: a pickle can run code when it is read. Convert it with save_pretrained on a machine "
        "where you trust it." if pickled else ": a configuration without weights."
    )  # fmt: skip


def _headers(folder: Path, file: str) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                tensor = opened.get_slice(name)
                yield name, Stored(file, tensor.get_dtype(), tuple(tensor.get_shape()))
    except (OSError, SafetensorError) as e:
        raise ModelError(f"The weights in {folder / file} cannot be loaded, the file is damaged: {e}.") from e
