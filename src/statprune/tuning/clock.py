"""What the next measurement will take, from what those before it took."""

from statprune.recipe import Recipe, Schedule
from statprune.tuning.trials import Trial

PASSES: dict[Schedule, int] = {"walk": 1, "one-shot": 1, "block": 2}
"""Forward passes over the pruning half."""


class Prices:
    """Seconds, never less than the most that was measured; the baselines, which come first, teach the first prices."""

    def __init__(self) -> None:
        self._pass = self._prune = self._solve = self._score = 0.0

    def learn(self, trial: Trial, *, is_shared: bool = False) -> None:
        """Take a measurement in; where its statistics were shared they are no price of one pass."""
        if not is_shared:
            self._pass = max(self._pass, trial.statistics_seconds / PASSES[trial.recipe.schedule])
        if steps := _steps(trial.recipe):
            self._solve = max(self._solve, trial.pruning_seconds / steps)
        else:
            self._prune = max(self._prune, trial.pruning_seconds)
        self._score = max(self._score, trial.scoring_seconds / trial.windows)

    def statistics(self, schedule: Schedule) -> float:
        """Of the passes of a schedule."""
        return self._pass * PASSES[schedule]

    def pruning(self, recipe: Recipe) -> float:
        """Of scores, masks and compensation; a step of least squares counts as all of SparseGPT until one was measured."""
        steps = _steps(recipe)
        return steps * (self._solve or self._prune) if steps else self._prune

    def scoring(self, windows: int) -> float:
        """Of the forward passes over so many held-out windows."""
        return self._score * windows


def _steps(recipe: Recipe) -> int:
    """Solutions of least squares for each weight; 0 where there are none."""
    compensation = recipe.to_dict()["compensation"]
    parts = compensation if isinstance(compensation, list) else [compensation]
    return sum(part.get("steps", 0) for part in parts)
