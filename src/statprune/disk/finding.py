"""In which file, and under which name, a parameter was saved."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from statprune.errors import CheckpointError

_LOOKED_AT = 256
"""Elements of a tensor, spread evenly, that tell it from others before all of them are compared."""


class Saved(contextlib.ExitStack):
    """The tensors of a folder's safetensors files; it is entered, and what was opened is closed behind it.

    Args:
        folder: with the files.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, str] = {}
        self._named: dict[Any, list[str]] = {}
        """Names by what tensors look like, of the shapes that were asked for."""
        self._looked_at: set[tuple[int, ...]] = set()
        for path in sorted(folder.glob("*.safetensors")):
            file = self._files[path.name] = self.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118  this is no dict
                self._places[name] = path.name
                self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def find(self, parameter: str, weight: Tensor) -> tuple[str, str]:
        """(file, tensor) that holds a parameter: by its name, or else by its content, since transformers renames some.

        Each saved tensor is looked at once, however many are asked for.

        Raises:
            CheckpointError: none holds it.
        """
        stored = weight.detach().cpu()
        if self._shapes.get(parameter) == tuple(stored.shape) and _is_same(self._read(parameter), stored):
            return self._places[parameter], parameter
        self._look_at(tuple(stored.shape))
        for name in self._named.get(_look(stored), []):
            if _is_same(self._read(name), stored):
                return self._places[name], name
        files = ", ".join(self._files)
        raise CheckpointError(f"{parameter} was saved under no name, in none of {files or 'no files'}.")

    def _look_at(self, shape: tuple[int, ...]) -> None:
        if shape not in self._looked_at:
            self._looked_at.add(shape)
            for name, own in self._shapes.items():
                if own == shape:
                    self._named.setdefault(_look(self._read(name)), []).append(name)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._places[name]].get_tensor(name)
        return tensor


def _look(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """The same for tensors that are the same to the bit."""
    flat = tensor.reshape(-1)
    some = flat[:: max(1, len(flat) // _LOOKED_AT)].contiguous()
    return tensor.dtype, tensor.shape, some.view(torch.uint8).numpy().tobytes()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
