"""Least squares on the support: against the exact solution row by row, and where the Gram is no help."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statprune import Recipe, prune
from statprune.errors import NonFiniteError
from statprune.methods.criteria import CRITERIA, wanda
from statprune.methods.gradual import GradualMask, least_squares
from statprune.methods.least_squares import LeastSquares
from statprune.methods.patterns import NM, Pattern, Unstructured
from statprune.methods.pruner import MaskPruner
from statprune.methods.statistics import InputMoments, Statistic
from tiny_models import classifier, llama, tokens

EXACT = LeastSquares(iterations=500, tolerance=0.0, damping=0.0)
PATTERNS = [NM(2, 4), NM(1, 4), Unstructured(0.5), Unstructured(0.9), Unstructured(0.5, rank_over="layer")]

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)


def correlated(seed: int, num_tokens: int, in_features: int, *stack: int) -> Tensor:
    """Tokens [..., tokens, in] with a mean, and with channels that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(*stack, in_features, in_features, generator=generator) / in_features**0.5
    tokens = torch.randn(*stack, num_tokens, in_features, generator=generator) @ mixing
    return tokens + 0.3 * torch.randn(*stack, 1, in_features, generator=generator)


def moments_of(tokens: Tensor) -> InputMoments:
    return InputMoments.zeros(tokens.shape[-1], needs=Statistic.GRAM).add(tokens)


def layer(seed: int, out_features: int, in_features: int, num_tokens: int = 200, sparsity: float = 0.5):
    """A weight, what is left of it, the mask and the statistics of its inputs."""
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(out_features, in_features, generator=generator)
    moments = moments_of(correlated(seed, num_tokens, in_features))
    keep = Unstructured(sparsity)(wanda(weight, moments))
    return weight, weight.masked_fill(~keep, 0.0), keep, moments


def error(weight: Tensor, other: Tensor, moments: InputMoments) -> Tensor:
    """(w' - w) H (w' - w)^T for each row, float64."""
    assert moments.gram is not None
    difference = (other - weight).double()
    return ((difference @ moments.gram.double()) * difference).sum(dim=-1)


def solved_row_by_row(weight: Tensor, keep: Tensor, gram: Tensor) -> Tensor:
    solution = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        kept = keep[row].nonzero()[:, 0]
        right = weight[row].double() @ gram.double()
        solution[row, kept] = torch.linalg.solve(gram.double()[kept][:, kept], right[kept])
    return solution


def test_two_channels_by_hand():
    # H = [[4, 2], [2, 1.5]]: the first weight takes over 2/4 of the second's 3, and the second 2/1.5 of the first's 1.
    moments = InputMoments.zeros(2, needs=Statistic.GRAM).add(torch.tensor([[2.0, 1.0], [0.0, 0.5**0.5]]))
    weight = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    keep = torch.tensor([[True, False], [False, True]])
    corrected = EXACT(weight, weight * keep, keep, moments)
    torch.testing.assert_close(corrected, torch.tensor([[2.5, 0.0], [0.0, 3 + 4 / 3]]))


def test_damping_by_hand():
    # The diagonal entry 4 counts as 5: the first weight takes over 2/5 of the second's 3.
    moments = InputMoments.zeros(2, needs=Statistic.GRAM).add(torch.tensor([[2.0, 1.0]]))
    weight, keep = torch.tensor([[1.0, 3.0]]), torch.tensor([[True, False]])
    corrected = LeastSquares(tolerance=0.0, damping=0.25)(weight, weight * keep, keep, moments)
    torch.testing.assert_close(corrected, torch.tensor([[2.2, 0.0]]))


@quick
@given(seeds, st.integers(1, 6), st.integers(2, 24), st.floats(0.1, 0.9))
def test_it_is_the_exact_solution_of_each_row(seed, out_features, in_features, sparsity):
    weight, pruned, keep, moments = layer(seed, out_features, in_features, sparsity=sparsity)
    corrected = EXACT(weight, pruned, keep, moments)
    exact = solved_row_by_row(weight, keep, moments.gram)
    excess = error(weight, corrected, moments) - error(weight, exact, moments)
    assert (excess <= 1e-4 * error(weight, pruned, moments) + 1e-6).all()
    assert corrected[~keep].count_nonzero() == 0


@quick
@given(
    seeds, st.integers(1, 6), st.integers(2, 24), st.integers(1, 60), st.floats(0.0, 0.95), st.integers(1, 30), st.floats(0, 1)
)
def test_the_error_is_never_above_the_masked_one(seed, out_features, in_features, num_tokens, sparsity, iterations, damping):
    weight, pruned, keep, moments = layer(seed, out_features, in_features, num_tokens, sparsity)
    corrected = LeastSquares(iterations=iterations, damping=damping)(weight, pruned, keep, moments)
    masked = error(weight, pruned, moments)
    assert corrected.isfinite().all()
    assert corrected[~keep].count_nonzero() == 0
    assert (error(weight, corrected, moments) <= masked * (1 + 1e-5) + 1e-9 * error(weight, 0 * weight, moments)).all()


def test_the_defaults_are_within_a_percent_of_the_optimum():
    weight, pruned, keep, moments = layer(0, 64, 96, 2000)
    exact = float(error(weight, solved_row_by_row(weight, keep, moments.gram), moments).sum())
    masked = float(error(weight, pruned, moments).sum())
    corrected = float(error(weight, LeastSquares(damping=0.0)(weight, pruned, keep, moments), moments).sum())
    assert exact < 0.6 * masked
    assert exact <= corrected < exact + 0.01 * (masked - exact)


@pytest.mark.parametrize("compensation", [EXACT, LeastSquares()])
def test_a_row_that_keeps_everything_is_left_as_it_is(compensation):
    weight, _, _, moments = layer(0, 3, 8)
    torch.testing.assert_close(compensation(weight, weight, torch.ones(3, 8, dtype=torch.bool), moments), weight)


def test_a_row_that_keeps_one_weight_or_none():
    weight, _, _, moments = layer(1, 2, 8)
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[0, 3] = True
    corrected = EXACT(weight, weight * keep, keep, moments)
    gram = moments.gram
    torch.testing.assert_close(corrected[0, 3], (weight[0] @ gram[:, 3]) / gram[3, 3])
    assert corrected.count_nonzero() == 1


def test_dead_and_constant_channels():
    tokens = correlated(2, 50, 8)
    tokens[:, 2], tokens[:, 5] = 0.0, 3.0
    moments = moments_of(tokens)
    weight, keep = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4, 8, dtype=torch.bool)
    keep[:, [0, 3, 6]] = False
    corrected = EXACT(weight, weight * keep, keep, moments)
    assert corrected.isfinite().all()
    assert torch.equal(corrected[:, 2], weight[:, 2])  # nothing is known of it, so nothing is changed
    assert (error(weight, corrected, moments) < error(weight, weight * keep, moments)).all()


def test_channels_that_are_the_same_twice_make_a_singular_gram():
    tokens = correlated(3, 50, 4)
    moments = moments_of(torch.cat([tokens, tokens], dim=-1))
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([True] * 4 + [False] * 4).expand(5, 8)
    corrected = EXACT(weight, weight * keep, keep, moments)
    torch.testing.assert_close(corrected[:, :4], weight[:, :4] + weight[:, 4:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_inputs_changes_nothing(scale):
    weight, pruned, keep, _ = layer(4, 6, 16)
    tokens = correlated(4, 100, 16)
    one, other = (LeastSquares()(weight, pruned, keep, moments_of(inputs)) for inputs in (tokens, scale * tokens))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_no_tokens_at_all_change_nothing():
    weight, pruned, keep, _ = layer(5, 3, 8)
    assert torch.equal(LeastSquares()(weight, pruned, keep, InputMoments.zeros(8, needs=Statistic.GRAM)), pruned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_half_precision_is_finite_and_exactly_masked(dtype, pattern, steps):
    weight, _, _, moments = layer(6, 8, 16)
    pruned = least_squares(MaskPruner(wanda, pattern), steps=steps)(weight.to(dtype), moments)
    assert pruned.weight.dtype == dtype
    assert pruned.weight.isfinite().all()
    assert torch.equal(pruned.weight != 0, pruned.keep)


def test_a_stack_of_matrices_is_solved_matrix_by_matrix():
    tokens = correlated(7, 60, 8, 3)
    gram = tokens.mT @ tokens
    stacked = InputMoments(torch.full((3,), 60), tokens.double().sum(-2), tokens.double().square().sum(-2), gram)
    weight = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    keep = NM(2, 4)(weight.abs())
    together = LeastSquares(tolerance=0.0)(weight, weight * keep, keep, stacked)
    for i in range(3):
        alone = LeastSquares(tolerance=0.0)(weight[i], weight[i] * keep[i], keep[i], moments_of(tokens[i]))
        torch.testing.assert_close(together[i], alone, rtol=1e-3, atol=1e-4)


def test_an_autocast_around_it_does_not_make_it_coarse():
    weight, pruned, keep, moments = layer(8, 6, 16)
    expected = LeastSquares()(weight, pruned, keep, moments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LeastSquares()(weight, pruned, keep, moments), expected)


def test_it_ends_where_an_iteration_gains_too_little():
    # The second iteration gains less than nine tenths of what both gain.
    weight, pruned, keep, moments = layer(15, 4, 12)
    early, two, many = (LeastSquares(**one)(weight, pruned, keep, moments) for one in (
        {"tolerance": 0.9}, {"iterations": 2, "tolerance": 0.0}, {"tolerance": 0.0}
    ))  # fmt: skip
    assert torch.equal(early, two)
    assert not torch.allclose(early, many)


def test_the_gram_is_normalised_anew_for_each_damping():
    weight, pruned, keep, moments = layer(16, 4, 12)
    for damping in (0.0, 1.0):
        fresh = InputMoments(moments.num_tokens, moments.sum, moments.sum_sq, moments.gram)
        expected = LeastSquares(damping=damping)(weight, pruned, keep, fresh)
        assert torch.equal(LeastSquares(damping=damping)(weight, pruned, keep, moments), expected)


def test_a_solution_is_left_as_it_is():
    weight, pruned, keep, moments = layer(13, 4, 12)
    solution = EXACT(weight, pruned, keep, moments)
    once_more = LeastSquares(iterations=1, damping=0.0)(weight, solution, keep, moments)
    torch.testing.assert_close(once_more, solution, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(LeastSquares(iterations=1, damping=0.0)(weight, pruned, keep, moments), solution, rtol=0.01)


def test_the_defaults_are_those_that_were_measured():
    assert LeastSquares() == LeastSquares(iterations=20, tolerance=1e-3, damping=0.01)


def test_layers_that_share_inputs_share_one_normalised_gram(monkeypatch):
    weight, pruned, keep, moments = layer(9, 4, 8)
    made = []
    monkeypatch.setattr(
        "statprune.methods.gram._normalised", lambda *args: made.append(args) or (torch.eye(8), torch.ones(1, 8))
    )
    for _ in range(3):
        LeastSquares()(weight, pruned, keep, moments)
    assert len(made) == 1


def test_without_a_gram_it_is_refused():
    weight, pruned, keep, _ = layer(10, 2, 8)
    assert LeastSquares().needs is Statistic.GRAM
    with pytest.raises(ValueError, match="least-squares needs the Gram"):
        LeastSquares()(weight, pruned, keep, InputMoments.zeros(8).add(torch.ones(1, 8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "expected a whole number from 0 to 1,000"),
        ({"iterations": 0}, "expected a whole number from 1 to 1,000"),
        ({"tolerance": 1.0}, "expected a number from 0 to 1, but not 1"),
        ({"damping": -0.1}, "expected a number from 0 to 100"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        least_squares(MaskPruner(wanda, NM(2, 4)), **settings)


# --- a mask that is reached in steps ---------------------------------------------------------------------------------


@quick
@given(
    seeds,
    st.sampled_from(sorted(CRITERIA)),
    st.sampled_from(PATTERNS),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 5).map(lambda n: 4 * n),
)
def test_steps_end_at_exactly_the_pattern(seed, criterion, pattern, steps, out_features, in_features):
    weight, _, _, moments = layer(seed, out_features, in_features)
    before = weight.clone()
    pruned = least_squares(MaskPruner(CRITERIA[criterion], pattern), steps=steps)(weight, moments)
    assert torch.equal(weight, before)
    assert int(pruned.keep.sum()) == int(pattern(weight.abs()).sum())
    assert pattern.holds(pruned.weight)
    assert pruned.weight[~pruned.keep].count_nonzero() == 0
    assert pruned.weight.isfinite().all()


def in_steps(weight: Tensor, gram: Tensor, choose, steps: int, damping: float) -> tuple[Tensor, Tensor]:
    """ADMM with a Gram H whose diagonal is 1 + damping, in the weights that belong to it, a penalty p for each channel:

    X = (W H + p (Z - U)) (H + p)^-1, then Z = X + U masked, then U = U + X - Z; p = 3 / [H^-1]_jj.
    """
    scale = gram.double().diagonal().rsqrt()
    normal = gram.double() * scale * scale[:, None]
    normal += damping * torch.eye(len(gram))
    penalty = 3 / torch.linalg.inv(normal + max(0, 0.001 - damping) * torch.eye(len(gram))).diagonal()
    dense, multiplier = weight.double() / scale, torch.zeros_like(weight, dtype=torch.float64)
    solved, rising = dense, -(-steps // 3)
    for step in range(1, steps + 1):
        candidate = solved + multiplier
        masked = candidate * choose((candidate * scale).float(), 1 - (1 - min(step / rising, 1)) ** 3)
        multiplier = multiplier if step == 1 else candidate - masked
        right = dense @ normal + penalty * (masked - multiplier)
        solved = torch.linalg.solve(normal + penalty.diag(), right, left=False)
    candidate = (solved + multiplier) * scale
    keep = choose(candidate.float(), 1.0)
    return candidate * keep, keep


@quick
@given(seeds, st.sampled_from(PATTERNS), st.integers(1, 6), st.sampled_from([0.0, 0.01, 0.5]))
def test_the_steps_are_those_of_a_slow_reference(seed, pattern, steps, damping):
    weight, _, _, moments = layer(seed, 5, 12)
    pruned = GradualMask(wanda, pattern, steps, damping)(weight, moments)
    expected, keep = in_steps(
        weight, moments.gram, lambda candidate, share: pattern.partly(wanda(candidate, moments), share), steps, damping
    )
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_inverse_is_made_anew_for_each_damping():
    weight, _, _, moments = layer(16, 4, 12)
    for damping in (0.01, 1.0):
        fresh = InputMoments(moments.num_tokens, moments.sum, moments.sum_sq, moments.gram)
        expected = GradualMask(wanda, NM(2, 4), 3, damping)(weight, fresh)
        assert torch.equal(GradualMask(wanda, NM(2, 4), 3, damping)(weight, moments).weight, expected.weight)


def test_a_gram_that_has_no_inverse_is_refused_with_what_can_be_done():
    moments = InputMoments.zeros(2, needs=Statistic.GRAM).add(torch.ones(1, 2))
    moments.gram.copy_(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    with pytest.raises(ValueError, match=r"cannot be factorised.* `ignore`, or use a method without the Gram"):
        GradualMask(wanda, NM(1, 2), 2)(torch.ones(2, 2), moments)


def test_the_settings_hold_for_the_steps_and_for_the_solution_on_their_mask():
    weight, _, _, moments = layer(17, 4, 12)
    pruned = least_squares(MaskPruner(wanda, NM(2, 4)), steps=3, iterations=5, tolerance=0.0, damping=0.5)(weight, moments)
    left = GradualMask(wanda, NM(2, 4), 3, 0.5)(weight, moments)
    solve = LeastSquares(iterations=5, tolerance=0.0, damping=0.5)
    assert torch.equal(pruned.keep, left.keep)
    assert torch.equal(pruned.weight, solve(weight, left.weight, left.keep, moments))


def test_what_the_steps_need_and_fit():
    steps = GradualMask(wanda, NM(2, 4), 2)
    assert steps.needs == Statistic.GRAM | Statistic.MOMENTS
    assert (steps.fits(8), steps.fits(6)) == (True, False)


def test_an_autocast_around_the_steps_does_not_make_them_coarse():
    weight, _, _, moments = layer(14, 6, 16)
    pruner = least_squares(MaskPruner(wanda, NM(2, 4)), steps=3)
    expected = pruner(weight, moments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruned = pruner(weight, moments)
    assert torch.equal(pruned.keep, expected.keep)
    assert torch.equal(pruned.weight, expected.weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_mask_that_is_reached_in_steps_loses_less(pattern: Pattern):
    weight, _, _, moments = layer(11, 32, 64, 1000)
    at_once, in_steps = (least_squares(MaskPruner(wanda, pattern), steps=steps)(weight, moments).weight for steps in (0, 10))
    assert error(weight, in_steps, moments).sum() < 0.95 * error(weight, at_once, moments).sum()


@pytest.mark.parametrize("method", ["sparsegpt+least-squares:steps=5", "cvr+energy+least-squares:steps=5"])
def test_steps_need_a_criterion_right_before(method):
    with pytest.raises(
        ValueError, match=r"least-squares:steps=5: a mask is reached in steps where the compensation follows a criterion"
    ):
        Recipe(method)


def test_a_gram_beyond_float32_is_refused_with_what_can_be_done():
    weight, pruned, keep, moments = layer(12, 2, 8)
    moments.gram[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"absurdly large activations\? Leave the layer dense with `ignore`"):
        LeastSquares()(weight, pruned, keep, moments)


def test_inputs_beyond_float32_are_an_error_that_names_the_layer():
    with pytest.raises(NonFiniteError, match=r"input of 0, the first layer"):
        prune(classifier(), [(torch.full((4, 8), 1e30),)], Recipe("wanda+least-squares", pattern="50%"))


@pytest.mark.parametrize("method", ["cvr+least-squares", "cvr+least-squares:steps=3+energy", "optimal-brain+least-squares"])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_a_whole_model(method, pattern):
    model, dense = llama(), llama()
    report = prune(model, [tokens(2, 16) for _ in range(2)], Recipe(method, pattern=pattern))
    assert report.sparsity == 0.5
    assert all(site.energy_after > 0 for site in report.sites)
    changed, unchanged = (dict(m.named_parameters())["model.layers.0.mlp.down_proj.weight"] for m in (model, dense))
    kept = changed != 0
    assert not torch.equal(changed[kept], unchanged[kept])
