"""Results of an experiment: one JSON line for each finished cell, so that an interrupted run goes on where it stopped.

    OUTPUT/cells.jsonl
        {"format": 1, "protocol": {...}, "versions": {...}}       what all cells have in common
        {"measure": "perplexity", "model": ..., "values": ...}    a cell
        ...

A line is written at once when its cell is finished, whole or not at all, and never changed. What a crash of the machine has
left of one is passed over, and its cell measured again. Numbers of another protocol or of other versions do not compare, so a
file that holds them is refused; so is a second run in a folder where one is at work.
"""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from statprune.errors import ResultsError, number_of
from statprune.plain import finite
from statprune.progress import Say, unsaid

FORMAT = 1
LOCK = ".lock"
HOLDER = ".running.json"
"""Of a folder where a run is at work: what the system locks, and who that is, for people."""

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
    """What was measured and is finite, by metric. `perplexity`: `perplexity`, and of a pruned model `divergence`, `loss` and
    `loss standard error` (see `divergence.Fidelity`), and `pruning seconds`. `zero-shot`: `TASK METRIC` for each task, and
    `average`, in [0, 1], with the `standard error` of each. `runtime`: seconds of `statistics`, `pruning` and `total`."""

    seconds: float = 0.0
    """Of the whole cell."""

    peak_memory: int | None = None
    """Bytes that pruning needed beyond what was held when it began (for the dense model, measuring): on the GPU, or resident in
    main memory; None where it cannot be read."""

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
        say: called where lines are passed over because they are broken.

    Raises:
        ResultsError: the file holds results of another protocol or of other versions, or cannot be read.
    """

    def __init__(self, path: str | Path, protocol: Mapping[str, Any], versions: Mapping[str, str], say: Say = unsaid) -> None:
        self.path, self.say = Path(path), say
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
        """Write a finished cell; it is on disk when this returns.

        Raises:
            ResultsError: it cannot be written, and the file is as it was before.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists() or not self.path.stat().st_size
            lines = ([self.head] if is_new else []) + [asdict(result)]
            _append(self.path, "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines).encode())
        except OSError as e:
            raise ResultsError(
                f"{self.path} cannot be written: {e}. What was measured before is in it: make room, and run again."
            ) from e
        self._results[result.key] = result

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *others = whole.splitlines() or [b""]
        read = [(line, _parsed(line)) for line in others]
        while read and read[-1][1] is None:
            read.pop()
        # What is broken at the end is overwritten; in the middle, where an older version went on after it, it stays.
        kept = b"".join(line + b"\n" for line in ([first] if first else []) + [line for line, _ in read])
        if kept != content:
            _replace(self.path, kept)
        num_broken = len(others) - sum(parsed is not None for _, parsed in read) + (len(content) > len(whole))
        if num_broken:
            self.say(f"{self.path}: {number_of(num_broken, 'line')} broken off in writing, passed over: measured again.")
        if not kept:
            self.path.unlink()
            return
        try:
            head, lines = json.loads(first), [parsed for _, parsed in read if parsed is not None]
            found = {name: head[name] for name in ("format", "protocol", "versions")}
            results = [_result(line) for line in lines]
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


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Be the only run that writes results into a folder, which is made. The lock ends with the process, however it ends.

    Raises:
        ResultsError: another run is at work there; or nothing can be written there.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise ResultsError(
            f"{folder}: another run is at work there{_holder(folder)}. Wait until it is finished, stop it, or choose another "
            "--output."
        ) from e
    except NotImplementedError:
        pass  # a file system without locks: whoever works on such a one has to see to it alone
    except OSError as e:
        raise ResultsError(f"{folder} cannot be written to: {e}. Choose another --output.") from e
    try:
        who = {"process": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
        (folder / HOLDER).write_text(json.dumps(who) + "\n", encoding="utf-8")
        yield
    finally:
        for name in (HOLDER, LOCK):
            (folder / name).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # that something is in it: then it stays
            for one in made:
                one.rmdir()


def _holder(folder: Path) -> str:
    try:
        who = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f" (process {who['process']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # it has just begun, or is just going


def _append(path: Path, content: bytes) -> None:
    """Add to a file, all or nothing."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError("no space left for a whole line")
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _parsed(line: bytes) -> Any:
    """What a line of JSON says; None where it is broken."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _result(line: Mapping[str, Any]) -> Result:
    parts = {part.name: line[part.name] for part in fields(Result)}
    return Result(**{**parts, "values": {name: value for name, value in parts["values"].items() if value is not None}})


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
