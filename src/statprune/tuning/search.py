"""The search: candidates in rungs, until the budget is used up or everything was tried (see `rungs`)."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from statprune.clock import timed
from statprune.engine import run
from statprune.errors import CalibrationError, TracingError
from statprune.model.inputs import bind_batches
from statprune.model.layers import Layers, find_layers
from statprune.model.observe import ForwardContext
from statprune.model.schedule import Schedule
from statprune.model.weights import Twin
from statprune.progress import Progress, Say
from statprune.ranks import ProcessGroup
from statprune.recipe import Recipe, Search
from statprune.results import digest
from statprune.selection import select, unfit_for_experts
from statprune.tuning.candidates import (
    BASELINES,
    KNOWN_GOOD,
    METHODS,
    SCHEDULES,
    UNSHARED,
    Keys,
    allocations,
    refinements,
    uses_gradients,
    variations,
)
from statprune.tuning.clock import Prices, Stopwatch
from statprune.tuning.halves import Halves, Scorer
from statprune.tuning.outcome import Tuned, write
from statprune.tuning.rungs import FIRST_SHARE, PARENTS, SECOND_SHARE, affordable, goes_on, num_batches, ranking, survivors
from statprune.tuning.trials import Trial, Trials
from statprune.tuning.twins import plan_together, twins_at_once


class _OutOfTime(Exception):
    """A candidate would take, or takes, longer than there is."""


class SearchRun:
    """One run over one model; see `tune`."""

    def __init__(
        self,
        layers: Layers,
        halves: Halves,
        search: Search,
        output: str | Path | None,
        process_group: ProcessGroup,
        forward_context: ForwardContext,
        progress: Progress,
        say: Say,
    ) -> None:
        self.model, self.halves, self.search, self.output = layers.model, halves, search, output
        self.process_group, self.forward_context, self.progress, self.say = process_group, forward_context, progress, say
        self.seconds = 60.0 * search.minutes
        self.inputs = bind_batches(layers.model, halves.pruning)
        self.layers = _holding(layers, self.inputs)
        self.selection = select(self.layers.groups, self.layers.left_out, search)
        self.trials = Trials(output, protocol(layers.model, halves, search) if output is not None else {}, say)
        device = next(layers.model.parameters()).device
        self.watch = Stopwatch(self.seconds, self.trials.seconds_before, device, process_group)
        self.prices = Prices()
        self.num_scoring = len(halves.scoring)
        self.notes: list[str] = []
        self.baselines = self._recipes(BASELINES)
        self.known_good = self._recipes(KNOWN_GOOD)

    def run(self) -> Tuned:
        """All rungs."""
        everything = self._windows(self.num_scoring)
        dense = self._dense(everything)
        for recipe in self.baselines:
            self._measure("baseline", recipe, [self.num_scoring])
        took = self.watch.spent()
        scores: list[float] = []
        # Before the shared rungs, so that a small budget is not used up when its turn comes.
        skipped = self._with_schedules(self.known_good, scores)
        promising = self._shared_rungs()
        skipped += self._with_schedules(self._last_candidates([trial.recipe for trial in promising]), scores)
        finalists, winner = self._finalists(), self._best()
        if skipped and len(finalists) <= len(self.baselines):
            self.notes = [
                f"{self.seconds / 60:g} minutes were too few: only the baselines were measured, which took {took:.0f} s. "
                f"Expect something better from {math.ceil(took / 15)} minutes or more."
            ]
        elif skipped:
            self.notes.append(f"{skipped} candidates with a schedule of their own did not fit.")
        tuned = Tuned(
            winner, list(self.trials.all), dense, _count(self.halves.pruning), everything, self.halves.shared,
            self.watch.spent(), self.notes,
        )  # fmt: skip
        for note in self.notes:
            self.say(f"the budget: {note}")
        if self.output is not None:
            write(self.output, tuned)
        return tuned

    def _recipes(self, candidates: Sequence[Keys]) -> list[Recipe]:
        """Those that the search allows."""
        return [recipe for recipe in (self.search.recipe(**keys) for keys in candidates) if self._is_allowed(recipe)]

    def _is_allowed(self, recipe: Recipe) -> bool:
        if uses_gradients(recipe) and not self.search.gradients:
            return False
        return unfit_for_experts(self.selection, recipe) is None

    def _methods(self, schedule: Schedule) -> list[Recipe]:
        return self._recipes([{"method": method, "schedule": schedule} for method in METHODS])

    def _finalists(self) -> list[Trial]:
        """The measurements on the whole held-out half so far."""
        return [trial for trial in self.trials.all if trial.windows == self._windows(self.num_scoring)]

    def _best(self) -> Trial:
        """Of the finalists so far."""
        finalists = self._finalists()
        return finalists[ranking([trial.perplexity for trial in finalists])[0]]

    def _windows(self, num_batches: int) -> int:
        return _count(self.halves.scoring[:num_batches])

    def _dense(self, windows: int) -> float:
        known = self.trials.dense(windows)
        if known is None:
            self._advance("the dense model")
            known = self._scorer({}).upto(self.num_scoring)
            if not math.isfinite(known):
                raise CalibrationError(
                    f"The dense model's perplexity on the held-out half, {windows} windows, is {known}: expected windows of at "
                    "least 2 tokens, and a model that predicts them."
                )
            self.trials.add_dense(windows, known, self.watch.lap())
        self.say(f"dense: perplexity {known:.4f} on {windows} held-out windows")
        return known

    def _shared_rungs(self) -> list[Trial]:
        """Methods, then variations of the best of them, all on the dense model's statistics; the best of both."""
        methods = self._methods("one-shot")
        trials = self._shared_rung("methods", methods, FIRST_SHARE)
        best = [trials[index].recipe for index in ranking([trial.perplexity for trial in trials])[:PARENTS]]
        varied = {recipe.method: recipe for parent in best for recipe in variations(parent)}
        known = {recipe.method for recipe in methods}
        trials += self._shared_rung("variations", [varied[name] for name in varied if name not in known], SECOND_SHARE)
        return [trials[index] for index in survivors([trial.perplexity for trial in trials])]

    def _shared_rung(self, rung: str, recipes: Sequence[Recipe], share: float) -> list[Trial]:
        """As many as can be afforded, from the first on."""
        if not recipes:
            return []
        batches = num_batches(0, self.num_scoring)
        windows = self._windows(batches)
        known = [self.trials.find(rung, recipe, windows) for recipe in recipes]
        for trial in filter(None, known):
            self.prices.learn(trial, is_shared=True)
        at_once = min(len(recipes), twins_at_once(self.layers, recipes[0]))
        one_pass, scoring = self.prices.statistics(recipes[0]), self.prices.scoring(windows)
        costs = [
            self.watch.agreed(0.0 if trial else one_pass / at_once + self.prices.pruning(recipe) + scoring)
            for trial, recipe in zip(known, recipes, strict=True)
        ]
        seconds = share * self.watch.left()
        until = self.watch.spent() + seconds
        new = [recipes[index] for index in affordable(costs, seconds) if known[index] is None]
        for start in range(0, len(new), at_once):
            self._prune_together(rung, new[start : start + at_once], batches, until)
        now_known = [self.trials.find(rung, recipe, windows) for recipe in recipes]
        found = [one for one in now_known if one is not None]
        if len(found) < len(recipes):
            self.notes.append(f"{len(recipes) - len(found)} of the {len(recipes)} {rung} did not fit.")
        return found

    def _prune_together(self, rung: str, recipes: Sequence[Recipe], batches: int, until: float) -> None:
        windows = self._windows(batches)
        scoring = self.prices.scoring(windows)
        started, seconds = time.perf_counter(), until - self.watch.spent()

        def keep_going(fraction: float, pruning: Sequence[float]) -> int:
            # Down to one: the pass over the batches is paid for already.
            self._advance(f"{len(pruning)} {rung}, one walk")
            statistics = time.perf_counter() - started - sum(pruning)
            count = len(pruning)
            while count > 1 and statistics + sum(pruning[:count]) / fraction + count * scoring > seconds:
                count -= 1
            return int(self.watch.agreed(count))

        twins = plan_together(
            self.layers, self.inputs, recipes,
            forward_context=self.forward_context, process_group=self.process_group, keep_going=keep_going,
        )  # fmt: skip
        statistics = (time.perf_counter() - started - sum(twin.seconds["prune"] for twin in twins)) / len(twins)
        for twin in twins:
            self._advance(f"{twin.recipe.method}, one-shot")
            with timed(twin.seconds, "score"):
                perplexity = self._scorer(twin.weights.pruned).upto(batches)
            twin.weights.pruned.clear()
            pruning, scored = twin.seconds["prune"], twin.seconds["score"]
            trial = Trial(rung, twin.recipe, windows, perplexity, statistics, pruning, scored, self.watch.lap())
            self.trials.add(trial)
            self.prices.learn(trial, is_shared=True)
            self._tell(trial)

    def _with_schedules(self, recipes: Sequence[Recipe], scores: list[float]) -> int:
        """Recipes with schedules of their own, each as far as it keeps up with the others; returns how many did not fit."""
        stages = sorted({num_batches(1, self.num_scoring), self.num_scoring})
        skipped = 0
        for recipe in recipes:
            try:
                self._measure("schedules", recipe, stages, scores)
            except _OutOfTime:
                skipped += 1
        return skipped

    def _last_candidates(self, promising: Sequence[Recipe]) -> list[Recipe]:
        if not promising:
            return self._methods(UNSHARED)
        *usual, last = SCHEDULES
        varied = [[replace(recipe, schedule=schedule) for schedule in usual] for recipe in promising]
        best = varied[0]
        rest = [*allocations(best[0]), *(recipe for others in varied[1:] for recipe in others)]
        candidates = [*refinements(self._best().recipe), *best, *rest, replace(promising[0], schedule=last)]
        measured = [*self.baselines, *self.known_good]
        return [one for one in dict.fromkeys(candidates) if one not in measured and self._is_allowed(one)]

    def _measure(self, rung: str, recipe: Recipe, stages: Sequence[int], rivals: list[float] | None = None) -> None:
        """Score a recipe on more and more held-out batches, as long as it is among the best of its rivals.

        Without rivals it is a baseline, which is measured whatever it takes.
        """
        scorer, seconds = None, {"score": 0.0}
        for stage in stages:
            windows = self._windows(stage)
            trial = self.trials.find(rung, recipe, windows)
            if trial is None:
                if scorer is None:
                    scorer, statistics, pruning = self._prune(recipe, is_limited=rivals is not None)
                with timed(seconds, "score"):  # of all windows so far
                    perplexity = scorer.upto(stage)
                trial = Trial(rung, recipe, windows, perplexity, statistics, pruning, seconds["score"], self.watch.lap())
                self.trials.add(trial)
            self.prices.learn(trial)
            self._tell(trial)
            if rivals is not None and stage != stages[-1]:
                rivals.append(trial.perplexity)
                if not goes_on(rivals):
                    return

    def _prune(self, recipe: Recipe, *, is_limited: bool) -> tuple[Scorer, float, float]:
        """A twin to score, and the seconds of statistics and of pruning."""
        scoring = self.watch.agreed(self.prices.scoring(self._windows(self.num_scoring)))
        price = self.watch.agreed(self.prices.statistics(recipe) + self.prices.pruning(recipe) + scoring)
        if is_limited and price > self.watch.left():
            raise _OutOfTime

        def advance(done: int, total: int, what: str) -> None:
            self._advance(f"{recipe.method}, {recipe.conditions}: {what}")
            if is_limited and done < total and self.watch.left() < scoring:
                raise _OutOfTime

        weights = Twin(self.model)
        report = run(
            self.layers, self.inputs, recipe, weights,
            process_group=self.process_group, progress=advance, forward_context=self.forward_context,
        )  # fmt: skip
        return self._scorer(weights.pruned), report.seconds.get("walk", 0.0), report.seconds["prune"]

    def _scorer(self, weights: dict[str, Tensor]) -> Scorer:
        return Scorer(self.model, self.halves.scoring, weights, self.forward_context, self.process_group)

    def _tell(self, trial: Trial) -> None:
        self.say(
            f"{trial.recipe.method}, {trial.recipe.conditions}: perplexity {trial.perplexity:.4f} on {trial.windows} windows"
        )

    def _advance(self, what: str) -> None:
        self.progress(min(int(self.seconds), int(self.watch.here())), max(1, int(self.seconds)), what)


def _holding(layers: Layers, inputs: list[Any]) -> Layers:
    """The layers with a graph that holds for these inputs: the halves may have batches of other sizes."""
    try:
        return find_layers(layers.model, inputs, traced=layers)
    except TracingError:
        return find_layers(layers.model, inputs)


def _count(batches: Sequence[dict[str, Tensor]]) -> int:
    return sum(len(batch["input_ids"]) for batch in batches)


def protocol(model: nn.Module, halves: Halves, search: Search) -> dict[str, Any]:
    """What trials must have in common to compare; how much is tried is no part of it."""
    tokens = {f"{index}.{name}": batch[name] for index, batch in enumerate(halves.pruning + halves.scoring) for name in batch}
    first = next(model.parameters())
    scope = {name: value for name, value in search.to_dict().items() if name not in ("minutes", "gradients")}
    return {
        "model": digest(dict(model.named_parameters())), "calibration": digest(tokens), "batch_size": halves.batch_size,
        "dtype": str(first.dtype).removeprefix("torch."), "device": first.device.type, **scope,
    }  # fmt: skip
