"""Results of an experiment: one JSON line for each finished cell, so that an interrupted run goes on where it stopped.

    OUTPUT/cells.jsonl
        {"format": 1, "protocol": {...}, "versions": {...}}       what all cells have in common
        {"measure": "perplexity", "model": ..., "values": ...}    a cell
        ...

A line is written at once when its cell is finished, and never changed. Numbers of another protocol or of other versions do
not compare, so a file that holds them is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.errors import ResultsError

FORMAT = 1
DENSE = "dense"
"""The label of the model as it is."""


@dataclass(frozen=True)
class Result:
    """One measured cell. What identifies it comes first, what was measured follows."""

    measure: str
    """`perplexity`, `zero-shot` or `runtime`."""

    model: str
    """The folder's or hub name's last part, for people."""

    label: str
    """What the method is called in tables; `dense` for the model as it is."""

    pattern: str = ""
    """`50%`, `2:4` ...; empty for the dense model."""

    samples: int | None = None
    """Calibration sequences; None for the dense model."""

    seed: int | None = None
    """Of the choice of calibration sequences; None for the dense model."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """The whole recipe; empty for the dense model."""

    details: dict[str, Any] = field(default_factory=dict)
    """Of the protocol, what differs between cells: the model's digest, the calibration tokens', the tasks."""

    values: dict[str, float] = field(default_factory=dict)
    """What was measured, by metric. `perplexity`: `perplexity`, and `pruning seconds`. `zero-shot`: `TASK METRIC` for each
    task, and `average`, in [0, 1]. `runtime`: seconds of `statistics`, `pruning` and `total`."""

    seconds: float = 0.0
    """Of the whole cell."""

    peak_memory: int | None = None
    """Bytes beyond what was held when the cell began: on the GPU, or resident in main memory; None where it cannot be read."""

    chosen: str | None = None
    """Where the method is `auto`: what it chose."""

    error: str | None = None
    """Why there are no values."""

    @property
    def key(self) -> str:
        """What identifies the cell; equal for two measurements of the same thing."""
        identity = {name: getattr(self, name) for name in _IDENTITY}
        return json.dumps(identity, sort_keys=True)


_IDENTITY = ("measure", "model", "pattern", "samples", "seed", "recipe", "details")


class ResultsFile:
    """The results of one output folder.

    Args:
        path: the JSON-lines file; made when the first cell is added.
        protocol: what all cells have in common.
        versions: of the packages.

    Raises:
        ResultsError: the file holds results of another protocol or of other versions, or cannot be read.
    """

    def __init__(self, path: str | Path, protocol: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.head = {"format": FORMAT, "protocol": dict(protocol), "versions": dict(versions)}
        self._results: dict[str, Result] = {}
        if self.path.exists():
            self._read()

    def get(self, key: str) -> Result | None:
        """The finished cell with this key; None where it has not been measured, or failed."""
        found = self._results.get(key)
        return found if found is not None and found.error is None else None

    def results(self) -> list[Result]:
        """All cells, in the order in which they were finished."""
        return list(self._results.values())

    def add(self, result: Result) -> None:
        """Write a finished cell; it is on disk when this returns."""
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for line in ([self.head] if is_new else []) + [asdict(result)]:
                file.write(json.dumps(line, sort_keys=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._results[result.key] = result

    def _read(self) -> None:
        text = self.path.read_bytes()
        if not text.endswith(b"\n"):
            # Cut off in the middle of a line: that cell was not finished.
            text = text[: text.rfind(b"\n") + 1]
            self.path.write_bytes(text)
        if not text:
            self.path.unlink()
            return
        try:
            head, *lines = [json.loads(line) for line in text.splitlines()]
            found = {name: head[name] for name in ("format", "protocol", "versions")}
            results = [Result(**{part.name: line[part.name] for part in fields(Result)}) for line in lines]
        except (ValueError, KeyError, TypeError) as e:
            raise ResultsError(
                f"{self.path} is not a file of results: {type(e).__name__}: {e}. Choose another --output, or remove it."
            ) from e
        if differences := [*_differences(found, json.loads(json.dumps(self.head)))]:
            raise ResultsError(
                f"{self.path} holds results that do not compare with this run: {'; '.join(differences)}. "
                "Choose another --output, or run with the settings and versions it was made with."
            )
        self._results = {result.key: result for result in results}


def _differences(then: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted(then.keys() | now.keys())
            for text in _differences(then.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if then == now else [f"{name.removeprefix('protocol.')} was {then!r} and is {now!r}"]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that differ where names, shapes, dtypes or values do."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
