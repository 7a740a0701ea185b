import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods.compensations import COMPENSATIONS, energy, none
from statprune.methods.counting import energy_sq
from statprune.methods.criteria import CRITERIA, cvr, magnitude, wanda
from statprune.methods.patterns import NM, Unstructured
from statprune.methods.pruner import PrunedWeight, compose, error_energy
from statprune.methods.registry import build_pruner
from statprune.methods.statistics import InputMoments, Statistic

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [NM(2, 4), NM(1, 4), Unstructured(0.5), Unstructured(0.3), Unstructured(0.5, rank_over="layer")]

quick = settings(max_examples=40, deadline=None, derandomize=True)


def random_layer(seed: int, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, InputMoments]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    tokens = torch.randn(40, in_features, generator=generator) * (0.1 + torch.rand(in_features, generator=generator))
    return weight, InputMoments.zeros(in_features, needs=Statistic.GRAM).add(tokens)


def test_criterion_pattern_compensation_in_this_order_by_hand():
    # Root mean squares 1 and 10 make the small weights the important ones, column by column.
    moments = InputMoments.zeros(4).add(torch.tensor([[1.0, 10.0, 1.0, 10.0]]))
    weight = torch.tensor([[4.0, 1.0, -3.0, 2.0]])
    by_wanda = compose(wanda, NM(2, 4), none)(weight, moments)
    assert by_wanda.keep.int().tolist() == [[0, 1, 0, 1]]
    assert by_wanda.weight.tolist() == [[0, 1, 0, 2]]
    by_magnitude = compose(magnitude, NM(2, 4), none)(weight, None)
    assert by_magnitude.keep.int().tolist() == [[1, 0, 1, 0]]
    # Row mean 1 and s held at 2: 2w - 1.
    doubled = compose(magnitude, NM(2, 4), functools.partial(energy, column=False, clamp=(2.0, 2.0)))(weight, None)
    assert doubled.weight.tolist() == [[7, 0, -7, 0]]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_compensation_sees_the_weight_as_it_was_and_as_it_is_in_float32(dtype):
    weight, moments = random_layer(0, 3, 8, dtype)
    seen = []

    def spy(original, pruned, keep, moments):
        seen.append((original, pruned, keep, moments))
        return pruned

    pruned = compose(wanda, NM(2, 4), spy)(weight, moments)
    assert pruned.weight.dtype == dtype
    ((original, left, keep, given),) = seen
    assert original.dtype == left.dtype == torch.float32
    assert torch.equal(original, weight.float())
    assert torch.equal(left, weight.float() * keep)
    assert torch.equal(keep, pruned.keep)
    assert given is moments


@quick
@given(
    st.sampled_from(sorted(CRITERIA)),
    st.sampled_from(sorted(COMPENSATIONS)),
    st.sampled_from(PATTERNS),
    st.sampled_from(FLOAT_DTYPES),
    st.integers(1, 5),
    st.integers(1, 4).map(lambda n: 4 * n),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_a_pruned_weight_keeps_its_promises(criterion, compensation, pattern, dtype, out_features, in_features, ties, seed):
    weight, moments = random_layer(seed, out_features, in_features, dtype)
    weight = torch.ones_like(weight) if ties else weight
    before = weight.clone()
    known = moments.with_output_gram(torch.eye(out_features) + 0.5)
    pruned = build_pruner({"name": criterion}, pattern, [{"name": compensation}])(weight, known)
    assert torch.equal(weight, before)
    assert (pruned.weight.dtype, pruned.weight.shape) == (dtype, weight.shape)
    assert torch.equal(pruned.keep, pattern(CRITERIA[criterion](weight, moments)))
    assert pruned.weight[~pruned.keep].count_nonzero() == 0
    assert pruned.weight.isfinite().all()


@quick
@given(
    st.sampled_from([magnitude, wanda, cvr]),
    st.sampled_from(PATTERNS),
    st.sampled_from(FLOAT_DTYPES),
    st.integers(2, 6),
    st.integers(1, 4).map(lambda n: 4 * n),
    st.integers(0, 2**32),
)
def test_pruning_again_changes_nothing(criterion, pattern, dtype, out_features, in_features, seed):
    weight, moments = random_layer(seed, out_features, in_features, dtype)
    prune = compose(criterion, pattern, energy)
    once = prune(weight, moments).weight
    again = prune(once, moments).weight
    torch.testing.assert_close(again, once, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_exact_whatever_the_compensation_returns(dtype):
    weight, _ = random_layer(0, 3, 8, dtype)
    pruned = compose(magnitude, NM(2, 4), lambda original, *_: torch.full_like(original, 9.0))(weight, None)
    assert torch.equal(pruned.weight, pruned.keep.to(dtype) * 9)


def test_the_weight_is_not_changed_even_if_a_compensation_hands_it_back():
    weight, _ = random_layer(0, 3, 8, torch.float32)
    before = weight.clone()
    pruned = compose(magnitude, NM(2, 4), lambda original, *_: original)(weight, None)
    assert torch.equal(weight, before)
    assert pruned.weight.count_nonzero() == 12


def test_a_stack_is_pruned_matrix_by_matrix():
    layers = [random_layer(seed, 4, 8, torch.float32) for seed in range(3)]
    prune = compose(cvr, NM(2, 4), energy)
    moments = [moments for _, moments in layers]
    stacked = InputMoments(*(torch.stack([getattr(one, key) for one in moments]) for key in ("num_tokens", "sum", "sum_sq")))
    together = prune(torch.stack([weight for weight, _ in layers]), stacked)
    for index, (weight, its_moments) in enumerate(layers):
        alone = prune(weight, its_moments)
        assert torch.equal(together.keep[index], alone.keep)
        torch.testing.assert_close(together.weight[index], alone.weight)


@pytest.mark.parametrize(
    ("criterion", "compensation", "needed"),
    [
        (magnitude, none, Statistic.NONE),
        (magnitude, energy, Statistic.NONE),
        (wanda, none, Statistic.MOMENTS),
        (cvr, energy, Statistic.MOMENTS),
        (functools.partial(magnitude), functools.partial(energy, eps=1e-6), Statistic.NONE),
        (functools.partial(cvr, alpha=1.0), none, Statistic.MOMENTS),
        (magnitude, lambda *inputs: inputs[1], Statistic.MOMENTS),  # undeclared: give it what there is
    ],
)
def test_a_pruner_needs_what_its_parts_need(criterion, compensation, needed):
    assert compose(criterion, NM(2, 4), compensation).needs is needed


@pytest.mark.parametrize(("pattern", "fits"), [(NM(2, 4), False), (NM(2, 3), True), (Unstructured(0.5), True)])
def test_a_pruner_fits_what_its_pattern_fits(pattern, fits):
    assert compose(magnitude, pattern, none).fits(9) is fits


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.tensor([[3.0, -4.0], [0.0, 12.0]]), 169.0),
        (torch.full((10, 10), 300.0, dtype=torch.float16), 9e6),  # 300 ** 2 is infinite in float16
        (torch.full((2, 2), 1e30), 4e60),  # and 1e30 ** 2 in float32
    ],
)
def test_energy_is_a_wide_sum_of_squares(weight, expected):
    assert energy_sq(weight) == pytest.approx(expected)


def test_the_error_is_that_of_the_output_exactly_with_a_gram_and_by_channels_without():
    inputs, weight = torch.randn(50, 4), torch.randn(3, 4)
    keep = torch.rand(3, 4) > 0.5
    pruned = PrunedWeight(weight * keep * 1.1, keep)
    exact = error_energy(weight, pruned, InputMoments.zeros(4, needs=Statistic.GRAM).add(inputs))
    assert exact == pytest.approx(float((inputs @ (weight - pruned.weight).T).square().sum()), rel=1e-4)
    channels = torch.diag(inputs.square().sum(0).sqrt())
    alone = error_energy(weight, pruned, InputMoments.zeros(4).add(inputs))
    assert alone == pytest.approx(float((channels @ (weight * ~keep).T).square().sum()), rel=1e-5)
