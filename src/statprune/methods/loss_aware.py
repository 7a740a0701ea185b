"""The loss-aware finish: what a layer may change is weighed by what the loss makes of it, not output by output alike.

With D the change of a weight, H the Gram of its inputs and G the mean of g g^T over tokens, g the gradient of the loss with
respect to the layer's output, tr(G D H D^T) is the change of the loss to second order, in the Gauss-Newton approximation with
inputs and gradients taken for independent (K-FAC; Martens & Grosse 2015, arXiv 1503.05671). Least squares (`least_squares`) is
the case G = 1, in which every row stands alone; here an error of one output can make up for that of another.

G is shrunk toward its diagonal: estimated from few tokens it has directions that it sees nothing in, and errors would go
there. And its diagonal has a floor: where one token is huge and a norm divides by its size, as with the massive activations of
LLaMAs, the loss hardly sees a small change of the outputs that make it, and errors that go there without limit are not small.

Two ways to use it. On a mask that is given: conjugate gradients over the whole matrix, two products an iteration. On a mask
that is reached in steps (`gradual`): ADMM in coordinates in which both curvatures' inverses have ones on their diagonals; with
the eigenvectors of both, each step is four products.

Gradients are needed once, of the dense model: this one is not gradient-free.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from statprune.methods.bounds import Between, Count, check
from statprune.methods.finite import check_scores, is_finite
from statprune.methods.gradual import PENALTY, Steps, criterion_before, reach
from statprune.methods.gram import channel_freedom, inverse_, normalised_gram
from statprune.methods.least_squares import Damping, Iterations, LeastSquares
from statprune.methods.patterns import Pattern
from statprune.methods.precision import full_precision
from statprune.methods.pruner import CompensatedPruner, MaskPruner, PrunedWeight, WeightPruner
from statprune.methods.statistics import InputMoments, Statistic

Shrinkage = Annotated[float, Between(0.01, 1)]

_LEAST = 0.1
"""An output's curvature is at least this fraction of the mean; one that no loss depends on would have no inverse. With 1e-6 the
second layer of a trained LLaMA, which makes massive activations, changed its output by 1.5 times the output's own root mean
square (70 %, uniform, 12 x 512 tokens), and the model lost 2.8 times what SparseGPT loses, where it now loses 0.26. With 0.01
that is 0.27; multiples of the identity in the place of the floor give 0.22 to 0.27."""


@dataclass(frozen=True)
class LossAware:
    """A compensation: the kept weights that change the loss the least, to second order."""

    iterations: Iterations = 20
    """Of conjugate gradients over the whole matrix."""

    shrinkage: Shrinkage = 0.3
    """How much of G is replaced by its diagonal."""

    damping: Damping = 0.01
    """Added to H's diagonal, as a fraction of each entry."""

    def __post_init__(self) -> None:
        check("loss-aware", LossAware, **vars(self))

    @property
    def needs(self) -> Statistic:
        """The Gram of the inputs, and that of the gradients."""
        return Statistic.GRAM | Statistic.CURVATURE

    def __call__(self, original: Tensor, pruned: Tensor, keep: Tensor, moments: InputMoments | None) -> Tensor:
        """Solve on a mask, starting from what the pruner left.

        Args:
            original: [..., out, in], the weight before pruning, any float dtype.
            pruned: [..., out, in], the weight after pruning.
            keep: [..., out, in], bool, True = kept.
            moments: of the layer's inputs, with the Gram, and with the Gram of the gradients.

        Returns:
            [..., out, in], float32, exactly 0 where `keep` is False. tr(G D H D^T), both damped, is never above that of
            `pruned`, but for rounding.

        Raises:
            ValueError: a Gram is missing, or so large that float32 cannot hold the products.
        """
        gram_II, scale_1I = normalised_gram(moments, self.damping)
        curvature_OO = shrunk_curvature(moments, self.shrinkage)
        with full_precision(original.device.type):
            solution_OI = _conjugate_gradients(
                original.float() / scale_1I, pruned.float() / scale_1I, keep, gram_II, curvature_OO, self.iterations
            )
        if not is_finite(solution_OI):
            raise ValueError(
                "loss-aware: the Gram of its inputs or of its gradients is too large for float32. Are there absurdly large "
                "activations? Leave the layer dense with `ignore`, or use least-squares."
            )
        return solution_OI.mul_(scale_1I).masked_fill_(~keep, 0.0)


@dataclass(frozen=True)
class GradualMaskUnderLoss:
    """A WeightPruner: a criterion and a pattern, reached in steps of ADMM under both curvatures."""

    mask: MaskPruner

    steps: Annotated[int, Count(1, 1000)]
    shrinkage: Shrinkage = 0.3
    damping: Damping = 0.01

    @property
    def pattern(self) -> Pattern:
        """What is reached."""
        return self.mask.pattern

    @property
    def needs(self) -> Statistic:
        """The Gram of the inputs, that of the gradients, and what the criterion needs."""
        return Statistic.GRAM | Statistic.CURVATURE | self.mask.needs

    def fits(self, in_features: int) -> bool:
        """Whether the pattern fits rows of this width."""
        return self.mask.fits(in_features)

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune [..., out, in]; the arithmetic is float32 and the result has the weight's dtype.

        Raises:
            ValueError: a Gram is missing or cannot be factorised.
        """
        gram_II, scale_1I = normalised_gram(moments, self.damping)
        curvature_OO = shrunk_curvature(moments, self.shrinkage)
        assert moments is not None
        in_freedom_I = channel_freedom(moments, self.damping)
        with full_precision(weight.device.type):
            values_I, vectors_II = moments.derive(
                ("whitened eigenvectors", self.damping), lambda: _eigenvectors(gram_II, in_freedom_I)
            )
            out_freedom_O = inverse_(curvature_OO.double()).diagonal(dim1=-2, dim2=-1).float()
            values_O, vectors_OO = _eigenvectors(curvature_OO, out_freedom_O)
            unit_1I, unit_O1 = in_freedom_I.sqrt()[..., None, :] * scale_1I, out_freedom_O.sqrt()[..., None]
            dense_OI = weight.float() / unit_1I / unit_O1
            curvature_OI = values_O[..., None] * values_I[..., None, :]
            gain_OI, pull_OI = curvature_OI / (curvature_OI + PENALTY), PENALTY / (curvature_OI + PENALTY)
            target_OI = (vectors_OO.mT @ dense_OI @ vectors_II) * gain_OI

            def solve(pulled_OI: Tensor) -> Tensor:
                turned_OI = vectors_OO.mT @ pulled_OI @ vectors_II
                return vectors_OO @ torch.addcmul(target_OI, turned_OI, pull_OI) @ vectors_II.mT

            def choose(candidate_OI: Tensor, share: float) -> Tensor:
                return self.pattern.partly(check_scores(self.mask.criterion(candidate_OI * unit_O1 * unit_1I, moments)), share)

            candidate_OI, keep_OI = reach(dense_OI, solve, choose, self.steps)
            candidate_OI *= unit_O1
            candidate_OI *= unit_1I
        return PrunedWeight(candidate_OI.to(weight.dtype).masked_fill(~keep_OI, 0.0), keep_OI)


def loss_aware(
    pruner: WeightPruner,
    *,
    steps: Steps = 0,
    iterations: Iterations = 20,
    shrinkage: Shrinkage = 0.3,
    damping: Damping = 0.01,
) -> WeightPruner:
    """The kept weights that change the loss the least, by the Grams of inputs and of gradients; takes one backward pass.

    Args:
        pruner: what it follows.
        steps: in how many steps the mask is reached; 0 takes the mask, and starts at the weights, of the pruner.
        iterations: of conjugate gradients.
        shrinkage: how much of the Gram of the gradients is replaced by its diagonal.
        damping: added to the diagonal of the inputs' Gram, as a fraction of each entry.

    Raises:
        ValueError: a setting is out of range, or steps behind anything but a criterion.
    """
    check("loss-aware", loss_aware, steps=steps)
    finish = LossAware(iterations, shrinkage, damping)
    if steps:
        pruner = GradualMaskUnderLoss(criterion_before(pruner, "loss-aware", steps), steps, shrinkage, damping)
    # From a solution of each row on its own, less an iteration, it is not far.
    return CompensatedPruner(CompensatedPruner(pruner, LeastSquares(1, 0.0, damping)), finish)


def shrunk_curvature(moments: InputMoments | None, shrinkage: float) -> Tensor:
    """G [..., out, out], float32, divided by its mean diagonal, with a share of it replaced by its diagonal.

    Raises:
        ValueError: the statistics have no Gram of gradients.
    """
    if moments is None or moments.output_gram is None:
        raise ValueError(
            "loss-aware needs the Gram of the gradients at the layer's output: expected moments with an `output_gram`."
        )
    diagonal_O = moments.output_gram.diagonal(dim1=-2, dim2=-1)
    mean_1 = diagonal_O.mean(dim=-1, keepdim=True, dtype=torch.float64)
    is_free_1 = mean_1 <= 0  # no loss depends on it: every output alike
    mean_1 = torch.where(is_free_1, 1.0, mean_1)
    curvature_OO = (moments.output_gram / mean_1[..., None]).float() * (1 - shrinkage)
    relative_O = torch.where(is_free_1, 1.0, diagonal_O / mean_1)
    curvature_OO.diagonal(dim1=-2, dim2=-1).copy_(relative_O.clamp_min(_LEAST))
    return curvature_OO


def _eigenvectors(matrix: Tensor, freedom: Tensor) -> tuple[Tensor, Tensor]:
    """(values, vectors) of a matrix in coordinates in which its inverse has ones on its diagonal."""
    root = freedom.sqrt()
    values, vectors = torch.linalg.eigh(matrix * root[..., :, None] * root[..., None, :])
    return values.clamp_min(0.0), vectors


def _conjugate_gradients(
    target_OI: Tensor, start_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, curvature_OO: Tensor, iterations: int
) -> Tensor:
    """Minimise tr(G (x - target) H (x - target)^T) over the kept places of the whole matrix, from `start`."""
    support_OI = keep_OI.to(start_OI.dtype)
    preconditioner_O1 = curvature_OO.diagonal(dim1=-2, dim2=-1).reciprocal()[..., None]
    solution_OI = start_OI * support_OI
    residual_OI = (curvature_OO @ ((target_OI - solution_OI) @ gram_II)).mul_(support_OI)
    conditioned_OI = residual_OI * preconditioner_O1
    direction_OI = conditioned_OI.clone()
    size_11 = _inner(residual_OI, conditioned_OI)
    for _ in range(iterations):
        product_OI = (curvature_OO @ (direction_OI @ gram_II)).mul_(support_OI)
        curvature_11 = _inner(direction_OI, product_OI)
        # A matrix that is solved, or a direction that nothing depends on, stays as it is.
        length_11 = torch.where(curvature_11 > 0, size_11 / curvature_11, 0.0)
        solution_OI.addcmul_(direction_OI, length_11)
        residual_OI.addcmul_(product_OI, length_11, value=-1)
        torch.mul(residual_OI, preconditioner_O1, out=conditioned_OI)
        previous_11, size_11 = size_11, _inner(residual_OI, conditioned_OI)
        direction_OI.mul_(torch.where(previous_11 > 0, size_11 / previous_11, 0.0)).add_(conditioned_OI)
    return solution_OI


def _inner(one_OI: Tensor, other_OI: Tensor) -> Tensor:
    """[..., 1, 1]: the sum over each matrix; products of rows, so that no product of matrices lies in memory."""
    inner: Tensor = torch.linalg.vecdot(one_OI, other_OI).sum(dim=-1)[..., None, None]
    return inner
