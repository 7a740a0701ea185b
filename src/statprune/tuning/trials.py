"""What was tried: kept in memory, and where there is an output folder on disk too, so that an interrupted run goes on.

OUTPUT/trials.jsonl    a line for each measurement, written when it is made, after a line with what they have in common
OUTPUT/tried.csv       the table, and as Markdown in tried.md
OUTPUT/recipe.yaml     the recipe that was chosen
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statprune.errors import ResultsError
from statprune.progress import Say, unsaid
from statprune.recipe import Recipe
from statprune.results import DENSE, HOLDER, LOCK, Result, ResultsFile
from statprune.versions import versions

TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """One recipe, pruned on the first half and scored on a part of the second."""

    rung: str
    """`baseline`, `methods`, `variations` or `schedules`."""

    recipe: Recipe
    windows: int
    """Held-out windows that it was scored on."""

    perplexity: float
    """NaN where the pruned model predicts nothing finite."""

    statistics_seconds: float
    """For the passes over the pruning half; where candidates shared them, this one's share."""

    pruning_seconds: float
    """For scores, masks and compensation."""

    scoring_seconds: float
    seconds: float
    """Since the measurement before, whatever was done in them."""

    def row(self) -> dict[str, Any]:
        """Plain data for a table."""
        return {
            "rung": self.rung, "method": self.recipe.method, "schedule": self.recipe.schedule,
            "allocation": self.recipe.allocation, "target": self.recipe.target, "windows": self.windows,
            "perplexity": self.perplexity,
            "statistics seconds": round(self.statistics_seconds, 3), "pruning seconds": round(self.pruning_seconds, 3),
        }  # fmt: skip


class Trials:
    """The measurements of one run.

    Args:
        output: folder; None keeps them in memory alone.
        protocol: what they have in common: the model, the tokens, the pattern.
        say: called where the folder holds broken lines.

    Raises:
        ResultsError: the folder holds something else, or trials of another model, other tokens, settings or versions.
    """

    def __init__(self, output: str | Path | None, protocol: Mapping[str, Any], say: Say = unsaid) -> None:
        self.file: ResultsFile | None = None
        self._known: dict[str, Trial] = {}
        self.all: list[Trial] = []
        if output is not None:
            folder = Path(output)
            if not (folder / TRIALS).is_file() and any(one.name not in (LOCK, HOLDER) for one in _inside(folder)):
                raise ResultsError(
                    f"{folder} exists and holds no {TRIALS}: expected a new folder, or one that a run of tune has begun."
                )
            self.file = ResultsFile(folder / TRIALS, protocol, versions(), say)

    @property
    def seconds_before(self) -> float:
        """What the recorded measurements took."""
        return sum(result.seconds for result in self.file.results()) if self.file is not None else 0.0

    def find(self, rung: str, recipe: Recipe, windows: int) -> Trial | None:
        """The measurement, in this run or before it was interrupted; None where there is none yet."""
        key = _result(recipe, windows).key
        if key not in self._known:
            result = self.file.get(key) if self.file is not None else None
            if result is None:
                return None
            values = {**result.values, "perplexity": result.values.get("perplexity", math.nan)}
            self._keep(key, Trial(rung, recipe, windows, seconds=result.seconds, **values))  # type: ignore[arg-type]
        return self._known[key]

    def dense(self, windows: int) -> float | None:
        """The dense model's perplexity, where it is known."""
        found = self.file.get(_dense(windows).key) if self.file is not None else None
        return found.values["perplexity"] if found is not None else None

    def add_dense(self, windows: int, perplexity: float, seconds: float) -> None:
        """Keep the dense model's perplexity."""
        if self.file is not None:
            self.file.add(replace(_dense(windows), values={"perplexity": perplexity}, seconds=seconds))

    def add(self, trial: Trial) -> None:
        """Keep a measurement; it is on disk when this returns."""
        result = _result(trial.recipe, trial.windows)
        self._keep(result.key, trial)
        if self.file is not None:
            names = ("perplexity", "statistics_seconds", "pruning_seconds", "scoring_seconds")
            values = {name: getattr(trial, name) for name in names if not math.isnan(getattr(trial, name))}
            self.file.add(replace(result, values=values, seconds=trial.seconds))

    def _keep(self, key: str, trial: Trial) -> None:
        self._known[key] = trial
        self.all.append(trial)


def _result(recipe: Recipe, windows: int) -> Result:
    return Result("perplexity", "", recipe.method, "", recipe=recipe.to_dict(), details={"windows": windows})


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _dense(windows: int) -> Result:
    return Result("perplexity", "", DENSE, details={"windows": windows})
