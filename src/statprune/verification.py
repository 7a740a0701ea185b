"""A sparse model on disk, checked: every promise of its `pruning.json` recomputed from the files. No model is built.

Imports neither transformers nor the engine, so that a check costs little more than reading the files.
"""

import contextlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from statprune.errors import CheckpointError, first_line
from statprune.methods.counting import energy_sq, num_zeros
from statprune.methods.patterns import Pattern
from statprune.progress import Progress, silent
from statprune.record import (
    INDEX,
    RECORD,
    TEMPLATES,
    close,
    file_digest,
    is_loaded_unasked,
    pattern_of,
    places_of,
    read_json,
    read_pattern,
    read_record,
    stored_matrices,
)

IGNORED = {".git", ".gitattributes", ".cache"}
"""What git and the hub put beside a model; nothing loads them."""


def verify(folder: str | Path, progress: Progress = silent, *, digest: str | None = None) -> dict[str, Any]:
    """Recompute every promise of a folder's `pruning.json` from the files on disk, and return the record.

    The record agrees with itself and is the one that was written. It names every file of the folder, and none outside of it;
    each has the SHA-256 digest that it had. The tensors that a loader finds by the index are those that the record names.
    Recomputed for each weight: its shape, number of zeros, energy, and that the pattern holds (at most N non-zeros in each M,
    or at least the promised zeros in each ranking group; where an allocation gave the weight a pattern of its own, that one).

    This shows that the folder is what the record says; that the record is the one that its author wrote shows its `digest`,
    where the author has published it elsewhere.

    Args:
        folder: what `save` wrote.
        progress: called after each weight, with its layer's name.
        digest: the record's, as it was published.

    Raises:
        CheckpointError: the first promise that is broken.
    """
    folder = Path(folder)
    record = read_record(folder)
    if digest is not None and digest.strip().lower() != record["digest"]:
        raise CheckpointError(
            f"{folder / RECORD} is not the record that was published: SHA-256 published {digest}, found {record['digest']}."
        )
    try:
        _check_listing(folder, record["files"])
        _check_what_loads(folder, record)
        usual = read_pattern(record["recipe"]["pattern"])
        with contextlib.ExitStack() as stack:
            opened: dict[str, Any] = {}
            for index, site in enumerate(record["sites"]):
                for file, _ in places_of(site):
                    if file not in opened:
                        opened[file] = stack.enter_context(_tensors(folder, file))
                _check_weight(folder, site, pattern_of(site, usual), opened)
                progress(index + 1, len(record["sites"]), site["name"])
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be read: {e}.") from e
    for file, promised in record["files"].items():
        if (found := file_digest(folder / file)) != promised:
            raise _broken(folder, file, "SHA-256", promised, found)
    return record


def _check_weight(folder: Path, site: Mapping[str, Any], pattern: Pattern, files: Mapping[str, Any]) -> None:
    name = site["name"]

    def read(file: str, tensor: str) -> Tensor:
        try:
            found: Tensor = files[file].get_tensor(tensor)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{folder}: {name}: promised in {file} as {tensor}, but: {e}.") from e
        return found

    shape = list(site["shape"][1:] if "parts" in site else site["shape"])
    zeros, holds, energy = 0, True, 0.0
    for weight in stored_matrices(site, read):
        if list(weight.shape) != shape:
            raise _broken(folder, name, "shape [..., out, in]", shape, list(weight.shape))
        try:
            zeros, holds, energy = zeros + num_zeros(weight), holds and pattern.holds(weight), energy + energy_sq(weight)
        except (TypeError, ValueError, RuntimeError) as e:  # no floating-point numbers, or a setting of another type
            raise CheckpointError(f"{folder}: {name}: {weight.dtype} with {pattern} cannot be checked: {first_line(e)}.") from e
    if zeros != site["num_zeros"]:
        raise _broken(folder, name, "number of zeros", site["num_zeros"], zeros)
    if not holds:
        raise _broken(folder, name, "pattern", str(pattern), "a group with too few zeros")
    if not close(energy, site["energy_after"]):
        raise _broken(folder, name, "energy", site["energy_after"], energy)


def _check_listing(folder: Path, files: Mapping[str, str]) -> None:
    """Every file that is there is one of these, and lies there itself."""
    for name in names(folder):
        if name not in files:
            danger = " It may be loaded in the place of the weights, or as code." if is_loaded_unasked(name) else ""
            raise CheckpointError(
                f"{folder}: {name!r} is there, but {RECORD} does not name it: it came later.{danger} Remove it, or put it "
                "elsewhere."
            )
    for name in (RECORD, *files):
        path = folder / name
        try:
            kind = path.stat().st_mode
        except OSError as e:
            raise CheckpointError(f"{folder}: {name} is promised in {RECORD}, but: {e.strerror}.") from e
        if not stat.S_ISREG(kind):
            raise CheckpointError(f"{folder}: {name} is promised in {RECORD}, but is no file.")
        if path.is_symlink() and not stays_inside(folder, path):
            raise CheckpointError(
                f"{folder}: {name} is a link to {path.resolve()}, outside of the folder. Put a copy in its place, so that the "
                "folder is whole wherever it is put."
            )


def names(folder: Path) -> Iterator[str]:
    """All there is in the folder but the record, relative to it; of other folders in it the name alone."""
    for path in sorted(folder.iterdir()):
        if path.name in IGNORED or path.name == RECORD:
            continue
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            yield from (f"{TEMPLATES}/{below.name}" for below in sorted(path.iterdir()))
        else:
            yield path.name


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether a link leads into the folder; or, in the hub's cache, to where that keeps the files of its snapshots."""
    target, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    return target.is_relative_to(home) or (home.parent.name == "snapshots" and target.parent == blobs)


def _check_what_loads(folder: Path, record: Mapping[str, Any]) -> None:
    """A loader that finds weights by their usual names finds the tensors that the record names, and no others."""
    weights = sorted(name for name in record["files"] if name.lower().endswith(".safetensors"))
    indices = sorted(name for name in record["files"] if name.lower().endswith(".index.json"))
    if indices not in ([], [INDEX]):
        raise CheckpointError(f"{folder}: {', '.join(indices)}: expected no index of weights but {INDEX}.")
    if not indices:
        if weights != ["model.safetensors"]:
            raise CheckpointError(
                f"{folder} holds {', '.join(weights) or 'no weights'} and no {INDEX}: expected model.safetensors alone, or an "
                "index that says where each tensor is."
            )
    else:
        if "model.safetensors" in weights:
            raise CheckpointError(
                f"{folder} holds model.safetensors and {INDEX} both, and which of them is loaded is not said."
            )
        _check_index(folder, weights)
    if "config.json" in record["files"]:
        config = _json(folder, "config.json")
        if not isinstance(config, dict) or "transformers_weights" in config:
            raise CheckpointError(f"{folder}: config.json names other weights to load, or is no configuration.")


def _check_index(folder: Path, weights: list[str]) -> None:
    index = _json(folder, INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise CheckpointError(f"{folder}: {INDEX} has no weight_map.")
    found: dict[str, str] = {}
    for name in weights:
        with _tensors(folder, name) as file:
            for tensor in file.keys():  # noqa: SIM118 (not a mapping)
                if tensor in found:
                    raise CheckpointError(f"{folder}: {tensor} is in {found[tensor]} and in {name}.")
                found[tensor] = name
    for tensor in sorted(named.keys() | found.keys()):
        if named.get(tensor) != found.get(tensor):
            raise CheckpointError(
                f"{folder}: {INDEX} says that {tensor} is in {named.get(tensor, 'no file')}, and it is in "
                f"{found.get(tensor, 'none')}."
            )


def _json(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name)
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{folder}: {name} cannot be read: {first_line(e)}.") from e


@contextlib.contextmanager
def _tensors(folder: Path, name: str) -> Iterator[Any]:
    try:
        file = safe_open(folder / name, framework="pt")
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{folder}: {name} cannot be read: {e}.") from e
    with file as opened:
        yield opened


def _broken(folder: Path, name: str, what: str, promised: object, found: object) -> CheckpointError:
    return CheckpointError(f"{folder}: {name}: {what} promised {promised}, found {found}.")
