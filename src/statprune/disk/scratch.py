"""Values that wait in files beside the output: the pages are the system's, which it writes when it wants their memory.

    .NAME.1a2b3c4d.partial/values-0/     of rank 0
        0, 1, 2 ...                      the values of a batch, as long as they are

What lies there means nothing to another run. It is removed at the end and after a failure; of a run that was killed, the next
one removes it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from statprune.disk.ranges import fill, pour
from statprune.errors import CheckpointError
from statprune.model.offload import ON_DEVICE, Elsewhere, Offload, Place, ToHost
from statprune.model.sites import TracedModel


@contextlib.contextmanager
def offloaded(values: Place, traced: TracedModel, partial: Path, rank: int = 0) -> Iterator[Offload]:
    """Where values wait for as long as a run takes.

    Args:
        values: on the device, in host memory or on the disk.
        traced: the graph.
        partial: the hidden folder of an output.
        rank: of this process, among those that work on this output.

    Raises:
        CheckpointError: as `ToFiles`.
    """
    folder = partial / f"values-{rank}"
    try:
        yield ToFiles(traced, folder) if values == "disk" else ToHost(traced) if values == "host" else ON_DEVICE
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(partial: Path) -> None:
    """Remove what a run that was killed has left of values in the hidden folder of an output."""
    for folder in partial.glob("values-*"):
        shutil.rmtree(folder, ignore_errors=True)


class ToFiles(Elsewhere):
    """Values that wait in files.

    Args:
        traced: the graph.
        folder: to make, for this alone.

    Raises:
        CheckpointError: it cannot be made; later, a file cannot be written or read.
    """

    def __init__(self, traced: TracedModel, folder: Path) -> None:
        super().__init__(traced)
        self.folder = folder
        self._sizes: dict[int, list[int]] = {}
        try:
            folder.mkdir(parents=True)
        except OSError as e:
            raise self._failed(e) from e

    def store(self, number: int, storages: Sequence[Tensor]) -> None:
        """As `Elsewhere`."""
        self._sizes[number] = [one.numel() for one in storages]
        try:
            descriptor = os.open(self.folder / str(number), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                start = 0
                for one in storages:
                    pour(descriptor, start, one.cpu())
                    start += one.numel()
                os.ftruncate(descriptor, start)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise self._failed(e) from e

    def fetch(self, number: int, storage: int, device: torch.device) -> Tensor:
        """As `Elsewhere`."""
        sizes = self._sizes[number]
        found = torch.empty(sizes[storage], dtype=torch.uint8, pin_memory=device.type == "cuda")
        try:
            descriptor = os.open(self.folder / str(number), os.O_RDONLY)
            try:
                is_whole = fill(descriptor, sum(sizes[:storage]), found)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise self._failed(e) from e
        if not is_whole:
            raise CheckpointError(f"{self.folder / str(number)} ends too early: something else has changed it. Run again.")
        return found.to(device, non_blocking=True)

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"The values of the batches, which wait in files while weights are pruned, cannot be kept in {self.folder}: "
            f"{error.strerror}. Make room, choose an output on another disk, or let them wait in memory: with more of it "
            "(--memory), or with fewer --samples."
        )
