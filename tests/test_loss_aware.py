"""The loss-aware finish: against the dense Kronecker system, and the gradients against autograd token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods.criteria import optimal_brain, wanda
from statprune.methods.gram import channel_freedom, normalised_gram
from statprune.methods.least_squares import LeastSquares
from statprune.methods.loss_aware import GradualMaskUnderLoss, LossAware, loss_aware, shrunk_curvature
from statprune.methods.patterns import NM, Unstructured
from statprune.methods.pruner import CompensatedPruner, MaskPruner
from statprune.methods.statistics import InputMoments, Statistic

quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
PATTERNS = [NM(2, 4), Unstructured(0.5), Unstructured(0.7, rank_over="layer")]


def layer(seed, out_features, in_features, num_tokens=200):
    """A weight and its statistics: correlated inputs, correlated gradients."""
    generator = torch.Generator().manual_seed(seed)

    def correlated(size):
        mixing = torch.randn(size, size, generator=generator) / size**0.5
        return torch.randn(num_tokens, size, generator=generator) @ mixing + 0.3 * torch.randn(size, generator=generator)

    weight, gradients = torch.randn(out_features, in_features, generator=generator), correlated(out_features)
    moments = InputMoments.zeros(in_features, needs=Statistic.GRAM).add(correlated(in_features))
    return weight, moments.with_output_gram(gradients.t() @ gradients / num_tokens)


def curvatures(moments, damping=0.01, shrinkage=0.3):
    """(G, H) of the weight itself, shrunk and damped, float64."""
    gram = moments.gram.double() + damping * moments.gram.double().diagonal().diag()
    curvature = moments.output_gram.double()
    diagonal = curvature.diagonal().clamp_min(0.1 * curvature.diagonal().mean())
    return (1 - shrinkage) * (curvature - curvature.diagonal().diag()) + diagonal.diag(), gram


def error(weight, other, moments, **settings):
    """tr(G D H D^T)."""
    curvature, gram = curvatures(moments, **settings)
    change = (other - weight).double()
    return float((curvature @ change @ gram * change).sum())


def solved(weight, keep, moments, **settings):
    """The minimiser of tr(G D H D^T) over the kept places: one dense system with kron(G, H)."""
    curvature, gram = curvatures(moments, **settings)
    whole, kept = torch.kron(curvature, gram), keep.flatten().nonzero()[:, 0]
    solution = torch.zeros(weight.numel(), dtype=torch.float64)
    solution[kept] = torch.linalg.solve(whole[kept][:, kept], (whole @ weight.double().flatten())[kept])
    return solution.view_as(weight)


def test_two_outputs_by_hand():
    # G = [[2, 1], [1, 2]], H = 1, one weight for each output, the second goes: the first takes over 1/2 of what it was.
    moments = InputMoments.zeros(1, needs=Statistic.GRAM).add(torch.ones(1, 1))
    moments = moments.with_output_gram(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    weight, keep = torch.tensor([[1.0], [3.0]]), torch.tensor([[True], [False]])
    corrected = LossAware(shrinkage=0.01, damping=0.0)(weight, weight * keep, keep, moments)
    torch.testing.assert_close(corrected, torch.tensor([[1 + 0.99 * 3 / 2], [0.0]]))


@quick
@given(seeds, st.integers(1, 6), st.integers(2, 10), st.floats(0.1, 0.9), st.sampled_from([0.1, 0.3, 1.0]))
def test_it_is_the_solution_of_the_dense_kronecker_system(seed, out_features, in_features, sparsity, shrinkage):
    weight, moments = layer(seed, out_features, in_features)
    keep = Unstructured(sparsity)(weight.abs())
    corrected = LossAware(iterations=100, shrinkage=shrinkage)(weight, weight * keep, keep, moments)
    exact = error(weight, solved(weight, keep, moments, shrinkage=shrinkage), moments, shrinkage=shrinkage)
    masked = error(weight, weight * keep, moments, shrinkage=shrinkage)
    assert error(weight, corrected, moments, shrinkage=shrinkage) <= exact + 1e-3 * masked + 1e-6
    assert corrected[~keep].count_nonzero() == 0


@quick
@given(seeds, st.integers(1, 8), st.integers(2, 16), st.integers(1, 60), st.floats(0.0, 0.9), st.integers(1, 30))
def test_the_error_is_never_above_the_start(seed, out_features, in_features, num_tokens, sparsity, iterations):
    weight, moments = layer(seed, out_features, in_features, num_tokens)
    keep = Unstructured(sparsity)(weight.abs())
    for start in (weight * keep, LeastSquares()(weight, weight * keep, keep, moments)):
        corrected = LossAware(iterations=iterations)(weight, start, keep, moments)
        assert corrected.isfinite().all()
        assert error(weight, corrected, moments) <= 1.0001 * error(weight, start, moments) + 1e-6


def test_with_all_outputs_alike_it_is_least_squares():
    weight, moments = layer(3, 6, 12)
    moments = moments.with_output_gram(5 * torch.eye(6))
    keep = NM(2, 4)(wanda(weight, moments))
    found = LossAware(iterations=200)(weight, weight * keep, keep, moments)
    expected = LeastSquares(iterations=200, tolerance=0.0)(weight, weight * keep, keep, moments)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_outputs_that_no_loss_depends_on():
    weight, moments = layer(4, 6, 8)
    keep = NM(2, 4)(weight.abs())
    for gradients in (torch.zeros(6, 6), torch.diag(torch.tensor([1.0, 0, 0, 2, 0, 1e-20]))):
        pruned = loss_aware(MaskPruner(wanda, NM(2, 4)), steps=3)(weight, moments.with_output_gram(gradients))
        assert pruned.weight.isfinite().all()
        assert pruned.weight[~pruned.keep].count_nonzero() == 0
        assert LossAware()(weight, weight * keep, keep, moments.with_output_gram(gradients)).isfinite().all()


def test_an_output_that_the_loss_hardly_sees_is_not_given_up():
    # Its errors could make up for those of others: gradients that are alike but for their size, as at massive activations.
    weight, moments = layer(6, 8, 32)
    sizes = torch.tensor([1e-4, 1, 1, 1, 1, 1, 1, 1.0])
    alike = torch.full((8, 8), 0.9).fill_diagonal_(1.0)
    pruned = loss_aware(MaskPruner(optimal_brain, NM(2, 4)), steps=9)(
        weight, moments.with_output_gram(alike * sizes[:, None] * sizes)
    )
    gram = curvatures(moments)[1].float()
    lost, was = (((matrix @ gram) * matrix).sum(dim=1) for matrix in (pruned.weight - weight, weight))
    assert float((lost / was)[0]) < float((lost / was)[1:].max()) * 2


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_gradients_changes_nothing(scale):
    weight, moments = layer(5, 6, 8)
    scaled = moments.with_output_gram(moments.output_gram * scale)
    pruner = loss_aware(MaskPruner(optimal_brain, NM(2, 4)), steps=6)
    torch.testing.assert_close(pruner(weight, scaled).weight, pruner(weight, moments).weight, rtol=1e-3, atol=1e-4)


def under_both(weight, moments, choose, steps):
    """ADMM for tr(G D H D^T) by a dense solve of each step, with the penalty 3 / ([G^-1]_ii [H^-1]_jj) of every weight.

    G has a mean diagonal of 1, H a diagonal of 1 and the damping.
    """
    scale = normalised_gram(moments, 0.01)[1].double()
    gram, curvature = normalised_gram(moments, 0.01)[0].double(), shrunk_curvature(moments, 0.3).double()
    freedom = torch.linalg.inv(curvature).diagonal()[:, None] * channel_freedom(moments, 0.01).double()[None]
    whole, penalty = torch.kron(curvature, gram), 3 / freedom.flatten()
    dense = (weight.double() / scale).flatten()
    solved, multiplier, rising = dense, torch.zeros_like(dense), -(-steps // 3)
    for step in range(1, steps + 1):
        candidate = solved + multiplier
        keep = choose((candidate.view_as(weight) * scale).float(), 1 - (1 - min(step / rising, 1)) ** 3)
        masked = candidate * keep.flatten()
        multiplier = multiplier if step == 1 else candidate - masked
        solved = torch.linalg.solve(whole + penalty.diag(), whole @ dense + penalty * (masked - multiplier))
    candidate = (solved + multiplier).view_as(weight) * scale
    keep = choose(candidate.float(), 1.0)
    return candidate * keep, keep


@quick
@given(seeds, st.sampled_from(PATTERNS), st.integers(1, 6))
def test_the_steps_are_those_of_a_slow_reference(seed, pattern, steps):
    weight, moments = layer(seed, 5, 8)
    pruned = GradualMaskUnderLoss(MaskPruner(wanda, pattern), steps)(weight, moments)
    expected, keep = under_both(
        weight, moments, lambda candidate, share: pattern.partly(wanda(candidate, moments), share), steps
    )
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_mask_that_is_reached_under_the_loss_loses_less(pattern):
    weight, moments = layer(11, 32, 64, 1000)
    finish = CompensatedPruner(MaskPruner(optimal_brain, pattern), LeastSquares())
    at_once, after, in_steps = (
        error(weight, pruner(weight, moments).weight, moments)
        for pruner in (finish, loss_aware(finish), loss_aware(MaskPruner(optimal_brain, pattern), steps=15))
    )
    assert after < 0.95 * at_once
    assert in_steps < 0.95 * after


def test_what_it_needs_and_refuses():
    weight, moments = layer(6, 4, 8)
    pruner = loss_aware(MaskPruner(wanda, NM(2, 4)), steps=2)
    assert pruner.needs == Statistic.GRAM | Statistic.CURVATURE | Statistic.MOMENTS
    assert (pruner.fits(8), pruner.fits(6)) == (True, False)
    alone = InputMoments(moments.num_tokens, moments.sum, moments.sum_sq, moments.gram)
    with pytest.raises(ValueError, match="loss-aware needs the Gram of the gradients"):
        pruner(weight, alone)
    with pytest.raises(ValueError, match=r"loss-aware:steps=3: a mask is reached in steps where the compensation follows"):
        loss_aware(pruner, steps=3)
    moments.gram[0, 0] = torch.inf
    with pytest.raises(ValueError, match="too large for float32"):
        LossAware()(weight, weight, weight != 0, moments)
