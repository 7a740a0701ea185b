"""SparseGPT against a slow reference in float64 that has no factorisation, no lazy updates and no vectors of columns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import statprune
from statprune import Recipe
from statprune.errors import SiteError
from statprune.methods import sparsegpt
from statprune.methods.criteria import wanda
from statprune.methods.inverse import inverse_factor
from statprune.methods.patterns import NM, Unstructured
from statprune.methods.sparsegpt import SparseGPT
from statprune.methods.statistics import InputMoments, Statistic
from tiny_models import changed, llama, refused, snapshot, tokens

quick = settings(max_examples=30, deadline=None, derandomize=True)

PATTERNS = [Unstructured(0.5), Unstructured(0.3, "layer"), Unstructured(0.7, "layer"), NM(2, 4), NM(4, 8), NM(1, 3)]


def correlated(seed: int, num_tokens: int, in_features: int) -> Tensor:
    """Tokens whose channels are mixtures of each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(in_features, in_features, generator=generator)
    spread = 0.2 + torch.rand(in_features, generator=generator)
    return torch.randn(num_tokens, in_features, generator=generator) @ mixture * spread


def random_weight(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def moments_of(tokens: Tensor) -> InputMoments:
    return InputMoments.zeros(tokens.shape[-1], needs=Statistic.GRAM).add(tokens)


def with_gram(gram: Tensor) -> InputMoments:
    """Statistics of which only the Gram is of interest."""
    moments = InputMoments.zeros(gram.shape[-1], stack=tuple(gram.shape[:-2]), needs=Statistic.GRAM)
    moments.gram = gram
    return moments


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def error_under(hessian: Tensor, weight: Tensor, pruned: Tensor) -> float:
    """Squared error of the layer's output, summed over the tokens that the Hessian stands for."""
    difference = (weight - pruned).double()
    return float(((difference @ hessian.double()) * difference).sum())


def goes(scores: list[list[float]], pattern, start: int) -> set[tuple[int, int]]:
    """Which (row, column) of a slice of columns are pruned: the lowest scores of each group that competes."""
    width = len(scores[0])
    rows = [[(score, row, column) for column, score in enumerate(line)] for row, line in enumerate(scores)]
    if isinstance(pattern, NM):
        groups, numbers = rows, [pattern.of - pattern.keep] * len(rows)
    else:
        groups = rows if pattern.rank_over == "row" else [[one for line in rows for one in line]]
        stay = len(groups)  # one in each row, or one of all
        before, after = (
            min(math.floor(pattern.sparsity * len(rows) * columns + 1e-9), max(0, len(rows) * columns - stay))
            for columns in (start, start + width)
        )
        numbers = [sum(index % len(groups) == group for index in range(before, after)) for group in range(len(groups))]
    return {place[1:] for group, number in zip(groups, numbers, strict=True) for place in sorted(group)[:number]}


def reference(weight: Tensor, gram: Tensor, pattern, block_size: int = 128, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """(pruned weight, mask) as the paper describes it: the inverse of what is left of H, anew for every column."""
    weight, hessian = weight.double().clone(), gram.double().clone()
    is_dead = hessian.diagonal() == 0
    mean = hessian.diagonal()[~is_dead].mean()
    hessian[is_dead, is_dead] = mean
    weight[:, is_dead] = 0
    num_rows, width = weight.shape
    hessian += damping * mean * torch.eye(width, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(width)]  # of the columns not yet done
    together = pattern.of if isinstance(pattern, NM) else block_size
    keep = torch.ones(num_rows, width, dtype=torch.bool)
    for column in range(width):
        if column % together == 0:
            chosen = range(column, min(column + together, width))
            scores = [[float(weight[row, c] ** 2 / inverses[c][0, 0]) for c in chosen] for row in range(num_rows)]
            for row, place in goes(scores, pattern, column):
                keep[row, column + place] = False
        inverse = inverses[column]
        for row in range(num_rows):
            if not keep[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight, keep


@pytest.mark.parametrize("block_size", [1, 5, 12, 24, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern} {getattr(pattern, 'rank_over', '')}".strip())
def test_it_equals_a_slow_reference(pattern, block_size):
    weight, moments = random_weight(3, 7, 24), moments_of(correlated(3, 60, 24))
    expected, keep = reference(weight, moments.gram, pattern, block_size)
    pruned = SparseGPT(pattern, block_size)(weight, moments)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", [Unstructured(0.4, "layer"), NM(2, 4)], ids=str)
def test_it_equals_a_slow_reference_beyond_the_columns_that_are_updated_one_by_one(pattern, seed):
    weight, moments = random_weight(seed, 5, 44), moments_of(correlated(seed, 100, 44))
    expected, keep = reference(weight, moments.gram, pattern, 40, damping=0.1)
    pruned = SparseGPT(pattern, 40, damping=0.1)(weight, moments)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=2e-4, atol=2e-5)


def test_groups_wider_than_a_block_and_than_the_narrow_columns_are_chosen_whole():
    weight, moments = random_weight(5, 4, 40), moments_of(correlated(5, 80, 40))
    expected, keep = reference(weight, moments.gram, NM(9, 20))
    pruned = SparseGPT(NM(9, 20), block_size=4)(weight, moments)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # H = [[1, 1/2], [1/2, 1]] + 1/4 on the diagonal; H^-1 = [[20, -8], [-8, 20]] / 21, and 4/5 is the inverse of
        # what is left behind column 0. Scores w0^2 / (20/21) and w1^2 / (4/5). Where w0 goes, w1 takes over
        # 8/20 of it; where w1 goes, nothing stands to its right.
        ([1.0, 2.0], [0.0, 2.4]),
        ([3.0, 1.0], [3.0, 0.0]),
        ([-1.0, 0.95], [0.0, 0.55]),  # the smaller one stays: 1.05 < 1.128
        ([1.0, -0.9], [1.0, 0.0]),  # 1.05 > 1.0125
    ],
)
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(1, 2)], ids=str)
def test_the_optimal_brain_surgeon_on_two_weights_by_hand(weight, expected, scale, pattern):
    moments = with_gram(scale * torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    pruned = SparseGPT(pattern, damping=0.25)(torch.tensor([weight]), moments)
    torch.testing.assert_close(pruned.weight, torch.tensor([expected]), rtol=1e-6, atol=0)
    assert pruned.keep.tolist() == [[value != 0 for value in expected]]


def test_uncorrelated_channels_of_one_size_are_pruned_by_magnitude_and_nothing_moves():
    weight = random_weight(0, 3, 8)
    pruned = SparseGPT(NM(2, 4))(weight, with_gram(5 * torch.eye(8)))
    assert torch.equal(pruned.keep, NM(2, 4)(weight.abs()))
    assert torch.equal(pruned.weight, weight * pruned.keep)


def test_uncorrelated_channels_of_different_size_are_pruned_by_what_they_carry():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruned = SparseGPT(NM(2, 4))(weight, with_gram(torch.tensor([100.0, 1.0, 30.0, 1.0]).diag()))
    assert pruned.weight.tolist() == [[1, 0, 3, 0]]


def test_blocks_share_out_what_is_pruned_in_the_layer():
    # One number in eight goes: column by column none, none, and so on until the eighth makes up for all that was rounded off.
    weight = torch.ones(1, 8)
    keep = SparseGPT(Unstructured(0.125, "layer"), block_size=1)(weight, with_gram(torch.eye(8))).keep
    assert keep.tolist() == [[True] * 7 + [False]]


@quick
@given(
    st.data(),
    st.sampled_from(["normal", "ties", "zero"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.integers(1, 2), max_size=2).map(tuple),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 2**32),
)
def test_exactly_the_asked_number_is_pruned(data, kind, dtype, stack, out_features, block_size, seed):
    of = data.draw(st.integers(1, 5))
    pattern = data.draw(
        st.one_of(
            st.builds(Unstructured, st.integers(0, 999).map(lambda n: n / 1000), st.sampled_from(["row", "layer"])),
            st.integers(1, of).map(lambda keep: NM(keep, of)),
        )
    )
    in_features = of * data.draw(st.integers(1, 7))
    weight = random_weight(seed, *stack, out_features, in_features)
    weight = {"normal": weight, "ties": torch.full_like(weight, 0.3), "zero": torch.zeros_like(weight)}[kind].to(dtype)
    grams = [moments_of(correlated(seed + index, 9, in_features)).gram for index in range(math.prod(stack))]
    moments = with_gram(torch.stack(grams).view(*stack, in_features, in_features))
    before = weight.clone()
    pruned = SparseGPT(pattern, block_size)(weight, moments)
    assert torch.equal(weight, before)
    assert (pruned.weight.dtype, pruned.weight.shape, pruned.keep.shape) == (dtype, weight.shape, weight.shape)
    assert pruned.weight[~pruned.keep].count_nonzero() == 0
    assert pruned.weight.isfinite().all()
    assert pattern.holds(pruned.weight)
    dropped = ~pruned.keep
    if isinstance(pattern, NM):
        assert (dropped.unflatten(-1, (-1, of)).sum(-1) == of - pattern.keep).all()
    else:
        assert (dropped.sum((-2, -1)) == pattern.pruned_of(out_features, in_features)).all()


@pytest.mark.parametrize("pattern", PATTERNS[1:4], ids=str)
def test_a_stack_is_pruned_matrix_by_matrix(pattern):
    weights = [random_weight(seed, 4, 20) for seed in range(3)]
    moments = [moments_of(correlated(seed, 30, 20)) for seed in range(3)]
    pruner = SparseGPT(pattern, block_size=8)
    together = pruner(torch.stack(weights), with_gram(torch.stack([one.gram for one in moments])))
    for index in range(3):
        alone = pruner(weights[index], moments[index])
        assert torch.equal(together.keep[index], alone.keep)
        torch.testing.assert_close(together.weight[index], alone.weight, rtol=1e-4, atol=1e-5)


def test_the_arithmetic_is_float32_whatever_the_dtype_of_the_weight():
    weight, moments = random_weight(0, 6, 16).bfloat16(), moments_of(correlated(0, 40, 16))
    low, wide = (SparseGPT(NM(2, 4))(one, moments) for one in (weight, weight.float()))
    assert torch.equal(low.keep, wide.keep)
    assert torch.equal(low.weight, wide.weight.bfloat16())


def test_an_autocast_around_it_changes_no_number():
    weight, moments = random_weight(0, 6, 40), moments_of(correlated(0, 60, 40))
    expected = SparseGPT(NM(2, 4), block_size=20)(weight, moments)
    with torch.autocast("cpu", torch.bfloat16):
        pruned = SparseGPT(NM(2, 4), block_size=20)(weight, with_gram(moments.gram))
    assert torch.equal(pruned.weight, expected.weight)


@quick
@given(st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(0, 2**32))
def test_every_kept_weight_is_the_best_there_is_given_those_before_it(pattern, out_features, seed):
    """The error is |d R|^2 with H = R R^T, R upper triangular; a kept column's own term is 0, so only pruned ones cost."""
    weight, moments = random_weight(seed, out_features, 24), moments_of(correlated(seed, 48, 24))
    pruned = SparseGPT(pattern, block_size=8)(weight, moments)
    hessian = damped(moments.gram)
    root = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    terms = (weight - pruned.weight).double() @ root
    assert float(terms.square().sum()) == pytest.approx(error_under(hessian, weight, pruned.weight), rel=1e-6)
    scale = float((weight.double() @ root).abs().max())
    assert float(terms[pruned.keep].abs().max()) < 1e-4 * scale


@quick
@given(st.integers(1, 4), st.integers(2, 20), st.integers(0, 2**32))
def test_where_one_weight_of_a_row_goes_the_update_never_makes_the_error_larger(out_features, in_features, seed):
    weight, moments = random_weight(seed, out_features, in_features), moments_of(correlated(seed, 30, in_features))
    pruned = SparseGPT(NM(in_features - 1, in_features))(weight, moments)
    hessian = damped(moments.gram)
    updated, masked = (error_under(hessian, weight, one) for one in (pruned.weight, weight * pruned.keep))
    assert updated <= masked * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4), NM(4, 8)], ids=str)
def test_the_error_is_below_that_of_its_mask_alone_and_of_wanda(pattern, seed):
    weight, moments = random_weight(seed, 16, 48), moments_of(correlated(seed, 200, 48))
    pruned = SparseGPT(pattern, block_size=16)(weight, moments)
    of_mask = error_under(moments.gram, weight, weight * pruned.keep)
    of_wanda = error_under(moments.gram, weight, weight * pattern(wanda(weight, moments)))
    assert error_under(moments.gram, weight, pruned.weight) < min(of_mask, of_wanda)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_channels_that_are_always_0_go_first_and_those_that_must_stay_are_0(pattern):
    x = correlated(1, 50, 24)
    dead = torch.arange(24) % 4 == 1
    x[:, dead] = 0
    weight, moments = 5 * random_weight(1, 6, 24), moments_of(x)
    expected, keep = reference(weight, moments.gram, pattern, 8)
    pruned = SparseGPT(pattern, block_size=8)(weight, moments)
    assert pruned.weight[:, dead].count_nonzero() == 0
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=2e-4, atol=2e-5)
    assert torch.equal(pruned.keep[:, ~dead], keep[:, ~dead])
    # At least as many places as there are dead channels are pruned here, and no living weight goes before a dead one.
    living_goes = ~pruned.keep[:, ~dead]
    assert not (pruned.keep[:, dead].all() and living_goes.any())


def test_what_stands_beside_a_channel_that_is_always_0_is_as_it_would_be_without_it():
    x, weight = correlated(2, 50, 6), random_weight(2, 4, 6)
    wide_x, wide_weight = torch.zeros(50, 8), torch.randn(4, 8)
    living = torch.tensor([0, 2, 3, 4, 6, 7])
    wide_x[:, living], wide_weight[:, living] = x, weight
    keep_all = SparseGPT(Unstructured(0.25))(wide_weight, moments_of(wide_x))  # two of eight: the two dead ones
    torch.testing.assert_close(keep_all.weight[:, living], weight, rtol=0, atol=0)
    assert keep_all.weight.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)], ids=str)
def test_all_channels_always_0(pattern):
    pruned = SparseGPT(pattern)(random_weight(0, 4, 8), moments_of(torch.zeros(5, 8)))
    assert pruned.weight.count_nonzero() == 0
    assert int(pruned.keep.sum()) == 16


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 24, generator=torch.Generator().manual_seed(0)),  # fewer tokens than channels
        torch.ones(40, 24),  # H of rank 1
        torch.cat([torch.full((40, 12), 7.0), correlated(0, 40, 12)], dim=1),  # half of the channels constant
        correlated(0, 1, 24),
        correlated(0, 50, 24) * torch.where(torch.arange(24) == 5, 1e6, 1.0),
        correlated(0, 50, 24) * torch.where(torch.arange(24) == 5, 1e-6, 1.0),
        correlated(0, 50, 24)[:, :1].expand(50, 24),  # 24 times the same channel
    ],
    ids=["few tokens", "all ones", "half constant", "one token", "one huge", "one tiny", "one channel"],
)
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), NM(2, 4)], ids=str)
def test_awkward_inputs_have_finite_results_that_are_no_worse_than_the_mask_alone(x, pattern):
    weight, moments = random_weight(0, 6, 24), moments_of(x)
    pruned = SparseGPT(pattern, block_size=8)(weight, moments)
    assert pruned.weight.isfinite().all()
    assert pattern.holds(pruned.weight)
    hessian = damped(moments.gram)
    assert error_under(hessian, weight, pruned.weight) <= error_under(hessian, weight, weight * pruned.keep)


def test_a_huge_channel_keeps_its_weights():
    x = correlated(0, 50, 8) * torch.where(torch.arange(8) == 5, 1e6, 1.0)
    assert SparseGPT(NM(2, 4))(random_weight(0, 6, 8), moments_of(x)).keep[:, 5].all()


@pytest.mark.parametrize(("scale", "tolerance"), [(1024.0, 0.0), (2.0**-10, 0.0), (1e3, 1e-4), (1e-3, 1e-4), (1e15, 1e-4)])
def test_the_scale_of_the_inputs_changes_nothing(scale, tolerance):
    weight, x = random_weight(7, 6, 16), correlated(7, 40, 16)
    one, other = (SparseGPT(NM(2, 4), block_size=8)(weight, moments_of(inputs)) for inputs in (x, scale * x))
    assert torch.equal(one.keep, other.keep)
    torch.testing.assert_close(one.weight, other.weight, rtol=tolerance, atol=tolerance / 10)


def test_a_gram_whose_diagonal_sums_up_beyond_float32_is_factorised_as_any_other():
    gram = moments_of(correlated(0, 40, 8)).gram
    gram = gram / gram.diagonal().mean()
    assert (gram * 5e37).isfinite().all()
    assert (gram * 5e37).diagonal().sum().isinf()
    factor = inverse_factor(gram * 5e37, 0.01)
    torch.testing.assert_close(factor, inverse_factor(gram, 0.01), rtol=1e-4, atol=1e-4)


# --- the factor ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch):
    """The dtypes in which a factorisation was tried, in order."""
    tried, cholesky_ex = [], torch.linalg.cholesky_ex

    def recorded(matrix, *args, **kwargs):
        tried.append(matrix.dtype)
        return cholesky_ex(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", recorded)
    return tried


def assert_is_factor_of(factor: Tensor, hessian: Tensor, rtol: float = 1e-4) -> None:
    """U is upper triangular, its diagonal positive, and U H' U^T = 1 in the order that makes it the inverse's factor."""
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    expected = torch.linalg.inv(hessian.double())
    torch.testing.assert_close(
        factor.double().mT @ factor.double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max())
    )


def test_the_factor_is_that_of_the_damped_inverse(stages):
    gram = moments_of(correlated(0, 40, 12)).gram
    factor = inverse_factor(gram, 0.03)
    assert_is_factor_of(factor, damped(gram, 0.03) / gram.double().diagonal().mean())
    assert stages == [torch.float64]


@pytest.mark.parametrize(
    ("off_diagonal", "damping", "tries"),
    [
        (0.9, 0.01, 1),
        (1.05, 0.1, 2),  # eigenvalues 2.05 and -0.05
        (1.5, 1.0, 3),  # 2.5 and -0.5
    ],
)
def test_more_damping_is_tried_until_a_factorisation_exists(stages, off_diagonal, damping, tries):
    gram = torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]])
    factor = inverse_factor(7 * gram, 0.01)
    assert_is_factor_of(factor, gram + damping * torch.eye(2))
    assert stages == [torch.float64] * tries


def test_what_float32_cannot_tell_from_singular_is_factorised():
    factor = inverse_factor(torch.ones(2, 2), 1e-10)
    assert_is_factor_of(factor, torch.ones(2, 2, dtype=torch.float64) + 1e-10 * torch.eye(2, dtype=torch.float64), rtol=1e-3)


def test_one_matrix_of_a_stack_that_needs_more_damping_does_not_spoil_the_others():
    grams = torch.stack([torch.eye(2), torch.tensor([[1.0, 1.05], [1.05, 1.0]])])
    factor = inverse_factor(grams, 0.01)
    assert_is_factor_of(factor[1], grams[1] + 0.1 * torch.eye(2))
    assert factor.isfinite().all()


@pytest.mark.parametrize(
    "gram", [torch.tensor([[1.0, 3.0], [3.0, 1.0]]), torch.full((3, 3), torch.nan), torch.full((3, 3), torch.inf)]
)
def test_a_gram_that_is_beyond_help_is_refused_with_what_can_be_done(stages, gram):
    with pytest.raises(ValueError, match=r"cannot be factorised, with damping 0\.01 to 1 .*sparsegpt:damping=10.*`ignore`"):
        SparseGPT(Unstructured(0.5))(torch.ones(2, len(gram)), with_gram(gram))
    assert stages == [torch.float64] * 3


def test_a_factor_beyond_float32_is_none():
    # The second channel is nothing beside the first: its entry of the inverse is 1 / 1e-90, at most 1 / 1e-88.
    with pytest.raises(ValueError, match="cannot be factorised"):
        inverse_factor(torch.diag(torch.tensor([1e30, 1e-30])), 1e-90)


def test_the_factor_is_made_anew_for_each_damping():
    weight, moments = torch.randn(4, 8), moments_of(correlated(0, 40, 8))
    for damping in (0.01, 1.0):
        expected = SparseGPT(NM(2, 4), damping=damping)(weight, with_gram(moments.gram))
        assert torch.equal(SparseGPT(NM(2, 4), damping=damping)(weight, moments).weight, expected.weight)


def test_the_defaults_are_the_authors():
    assert SparseGPT(NM(2, 4)) == SparseGPT(NM(2, 4), block_size=128, damping=0.01)


@pytest.mark.parametrize("moments", [None, InputMoments.zeros(4).add(torch.ones(3, 4))], ids=["nothing", "no Gram"])
def test_without_a_gram_it_says_what_it_needs(moments):
    with pytest.raises(ValueError, match=r"expected moments with a Gram, InputMoments.zeros\(..., gram=True\)"):
        SparseGPT(NM(2, 4))(torch.ones(2, 4), moments)
    assert SparseGPT(NM(2, 4)).needs is Statistic.GRAM


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, r"sparsegpt\(block_size=0\): expected a whole number from 1 to 65,536"),
        ({"damping": 0.0}, r"sparsegpt\(damping=0.0\): expected a number from 1e-30 to 100"),
        ({"damping": float("nan")}, r"sparsegpt\(damping=nan\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseGPT(NM(2, 4), **settings)


@pytest.mark.parametrize(("pattern", "fits"), [(NM(2, 4), False), (NM(1, 3), True), (Unstructured(0.5), True)], ids=str)
def test_it_fits_what_its_pattern_fits(pattern, fits):
    assert SparseGPT(pattern).fits(9) is fits


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def factorised(monkeypatch):
    """How many channels each matrix had that was factorised; recipes are to be made before, they try themselves out."""
    sizes = []

    def counted(gram, damping, team):
        sizes.append(gram.shape[-1])
        return inverse_factor(gram, damping, team)

    monkeypatch.setattr(sparsegpt, "inverse_factor", counted)
    return sizes


RECIPE = Recipe("sparsegpt", pattern="2:4")
GROUPS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def test_layers_that_share_their_inputs_share_the_factor(factorised):
    report = statprune.prune(llama(), [tokens(4, 8)], RECIPE)
    assert len(report.sites) == 14
    assert factorised == [16, 16, 16, 24] * 2  # q k v, o, gate and up, down


def test_a_model_is_pruned_with_the_gram_of_its_inputs():
    model, batches = llama(num_hidden_layers=1), [tokens(4, 8), tokens(4, 8)]
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for batch in batches:
        model(batch)
    handle.remove()
    x = torch.cat([part.detach().flatten(0, -2) for part in seen])
    recipe = Recipe("sparsegpt", pattern="2:4", schedule="one-shot")
    expected = SparseGPT(NM(2, 4))(model.model.layers[0].mlp.down_proj.weight.detach(), moments_of(x))
    statprune.prune(model, batches, recipe)
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight.detach(), expected.weight, rtol=1e-4, atol=1e-5)


def hopeless(monkeypatch, after: int) -> None:
    """From the call of this number on, no matrix can be factorised."""
    calls = []

    def fail(gram, damping, team):
        calls.append(gram)
        return inverse_factor(gram if len(calls) <= after else gram * torch.nan, damping, team)

    monkeypatch.setattr(sparsegpt, "inverse_factor", fail)


def test_a_layer_that_cannot_be_factorised_is_named_and_nothing_was_changed(monkeypatch):
    model = llama()
    hopeless(monkeypatch, after=0)
    with refused(model, SiteError, r"model\.layers\.0\.self_attn\.q_proj: the Gram .*Nothing was changed\."):
        statprune.prune(model, [tokens(4, 8)], RECIPE)


def test_a_later_layer_that_cannot_be_factorised_says_what_was_pruned_before_it(monkeypatch):
    model = llama()
    before = snapshot(model)
    hopeless(monkeypatch, after=2)
    with pytest.raises(SiteError, match=r"model\.layers\.0\.mlp\.gate_proj: .* Pruned already: 4 weights before it. Reload"):
        statprune.prune(model, [tokens(4, 8)], RECIPE)
    done = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert changed(model, before) == done


def test_a_twin_of_a_model_with_such_a_layer_is_refused_with_nothing_changed(monkeypatch):
    model = llama()
    hopeless(monkeypatch, after=2)
    with refused(model, SiteError, r"model\.layers\.0\.mlp\.gate_proj: .*Nothing was changed\."):
        statprune.plan(model, [tokens(4, 8)], RECIPE)
