import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import statprune
from statprune.data import random_windows
from statprune.errors import (
    CalibrationError,
    CalibrationWarning,
    ModelError,
    RecipeError,
    ResultsError,
    SiteError,
    TracingError,
)
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.trace import trace
from statprune.perplexity import evaluate
from statprune.recipe import Recipe, Search
from statprune.results import alone_in
from statprune.tuning import twins as shared
from statprune.tuning.candidates import (
    ALLOCATIONS,
    BASELINES,
    METHODS,
    TARGETS,
    allocations,
    refinements,
    uses_gradients,
    variations,
)
from statprune.tuning.clock import Prices, Stopwatch
from statprune.tuning.overlap import shared_share
from statprune.tuning.search import SearchRun
from statprune.tuning.trials import Trial, Trials
from statprune.tuning.twins import plan_together
from tiny_models import changed, classifier, gpt2, llama, refused, snapshot, t5, tokens

BASELINE_RECIPES = [Search().recipe(**keys) for keys in BASELINES]
FEW = ("cvr+least-squares", "wanda+energy", "ria", "cvr")
ENOUGH = 10.0
NONE = 1e-6


@pytest.fixture
def few(monkeypatch):
    """Four methods, few variations of two of them, and one preset beside the baselines."""
    monkeypatch.setattr("statprune.tuning.search.KNOWN_GOOD", ({"method": "default"},))
    monkeypatch.setattr("statprune.tuning.search.METHODS", FEW)
    monkeypatch.setattr("statprune.tuning.candidates.VARIATIONS", {"cvr": {"alpha": (1.0,)}, "energy": {"strength": (0.5,)}})


def tune(model=None, windows=None, **settings):
    torch.manual_seed(1)
    windows = tokens(8, 12) if windows is None else windows
    return statprune.tune(
        llama(num_hidden_layers=1) if model is None else model, windows.split(2), **{"minutes": ENOUGH, **settings}
    )


def measured(tuned):
    return [(trial.recipe, trial.windows) for trial in tuned.trials]


def test_the_winner_is_the_best_finalist_and_its_perplexity_can_be_measured_again(few):
    torch.manual_seed(1)
    model, windows = llama(), tokens(8, 12)
    before = snapshot(model)
    tuned = statprune.tune(model, windows.split(2), pattern="2:4", minutes=ENOUGH)
    assert changed(model, before) == set()
    assert (tuned.pruning_windows, tuned.held_out_windows, tuned.notes) == (4, 4, [])
    assert tuned.winner.perplexity == min(trial.perplexity for trial in tuned.finalists)
    assert {trial.rung for trial in tuned.finalists} == {"baseline", "schedules"}
    assert {trial.rung for trial in tuned.trials} == {"baseline", "methods", "variations", "schedules"}
    for trial in tuned.finalists:
        weights = statprune.plan(model, windows[::2].split(2), trial.recipe).weights
        assert evaluate(model, windows[1::2], batch_size=2, weights=weights) == trial.perplexity
    assert tuned.dense_perplexity == evaluate(model, windows[1::2], batch_size=2)


def test_without_any_time_the_baselines_are_measured_to_the_end_and_it_says_what_was_missed(few):
    said = []
    tuned = tune(minutes=NONE, say=said.append)
    assert [trial.recipe for trial in tuned.trials] == BASELINE_RECIPES
    assert {trial.windows for trial in tuned.trials} == {4}
    assert tuned.winner.perplexity == min(trial.perplexity for trial in tuned.trials)
    assert "too few: only the baselines were measured" in tuned.notes[0]
    assert f"the budget: {tuned.notes[0]}" in said


def test_with_enough_time_the_choice_does_not_depend_on_the_clock(few):
    first, second = tune(), tune(minutes=2 * ENOUGH)
    assert measured(first) == measured(second)
    assert first.recipe == second.recipe
    assert [trial.perplexity for trial in first.trials] == [trial.perplexity for trial in second.trials]


def test_progress_is_in_seconds_of_the_budget(few):
    seen = []
    tune(minutes=1, progress=lambda *advanced: seen.append(advanced))
    assert {total for _, total, _ in seen} == {60}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert any("one walk" in what for *_, what in seen)


@pytest.mark.parametrize("model", [llama, gpt2])
def test_twins_from_one_walk_are_those_of_a_plan_each(model, monkeypatch):
    model, batches = model(), tokens(4, 12).split(2)
    recipes = [Recipe(method, pattern="2:4", schedule="one-shot") for method in METHODS]
    inputs = bind_batches(model, batches)
    layers = find_layers(model, inputs)
    context = torch.no_grad
    for max_bytes in (shared.MAX_STATISTICS_BYTES, 1):
        monkeypatch.setattr(shared, "MAX_STATISTICS_BYTES", max_bytes)
        twins = plan_together(layers, inputs, recipes, forward_context=context)
        assert [twin.recipe for twin in twins] == recipes
        for twin in twins:
            alone, together = statprune.plan(model, batches, twin.recipe, traced=layers).weights, twin.weights.pruned
            assert together.keys() == alone.keys()
            for name, weight in alone.items():
                # The Gram of a walk that needs only moments is not there to add up: the moments are the same either way.
                assert torch.equal(together[name], weight), (twin.recipe.method, name)
                assert together[name].stride() == weight.stride()


def test_twins_that_do_not_fit_in_memory_are_made_in_several_walks(few, monkeypatch):
    at_once = tune()
    walks = []
    together = shared.plan_together
    monkeypatch.setattr(shared, "MAX_TWIN_BYTES", 1)
    monkeypatch.setattr("statprune.tuning.search.plan_together", lambda *a, **k: walks.append(len(a[2])) or together(*a, **k))
    one_by_one = tune()
    assert set(walks) == {1}
    assert measured(one_by_one) == measured(at_once)
    assert one_by_one.recipe == at_once.recipe


def test_twins_are_dropped_from_the_end_where_they_take_too_long():
    model, batches = llama(), tokens(4, 12).split(2)
    recipes = [Recipe(method, pattern="2:4", schedule="one-shot") for method in FEW]
    inputs = bind_batches(model, batches)
    seen = []

    def keep_going(fraction, seconds):
        seen.append((fraction, len(seconds)))
        return max(1, len(seconds) - 1)

    twins = plan_together(find_layers(model, inputs), inputs, recipes, forward_context=torch.no_grad, keep_going=keep_going)
    assert [twin.recipe for twin in twins] == recipes[:1]
    assert [number for _, number in seen[:4]] == [4, 3, 2, 1]
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert seen[-1][0] == 1.0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [2, 5, 9])
def test_an_interrupted_run_goes_on_and_measures_nothing_twice(few, tmp_path, monkeypatch, after):
    whole = tune(output=tmp_path / "whole")
    add, added = Trials.add, []

    def stop(self, trial):
        add(self, trial)
        added.append((trial.recipe, trial.windows))
        if len(added) == after:
            raise Interrupted

    monkeypatch.setattr(Trials, "add", stop)
    with pytest.raises(Interrupted):
        tune(output=tmp_path / "cut")
    assert not (tmp_path / "cut" / "recipe.yaml").exists()
    with (tmp_path / "cut" / "trials.jsonl").open("a") as file:
        file.write('{"measure": "perpl')  # cut off in the middle of a line
    monkeypatch.setattr(Trials, "add", lambda self, trial: add(self, trial) or added.append((trial.recipe, trial.windows)))
    again = tune(output=tmp_path / "cut")
    assert measured(again) == measured(whole)
    assert len(added) == len(whole.trials)
    assert all(added.count(one) == 1 for one in added)
    assert (again.recipe, again.winner.perplexity) == (whole.recipe, whole.winner.perplexity)
    assert again.seconds > sum(trial.seconds for trial in again.trials)  # what the first run used counts
    for name in ("recipe.yaml", "tried.csv"):
        columns = [line.rsplit(",", 2)[0] for line in (tmp_path / "cut" / name).read_text().splitlines()]
        assert columns == [line.rsplit(",", 2)[0] for line in (tmp_path / "whole" / name).read_text().splitlines()]


def test_a_finished_run_is_read_and_not_repeated_and_goes_further_with_more_minutes(few, tmp_path, monkeypatch):
    short = tune(output=tmp_path, minutes=NONE)
    assert len(short.trials) == len(BASELINES)
    longer = tune(output=tmp_path, minutes=ENOUGH)
    assert measured(longer)[: len(BASELINES)] == measured(short)
    assert len(longer.trials) > len(short.trials)
    monkeypatch.setattr("statprune.tuning.search.run", lambda *a, **k: pytest.fail("pruned again"))
    monkeypatch.setattr("statprune.tuning.search.plan_together", lambda *a, **k: pytest.fail("pruned again"))
    monkeypatch.setattr("statprune.tuning.search.Scorer", lambda *a, **k: pytest.fail("scored again"))
    assert tune(output=tmp_path, minutes=ENOUGH).trials == longer.trials


def test_the_files_say_what_was_tried_and_the_recipe_can_be_used(few, tmp_path):
    tuned = tune(output=tmp_path, pattern="50%")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == tuned.recipe
    rows = list(csv.DictReader((tmp_path / "tried.csv").read_text().splitlines()))
    assert len(rows) == len(tuned.trials)
    (chosen,) = [row for row in rows if row["chosen"] == "True"]
    assert (chosen["method"], float(chosen["perplexity"])) == (tuned.recipe.method, tuned.winner.perplexity)
    assert {row["allocation"].partition(":")[0] for row in rows} <= {*ALLOCATIONS, "uniform"}
    assert {row["target"] for row in rows} == {"pruned", "dense", "dense:damping=1.0", "dense:share=0.5"}
    assert any(row["allocation"] != "uniform" for row in rows)  # an unstructured pattern's sparsity can be shared out
    table = (tmp_path / "tried.md").read_text()
    assert "{" not in table
    assert table == tuned.to_markdown() + "\n"
    assert table.count("**") == 2 * len(tuned.winner.row())
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 2 + len(tuned.trials)  # the head and the dense model


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pattern": "1:4"}, "pattern was '2:4' and is '1:4'"),
        ({"ignore": ["*.down_proj"]}, "ignore was"),
        ({"model": gpt2}, "model was"),
        ({"windows": torch.randint(3, 48, (8, 12), generator=torch.Generator().manual_seed(5))}, "calibration was"),
    ],
)
def test_a_folder_with_trials_of_something_else_is_refused(few, tmp_path, settings, named):
    tune(output=tmp_path, minutes=NONE)
    before = (tmp_path / "trials.jsonl").read_bytes()
    model = settings.pop("model", llama)()
    with pytest.raises(ResultsError, match=named):
        tune(model, output=tmp_path, minutes=NONE, **settings)
    assert (tmp_path / "trials.jsonl").read_bytes() == before


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResultsError, match=r"holds no trials.jsonl: expected a new folder"):
        tune(output=tmp_path)


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, "ten", True])
def test_minutes_that_are_none_are_refused(minutes):
    with refused(model := llama(), RecipeError, r"Search\(minutes=.*expected a number from 0"):
        statprune.tune(model, tokens(4, 8).split(1), minutes=minutes)


def test_what_cannot_be_scored_is_refused():
    for model in (classifier(), t5()):
        with refused(model, ModelError, "not a causal language model of transformers.*cannot be measured"):
            statprune.tune(model, tokens(4, 8).split(1))
    with refused(model := llama(), CalibrationError, "a single window: expected at least 2"):
        statprune.tune(model, [tokens(1, 8)])
    with refused(model, CalibrationError, "position_ids.*expected input_ids"):
        statprune.tune(model, [{"input_ids": tokens(2, 8), "position_ids": torch.arange(8).expand(2, 8)}])
    with refused(model, CalibrationError, "held-out half.*at least 2 tokens"):
        statprune.tune(model, tokens(4, 1).split(2))


def test_a_pattern_that_does_not_fit_or_exist_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("statprune.tuning.search.Scorer", lambda *a, **k: pytest.fail("scored"))
    with refused(model := llama(), SiteError, "3:5 does not divide its width"):
        statprune.tune(model, tokens(4, 8).split(2), pattern="3:5")
    with refused(model, RecipeError, "expected a number from 0 to 1"):
        statprune.tune(model, tokens(4, 8).split(2), pattern="120%")
    with refused(model, SiteError, "matches no weight"):
        statprune.tune(model, tokens(4, 8).split(2), targets=["*.mpl.*"])


def test_a_model_that_cannot_be_exported_is_refused(monkeypatch):
    def fail(*_):
        raise TracingError("torch.export cannot trace it")

    monkeypatch.setattr("statprune.model.layers.trace", fail)
    with refused(model := llama(), TracingError, "cannot trace it"):
        statprune.tune(model, tokens(4, 8).split(2))


def test_targets_and_ignored_layers_hold_for_every_candidate(few):
    tuned = tune(ignore=["*.down_proj"], targets=["*.mlp.*"])
    assert {(trial.recipe.ignore, trial.recipe.targets) for trial in tuned.trials} == {(("*.down_proj",), ("*.mlp.*",))}


def test_padding_counts_neither_in_the_statistics_nor_in_the_score(few):
    windows = tokens(4, 8)
    padded = {
        "input_ids": torch.cat([windows, tokens(4, 4)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(windows), torch.zeros(4, 4, dtype=torch.int64)], dim=1),
    }
    batches = [{name: value[rows] for name, value in padded.items()} for rows in (slice(0, 2), slice(2, 4))]
    model = llama()
    # Without gradients: where a mask is reached in many steps, rounding has a say.
    with_padding = statprune.tune(model, batches, minutes=NONE, gradients=False)
    without = statprune.tune(model, windows.split(2), minutes=NONE, gradients=False)
    expected = [one.perplexity for one in without.trials]
    assert [one.perplexity for one in with_padding.trials] == pytest.approx(expected, rel=1e-5)


def test_windows_of_several_lengths_and_a_tensor_of_windows_will_do(few):
    tuned = statprune.tune(llama(), [tokens(3, 8), tokens(2, 12)], minutes=NONE)
    assert (tuned.pruning_windows, tuned.held_out_windows) == (3, 2)
    assert statprune.tune(llama(), tokens(5, 8), minutes=NONE).held_out_windows == 2


def test_variations_change_one_setting_and_keep_the_rest():
    recipe = Recipe("cvr+least-squares:steps=15", pattern="2:4", schedule="one-shot", ignore=["*.down_proj"])
    found = [one.method for one in variations(recipe)]
    assert "cvr:alpha=0.25+least-squares:steps=15" in found
    assert "cvr+least-squares:steps=40" in found
    assert len(found) == len(set(found))
    assert recipe.method not in found
    assert all((one.ignore, one.schedule) == (recipe.ignore, "one-shot") for one in variations(recipe))
    assert list(variations(Recipe("magnitude"))) == []
    for method in METHODS:
        assert len({one.method for one in variations(Recipe(method))}) == len(list(variations(Recipe(method))))


def test_allocations_are_tried_where_they_prune_as_many_weights():
    recipe = Recipe("wanda", pattern="70%", schedule="block")
    assert [one.allocation for one in allocations(recipe)] == [name for name in ALLOCATIONS if name != "uniform"]
    assert "uniform" in [one.allocation for one in allocations(replace(recipe, allocation="owl:spread=0.1"))]
    assert "owl" not in [one.allocation for one in allocations(replace(recipe, allocation="owl:spread=0.1"))]
    assert all((one.method, one.pattern, one.schedule) == ("wanda", recipe.pattern, "block") for one in allocations(recipe))
    assert list(allocations(Recipe("wanda", pattern="2:4"))) == []


def test_the_best_is_refined_by_one_thing_at_a_time():
    for name in ("best", "default", "fast", "paper"):
        recipe = Recipe(name, "50%", ignore=["a"])
        found = list(refinements(recipe))
        assert recipe not in found
        assert len(set(found)) == len(found)
        for one in found:
            changed_keys = [key for key in ("method", "target", "allocation") if getattr(one, key) != getattr(recipe, key)]
            assert len(changed_keys) == 1
            assert replace(one, **{key: getattr(recipe, key) for key in changed_keys}) == recipe
        assert {one.target for one in found} | {recipe.target} == set(TARGETS)
        assert {one.allocation.partition(":")[0] for one in found} == set(ALLOCATIONS)
    assert all(one.allocation == "uniform" for one in refinements(Recipe("best", "2:4")))


def test_a_search_without_gradients_tries_none_and_has_the_other_baselines(few, tmp_path):
    tuned = tune(output=tmp_path, gradients=False)
    assert len(tuned.trials) > len(BASELINES)
    assert not any(uses_gradients(trial.recipe) for trial in tuned.trials)
    expected = [recipe for recipe in BASELINE_RECIPES if not uses_gradients(recipe)]
    assert len(expected) == len(BASELINES) - 1
    assert [trial.recipe for trial in tuned.trials if trial.rung == "baseline"] == expected
    # What was measured counts for a search that may use them too.
    with_gradients = tune(output=tmp_path, minutes=NONE)
    assert Recipe("best") in [trial.recipe for trial in with_gradients.trials]


def test_prices_are_of_passes_and_of_steps_of_a_solver():
    def trial(recipe, statistics, pruning):
        return Trial("baseline", recipe, 4, 9.0, statistics, pruning, 8.0, 0.0)

    prices = Prices()
    prices.learn(trial(Recipe("wanda", schedule="block"), 2.0, 0.5))
    dense = Recipe("cvr+least-squares:steps=10", schedule="walk", target="dense")
    assert (prices.statistics(Recipe("wanda")), prices.statistics(dense), prices.scoring(2)) == (1.0, 2.0, 4.0)
    assert (prices.pruning(Recipe("wanda")), prices.pruning(dense)) == (0.5, 5.0)
    prices.learn(trial(dense, 2.0, 40.0))
    loss_aware = Recipe("cvr+loss-aware:steps=10")
    assert (prices.pruning(dense), prices.pruning(loss_aware)) == (40.0, 5.0)
    prices.learn(trial(loss_aware, 1.0, 80.0))
    assert (prices.pruning(dense), prices.pruning(loss_aware)) == (40.0, 80.0)
    assert prices.pruning(Recipe("cvr+loss-aware")) == 8.0


def test_every_listed_method_exists():
    assert len({Recipe(method).method for method in METHODS}) == len(METHODS)


def _chosen_by_a_rank(rank):
    torch.manual_seed(1)
    windows, model = tokens(16, 12), llama()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("statprune.tuning.search.METHODS", ("cvr+least-squares", "wanda+energy"))
        monkeypatch.setattr("statprune.tuning.search.KNOWN_GOOD", ())
        monkeypatch.setattr("statprune.tuning.candidates.TARGETS", ("dense",))
        monkeypatch.setattr("statprune.tuning.candidates.VARIATIONS", {"cvr": {"alpha": (1.0,)}})
        if rank == 1:  # whose clock does not count
            monkeypatch.setattr("statprune.tuning.search.Stopwatch.here", lambda self: 1e9)
            monkeypatch.setattr("statprune.tuning.search.Prices.pruning", lambda self, recipe: 1e9)
        report = statprune.prune(model, windows[rank::2].split(2), "auto:minutes=1", pattern="2:4")
    return report.chosen_by["finalists"], report.recipe, model.state_dict()


def test_ranks_choose_alike_by_the_windows_of_all_of_them_and_the_first_ones_clock(two_ranks):
    first, second = two_ranks(_chosen_by_a_rank)
    assert first[:2] == second[:2]
    assert len(first[0]) > len(BASELINES)
    assert all(torch.equal(weight, second[2][name]) for name, weight in first[2].items())


def test_a_stopwatch_counts_what_earlier_runs_used():
    watch = Stopwatch(100.0, 60.0, torch.device("cpu"))
    assert 60 <= watch.spent() < 61
    assert 39 < watch.left() <= 40
    assert 0 <= watch.lap() < 1


def test_a_candidate_that_takes_longer_than_is_left_is_given_up(few, monkeypatch):
    prune_one, begun = SearchRun._prune, []

    def slow(self, recipe, *, is_limited):
        if is_limited:
            # Time is up after the first group.
            self._advance = lambda what: begun.append(recipe) or setattr(self.watch, "before", 1e9)
        return prune_one(self, recipe, is_limited=is_limited)

    monkeypatch.setattr(SearchRun, "_prune", slow)
    tuned = tune()
    assert len(begun) == 1
    assert [trial.recipe for trial in tuned.finalists] == BASELINE_RECIPES
    assert "too few" in tuned.notes[0]
    assert json.loads(json.dumps(tuned.record()))["measurements"] == len(tuned.trials)


def test_one_search_exports_the_model_once_and_looks_through_its_weights_once(few, monkeypatch):
    exports, scans = [], []
    monkeypatch.setattr("statprune.model.layers.trace", lambda *args: exports.append(args) or trace(*args))
    monkeypatch.setattr("statprune.agreement.check_weights", lambda model: scans.append(model))
    statprune.prune(llama(num_hidden_layers=1), tokens(8, 12).split(2), Search(minutes=ENOUGH))
    assert (len(exports), len(scans)) == (1, 1)


def share(first, second, **others):
    return shared_share([{"input_ids": first, **others}], [{"input_ids": second, **others}])


def test_held_out_tokens_that_stand_in_pruning_windows_are_counted():
    text = torch.randint(3, 30_000, (4000,))
    ahead, behind, apart = (text[start : start + 100][None] for start in (0, 60, 500))
    assert share(ahead, behind) == share(behind, ahead) == 0.4
    assert share(ahead, ahead) == 1.0
    assert share(ahead, apart) == 0.0
    assert share(ahead, torch.cat([apart, behind])) == 0.2
    assert share(text[:100][None], text[80:180][None]) == 0.0  # fewer tokens than a run
    assert share(torch.arange(8)[None], torch.arange(8)[None]) == 1.0
    assert shared_share([{"input_ids": text[None, :8]}], [{"input_ids": ahead}]) == 0.0


def test_padding_is_not_shared():
    text = torch.randint(3, 30_000, (2, 100))
    mask = torch.ones_like(text)
    mask[:, 60:] = 0
    padded = text * mask
    assert share(padded[:1], padded[1:]) > 0
    assert share(padded[:1], padded[1:], attention_mask=mask[:1]) == 0


def test_windows_that_overlap_are_told_with_the_way_out_and_those_of_halves_are_none():
    torch.manual_seed(3)
    text = tokens(1, 500)[0]
    drawn = [random_windows(text, 16, 30, 0, halves=halves) for halves in (False, True)]
    with pytest.warns(CalibrationWarning, match=r"\d\d % of the held-out tokens .*calibration_windows\(..., halves=True\)"):
        tuned = statprune.tune(llama(), drawn[0], minutes=NONE)
    assert tuned.record()["held_out_shared"] > 0.3
    assert statprune.tune(llama(), drawn[1], minutes=NONE).record()["held_out_shared"] == 0
    with pytest.warns(CalibrationWarning, match="held-out tokens"):
        statprune.prune(llama(), drawn[0].split(4), Search(minutes=NONE))


def test_two_runs_take_turns_in_a_folder(tmp_path, few):
    with alone_in(tmp_path / "out"), pytest.raises(ResultsError, match="another run is at work there"):
        tune(output=tmp_path / "out", minutes=NONE)
    tune(output=tmp_path / "out", minutes=NONE)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"trials.jsonl", "tried.csv", "tried.md", "recipe.yaml"}
