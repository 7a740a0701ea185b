import math

from hypothesis import given
from hypothesis import strategies as st

from statprune.tuning.rungs import FINALISTS, FRACTIONS, affordable, goes_on, num_batches, ranking, survivors

scores_of = st.lists(st.floats(min_value=1, max_value=1e9) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=40)
costs_of = st.lists(st.floats(min_value=0, max_value=100), max_size=20)


def test_nan_comes_last_and_of_equals_the_first_comes_first():
    assert ranking([3.0, math.nan, 1.0, 3.0, math.inf]) == [2, 0, 3, 1, 4]
    assert survivors([3.0, 1.0, 2.0, 5.0]) == [1, 2]
    assert survivors([7.0]) == [0]
    assert survivors([]) == []


@given(scores_of)
def test_under_a_scorer_that_does_not_change_its_mind_the_best_candidate_survives_every_rung(scores):
    best = min(scores, key=lambda score: math.inf if math.isnan(score) else score)
    left = [scores[index] for index in survivors(scores)]
    assert len(left) == math.ceil(len(scores) / 3)
    finalists = [score for index, score in enumerate(left) if goes_on(left[: index + 1])]
    assert left[0] in finalists
    assert left[0] == best or (math.isnan(left[0]) and best in (math.inf, left[0])) or math.isnan(best)


@given(scores_of)
def test_whoever_is_among_the_best_at_the_end_has_gone_on(scores):
    gone_on = {index for index in range(len(scores)) if goes_on(scores[: index + 1])}
    assert set(ranking(scores)[:FINALISTS]) <= gone_on


@given(costs_of, st.floats(min_value=-10, max_value=500))
def test_what_is_afforded_fits_and_what_is_not_did_not_fit_when_its_turn_came(costs, seconds):
    chosen = affordable(costs, seconds)
    assert chosen == sorted(set(chosen))
    assert sum(costs[index] for index in chosen) <= max(0, seconds) + 1e-9
    for index in set(range(len(costs))) - set(chosen):
        left = seconds - sum(costs[before] for before in chosen if before < index)
        assert costs[index] > max(0, left - 1e-9)


def test_what_is_known_already_is_afforded_without_any_time():
    assert affordable([0.0, 2.0, 1.0, 0.0], -5.0) == [0, 3]
    assert affordable([3.0, 2.0, 1.0], 4.0) == [0, 2]


@given(st.integers(1, 500))
def test_rungs_are_scored_on_more_and_more_and_the_last_on_everything(batches):
    counts = [num_batches(rung, batches) for rung in range(len(FRACTIONS))]
    assert 1 <= counts[0] <= counts[1] <= counts[2] == batches
