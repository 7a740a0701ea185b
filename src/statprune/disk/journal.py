"""The journal of a run: which weights it has finished, so that another run of the same goes on where it was ended.

    .NAME.1a2b3c4d.partial/journal.jsonl
        {"format": 1, "inputs": {...}}                            what is pruned, how, on what, with which versions
        {"finished": [{"report": ..., "digest": ...}, ...]}       the weights that were pruned together
        ...

A line is written at once when its weights are in their places. What a crash has left of one ends the journal there; and a
weight whose place does not hold what its line promises is pruned again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from statprune.errors import CheckpointError, shown
from statprune.model.sites import LinearSite
from statprune.report import FinishedSite, site_report

FORMAT = 1


class Store(Protocol):
    """Where pruned weights are kept, by their parameter's name."""

    def digest(self, parameter: str) -> str:
        """The digest of what was put there in this run."""

    def holds(self, parameter: str, digest: str) -> bool:
        """Whether what lies there has this digest."""

    def land(self, site: LinearSite) -> None:
        """Give it as it lies there from now on."""


class Journal:
    """The lines of one run's journal; a `Ledger`.

    Args:
        path: the file; made where it is not there.
        inputs: what makes two runs the same, by name; plain data for JSON.
        store: where the weights are.

    Raises:
        CheckpointError: it is the journal of a run with other inputs; names what differs. Or it cannot be written.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any], store: Store) -> None:
        self.path, self.store = path, store
        self.inputs = json.loads(json.dumps(inputs, default=str))
        self.lines, length = _lines(path)
        if self.lines:
            _check_same(path, self.lines.pop(0).get("inputs"), self.inputs)
            if length < path.stat().st_size:
                os.truncate(path, length)  # else the next line would go on where a broken one ends
        else:
            self._write({"format": FORMAT, "inputs": self.inputs}, mode="w")

    def finished(self) -> dict[str, FinishedSite]:
        """What an earlier run has finished and is in its place, by parameter."""
        lines = {one["report"]["parameter"]: one for line in self.lines for one in line["finished"]}
        return {
            parameter: FinishedSite(
                site_report(one["report"]), None if one["energies"] is None else tuple(one["energies"]), one["num_tokens"]
            )
            for parameter, one in lines.items()
            if self.store.holds(parameter, one["digest"])
        }

    def land(self, site: LinearSite) -> None:
        """Have the weight as it was pruned."""
        self.store.land(site)

    def add(self, finished: Sequence[FinishedSite]) -> None:
        """Weights that were pruned together and are in their places.

        Raises:
            CheckpointError: the line cannot be written.
        """
        lines = [{**asdict(one), "digest": self.store.digest(one.report.parameter)} for one in finished]
        self._write({"finished": lines}, mode="a")

    def _write(self, line: Mapping[str, Any], mode: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise CheckpointError(f"The journal {self.path} cannot be written: {e.strerror}.") from e


def read_inputs(path: Path) -> dict[str, Any] | None:
    """What the run of a journal is about; None where there is no journal that says so."""
    lines, _ = _lines(path)
    return lines[0].get("inputs") if lines else None


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, from the first one on, and their bytes; none where the first one is not."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as e:
        raise CheckpointError(f"The journal {path} cannot be read: {e.strerror}.") from e
    lines: list[dict[str, Any]] = []
    length = 0
    for text in raw.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            break
        key = "finished" if lines else "inputs"
        if not isinstance(line, dict) or key not in line or (not lines and line.get("format") != FORMAT):
            break
        lines.append(line)
        length += len(text) + 1
    return lines, length


def _check_same(path: Path, before: Any, now: Mapping[str, Any]) -> None:
    before = before if isinstance(before, dict) else {}
    for name in sorted(now.keys() | before.keys()):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"An unfinished run of this output is there ({path.parent}), and it was another one: its {name} was "
                f"{shown(before.get(name))}, and is {shown(now.get(name))} now. Give the same command to go on with it, or "
                "--restart to begin anew, which removes what it had done."
            )
