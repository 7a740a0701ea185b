"""What a run of tune gives: the winner, the table of what was tried, and both as files."""

import csv
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statprune.markdown import table
from statprune.plain import finite
from statprune.recipe import Recipe
from statprune.tuning.trials import Trial

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and from what."""

    winner: Trial
    trials: list[Trial]
    """Every measurement, in the order in which they were made; those on `held_out_windows` windows are the finalists."""

    dense_perplexity: float
    """Of the model as it is, on the held-out half."""

    pruning_windows: int
    """Windows that candidates were pruned on."""

    held_out_windows: int
    """Windows that finalists were scored on."""

    held_out_shared: float
    """Share of their tokens, in [0, 1], that stand in pruning windows too."""

    seconds: float
    """Used, in this run and before it was interrupted."""

    notes: list[str]
    """What the budget did not reach; empty where everything was tried."""

    @property
    def recipe(self) -> Recipe:
        """The chosen recipe."""
        return self.winner.recipe

    @property
    def finalists(self) -> list[Trial]:
        """The measurements on the whole held-out half."""
        return [trial for trial in self.trials if trial.windows == self.held_out_windows]

    def to_markdown(self) -> str:
        """A table of everything that was tried, the winner in bold."""
        rows = self.rows()
        lines = [list(row.values()) for row in rows]
        for mark, line in zip(self.marks(), lines, strict=True):
            line[:] = [f"**{value}**" for value in line] if mark else line
        return table(list(rows[0]), lines, num_left=len(rows[0]))

    def rows(self) -> list[dict[str, str]]:
        """The table's rows: the trials on the most windows first, and of these the best first."""
        return [
            {**{key: str(value) for key, value in trial.row().items()}, "perplexity": f"{trial.perplexity:.4f}"}
            for trial in self._ordered()
        ]

    def marks(self) -> list[bool]:
        """For each row, whether it is the winner's."""
        return [trial is self.winner for trial in self._ordered()]

    def _ordered(self) -> list[Trial]:
        return sorted(
            self.trials,
            key=lambda trial: (-trial.windows, math.inf if math.isnan(trial.perplexity) else trial.perplexity),
        )

    def record(self) -> dict[str, Any]:
        """What `pruning.json` keeps of the choice."""
        return {
            "perplexity": self.winner.perplexity,
            "dense_perplexity": self.dense_perplexity,
            "finalists": finite({f"{one.recipe.method}, {one.recipe.conditions}": one.perplexity for one in self.finalists}),
            "measurements": len(self.trials),
            "pruning_windows": self.pruning_windows,
            "held_out_windows": self.held_out_windows,
            "held_out_shared": self.held_out_shared,
            "seconds": self.seconds,
            "notes": self.notes,
        }


def write(output: str | Path, tuned: Tuned) -> None:
    """The tables and the recipe."""
    winner = tuned.winner
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = io.StringIO()
    writer = csv.DictWriter(rows, ["chosen", *winner.row()], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"chosen": trial is winner, **trial.row()} for trial in tuned.trials)
    recipe = (
        f"# Chosen by statprune tune: {winner.recipe.method}, perplexity {winner.perplexity:.4f} on {winner.windows} windows "
        "that it was not pruned on.\n" + winner.recipe.to_yaml()
    )
    for name, text in (("tried.csv", rows.getvalue()), ("tried.md", tuned.to_markdown() + "\n"), (RECIPE, recipe)):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)
