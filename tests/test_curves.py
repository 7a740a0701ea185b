"""Allocation by error curves: the arithmetic by hand and by brute force, and what is measured on very small models."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import statprune
from statprune import Recipe
from statprune.allocation import allocate
from statprune.allocation.curves import error_curves, fast_pruner, points, sampled_rows
from statprune.allocation.dense import PROBE_LENGTH, DenseModel
from statprune.checkpoint import save, verify
from statprune.errors import CheckpointError, NonFiniteError
from statprune.methods.apportion import choose, curve_at, least_error_sparsities, whole_counts
from statprune.methods.patterns import NM, Counted, Unstructured
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.weights import InPlace
from statprune.record import write_record
from statprune.selection import select
from tiny_models import classifier, llama, refused, tokens

quick = settings(max_examples=30, deadline=None, derandomize=True)

POINTS = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7], dtype=torch.float64)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def exponential(*layers):
    """Errors a e^(b s), of which straight lines between logarithms miss nothing."""
    return torch.stack([a * (b * POINTS).exp() for a, b in layers])


def cost(errors, sparsities):
    return float(curve_at(errors, POINTS, sparsities[:, None]).sum())


# The arithmetic.


def test_the_logarithm_of_an_error_is_linear_between_the_points():
    errors = double(1, 4, 16, 16, 64)[None]
    found = curve_at(errors, POINTS, double(0.3, 0.35, 0.45, 0.55, 0.65, 0.7)[None])
    torch.testing.assert_close(found, double(1, 2, 8, 16, 32, 64)[None])


def test_an_error_that_falls_is_noise_and_none_at_all_is_a_little():
    found = curve_at(double(4, 2, 8, 8, 8)[None], POINTS, double(0.4, 0.45)[None])
    torch.testing.assert_close(found, double(4, 32**0.5)[None])
    found = curve_at(torch.stack([double(0, 0, 0, 0, 0), double(1, 1, 1, 1, 2)]), POINTS, double(0.5)[None].expand(2, 1))
    torch.testing.assert_close(found[:, 0], double(2e-12, 1))


def test_two_layers_by_hand():
    find = partial(least_error_sparsities, points=POINTS, target=0.5)
    # e^(10 s1) = e e^(10 s2): 0.1 apart, around the target.
    found = find(exponential((1, 10), (math.e, 10)), sizes=torch.tensor([50, 50]))
    torch.testing.assert_close(found, double(0.55, 0.45), rtol=0, atol=1e-6)
    # The same error, and one layer three times as large: a weight of it costs a third, log(3) / 10 apart.
    found = find(exponential((1, 10), (1, 10)), sizes=torch.tensor([300, 100]))
    torch.testing.assert_close(found, double(0.5 + math.log(3) / 40, 0.5 - 3 * math.log(3) / 40), rtol=0, atol=1e-6)
    # 5 e^(5 s1) = 10 e^(10 s2) and s1 + s2 = 1: s2 = (5 - log 2) / 15.
    found = find(exponential((1, 5), (1, 10)), sizes=torch.tensor([50, 50]))
    torch.testing.assert_close(found, double(0.7, 0.3), rtol=0, atol=1e-6)  # 0.287 is beyond the bound
    found = find(exponential((3, 5), (1, 10)), sizes=torch.tensor([50, 50]))
    torch.testing.assert_close(found[1], double((5 + math.log(3) - math.log(2)) / 15)[0], rtol=0, atol=1e-4)
    # What costs nothing goes as far as it may.
    found = find(torch.stack([torch.zeros(5).double(), exponential((1, 8))[0]]), sizes=torch.tensor([50, 50]))
    torch.testing.assert_close(found, double(0.7, 0.3))
    # Nothing costs anything: all alike.
    found = find(torch.zeros(3, 5).double(), sizes=torch.tensor([50, 20, 50]))
    torch.testing.assert_close(found, double(0.5, 0.5, 0.5))


layers = st.lists(st.tuples(st.floats(0.01, 100), st.floats(2, 15), st.integers(1, 9)), min_size=2, max_size=8)


@quick
@given(layers, st.sampled_from([0.35, 0.5, 0.62]))
def test_inside_the_bounds_a_further_weight_costs_the_same_everywhere(layers, target):
    errors, sizes = exponential(*(layer[:2] for layer in layers)), torch.tensor([100 * layer[2] for layer in layers])
    found = least_error_sparsities(errors, POINTS, sizes, target)
    assert float((found * sizes).sum()) == pytest.approx(target * float(sizes.sum()))
    inside = (found > 0.3 + 1e-6) & (found < 0.7 - 1e-6)
    marginal = (double(*(layer[1] for layer in layers)) * curve_at(errors, POINTS, found[:, None])[:, 0] / sizes)[inside]
    assert len(marginal) < 2 or float(marginal.max() / marginal.min()) < 1.01
    if len(marginal):
        # What is at a bound would cost more there, or less.
        price, at = float(marginal.mean()), double(*(layer[1] for layer in layers)) * errors[:, [0, -1]].T / sizes
        assert all(at[0, found <= 0.3 + 1e-6] >= 0.98 * price)
        assert all(at[1, found >= 0.7 - 1e-6] <= 1.02 * price)


@quick
@given(st.lists(st.lists(st.floats(0, 10), min_size=5, max_size=5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_no_curves_make_it_worse_than_the_same_sparsity_everywhere(curves, random):
    errors, sizes = double(*curves), torch.tensor([random.randint(10, 300) for _ in curves])
    found = least_error_sparsities(errors, POINTS, sizes, 0.5)
    assert float((found * sizes).sum()) == pytest.approx(0.5 * float(sizes.sum()))
    assert cost(errors, found) <= cost(errors, torch.full_like(found, 0.5)) * (1 + 1e-9)
    shapes = [(int(size), 7) for size in sizes]
    total = Unstructured(0.5, "layer").pruned_of(7, int(sizes.sum()))
    assert sum(whole_counts(found, shapes, 0.5, 0.2)) == total


@quick
@given(st.lists(st.lists(st.floats(0.01, 3), min_size=5, max_size=5), min_size=2, max_size=2), st.integers(1, 4))
def test_no_other_sparsities_of_two_layers_cost_less(steps, times):
    first, rises = double(*steps).split([1, 4], dim=-1)  # logarithms that rise ever faster: convex curves
    errors = torch.cat([first, first + rises.sort(dim=-1).values.cumsum(-1)], dim=-1).exp()
    found = least_error_sparsities(errors, POINTS, torch.tensor([100, 100 * times]), 0.5)
    second = torch.linspace(0.3, 0.7, 401, dtype=torch.float64)
    tried = torch.stack([0.5 * (1 + times) - times * second, second])
    tried = tried[:, (tried[0] >= 0.3) & (tried[0] <= 0.7)]
    assert cost(errors, found) <= 1.005 * float(curve_at(errors, POINTS, tried).sum(0).min())


@pytest.mark.parametrize(
    ("target", "spread", "expected"),
    [
        (0.7, 0.2, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (0.5, 0.3, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        (0.5, 0.05, [0.45, 0.5, 0.55]),
        (0.1, 0.2, [0.01, 0.1, 0.2, 0.3]),
        (0.9, 0.2, [0.7, 0.8, 0.9, 0.99]),
    ],
)
def test_a_curve_is_measured_at_the_bounds_at_the_target_and_between(target, spread, expected):
    found = points(target, spread)
    assert found == pytest.approx(expected)
    assert target in found


def test_what_each_layer_does_by_hand():
    # Of 10 weights each: 1 for the first ten of layer 0, 3 for the next; 2 for those of layer 1, then 4.
    costs, counts = [[0, 1, 4], [0, 2, 6]], [[0, 10, 20], [0, 10, 20]]
    assert choose(costs, counts, 10) == [1, 0]
    assert choose(costs, counts, 11) == [1, 1]
    assert choose(costs, counts, 30) == [2, 1]
    assert choose(costs, counts, 40) == [2, 2]
    # As many zeros for less: never the third choice. The second is above the line from the first to the third: passed over.
    assert choose([[0, 5, 7]], [[0, 20, 20]], 20) == [1]
    assert choose([[0, 9, 10], [0, 12, 14]], [[0, 10, 20], [0, 10, 20]], 20) == [2, 0]
    # 30 are reached with 20 + 20; the first needs no more than 10 then.
    assert choose([[0, 1, 2], [0, 10, 30]], [[0, 10, 20], [0, 5, 20]], 25) == [2, 1]


@quick
@given(
    st.lists(st.tuples(*[st.floats(0, 10)] * 3, st.integers(1, 5)), min_size=1, max_size=5),
    st.floats(0.05, 1), st.booleans(),
)  # fmt: skip
def test_choices_against_all_there_are(drawn, share, are_alike):
    sizes = [4 * (1 if are_alike else size) for *_, size in drawn]
    costs = [[0.0, *sorted(some)] for *some, _ in drawn]
    counts = [[0, size // 4, size // 2, size] for size in sizes]
    total = math.ceil(share * sum(sizes))
    chosen = choose(costs, counts, total)

    def of(choice):
        return sum(own[one] for own, one in zip(counts, choice, strict=True)), sum(
            own[one] for own, one in zip(costs, choice, strict=True)
        )

    reached, spent = of(chosen)
    assert reached >= total
    every = [of(choice) for choice in itertools.product(range(4), repeat=len(drawn))]
    best = min(price for zeros, price in every if zeros >= total)
    # Greedy is off by less than one step, the last one; no step costs more than the dearest layer.
    assert spent <= best + max(own[-1] for own in costs) + 1e-9
    for layer, now in enumerate(chosen):  # and nothing can be spared
        for choice, count in enumerate(counts[layer]):
            if 0 < counts[layer][now] - count <= reached - total:
                assert costs[layer][choice] > costs[layer][now]


@quick
@given(st.lists(st.floats(0, 10), min_size=1, max_size=7), st.floats(0.05, 1))
def test_equal_layers_that_are_dense_or_not_are_chosen_as_well_as_can_be(harms, share):
    total = math.ceil(share * 10 * len(harms))
    chosen = choose([[0.0, harm] for harm in harms], [[0, 10]] * len(harms), total)
    assert sum(harm for harm, one in zip(harms, chosen, strict=True) if one) == pytest.approx(
        sum(sorted(harms)[: math.ceil(total / 10)])
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NM(2, 4), (NM(6, 8), NM(4, 8))),
        (NM(4, 8), (NM(6, 8),)),
        (NM(1, 4), (NM(5, 8), NM(2, 8))),
        (NM(1, 2), (NM(3, 4), NM(2, 4))),
        (NM(5, 8), (NM(13, 16),)),
        (NM(8, 16), (NM(12, 16),)),
        (NM(511, 1024), ()),
        (NM(4, 4), ()),
        (Unstructured(0.5), ()),
    ],
)
def test_milder_patterns(pattern, expected):
    assert pattern.milder() == expected
    score = torch.rand(5, 2048)
    for one in expected:
        # What has the pattern has the milder ones: they allow more.
        assert one.holds(score * pattern(score))
        assert one.pruned_of(5, 2048) <= pattern.pruned_of(5, 2048)


# What is measured.


class Gradients:
    """Of which the diagonals are known."""

    def __init__(self, diagonals):
        self.diagonals = diagonals

    def diagonal(self, parameter):
        return self.diagonals[parameter]


def dense_of(model, batches):
    inputs = bind_batches(model, batches)
    found = find_layers(model, inputs)
    return DenseModel(found, select(found.groups, found.left_out, Recipe("wanda")), inputs, InPlace(model))


def gram_before(model, name, batches):
    """Gram of what enters a layer, by a hook."""
    moments = InputMoments.zeros(model.get_submodule(name).in_features, Statistic.GRAM)
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: moments.add(args[0]) and None)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return moments


def test_the_curve_of_a_layer_is_the_weighed_error_of_its_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 12), nn.Tanh(), nn.Linear(12, 2)).eval()
    batches = [torch.randn(30, 8) for _ in range(7)]
    diagonals = {f"{name}.weight": torch.rand(model.get_submodule(name).out_features) for name in "02"}
    shares = [0.25, 0.5, 0.625]  # as many of each row, so that a row fares alike in the sample and in the whole
    found = error_curves(
        dense_of(model, batches), Unstructured(0.5), lambda _: [Unstructured(one) for one in shares], 1, Gradients(diagonals), 1
    )
    for curve, name in zip(found, "02", strict=True):
        weight, moments = model.get_submodule(name).weight.detach(), gram_before(model, name, batches[:2])  # of 7, a quarter
        rows = sampled_rows(len(weight)).tolist()
        assert len(rows) == min(len(weight), 32)
        for share, error in zip(shares, curve, strict=True):
            pruned = fast_pruner(Unstructured(share))(weight, moments).weight  # rows are pruned apart: whole, or a few
            by_hand = 0.0
            for row in rows:
                change = (pruned[row] - weight[row]).double()
                by_hand += float(diagonals[f"{name}.weight"][row]) * float(change @ moments.gram.double() @ change)
            assert error == pytest.approx(by_hand * len(weight) / len(rows), rel=1e-3)
        assert curve == sorted(curve)


def test_without_gradients_the_error_at_the_target_is_the_divergence_of_the_predictions():
    model, batches = llama(), [tokens(3, 9), tokens(3, 9)]
    dense = dense_of(model, batches)
    pattern = NM(2, 4)
    with torch.no_grad():
        model.lm_head.weight *= 30
        found = error_curves(dense, pattern, lambda _: [NM(6, 8), NM(2, 4)], -1, None, 1)
        expected = model(batches[0][:1]).logits.double().log_softmax(-1)  # one sequence of the batch
    for number, name in ((2, "model.layers.0.self_attn.v_proj"), (9, "model.layers.1.self_attn.v_proj")):
        weight = model.get_submodule(name).weight.detach()
        pruned = fast_pruner(pattern)(weight, gram_before(model, name, batches[:1])).weight
        with torch.no_grad():
            logits = functional_call(model, {f"{name}.weight": pruned}, (batches[0][:1],)).logits.double()
        divergence = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean()
        assert found[number][1] == pytest.approx(float(divergence), rel=1e-3)
        assert found[number][0] < found[number][1]


def test_gradients_decide_where_there_are_some():
    model, batches = llama(), [tokens(2, 9)]
    dense = dense_of(model, batches)
    feels = {site.parameter: torch.full((site.shape[0],), 1e-9 if "layers.1" in site.name else 1.0) for site in dense.sites}
    find = partial(allocate, dense.layers, dense.selection, dense.inputs, weights=dense.weights, curvature=Gradients(feels))
    shares = {
        name: own.num_pruned / (model.get_parameter(name).numel())
        for name, own in find(recipe=Recipe("wanda", pattern="50%", allocation="curves")).patterns.items()
    }
    assert all(share == pytest.approx(0.7 if "layers.1" in name else 0.3, abs=0.01) for name, share in shares.items())
    found = find(recipe=Recipe("wanda", pattern="2:4", allocation="curves:sparsity=0.25"))
    assert found.patterns == {}
    assert {site.name for site in found.selection.sites} == {site.name for site in dense.sites if "layers.1" in site.name}
    assert "dense by the allocation curves: 2:4 in the other layers makes 25 %" in found.selection.left_out[-1].reason


def test_an_error_that_is_not_finite_names_the_layer():
    model = classifier()
    dense = dense_of(model, [torch.randn(6, 8)])
    diagonals = {"0.weight": torch.ones(12), "2.weight": torch.full((8,), math.inf)}
    with refused(model, NonFiniteError, "the error of 2 is not finite"):
        error_curves(dense, NM(2, 4), lambda _: [NM(2, 4)], -1, Gradients(diagonals), 1)


# From end to end.


@pytest.mark.parametrize("method", ["cvr+energy", "optimal-brain+least-squares:steps=3", "sparsegpt"])
def test_milder_patterns_are_mixed_and_verified_layer_by_layer(tmp_path, method):
    model = llama(intermediate_size=20)  # which 8 does not divide
    batches = [tokens(2, 9) for _ in range(3)]
    report = statprune.prune(model, batches, Recipe(method, pattern="2:4", allocation="curves:mixed,sparsity=0.3"))
    folder = save(model, report, tmp_path / "sparse")
    record = verify(folder)
    own = {site["name"]: site["pattern"] for site in record["sites"] if site["pattern"]}
    assert own
    assert all(pattern in ({"name": "nm", "keep": 6, "of": 8}, {"name": "nm", "keep": 4, "of": 8}) for pattern in own.values())
    assert all(site["pattern"] is None for site in record["sites"] if site["shape"][1] == 20)
    kept = {name: NM(pattern["keep"], pattern["of"]) for name, pattern in own.items()}
    for site in report.sites:
        pattern = kept.get(site.name, NM(2, 4))
        assert pattern.holds(model.get_parameter(site.parameter))
        assert site.num_pruned == pattern.pruned_of(*site.shape)
    in_scope = report.num_weights + sum(math.prod(one.shape) for one in report.left_out if "allocation" in one.reason)
    assert 0.3 <= sum(site.num_pruned for site in report.sites) / in_scope < 0.4
    wrong = [{**site, "pattern": None} if site["pattern"] else site for site in record["sites"]]
    write_record(folder, {**record, "sites": wrong})
    with pytest.raises(CheckpointError, match=r"number of pruned weights with 2:4|pattern promised 2:4"):
        verify(folder)


def test_only_the_pattern_itself_where_nobody_asks_for_more():
    twin = statprune.plan(llama(), [tokens(2, 9)], Recipe("wanda", pattern="4:8", allocation="curves:sparsity=0.3"))
    assert all(site.pattern is None for site in twin.report.sites)
    assert all(NM(4, 8).holds(weight) for weight in twin.weights.values())
    assert len(twin.report.sites) < 14


def test_a_curve_is_told_for_every_layer():
    seen = []
    recipe = Recipe("wanda", pattern="50%", allocation="curves")
    twin = statprune.plan(llama(), [tokens(2, 9)], recipe, progress=lambda *step: seen.append(step))
    assert seen[0] == (1, 14, "error curve of model.layers.0.self_attn.q_proj")
    assert seen[13] == (14, 14, "error curve of model.layers.1.mlp.down_proj")
    counted = [Counted(**{key: value for key, value in site.pattern.items() if key != "name"}) for site in twin.report.sites]
    assert len({round(one.num_pruned / site.num_weights, 2) for one, site in zip(counted, twin.report.sites, strict=True)}) > 2


def _patterns(rank, num_ranks, pattern, allocation):
    torch.manual_seed(1)
    every = [tokens(2, 9) for _ in range(8)]
    twin = statprune.plan(llama(), every[rank::num_ranks], Recipe("wanda", pattern=pattern, allocation=allocation))
    return {site.name: (site.num_pruned, site.pattern) for site in twin.report.sites}


@pytest.mark.parametrize(("pattern", "allocation"), [("50%", "curves"), ("2:4", "curves:mixed,sparsity=0.3")])
def test_all_ranks_come_to_the_allocation_of_one_process(two_ranks, pattern, allocation):
    first, second = two_ranks(_patterns, 2, pattern, allocation)
    alone = _patterns(0, 1, pattern, allocation)
    assert first == second
    # Grams are float32 sums, added up in another order, and a weight more or less is what that may make of it.
    assert {name: own[0] for name, own in first.items()} == pytest.approx({name: own[0] for name, own in alone.items()}, abs=2)


def test_a_probe_is_the_beginning_of_the_sequence_with_the_least_padding():
    batch = {"input_ids": torch.arange(20).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    batch["attention_mask"][0, :6] = batch["attention_mask"][1, :2] = 0
    (found,) = dense_of(llama(), [batch]).sequences(1)
    assert found.kwargs["input_ids"].tolist() == [list(range(12, 20))]
    assert found.kwargs["attention_mask"].tolist() == [[1] * 8]
    model = llama(max_position_embeddings=PROBE_LENGTH + 9)
    (found,) = dense_of(model, [tokens(3, PROBE_LENGTH + 9), tokens(3, 4)]).sequences(1)
    assert found.tensors()[0].shape == (1, PROBE_LENGTH)
    # What is no language model has no sequences.
    assert dense_of(classifier(), [torch.randn(6, 8)]).sequences(1)[0].tensors()[0].shape == (6, 8)
    # Nor has a batch whose tensors are not all [rows, length].
    mixed = {"input_ids": tokens(2, 5), "position_ids": torch.arange(5)[None]}
    assert dense_of(llama(), [mixed]).sequences(1)[0].tensors()[0].shape == (2, 5)
