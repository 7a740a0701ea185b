"""A mask that is reached in steps: prune a little, solve, score what the solution made of the weights, prune more.

Least squares on the support (`least_squares`) with a mask that is not fixed: here ADMM (as in Boza 2024, arXiv 2401.02938)
wins over conjugate gradients, because its second variable remembers what the pruned weights would be worth, so that a step can
bring one back. The sparsity is reached in a third of the steps, `1 - (1 - k/n)^3` of it after step k of n, so that the first
steps take the most; in the others the mask still moves, with all weights gone that have to go.

    V = X + U     X solves without the mask, Z = V masked, and U adds up X - Z

What is ours is the penalty, one for each channel: PENALTY / [H^-1]_jj, H the Gram with ones on its diagonal. [H^-1]_jj is 1
for a channel that no other can stand in for, and large for one that others can: there the mask may hardly hold on to what it
has. One penalty for all channels is too small where the Gram is near diagonal and too large where it is ill-conditioned.
Divided by sqrt([H^-1]_jj), a channel's weights have one penalty again; all here is in those coordinates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from statprune.methods.bounds import Count, check
from statprune.methods.finite import check_scores
from statprune.methods.gram import channel_freedom, inverse_, normalised_gram
from statprune.methods.least_squares import Damping, Iterations, LeastSquares, Tolerance
from statprune.methods.patterns import Pattern
from statprune.methods.precision import full_precision
from statprune.methods.pruner import CompensatedPruner, MaskPruner, PrunedWeight, WeightPruner, needs_of
from statprune.methods.rows import Rows, Team, of_rows
from statprune.methods.statistics import InputMoments, Statistic

PENALTY = 3.0
"""ADMM's step size in these coordinates. Of 1, 3 and 5 the best for 2:4 and 70 %, by the error under the Gram on the layers of
a trained LLaMA."""

Steps = Annotated[int, Count(0, 1000)]


@dataclass(frozen=True)
class GradualMask:
    """A WeightPruner: a criterion and a pattern, reached in steps of ADMM. A solution on its mask starts at its weights."""

    criterion: Callable[..., Tensor]
    pattern: Pattern

    steps: Annotated[int, Count(1, 1000)]
    """How many."""

    damping: Damping = 0.01
    """Added to the Gram's diagonal, as a fraction of each entry."""

    def __post_init__(self) -> None:
        check("least-squares", GradualMask, **vars(self))

    @property
    def needs(self) -> Statistic:
        """The Gram, and what the criterion needs."""
        return Statistic.GRAM | needs_of(self.criterion)

    def fits(self, in_features: int) -> bool:
        """Whether the pattern fits rows of this width."""
        return self.pattern.fits(in_features)

    def of_rows(self, rows: Rows) -> "GradualMask | None":
        """The same for a stretch of rows; None where the criterion or the pattern compares rows."""
        criterion, pattern = of_rows(self.criterion, rows), of_rows(self.pattern, rows)
        return None if criterion is None or pattern is None else replace(self, criterion=criterion, pattern=pattern)

    def __call__(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Prune [..., out, in]; the arithmetic is float32 and the result has the weight's dtype.

        Raises:
            ValueError: the statistics have no Gram, or it cannot be factorised.
        """
        gram_II, scale_1I = normalised_gram(moments, self.damping)
        assert moments is not None
        freedom_I = channel_freedom(moments, self.damping)
        with full_precision(weight.device.type):
            inverse_II = moments.derive(
                ("ADMM inverse", self.damping), lambda: _regularised_inverse(gram_II, freedom_I, moments.team)
            )
            root_1I = freedom_I.sqrt()[..., None, :]
            unit_1I = root_1I * scale_1I  # a weight is its coordinate times this
            target_OI = ((weight.float() / scale_1I) @ gram_II).mul_(root_1I)

            def solve(pulled_OI: Tensor) -> Tensor:
                return torch.add(target_OI, pulled_OI, alpha=PENALTY) @ inverse_II

            def choose(candidate_OI: Tensor, share: float) -> Tensor:
                return self.pattern.partly(check_scores(self.criterion(candidate_OI * unit_1I, moments)), share)

            candidate_OI, keep_OI = reach(weight.float() / unit_1I, solve, choose, self.steps)
            candidate_OI *= unit_1I
        return PrunedWeight(candidate_OI.to(weight.dtype).masked_fill(~keep_OI, 0.0), keep_OI)


def reach(
    dense: Tensor, solve: Callable[[Tensor], Tensor], choose: Callable[[Tensor, float], Tensor], steps: int
) -> tuple[Tensor, Tensor]:
    """ADMM with a mask that moves.

    Args:
        dense: [..., out, in], the weight in coordinates in which the penalty is PENALTY everywhere.
        solve: Z - U to X, the minimiser of the error plus `PENALTY / 2 * |X - (Z - U)|^2`.
        choose: V and a share in [0, 1] to the keep mask, with this share of the weights that have to go gone.
        steps: how many; the whole share is reached in a third of them.

    Returns:
        (V, before it is masked; the keep mask).
    """
    rising = math.ceil(steps / 3)
    candidate, multiplier = dense, None
    del dense  # memory that the steps can use
    for step in range(1, steps + 1):
        masked = candidate * choose(candidate, 1 - (1 - min(step / rising, 1)) ** 3)  # several times faster than to fill
        if step > 1:  # before, there is no X, and V is the dense weight
            multiplier = candidate - masked
            masked = masked.sub_(multiplier)
        candidate = solve(masked)
        if multiplier is not None:
            candidate += multiplier
    return candidate, choose(candidate, 1.0)


def least_squares(
    pruner: WeightPruner,
    *,
    steps: Steps = 0,
    iterations: Iterations = 20,
    tolerance: Tolerance = 1e-3,
    damping: Damping = 0.01,
) -> WeightPruner:
    """Least squares on the support: the kept weights that change the layer's output the least, by the Gram of its inputs.

    Args:
        pruner: what it follows.
        steps: in how many steps the mask is reached; 0 takes the mask that the pruner chooses on the dense weight.
        iterations: of conjugate gradients, at most.
        tolerance: they end where an iteration gains less than this share of what all have gained.
        damping: added to the Gram's diagonal, as a fraction of each entry; holds back weights that few tokens decide.

    Raises:
        ValueError: a setting is out of range, or steps behind anything but a criterion.
    """
    check("least-squares", least_squares, steps=steps)
    solve = LeastSquares(iterations, tolerance, damping)
    if not steps:
        return CompensatedPruner(pruner, solve)
    mask = criterion_before(pruner, "least-squares", steps)
    return CompensatedPruner(GradualMask(mask.criterion, mask.pattern, steps, damping), solve)


def criterion_before(pruner: WeightPruner, name: str, steps: int) -> MaskPruner:
    """What a compensation that reaches the mask itself follows.

    Raises:
        ValueError: it is no criterion.
    """
    if not isinstance(pruner, MaskPruner):
        raise ValueError(
            f"{name}:steps={steps}: a mask is reached in steps where the compensation follows a criterion at once, as in "
            f"optimal-brain+{name}:steps=15; not behind another compensation, or a pruner that updates by itself."
        )
    return pruner


def _regularised_inverse(gram_II: Tensor, freedom_I: Tensor, team: Team) -> Tensor:
    """(H + penalty)^-1 of a normalised Gram in the solver's coordinates; the penalty is so large that float32 will do."""
    root_I = freedom_I.sqrt()
    regularised_II = (gram_II * root_I[..., :, None]).mul_(root_I[..., None, :])
    regularised_II.diagonal(dim1=-2, dim2=-1).add_(PENALTY)
    return inverse_(regularised_II, team)
