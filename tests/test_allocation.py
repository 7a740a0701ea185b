import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.errors import RecipeError
from statprune.how import labelled
from statprune.methods.apportion import (
    budget,
    choose,
    least_loss_sparsities,
    marginal_rates,
    outlier_share,
    owl_sparsities,
    whole_counts,
)
from statprune.methods.budget import Sensitivity
from statprune.methods.patterns import Counted, Unstructured
from statprune.recipe import Recipe

quick = settings(max_examples=40, deadline=None, derandomize=True)

shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(2, 40)), min_size=1, max_size=8)
fractions = st.integers(1, 99).map(lambda percent: percent / 100)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_outliers_are_counted_over_the_mean_of_the_whole_block():
    # Mean 2 of both layers together: 8 and 6 are above twice that. By layer, twice 3.5 and twice 0.5 would find 8 and one 2.
    block = [torch.tensor([[8.0, 2.0], [1.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])]
    assert outlier_share(block, 2.0) == 1 / 8
    assert outlier_share([*block, torch.tensor([[6.0, 2.0], [0.0, 0.0]])], 2.0) == 2 / 12
    assert outlier_share([torch.zeros(2, 2)], 5.0) == 0
    assert outlier_share([], 5.0) == 0
    assert outlier_share([torch.full((10,), 1e38)], 0.5) == 1  # whose sum is beyond float32


def test_owl_shifts_the_kept_share_linearly_in_the_share_of_outliers():
    # Mean 0.3, furthest 0.3 away: keep 0.3 + 0.08 * (-2/3, -1/3, 1).
    found = owl_sparsities(double(0.1, 0.2, 0.6), torch.tensor([10, 10, 10]), 0.7, 0.08)
    torch.testing.assert_close(found, double(0.7 + 0.16 / 3, 0.7 + 0.08 / 3, 0.62))
    # Weights count alike: the mean of 1 and three times 0 is 0.25, so the small layer moves three times as far.
    found = owl_sparsities(double(1.0, 0.0), torch.tensor([10, 30]), 0.5, 0.09)
    torch.testing.assert_close(found, double(0.41, 0.53))
    # Mean 0.5, furthest 0.4 below it.
    found = owl_sparsities(double(0.1, 0.7, 0.7), torch.tensor([10, 10, 10]), 0.5, 0.08)
    torch.testing.assert_close(found, double(0.58, 0.46, 0.46))
    assert owl_sparsities(double(0.2, 0.2), torch.tensor([10, 30]), 0.5, 0.09).tolist() == [0.5, 0.5]


POINTS = double(0.3, 0.4, 0.5, 0.6, 0.7)


def curve(*strengths):
    """Errors that rise with the square of the sparsity, which the rates represent exactly."""
    return double(*strengths)[:, None] * POINTS.square()


def test_the_rates_are_the_slopes_of_the_error_scaled_to_the_measured_increase():
    errors = curve(2.0, 50.0)
    rates = marginal_rates(double(0.1, 0.3), errors, errors[:, 2], POINTS)
    # d/ds of increase * (s / 0.5)^2
    torch.testing.assert_close(rates, torch.stack([0.1 * 8 * POINTS, 0.3 * 8 * POINTS]))


def test_an_increase_below_zero_counts_as_a_little():
    errors = curve(1.0, 1.0)
    rates = marginal_rates(double(-0.1, 0.2), errors, errors[:, 2], POINTS)
    torch.testing.assert_close(rates[0], 0.01 * 0.1 * 8 * POINTS)
    # Nothing measured at all: the errors decide.
    rates = marginal_rates(double(-0.1, 0.0), curve(1.0, 2.0), curve(1.0, 2.0)[:, 2], POINTS)
    torch.testing.assert_close(rates[1], 2 * rates[0])


def test_a_rate_never_falls_and_a_layer_without_error_costs_nothing():
    errors = torch.stack([double(0, 3, 4, 4.5, 5), double(0, 0, 0, 0, 0)])
    rates = marginal_rates(double(1.0, 1.0), errors, errors[:, 2], POINTS)
    assert bool((rates.diff(dim=-1) >= 0).all())
    assert rates[1].tolist() == [0, 0, 0, 0, 0]


def test_the_cheapest_sparsities_of_two_layers_by_hand():
    # 8 c s = price in both, (s1 + s2) / 2 = 0.5, c2 = 1.5 c1: s1 = 0.6, s2 = 0.4.
    errors = curve(1.0, 1.0)
    rates = marginal_rates(double(0.1, 0.15), errors, errors[:, 2], POINTS)
    found = least_loss_sparsities(rates, POINTS, torch.tensor([100, 100]), 0.5)
    torch.testing.assert_close(found, double(0.6, 0.4))
    # The bound of 0.7 stops the first, and the second makes up for it.
    rates = marginal_rates(double(0.01, 0.15), errors, errors[:, 2], POINTS)
    torch.testing.assert_close(least_loss_sparsities(rates, POINTS, torch.tensor([100, 100]), 0.5), double(0.7, 0.3))
    # The harm is the same and one layer is three times as large: a weight of it costs a third.
    rates = marginal_rates(double(0.1, 0.1), errors, errors[:, 2], POINTS)
    assert least_loss_sparsities(rates, POINTS, torch.tensor([300, 100]), 0.5)[0] > 0.5


def test_equal_layers_share_alike_even_where_their_error_rises_in_a_straight_line():
    for errors in (curve(1.0, 1.0, 1.0), POINTS.expand(3, 5)):
        rates = marginal_rates(double(0.1, 0.1, 0.1), errors, errors[:, 2], POINTS)
        found = least_loss_sparsities(rates, POINTS, torch.tensor([40, 40, 40]), 0.45)
        torch.testing.assert_close(found, double(0.45, 0.45, 0.45))
        assert whole_counts(found, [(4, 10)] * 3, 0.45, 0.2) == [18, 18, 18]


@quick
@given(st.tuples(*[st.floats(0.01, 1.0)] * 3), st.tuples(*[st.floats(1.0, 3.0)] * 3), st.tuples(*[st.integers(1, 5)] * 3))
def test_no_other_counts_cost_less(increases, powers, rows):
    def cost(layer, sparsity):
        return increases[layer] * (sparsity / 0.5) ** powers[layer]

    layers = [(number, 10) for number in rows]
    errors = torch.stack([(POINTS / 0.5) ** power for power in powers])
    rates = marginal_rates(double(*increases), errors, errors[:, 2], POINTS)
    sizes = torch.tensor([10 * number for number in rows])
    found = least_loss_sparsities(rates, POINTS, sizes, 0.5)
    counts = whole_counts(found, layers, 0.5, 0.2)
    ranges = [range(3 * number, 7 * number + 1) for number in rows]
    best = min(
        sum(cost(layer, count / (10 * rows[layer])) for layer, count in enumerate(tried))
        for tried in itertools.product(*ranges)
        if sum(tried) == sum(counts)
    )
    ours = sum(cost(layer, count / (10 * rows[layer])) for layer, count in enumerate(counts))
    # Not to the last digit: counts are whole, and five points stand for the curve.
    assert ours <= 1.02 * best


@quick
@given(shapes, fractions, st.floats(0, 0.5), st.randoms(use_true_random=False))
def test_the_counts_are_exact_together_and_within_bounds_each(layers, target, spread, random):
    sparsities = double(*(random.uniform(-0.5, 1.5) for _ in layers))
    counts = whole_counts(sparsities, layers, target, spread)
    sizes = [rows * columns for rows, columns in layers]
    room = [rows * (columns - 1) for rows, columns in layers]
    most = [min(int((target + spread) * size + 1), free) for size, free in zip(sizes, room, strict=True)]
    asked_for = Unstructured(target, "layer").pruned_of(1, sum(sizes))
    assert sum(counts) == asked_for or (sum(counts) < asked_for and sum(counts) >= sum(most) - len(most))
    for count, size, free in zip(counts, sizes, room, strict=True):
        assert (target - spread) * size - 1 <= count <= (target + spread) * size + 1 or count == free
        assert 0 <= count <= free


@quick
@given(shapes, fractions, st.randoms(use_true_random=False))
def test_minimised_counts_are_exact(layers, target, random):
    points = double(*(target * share for share in (0.5, 0.75, 1.0)), *(target + (1 - target) * x for x in (0.25, 0.5)))
    errors = torch.stack([points ** random.uniform(0.5, 4.0) for _ in layers])
    increases = double(*(random.uniform(-0.1, 1.0) for _ in layers))
    sizes = torch.tensor([rows * columns for rows, columns in layers])
    found = least_loss_sparsities(marginal_rates(increases, errors, errors[:, 2], points), points, sizes, target)
    assert float((found * sizes).sum()) == pytest.approx(target * float(sizes.sum()))
    assert points[0] <= found.min() <= found.max() <= points[-1]


def test_whole_numbers_are_near_what_they_stand_for_by_hand():
    rows = [(1, 11), (1, 11), (1, 11)]
    # All are 0.2 short: each gets 0.2 of its 11 weights more, whatever it has. 4.4 + 6.6 + 5.5 are 16 of 33, rounded down.
    assert whole_counts(double(0.2, 0.4, 0.3), rows, 0.5, 0.5) == [4, 7, 5]
    # 0.2 more again: 30.3 and 70.7, where shares in proportion would be 16.8 and 84.2.
    assert whole_counts(double(0.1, 0.5), [(1, 101), (1, 101)], 0.5, 0.5) == [30, 71]
    # The larger one takes its part.
    assert whole_counts(double(0.2, 0.2), [(1, 10), (10, 10)], 0.5, 0.5) == [5, 50]
    # What rounding leaves over goes where most was cut off.
    assert whole_counts(double(0.41, 0.49), [(1, 10), (1, 10)], 0.45, 0.1) == [4, 5]
    # Bounds are rounded outwards: without that, no layer of 10 could be at 0.45.
    assert sorted(whole_counts(double(0.45, 0.45), [(1, 10), (1, 10)], 0.45, 0.0)) == [4, 5]


def test_a_further_weight_costs_the_same_in_every_layer_that_is_at_no_bound():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10, 100, (20,), generator=generator)
    rates = torch.rand(20, len(POINTS), generator=generator, dtype=torch.float64).cumsum(-1) * sizes[:, None]
    found = least_loss_sparsities(rates, POINTS, sizes, 0.5)
    assert float((found * sizes).sum()) == pytest.approx(0.5 * float(sizes.sum()), rel=1e-9)
    prices = []
    for rate, size, sparsity in zip(rates, sizes, found, strict=True):
        at = min(int(torch.searchsorted(POINTS, sparsity, right=True)) - 1, len(POINTS) - 2)
        share = (sparsity - POINTS[at]) / (POINTS[at + 1] - POINTS[at])
        if POINTS[0] + 1e-6 < sparsity < POINTS[-1] - 1e-6:
            prices.append(float((rate[at] + share * (rate[at + 1] - rate[at])) / size))
    assert len(prices) > 10
    assert max(prices) - min(prices) < 1e-6


def choose_layers(harms, counts, total):
    """Which layers are pruned, by the harm of each weight that goes."""
    costs = [[0.0, harm * count] for harm, count in zip(harms, counts, strict=True)]
    return [layer for layer, choice in enumerate(choose(costs, [[0, count] for count in counts], total)) if choice]


@quick
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=10), st.floats(0.01, 1))
def test_chosen_layers_reach_the_budget_and_none_can_be_spared(layers, share):
    harms, counts = zip(*layers, strict=True)
    total = budget(share, sum(counts))
    chosen = choose_layers(harms, counts, total)
    reached = sum(counts[index] for index in chosen)
    assert reached >= total
    assert all(reached - counts[index] < total for index in chosen)


def test_the_least_harmful_layers_go_first_and_those_not_needed_after_all_stay():
    assert choose_layers([3.0, 1.0, 2.0], [10, 10, 10], 20) == [1, 2]
    # 4 + 10 are short of 15, and with 12 the second one is not needed any more: 4 + 12 do.
    assert choose_layers([1.0, 2.0, 3.0], [4, 10, 12], 15) == [0, 2]
    # Without the 10, the 4 is not needed either.
    assert choose_layers([1.0, 2.0, 3.0], [4, 10, 15], 15) == [2]
    assert choose_layers([2.0, 1.0, 3.0], [10, 10, 10], 20) == [0, 1]


def test_a_budget_is_the_least_number_that_makes_the_sparsity():
    assert budget(0.4, 35) == 14
    assert budget(0.41, 35) == 15
    assert budget(0.07, 100) == 7  # the product is 7.000000000000001


@pytest.mark.parametrize(
    ("rank_over", "expected"),
    [
        # Five of the twelve: two of the first two rows, one of the last.
        ("row", [[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]]),
        ("layer", [[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]]),
    ],
)
def test_an_exact_number_goes_from_rows_or_from_the_layer(rank_over, expected):
    score = torch.tensor([[1.0, 2.0, 9.0, 8.0], [7.0, 1.0, 2.0, 9.0], [9.0, 8.0, 7.0, 3.0]])
    pattern = Counted(5, 4, rank_over)
    assert pattern(score).int().tolist() == expected
    assert pattern.holds(score * pattern(score))
    assert not Counted(6, 4, rank_over).holds(score * pattern(score))
    assert (pattern.fits(4), pattern.fits(8)) == (True, False)
    assert str(pattern) == f"5 weights, by {rank_over}"


def test_a_row_with_too_few_zeros_is_found_though_the_layer_has_enough():
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert Counted(3, 4, "layer").holds(weight)
    assert not Counted(3, 4, "row").holds(weight)


@quick
@given(
    st.integers(1, 6), st.integers(2, 24), st.integers(0, 100), st.integers(1, 24), st.sampled_from(["row", "layer"]),
    st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_an_exact_number_goes_whole_and_in_slices(rows, columns, percent, width, rank_over, all_equal, stack):
    number = rows * (columns - 1) * percent // 100
    shape = (*[2] * stack, rows, columns)
    score = torch.ones(shape) if all_equal else torch.rand(shape)
    pattern = Counted(number, columns, rank_over)
    slices = [pattern.slice(score[..., start : start + width], start) for start in range(0, columns, width)]
    for keep in (pattern(score), torch.cat(slices, -1)):
        assert ((~keep).sum((-2, -1)) == number).all()
        assert pattern.holds((score + 1) * keep)
        if rank_over == "row":
            gone = (~keep).sum(-1)
            assert int(gone.max() - gone.min()) <= 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"allocation": "wol"}, "Recipe(allocation='wol') does not exist. Did you mean 'owl'? Known: uniform, owl, sens"),
        ({"allocation": "owl:sprd=1"}, "Its settings are threshold, spread, sparsity."),
        ({"allocation": "uniform:spread=0.1"}, "The allocation 'uniform' has no setting 'spread'."),
        ({"allocation": "owl:spread=2"}, "'owl' has spread=2: expected a number from 0 to 1"),
        ({"allocation": "owl:spread=-0.1"}, "'owl' has spread=-0.1: expected a number from 0 to 1"),
        ({"allocation": "owl:threshold=0"}, "'owl' has threshold=0: expected a number from 0.001 to"),
        ({"allocation": "sensitivity:probes=0"}, "'sensitivity' has probes=0: expected a whole number from 1 to 10,000"),
        ({"allocation": "sensitivity:probes=1.5"}, "The allocation 'sensitivity' has probes=1.5: expected a whole number"),
        ({"allocation": "sensitivity:spread=much"}, "The allocation 'sensitivity' has spread='much': expected a number"),
        (
            {"allocation": "owl:sparsity=1.5", "pattern": "2:4"},
            "'owl' has sparsity=1.5: expected a number from 0 to 1, but not 0 or 1",
        ),
        (
            {"allocation": "owl:sparsity=1", "pattern": "2:4"},
            "'owl' has sparsity=1: expected a number from 0 to 1, but not 0 or 1",
        ),
        (
            {"allocation": "sensitivity:sparsity=0", "pattern": "2:4"},
            "'sensitivity' has sparsity=0: expected a number from 0 to 1, but not 0 or 1",
        ),
        ({"allocation": "owl", "pattern": "2:4"}, "with 2:4 every layer that is pruned is equally sparse, and the allocation"),
        ({"allocation": "sensitivity:sparsity=0.6", "pattern": "2:4"}, "up to 0.5, such as 'sensitivity:sparsity=0.1'"),
        ({"allocation": "owl:sparsity=0.4", "pattern": "50%"}, "the pattern says it already"),
        ({"allocation": "curves:sparsity=0.4", "pattern": "50%"}, "the pattern says it already"),
        ({"allocation": "curves:mixed"}, "with mixed: there is nothing to mix. Leave it out"),
        ({"allocation": "curves:mixed=2,sparsity=0.4", "pattern": "2:4"}, "'curves' has mixed=2: expected true or false"),
        ({"allocation": "curves:spread=-1"}, "'curves' has spread=-1: expected a number from 0 to 1"),
        ({"allocation": "curves:probes=0"}, "'curves' has probes=0: expected a whole number from 1 to 10,000"),
        ({"allocation": "curves:mixed", "pattern": "2:4"}, "up to 0.5, such as 'curves:sparsity=0.1'"),
    ],
)
def test_an_allocation_that_makes_no_sense_is_refused(data, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.from_dict({"pattern": "50%", **data})


def test_half_a_batch_is_no_probe():
    with pytest.raises(ValueError, match=r"sensitivity\(probes=1.5\): expected a whole number from 1 to 10,000"):
        Sensitivity(probes=1.5)


def test_a_recipe_spells_an_allocation_out_and_reads_it_back():
    recipe = Recipe(pattern="2:4", allocation="owl:sparsity=0.4")
    assert recipe.allocation == "owl:sparsity=0.4"
    assert recipe.to_dict()["allocation"] == {"name": "owl", "threshold": 5.0, "spread": 0.08, "sparsity": 0.4}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe().to_dict()["allocation"] == {"name": "uniform"}


def test_a_method_may_bring_its_allocation_and_its_label_says_so():
    label, recipe = labelled({"method": "wanda", "allocation": "owl"}, pattern="50%")
    assert (label, recipe.allocation) == ("wanda (owl)", "owl")
    assert labelled({"criterion": "wanda", "allocation": "owl", "label": "mine"}, pattern="50%")[0] == "mine"
    assert labelled({"method": "wanda"}, pattern="50%")[0] == "wanda"
