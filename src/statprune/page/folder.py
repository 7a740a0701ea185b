"""The page of a folder: its record, and the mask of one layer from its weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from statprune.errors import CheckpointError, first_line
from statprune.page.document import pictured, render
from statprune.record import stored_matrices

PAGE = "report.html"


def render_folder(record: Mapping[str, Any], folder: str | Path) -> str:
    """The page of a record, with the mask of one of its layers read from the folder's weights.

    Args:
        record: what is in `pruning.json`, or will be; each site with its `file` and `tensor`, or `parts`.
        folder: holds the files that the record names.

    Raises:
        CheckpointError: the weight cannot be read, or the record is not one that `save` wrote.
    """
    try:
        site = pictured(record)
        return render(record, _mask(Path(folder), site) if site is not None else None)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(f"The record of {folder} cannot be shown: {type(e).__name__}: {first_line(e)}.") from e


def write_page(record: Mapping[str, Any], folder: str | Path, output: str | Path | None = None) -> Path:
    """Make a folder's page anew.

    Args:
        record: of the folder, as `read_record` gives it.
        folder: what `save` wrote.
        output: a file that does not exist yet. None: the folder's own page, but only as the record knows it, by its digest.

    Returns:
        The file.

    Raises:
        CheckpointError: as `render_folder`; the page would differ from the one that the record knows, and the folder could not
            be verified any more; or it cannot be written.
    """
    folder = Path(folder)
    path = folder / PAGE if output is None else Path(output)
    page = render_folder(record, folder).encode()
    if path.resolve().parent == folder.resolve():
        if path.name != PAGE or hashlib.sha256(page).hexdigest() != record["files"].get(PAGE):
            writer = (record.get("versions") or {}).get("statprune", "of another version")
            raise CheckpointError(
                f"{path} would not be the {PAGE} whose digest is in the record of {folder}, written by statprune {writer}, so "
                "that the folder could not be verified any more. Write it elsewhere: --output FILE."
            )
    elif path.exists():
        raise CheckpointError(f"The output {path} exists. Choose another name, or remove it first; nothing is overwritten.")
    try:
        path.write_bytes(page)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be written: {e.strerror}.") from e
    return path


def _mask(folder: Path, site: Mapping[str, Any]) -> Tensor:
    """[out, in], bool, True = kept: where a weight is not zero; the matrices of a stack one below the other."""

    def read(name: str, tensor: str) -> Tensor:
        try:
            with safe_open(folder / name, framework="pt") as file:
                stored: Tensor = file.get_tensor(tensor)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{folder}: {site['name']} cannot be read from {name}: {first_line(e)}.") from e
        return stored != 0

    return torch.cat([keep.reshape(-1, keep.shape[-1]) for keep in stored_matrices(site, read)])
