"""The journal of a run: which weights it has finished, so that another run of the same goes on where it was ended.

    .NAME.1a2b3c4d.partial/journal.jsonl
        {"format": 1, "inputs": {...}}                            what is pruned, how, on what, with which versions
        {"finished": [{"report": ..., "digest": ...}, ...]}       the weights that were pruned together
        ...

A line is written at once when its weights are in their places. What a crash has left of one ends the journal there; and a
weight whose place does not hold what its line promises is pruned again.

Of several ranks the first keeps the journal and the weights, and tells the others what is finished.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from statprune.errors import CheckpointError, shown
from statprune.model.inputs import ModelInputs
from statprune.model.sites import LinearSite
from statprune.ranks import ProcessGroup, gather, place
from statprune.report import FinishedSite, site_report
from statprune.results import digest
from statprune.versions import versions

FORMAT = 2


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
        path: the file; made where it is not there. Only the first rank's is looked at.
        inputs: what makes two runs the same, by name; plain data for JSON.
        store: where the weights are.
        process_group: of the ranks that prune together.

    Raises:
        CheckpointError: it is the journal of a run with other inputs; names what differs. Or it cannot be written.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any], store: Store, process_group: ProcessGroup = None) -> None:
        self.path, self.store = path, store
        self.inputs = json.loads(json.dumps(inputs, default=str))
        self.lines: list[dict[str, Any]] = []
        self._process_group = process_group
        self._rank, _ = place(process_group)
        if self._rank:
            return
        self.lines, length = _lines(path)
        if self.lines:
            _check_same(path, self.lines.pop(0).get("inputs"), self.inputs)
            if length < path.stat().st_size:
                os.truncate(path, length)  # else the next line would go on where a broken one ends
        else:
            self._write({"format": FORMAT, "inputs": self.inputs}, mode="w")

    def finished(self) -> dict[str, FinishedSite]:
        """What an earlier run has finished and is in its place, by parameter.

        Raises:
            RanksError: another rank failed.
        """
        lines = {one["report"]["parameter"]: one for line in self.lines for one in line["finished"]}
        held = [one for parameter, one in lines.items() if self.store.holds(parameter, one["digest"])]
        found = {}
        for one in gather(held, self._process_group, "what is finished")[0]:
            report, energies = site_report(one["report"]), one["energies"][self._rank]
            found[report.parameter] = FinishedSite(report, None if energies is None else tuple(energies), one["num_tokens"])
        return found

    def land(self, site: LinearSite) -> None:
        """Have the weight as it was pruned."""
        self.store.land(site)

    def add(self, finished: Sequence[FinishedSite]) -> None:
        """Weights that were pruned together and are in their places.

        Raises:
            CheckpointError: the line cannot be written.
            RanksError: another rank failed.
        """
        # Each rank's own are added up at the end, in the order in which they would be without a journal.
        energies = gather([one.energies for one in finished], self._process_group, "what has been pruned")
        if self._rank:
            return
        lines = [
            {**asdict(one), "energies": theirs, "digest": self.store.digest(one.report.parameter)}
            for one, *theirs in zip(finished, *energies, strict=True)
        ]
        self._write({"finished": lines}, mode="a")

    def _write(self, line: Mapping[str, Any], mode: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise CheckpointError(f"The journal {self.path} cannot be written: {e.strerror}.") from e


def fingerprint(
    recipe: Mapping[str, Any],
    model: Mapping[str, Any],
    inputs: Sequence[ModelInputs],
    process_group: ProcessGroup = None,
    **settings: Any,
) -> dict[str, Any]:
    """What two runs have in common of which one can go on with the other's work: all that the bits of a result depend on.

    Of several ranks each has its own inputs and its own threads; what they add up depends on how many they are.
    """
    tokens = {f"{number}.{at}": one for number, batch in enumerate(inputs) for at, one in enumerate(batch.tensors())}
    ranks = gather([digest(tokens), torch.get_num_threads()], process_group, "the calibration data of all ranks")
    each = [list(of_all) if len(ranks) > 1 else of_all[0] for of_all in zip(*ranks, strict=True)]
    return {
        "recipe": dict(recipe), "model": dict(model), "number of processes": len(ranks), "tokens": each[0], "threads": each[1],
        **settings, "versions": versions(),
    }  # fmt: skip


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
