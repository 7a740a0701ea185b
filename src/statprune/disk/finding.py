"""In which file, and under which name, a parameter was saved."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from statprune.errors import CheckpointError


def places_in(folder: Path) -> dict[str, str]:
    """In which file of a folder each tensor is."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path.name))
    return places


def find(parameter: str, weight: Tensor, places: dict[str, str], folder: Path) -> tuple[str, str]:
    """(file, tensor) that holds a parameter: by its name, or else by its content, since transformers renames some."""
    stored = weight.detach().cpu()
    for name in _candidates(parameter, places):
        with safe_open(folder / places[name], framework="pt") as file:
            if tuple(file.get_slice(name).get_shape()) == tuple(stored.shape) and torch.equal(file.get_tensor(name), stored):
                return places[name], name
    raise CheckpointError(f"{parameter} was saved under no name, in none of {', '.join(sorted(set(places.values())))}.")


def _candidates(parameter: str, places: dict[str, str]) -> Iterator[str]:
    if parameter in places:
        yield parameter
    yield from (name for name in places if name != parameter)
