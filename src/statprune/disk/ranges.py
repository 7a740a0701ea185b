"""Tensors of safetensors files, read and written by their ranges of bytes: one tensor is in memory, and no file is mapped.

    8 bytes       length of the header
    header        JSON: {tensor: {"dtype", "shape", "data_offsets"}}
    data          the tensors, one behind the other

What is read lies in memory of its own, as torch aligns it, so that it is computed with to the bit as a model that was loaded
whole.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.errors import ModelError, NonFiniteError
from statprune.methods.finite import is_finite

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the words of safetensors."""

WORDS = {dtype: word for word, dtype in DTYPES.items()}

_AT_ONCE = 1 << 30
"""Bytes for one call of the system, which takes no more than 2 GiB."""

_GLANCE = 4096
"""Bytes of each end of a tensor, for a `glance`."""


@dataclass(frozen=True)
class Range:
    """Where a tensor's bytes are."""

    file: Path
    start: int
    """From the beginning of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How many there are."""
        return prod(self.shape) * self.dtype.itemsize


def ranges_of(file: Path) -> dict[str, Range]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: the file cannot be read, or holds a dtype that no weight has.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
        return {
            name: Range(file, 8 + length + one["data_offsets"][0], DTYPES[one["dtype"]], tuple(one["shape"]))
            for name, one in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as e:
        raise ModelError(f"The weights in {file} cannot be read by range: {type(e).__name__}: {e}.") from e


def read(place: Range, *, pinned: bool = False) -> Tensor:
    """A tensor from its file, in main memory.

    Args:
        place: where it is.
        pinned: in memory that a GPU copies from while it computes.

    Raises:
        ModelError: the file cannot be read, or is shorter.
    """
    tensor = torch.empty(place.shape, dtype=place.dtype, pin_memory=pinned)
    try:
        descriptor = os.open(place.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            is_whole = fill(descriptor, place.start, tensor)
        finally:
            os.close(descriptor)
    except OSError as e:
        raise ModelError(f"The weights in {place.file} cannot be read: {e.strerror}.") from e
    if not is_whole:
        raise ModelError(f"The weights in {place.file} end too early. Was the file copied whole?")
    return tensor


def glance(place: Range) -> str:
    """A digest of the first and of the last bytes of a tensor, which tells two checkpoints apart; errors as for `read`."""
    size = min(_GLANCE, place.num_bytes)
    ends = (place.start, place.start + place.num_bytes - size)
    return digest_of(torch.stack([read(Range(place.file, start, torch.uint8, (size,))) for start in ends]))


def write(place: Range, tensor: Tensor) -> None:
    """Put a tensor where it belongs in a file that is there.

    Args:
        place: of this dtype and shape.
        tensor: on any device.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), (place, tensor.dtype, tensor.shape)
    descriptor = os.open(place.file, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    try:
        pour(descriptor, place.start, tensor.detach().cpu().contiguous())
    finally:
        os.close(descriptor)


def fill(descriptor: int, start: int, tensor: Tensor) -> bool:
    """Read a contiguous tensor of main memory from an open file; whether the file was long enough. OSError as the system's."""
    memory, done = _bytes(tensor), 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + _AT_ONCE]], start + done)
        if not count:
            return False
        done += count
    return True


def pour(descriptor: int, start: int, tensor: Tensor) -> None:
    """Write a contiguous tensor of main memory into an open file. OSError as the system's."""
    memory, done = _bytes(tensor), 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done : done + _AT_ONCE], start + done)


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself.

    Raises:
        NonFiniteError: NaN or infinity in it.
    """
    if tensor.is_floating_point() and not is_finite(tensor):
        raise NonFiniteError(f"NaN or infinity in the parameter {name}. Was the checkpoint saved whole?")
    return tensor


def digest_of(tensor: Tensor) -> str:
    """The SHA-256 digest of a tensor's bytes, 64 hexadecimal digits."""
    return hashlib.sha256(_bytes(tensor.detach().cpu().contiguous())).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
