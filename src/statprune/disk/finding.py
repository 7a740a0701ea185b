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
        self._by_first_row: dict[Any, list[str]] | None = None
        """Names of matrices by their first row."""
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

    def find_parts(self, parameter: str, stack: Tensor) -> list[list[tuple[str, str]]]:
        """The same for a stack of matrices that lies in several tensors: the (file, tensor) of each matrix's stretches of rows.

        So are most experts saved: `gate_up_proj` of all of them as a gate and an up of each.

        Args:
            parameter: its name, for an error.
            stack: [experts, rows, columns], as it is stored in the model.

        Raises:
            CheckpointError: some of it is in none.
        """
        used: set[str] = set()
        experts = []
        for index, matrix in enumerate(stack.detach().cpu()):
            parts, row = [], 0
            while row < len(matrix):
                name = next(
                    (name for name in self._beginning_with(matrix[row]) if self._is_part(name, matrix, row, used)), None
                )
                if name is None:
                    raise CheckpointError(f"Row {row} of matrix {index} of {parameter} was saved in no tensor.")
                used.add(name)
                parts.append((self._places[name], name))
                row += self._shapes[name][0]
            experts.append(parts)
        return experts

    def _beginning_with(self, row: Tensor) -> list[str]:
        """The matrices that have this first row."""
        if self._by_first_row is None:
            self._by_first_row = {}
            for name, shape in sorted(self._shapes.items()):
                if len(shape) == 2 and shape[0]:
                    first: Tensor = self._files[self._places[name]].get_slice(name)[:1]
                    self._by_first_row.setdefault(_bits(first[0]), []).append(name)
        return self._by_first_row.get(_bits(row), [])

    def _is_part(self, name: str, matrix: Tensor, row: int, used: set[str]) -> bool:
        """Whether an unused tensor is the matrix from this row on."""
        rows = self._shapes[name][0]
        return name not in used and row + rows <= len(matrix) and _is_same(self._read(name), matrix[row : row + rows])

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


def _bits(row: Tensor) -> tuple[torch.dtype, bytes]:
    return row.dtype, row.contiguous().view(torch.uint8).numpy().tobytes()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
