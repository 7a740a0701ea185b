from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods.compensations import COMPENSATIONS, activation_energy, energy, none
from statprune.methods.least_squares import LeastSquares
from statprune.methods.loss_aware import LossAware
from statprune.methods.statistics import InputMoments, Statistic

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_CLAMP = (1e-30, 1e30)
CORRECT = {**COMPENSATIONS, "least-squares": LeastSquares(), "loss-aware": LossAware()}
"""By name, functions of (original, pruned, keep, moments)."""

quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
sizes = st.integers(1, 8)
stacks = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def random_weight(seed, *shape, kept=0.5, dtype=torch.float32):
    """A weight whose columns have means of their own, what is left of it, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    original = (torch.randn(shape, generator=generator) + torch.randn(shape[-1], generator=generator)).to(dtype)
    keep = torch.rand(shape, generator=generator) < kept
    return original, original.masked_fill(~keep, 0), keep


def moments_of(seed, out_features, in_features, *stack):
    """Of random tokens, channels of several sizes, with the Gram, and with that of the gradients at the output."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(*stack, 30, in_features, generator=generator) * (0.1 + torch.rand(in_features, generator=generator))
    moments = InputMoments(
        torch.full(stack, 30), tokens.double().sum(-2), tokens.double().square().sum(-2), (tokens.mT @ tokens).float()
    )
    gradients = torch.randn(*stack, 30, out_features, generator=generator)
    return moments.with_output_gram(gradients.mT @ gradients / 30)


def reference_energy(original, keep, *, column=True, row=True, eps=1e-8, clamp=(0.5, 2.0), strength=1.0):
    """Section 3.2 in plain loops: columns first, then rows; the mask after each."""
    num_rows, num_columns = len(original), len(original[0])
    columns = [[(i, j) for i in range(num_rows)] for j in range(num_columns)]
    rows = [[(i, j) for j in range(num_columns)] for i in range(num_rows)]
    corrected = [[w if k else 0.0 for w, k in zip(ws, ks, strict=True)] for ws, ks in zip(original, keep, strict=True)]
    for line in (columns if column else []) + (rows if row else []):
        mean = sum(original[i][j] for i, j in line) / len(line)
        energy_original = sum((original[i][j] - mean) ** 2 for i, j in line)
        energy_pruned = sum((corrected[i][j] - mean) ** 2 for i, j in line)
        scale = min(max(sqrt(energy_original / (energy_pruned + eps)), clamp[0]), clamp[1]) ** strength
        for i, j in line:
            corrected[i][j] = (corrected[i][j] - mean) * scale + mean if keep[i][j] else 0.0
    return corrected


def corrected_by_hand(original, keep, **settings):
    original, keep = torch.tensor(original), torch.tensor(keep, dtype=torch.bool)
    return energy(original, original.masked_fill(~keep, 0), keep, **settings)


def assert_equals(corrected, expected):
    torch.testing.assert_close(corrected, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def test_column_step_by_hand():
    # mu = (1 + 1 + 1 + 5) / 4 = 2 (7/4 after pruning); E_original = 1 + 1 + 1 + 9 = 12.
    # E_pruned of 0, 1, 1, 5 = 4 + 1 + 1 + 9 = 15 (11 without the zero); s = sqrt(12 / (15 + 12)) = 2/3.
    # Kept: 2 - 2/3 and 2 + 3 * 2/3. Pruned: 0, where a forgotten mask would leave 2 - 2 * 2/3 = 2/3.
    original, keep = [[1.0], [1.0], [1.0], [5.0]], [[0], [1], [1], [1]]
    assert_equals(corrected_by_hand(original, keep, row=False, eps=12.0), [[0], [4 / 3], [4 / 3], [4]])


def test_row_step_by_hand():
    # First the column of the test above as a row. Then 5, 5, 5, 1: mu = 4, E_original = 1 + 1 + 1 + 9 = 12,
    # E_pruned of 5, 5, 5, 0 = 1 + 1 + 1 + 16 = 19, s = sqrt(12 / (19 + 12)).
    original, keep = [[1.0, 1.0, 1.0, 5.0], [5.0, 5.0, 5.0, 1.0]], [[0, 1, 1, 1], [1, 1, 1, 0]]
    second = 4 + sqrt(12 / 31)
    assert_equals(
        corrected_by_hand(original, keep, column=False, eps=12.0), [[0, 4 / 3, 4 / 3, 4], [second, second, second, 0]]
    )


def test_column_then_row_by_hand():
    # eps = 3. Columns: both of the first two have mu = 2, E_original = 1 + 1 = 2, E_pruned = 4 + 1 = 5,
    # s = sqrt(2 / (5 + 3)) = 1/2, so their 3 becomes 2 + 1/2. The third is constant: its 5 stays 5.
    # Rows, with what the columns left: mu = 3 and E_original = 4 + 0 + 4 = 8 in both.
    #   0, 5/2, 5: E = 9 + 1/4 + 4 = 53/4, s = sqrt(8 / (53/4 + 3)) = sqrt(32/65)
    #   5/2, 0, 0: E = 1/4 + 9 + 9 = 73/4, s = sqrt(8 / (73/4 + 3)) = sqrt(32/85)
    original, keep = [[1.0, 3.0, 5.0], [3.0, 1.0, 5.0]], [[0, 1, 1], [1, 0, 0]]
    first, second = sqrt(32 / 65), sqrt(32 / 85)
    expected = [[0, 3 - first / 2, 3 + 2 * first], [3 - second / 2, 0, 0]]
    assert_equals(corrected_by_hand(original, keep, eps=3.0), expected)


def test_the_row_step_follows_the_column_step_by_hand():
    # With s held at 2, a kept w becomes 2w - mu in each step: 2 (2w - mu_column) - mu_row = 4w - 2 mu_column - mu_row.
    # Rows first would give 4w - 2 mu_row - mu_column. Column means 2, 5; row means 5/2, 9/2.
    corrected = corrected_by_hand([[1.0, 4.0], [3.0, 6.0]], [[1, 1], [0, 1]], clamp=(2.0, 2.0))
    assert_equals(corrected, [[4 - 4 - 2.5, 16 - 10 - 2.5], [0, 24 - 10 - 4.5]])


@pytest.mark.parametrize(
    ("column", "keep", "settings", "expected"),
    [
        # mu = 0, s = sqrt((200 + 2) / 2) = 10.05
        ([10.0, -10.0, 1.0, -1.0], [0, 0, 1, 1], {}, [0, 0, 2, -2]),
        ([10.0, -10.0, 1.0, -1.0], [0, 0, 1, 1], {"clamp": [0.5, 3.0]}, [0, 0, 3, -3]),
        # The clamp comes before the strength; the other way round, 10.05 ** 0.5 = 3.17 would be clamped to 2.
        ([10.0, -10.0, 1.0, -1.0], [0, 0, 1, 1], {"strength": 0.5}, [0, 0, sqrt(2), -sqrt(2)]),
        # mu = 10, s = sqrt(2 / (100 + 1)) = 0.14: 10 + 1 * s
        ([9.0, 11.0], [0, 1], {}, [0, 10.5]),
        ([9.0, 11.0], [0, 1], {"clamp": [0.25, 2.0]}, [0, 10.25]),
        ([9.0, 11.0], [0, 1], {"clamp": NO_CLAMP}, [0, 10 + sqrt(2 / 101)]),
    ],
)
def test_the_scale_is_clamped_by_hand(column, keep, settings, expected):
    corrected = corrected_by_hand([[w] for w in column], [[k] for k in keep], row=False, **settings)
    assert_equals(corrected, [[w] for w in expected])


@quick
@given(
    sizes,
    sizes,
    st.fixed_dictionaries(
        {
            "column": st.booleans(),
            "row": st.booleans(),
            "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
            "clamp": st.sampled_from([(0.5, 2.0), (0.9, 1.1), (1e-3, 1e3)]),
            "strength": st.sampled_from([0.0, 0.3, 1.0]),
        }
    ),
    seeds,
)
def test_energy_equals_a_plain_reference(out_features, in_features, settings, seed):
    original, pruned, keep = random_weight(seed, out_features, in_features)
    expected = torch.tensor(reference_energy(original.tolist(), keep.tolist(), **settings))
    torch.testing.assert_close(energy(original, pruned, keep, **settings), expected, rtol=1e-3, atol=1e-4)


@quick
@given(
    st.sampled_from(sorted(COMPENSATIONS)),
    stacks,
    sizes,
    sizes,
    st.sampled_from([0.0, 0.2, 0.6]),
    st.sampled_from(FLOAT_DTYPES),
    seeds,
)
def test_pruned_weights_are_never_revived(name, stack, out_features, in_features, kept, dtype, seed):
    original, pruned, keep = random_weight(seed, *stack, out_features, in_features, kept=kept, dtype=dtype)
    corrected = CORRECT[name](original, pruned, keep, moments_of(seed, out_features, in_features, *stack))
    assert (corrected.shape, corrected.dtype) == (original.shape, torch.float32)
    assert corrected[~keep].count_nonzero() == 0
    assert corrected.isfinite().all()


@quick
@given(sizes, sizes, seeds)
def test_strength_zero_is_the_identity(out_features, in_features, seed):
    original, pruned, keep = random_weight(seed, out_features, in_features)
    torch.testing.assert_close(energy(original, pruned, keep, strength=0.0), pruned, rtol=1e-5, atol=1e-6)


@quick
@given(st.integers(2, 8), sizes, seeds)
def test_the_column_step_restores_the_energy_of_centred_columns(out_features, in_features, seed):
    half, _, _ = random_weight(seed, out_features, in_features)
    original = torch.cat([half, -half])  # mean 0, so that pruned places hold no energy
    keep = torch.rand(original.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    keep[0] = True
    corrected = energy(original, original.masked_fill(~keep, 0), keep, row=False, clamp=NO_CLAMP, eps=1e-30)
    torch.testing.assert_close(corrected.square().sum(0), original.square().sum(0), rtol=1e-5, atol=0)


@quick
@given(st.integers(2, 8), sizes, seeds)
def test_the_column_step_scales_kept_weights_by_the_lost_energy(out_features, in_features, seed):
    original, pruned, keep = random_weight(seed, out_features, in_features)
    mean = original.mean(0)
    corrected = energy(original, pruned, keep, row=False, clamp=NO_CLAMP, eps=1e-30)
    energy_original, energy_pruned = (original - mean).square().sum(0), (pruned - mean).square().sum(0)
    after, before = (corrected - mean).square() * energy_pruned, (pruned - mean).square() * energy_original
    torch.testing.assert_close(after[keep], before[keep], rtol=1e-3, atol=1e-3)


@quick
@given(sizes, sizes, seeds)
def test_the_row_step_is_the_column_step_of_the_transpose(out_features, in_features, seed):
    original, pruned, keep = random_weight(seed, out_features, in_features)
    by_rows = energy(original, pruned, keep, column=False)
    by_columns = energy(original.t(), pruned.t(), keep.t(), row=False)
    torch.testing.assert_close(by_rows, by_columns.t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_neither_step_leaves_the_pruned_weight(dtype):
    original, pruned, keep = random_weight(0, 5, 6, dtype=dtype)
    assert torch.equal(energy(original, pruned, keep, column=False, row=False), pruned.float())
    assert torch.equal(none(original, pruned, keep), pruned.float())


def test_where_nothing_is_pruned_nothing_changes():
    original, pruned, keep = random_weight(0, 5, 6, kept=1.1)
    torch.testing.assert_close(energy(original, pruned, keep), original, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clamp", [(0.5, 2.0), NO_CLAMP])
def test_an_all_zero_weight_stays_zero(clamp):
    zero = torch.zeros(4, 6)
    keep = torch.arange(24).reshape(4, 6) % 2 == 0
    assert torch.equal(energy(zero, zero, keep, clamp=clamp), zero)


@pytest.mark.parametrize("keep", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("constant", [0.0, 0.1, -7.0])
def test_what_is_kept_of_a_constant_column_stays(constant, keep):
    corrected = corrected_by_hand([[constant]] * 4, [[k] for k in keep], row=False)
    assert_equals(corrected, [[constant * k] for k in keep])


@pytest.mark.parametrize("settings", [{}, {"clamp": NO_CLAMP}])
def test_emptied_columns_and_rows_are_finite(settings):
    original, _, keep = random_weight(0, 4, 6)
    original = original - original.mean()
    keep[:, 2] = False
    keep[1] = False
    corrected = energy(original, original.masked_fill(~keep, 0), keep, **settings)
    assert corrected.isfinite().all()
    assert corrected[~keep].count_nonzero() == 0


def test_a_stack_is_corrected_matrix_by_matrix():
    original, pruned, keep = random_weight(0, 2, 3, 5, 6)
    together = energy(original, pruned, keep).flatten(0, 1)
    for index, parts in enumerate(zip(original.flatten(0, 1), pruned.flatten(0, 1), keep.flatten(0, 1), strict=True)):
        torch.testing.assert_close(together[index], energy(*parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMPENSATIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_compensating_does_not_change_its_inputs(name, dtype):
    inputs = random_weight(0, 5, 6, dtype=dtype)
    before = [tensor.clone() for tensor in inputs]
    CORRECT[name](*inputs, moments_of(0, 5, 6))
    assert all(torch.equal(tensor, old) for tensor, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, r"energy\(eps=0.0\): expected a number from 1e-30 to 1,000"),
        ({"clamp": (2.0, 0.5)}, r"energy\(clamp=\[2.0, 0.5\]\): expected \[low, high\] with low <= high"),
        ({"clamp": [0.0, 2.0]}, r"energy\(clamp=\[0.0, 2.0\]\)"),
        ({"strength": 1.1}, r"energy\(strength=1.1\): expected a number from 0 to 1"),
        ({"strength": -0.1}, r"energy\(strength=-0.1\)"),
        ({"strength": float("nan")}, r"energy\(strength=nan\)"),
    ],
)
def test_energy_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        energy(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), **settings)


def test_what_each_compensation_needs():
    assert CORRECT.keys() == COMPENSATIONS.keys()
    functions = {"none": none, "energy": energy, "activation-energy": activation_energy}
    assert {name: COMPENSATIONS[name] for name in functions} == functions
    assert (none.needs, energy.needs, activation_energy.needs) == (Statistic.NONE, Statistic.NONE, Statistic.MOMENTS)


# --- activation-weighted ---------------------------------------------------------------------------------------------


def with_second_moments(*second_moments):
    sum_sq = torch.tensor(second_moments, dtype=torch.float64)
    return InputMoments(torch.tensor(1), torch.zeros_like(sum_sq), sum_sq)


def test_the_row_step_weighs_channels_by_their_second_moment_by_hand():
    # E[x^2] = 3, 1, 0; divided by their mean 4/3: a = 9/4, 3/4, 0. Row 1, 5, 7: mu = (9/4 + 15/4) / 3 = 2,
    # E_original = 9/4 * 1 + 3/4 * 9 = 9. Without the 5: E_pruned = 9/4 + 3/4 * 4 = 21/4. The 7 has no say, and moves as well.
    original, keep = torch.tensor([[1.0, 5.0, 7.0]]), torch.tensor([[True, False, True]])
    corrected = activation_energy(original, original * keep, keep, with_second_moments(3, 1, 0), column=False)
    scale = sqrt(9 / 5.25)
    assert_equals(corrected, [[2 - scale, 0, 2 + 5 * scale]])


@quick
@given(sizes, sizes, st.booleans(), st.booleans(), seeds)
def test_where_all_channels_have_one_second_moment_it_is_energy(out_features, in_features, column, row, seed):
    original, pruned, keep = random_weight(seed, out_features, in_features)
    settings = {"column": column, "row": row, "strength": 0.7}
    weighted = activation_energy(original, pruned, keep, with_second_moments(*[2.5] * in_features), **settings)
    torch.testing.assert_close(weighted, energy(original, pruned, keep, **settings), rtol=1e-4, atol=1e-5)


def test_its_column_step_is_that_of_energy():
    original, pruned, keep = random_weight(0, 5, 6)
    weighted = activation_energy(original, pruned, keep, moments_of(0, 5, 6), row=False)
    assert torch.equal(weighted, energy(original, pruned, keep, row=False))


@pytest.mark.parametrize("second_moments", [[0.0] * 6, [0.0] * 5 + [1.0], [1e-30] * 6, [1e30, *[1e-30] * 5]])
def test_channels_that_were_always_zero_leave_it_finite(second_moments):
    original, pruned, keep = random_weight(0, 5, 6)
    corrected = activation_energy(original, pruned, keep, with_second_moments(*second_moments))
    assert corrected.isfinite().all()
    assert corrected[~keep].count_nonzero() == 0


@pytest.mark.parametrize("settings", [{"eps": 0.0}, {"clamp": (2.0, 0.5)}, {"strength": 1.1}])
def test_activation_energy_refuses_what_energy_refuses(settings):
    with pytest.raises(ValueError, match=r"energy\("):
        activation_energy(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2).bool(), moments_of(0, 2, 2), **settings)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_inputs_changes_nothing(scale):
    original, pruned, keep = random_weight(0, 5, 6)
    second_moments = torch.rand(6, generator=torch.Generator().manual_seed(0)).tolist()
    expected = activation_energy(original, pruned, keep, with_second_moments(*second_moments))
    scaled = with_second_moments(*(scale * one for one in second_moments))
    torch.testing.assert_close(activation_energy(original, pruned, keep, scaled), expected)


def test_a_stack_is_weighted_matrix_by_matrix():
    original, pruned, keep = random_weight(0, 2, 5, 6)
    sums = [moments_of(seed, 4, 6).sum_sq * 10.0 ** (12 * seed) for seed in range(2)]
    stacked = InputMoments(torch.tensor([30, 30]), torch.zeros(2, 6), torch.stack(sums))
    together = activation_energy(original, pruned, keep, stacked)
    for index, sum_sq in enumerate(sums):
        alone = InputMoments(torch.tensor(30), torch.zeros(6), sum_sq)
        torch.testing.assert_close(together[index], activation_energy(original[index], pruned[index], keep[index], alone))


def test_a_mean_of_the_inputs_counts():
    # E[x^2] = 1 + 3 and 0 + 4: alike, though the variances are not.
    original, pruned, keep = random_weight(0, 5, 2)
    moments = InputMoments.zeros(2).add(torch.tensor([[1.0 + 3**0.5, 2.0], [1.0 - 3**0.5, 2.0]]))
    torch.testing.assert_close(activation_energy(original, pruned, keep, moments), energy(original, pruned, keep))
