"""The budget: what it has left, and what the next measurement will take, from what those before it took."""

import time

import torch

from statprune.model.schedule import Schedule
from statprune.ranks import ProcessGroup, from_first_rank
from statprune.recipe import Recipe
from statprune.tuning.trials import Trial

PASSES: dict[Schedule, int] = {"walk": 1, "one-shot": 1, "block": 2}
"""Forward passes over the pruning half, for the target pruned."""


def _passes(recipe: Recipe) -> int:
    return PASSES[recipe.schedule] + (recipe.target != "pruned")


class Prices:
    """Seconds, never less than the most that was measured; the baselines, which come first, teach the first prices."""

    def __init__(self) -> None:
        self._pass = self._prune = self._score = 0.0
        self._solve: dict[tuple[str, ...], float] = {}

    def learn(self, trial: Trial, *, is_shared: bool = False) -> None:
        """Take a measurement in; where its statistics were shared they are no price of one pass."""
        if not is_shared:
            self._pass = max(self._pass, trial.statistics_seconds / _passes(trial.recipe))
        if steps := _steps(trial.recipe):
            solver = _solver(trial.recipe)
            self._solve[solver] = max(self._solve.get(solver, 0.0), trial.pruning_seconds / steps)
        else:
            self._prune = max(self._prune, trial.pruning_seconds)
        self._score = max(self._score, trial.scoring_seconds / trial.windows)

    def statistics(self, recipe: Recipe) -> float:
        """Of the passes of its schedule and its target."""
        return self._pass * _passes(recipe)

    def pruning(self, recipe: Recipe) -> float:
        """Of scores, masks and compensation; a step of a solver counts as all of SparseGPT until one of it was measured."""
        steps = _steps(recipe)
        return steps * (self._solve.get(_solver(recipe)) or self._prune) if steps else self._prune

    def scoring(self, windows: int) -> float:
        """Of the forward passes over so many held-out windows."""
        return self._score * windows


def _steps(recipe: Recipe) -> int:
    """Solutions for each weight; 0 where there are none. What has gradients finishes with one, whatever its steps."""
    return sum(max(part.get("steps", 0), int("shrinkage" in part)) for part in recipe.compensation)


def _solver(recipe: Recipe) -> tuple[str, ...]:
    """What solves: a step costs in each what it costs."""
    return tuple(part["name"] for part in recipe.compensation if "steps" in part)


class Stopwatch:
    """Seconds of a budget; under DDP those of the first rank, so that all ranks decide alike.

    Args:
        seconds: the budget.
        before: what earlier runs have used of it.
        device: of the model, for the message between ranks.
        process_group: the ranks that decide together.
    """

    def __init__(self, seconds: float, before: float, device: torch.device, process_group: ProcessGroup = None) -> None:
        self.seconds, self.before, self.device, self.process_group = seconds, before, device, process_group
        self._started = self._lap = time.perf_counter()

    def here(self) -> float:
        """Seconds used, in this run and before, by this rank's clock."""
        return self.before + time.perf_counter() - self._started

    def spent(self) -> float:
        """Seconds used, by the first rank's clock; every rank must ask."""
        return self.agreed(self.here())

    def left(self) -> float:
        """Seconds left; below 0 where the budget is overdrawn."""
        return self.seconds - self.spent()

    def lap(self) -> float:
        """Seconds since the lap before."""
        before, self._lap = self._lap, time.perf_counter()
        return self.agreed(self._lap - before)

    def agreed(self, value: float) -> float:
        """The first rank's value, on every rank."""
        return from_first_rank(value, self.device, self.process_group)
