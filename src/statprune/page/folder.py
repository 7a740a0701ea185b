"""The page of a folder: its record, and the mask of one layer from its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from statprune.errors import CheckpointError, first_line
from statprune.page.document import pictured, render

PAGE = "report.html"


def render_folder(folder: str | Path, record: Mapping[str, Any]) -> str:
    """The page of a record, with the mask of one of its layers read from the folder's weights.

    Args:
        folder: holds the files that the record names.
        record: what is in `pruning.json`, or will be; each site with its `file` and `tensor`.

    Raises:
        CheckpointError: the weight cannot be read, or the record is not one that `save` wrote.
    """
    try:
        site = pictured(record)
        return render(record, _mask(Path(folder), site) if site is not None else None)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(f"The record of {folder} cannot be shown: {type(e).__name__}: {first_line(e)}.") from e


def _mask(folder: Path, site: Mapping[str, Any]) -> Tensor:
    """[out, in], bool, True = kept: where a weight is not zero."""
    try:
        with safe_open(folder / site["file"], framework="pt") as file:
            stored: Tensor = file.get_tensor(site["tensor"])
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{folder}: {site['name']} cannot be read from {site['file']}: {first_line(e)}.") from e
    keep = stored != 0
    return keep.t() if site["stored"] == "in_out" else keep
