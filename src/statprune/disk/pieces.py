"""Pieces: pruned weights of a model in memory, each in a file of its own, to go on with when the process has ended early."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from statprune.disk.ranges import digest_of
from statprune.errors import CheckpointError
from statprune.methods.pruner import PrunedWeight
from statprune.model.sites import LinearSite
from statprune.model.weights import InPlace

_NAME = "weight"


class KeptInPlace(InPlace):
    """A model's own weights, and beside them a copy on disk of each that was pruned; also the store of a `Journal`.

    Args:
        model: pruned in place.
        folder: for the files.
        writes: whether to write them. Of several ranks the first does, and all read them.
    """

    def __init__(self, model: nn.Module, folder: Path, *, writes: bool = True) -> None:
        super().__init__(model)
        self._folder, self._writes = folder, writes
        self._digests: dict[str, str] = {}

    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Write it into its file, and into the model.

        Raises:
            CheckpointError: the disk does not take it.
        """
        if self._writes:
            stored = site.view(pruned.weight).detach().cpu().contiguous()
            try:
                save_file({_NAME: stored}, self._file(site.parameter))
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"What was pruned cannot be kept in {self._folder}: {e}. Make room.") from e
            self._digests[site.parameter] = digest_of(stored)
        super().put(site, pruned)

    def digest(self, parameter: str) -> str:
        """Of what was put."""
        return self._digests[parameter]

    def holds(self, parameter: str, digest: str) -> bool:
        """Whether its file holds a weight of this digest."""
        try:
            return digest_of(self._read(parameter)) == digest
        except (OSError, SafetensorError, KeyError):
            return False

    def land(self, site: LinearSite) -> None:
        """Write what its file holds into the model."""
        weight = site.view(self._read(site.parameter))
        super().put(site, PrunedWeight(weight, weight != 0))

    def _file(self, parameter: str) -> Path:
        return self._folder / f"{parameter}.safetensors"

    def _read(self, parameter: str) -> Tensor:
        weight: Tensor = load_file(self._file(parameter))[_NAME]
        return weight
