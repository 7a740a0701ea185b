"""The zeros in a folder's weights, counted from its files: no model is built, and one weight is in memory at a time."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from statprune.errors import ModelError, first_line
from statprune.methods.counting import num_zeros
from statprune.methods.patterns import NM
from statprune.model.sites import LinearSite
from statprune.progress import Progress, silent
from statprune.record import places_of, stored_matrices

USUAL = (NM(2, 4), NM(4, 8), NM(6, 8))
"""What hardware and papers use, and what an allocation mixes with 2:4; from the stricter one on."""

SPARSE = 0.01
"""A weight with a larger share of zeros was pruned: training leaves hardly any."""


@dataclass(frozen=True)
class Zeros:
    """Of one weight."""

    name: str
    shape: tuple[int, ...]
    """(out, in), or (experts, out, in)."""

    zeros: int | None
    """How many; None where no file has the weight under its name."""

    pattern: str | None
    """The N:M that every group of its rows keeps, such as `2:4`; None for anything else."""

    @property
    def sparsity(self) -> float | None:
        """The share of zeros."""
        return None if self.zeros is None else self.zeros / math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "sparsity": self.sparsity}


@dataclass(frozen=True)
class Recorded:
    """What a folder's `pruning.json` says, as it stands there: nothing of it is checked here."""

    recipe: str
    """In words; empty where it says nothing."""

    pattern: NM | None
    """The recipe's, where that is an N:M."""

    tensors: dict[str, str]
    """The tensor's name in the files by the parameter's in the model, where one holds it."""

    stacks: dict[str, dict[str, Any]]
    """What it says of a stack that lies in several tensors, by the parameter's name."""


def read_recorded(folder: str | Path) -> Recorded | None:
    """What the record of a folder says; None where there is none that can be read."""
    try:
        record = json.loads((Path(folder) / "pruning.json").read_text(encoding="utf-8"))
        recipe = record["recipe"]
        pattern = recipe["pattern"]
        keeps = NM(pattern["keep"], pattern["of"]) if pattern["name"] == "nm" else None
        shown = str(keeps) if keeps else f"{100 * pattern['sparsity']:g}%"
        return Recorded(
            f"{recipe['method']} at {shown}, schedule {recipe['schedule']}, allocation {recipe['allocation']['name']}",
            keeps,
            {str(site["parameter"]): str(site["tensor"]) for site in record["sites"] if "parts" not in site},
            {str(site["parameter"]): site for site in record["sites"] if "parts" in site},
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def looks_sparse(folder: str | Path, sites: Sequence[LinearSite]) -> bool:
    """Whether the first, the middle or the last of these weights has zeros: enough to tell a pruned folder from a dense one.

    Raises:
        ModelError: a file cannot be read.
    """
    some = {index: sites[index] for index in (0, len(sites) // 2, len(sites) - 1)} if sites else {}
    return any((one.sparsity or 0.0) > SPARSE for one in count_zeros(folder, list(some.values())))


def count_zeros(
    folder: str | Path,
    sites: Sequence[LinearSite],
    recorded: Recorded | None = None,
    *,
    progress: Progress = silent,
) -> list[Zeros]:
    """The zeros of each weight, and the first N:M that it keeps: the recorded one, or else one of `USUAL`.

    Args:
        folder: with the files; where it has none, or is none, no weight is found.
        sites: the weights.
        recorded: what the record says, where there is one.
        progress: called after each weight.

    Raises:
        ModelError: a file cannot be read.
    """
    found: dict[str, Zeros] = {}
    stored_as = {} if recorded is None else recorded.tensors
    patterns = [*([recorded.pattern] if recorded and recorded.pattern else []), *USUAL]
    at = {stored_as.get(site.parameter, site.parameter): site for site in sites}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  this is no dict
                    if name in at and at[name].name not in found:
                        site = at[name]
                        found[site.name] = _zeros(site, tensors.get_tensor(name), patterns)
                        progress(len(found), len(sites), site.name)
        except (OSError, SafetensorError) as e:
            raise ModelError(f"{file} cannot be read: {e}.") from e
    stacks = {} if recorded is None else recorded.stacks
    for site in sites:
        if site.name not in found and site.parameter in stacks:
            found[site.name] = _zeros_of_parts(Path(folder), site, stacks[site.parameter], patterns)
            progress(len(found), len(sites), site.name)
    return [found.get(site.name, Zeros(site.name, site.shape, None, None)) for site in sites]


def _zeros_of_parts(folder: Path, site: LinearSite, record: Mapping[str, Any], patterns: Sequence[NM]) -> Zeros:
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(safe_open(folder / name, framework="pt")) for name, _ in places_of(record)}
            matrices = list(stored_matrices(record, lambda file, tensor: files[file].get_tensor(tensor)))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as e:
        raise ModelError(f"{folder}: {site.name} cannot be read as its pruning.json says: {first_line(e)}.") from e
    if any(tuple(matrix.shape) != site.matrix for matrix in matrices):
        return Zeros(site.name, site.shape, None, None)
    kept = next((str(pattern) for pattern in patterns if pattern.sparsity > 0 and all(map(pattern.holds, matrices))), None)
    return Zeros(site.name, site.shape, sum(map(num_zeros, matrices)), kept)


def _zeros(site: LinearSite, stored: Tensor, patterns: Sequence[NM]) -> Zeros:
    *stack, rows, columns = site.shape
    shape = (*stack, columns, rows) if site.layout == "in_out" else site.shape
    if tuple(stored.shape) != tuple(shape):
        return Zeros(site.name, site.shape, None, None)
    weight = site.view(stored)
    kept = next((str(pattern) for pattern in patterns if pattern.sparsity > 0 and pattern.holds(weight)), None)
    return Zeros(site.name, site.shape, num_zeros(weight), kept)
