"""The weight files of an output, laid out in full before the first weight is written: each has its place from the beginning.

The disk's room is taken then, too, so that a disk that is too small says so before work begins.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from statprune.disk.ranges import WORDS, Range, check_finite, digest_of, read, write
from statprune.errors import CheckpointError, ModelError

_ALIGNMENT = 64


class Shards:
    """Weight files that are filled in any order.

    Args:
        folder: where they are, or will be.
        tensors: what they hold, by name: (dtype, shape).
        max_shard_size: of one file, in bytes or as a text such as `"5GB"`.

    Attributes:
        digests: SHA-256 of each tensor that was written, by name.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_size: int | str
    ) -> None:
        self.folder = folder
        blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in tensors.items()}
        split = split_torch_state_dict_into_shards(blank, max_shard_size=max_shard_size)
        self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
        self._headers = {name: _header(blank, names) for name, names in split.filename_to_tensors.items()}
        self._sizes = {
            name: len(header) + _num_bytes(blank, split.filename_to_tensors[name]) for name, header in self._headers.items()
        }
        self.digests: dict[str, str] = {}
        self.places: dict[str, Range] = {}
        for file, header in self._headers.items():
            start = len(header)
            for name in _order(blank, split.filename_to_tensors[file]):
                self.places[name] = Range(folder / file, start, blank[name].dtype, tuple(blank[name].shape))
                start += self.places[name].num_bytes

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes.values())

    def are_there(self) -> bool:
        """Whether the files are there, as they were laid out; what is in them is another question."""
        for name, header in self._headers.items():
            try:
                with (self.folder / name).open("rb") as file:
                    if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != self._sizes[name]:
                        return False
            except OSError:
                return False
        return True

    def create(self) -> None:
        """Make the files, in place of any that are there, with all of their room.

        Raises:
            CheckpointError: the disk has no room, or cannot be written.
        """
        try:
            for name, header in self._headers.items():
                with (self.folder / name).open("wb") as file:
                    file.write(header)
                    file.flush()
                    _reserve(file.fileno(), self._sizes[name])
            if self._index is not None:
                text = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
                (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        except OSError as e:
            raise CheckpointError(
                f"The weights to write need {self.num_bytes / 1e9:,.2f} GB in {self.folder.parent.parent}: {e.strerror}. Make "
                "room, or choose an output on another disk."
            ) from e

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place, and remember its digest; OSError where the disk does not take it."""
        write(self.places[name], tensor)
        self.digests[name] = digest_of(tensor)

    def copy(self, name: str, source: Range) -> None:
        """Put a tensor of another file into its place, in this one's dtype.

        Raises:
            NonFiniteError: NaN or infinity in it.
            OSError: the disk does not take it.
        """
        write(self.places[name], check_finite(read(source), name).to(self.places[name].dtype))

    def read(self, name: str, *, pinned: bool = False) -> Tensor:
        """A tensor that was written; see `ranges.read`."""
        return read(self.places[name], pinned=pinned)

    def is_whole(self, name: str, digest: str) -> bool:
        """Whether the place of a tensor holds what has this digest, which is remembered then."""
        try:
            is_whole = digest_of(self.read(name)) == digest
        except ModelError:
            return False
        if is_whole:
            self.digests[name] = digest
        return is_whole

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        for name in self._headers:
            descriptor = os.open(self.folder / name, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _header(blank: Mapping[str, Tensor], names: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in _order(blank, names):
        end = start + _num_bytes(blank, [name])
        header[name] = {"dtype": WORDS[blank[name].dtype], "shape": list(blank[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _order(blank: Mapping[str, Tensor], names: list[str]) -> list[str]:
    """As safetensors writes them: the widest numbers first, so that each is aligned."""
    return sorted(names, key=lambda name: (-blank[name].dtype.itemsize, name))


def _num_bytes(blank: Mapping[str, Tensor], names: list[str]) -> int:
    return sum(blank[name].numel() * blank[name].dtype.itemsize for name in names)


def _reserve(descriptor: int, size: int) -> None:
    """Make a file so long, with room for it on the disk where the system can promise that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
