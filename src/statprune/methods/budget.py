"""Allocation: how sparse each layer becomes where the model as a whole has a budget.

    uniform       ▆▆▆▆▆▆▆▆    every layer as sparse as the pattern says
    owl           ▃▅▆▆▆▇▇▆    blocks with more outliers keep more
    sensitivity   ▂▇▅▆█▆▇▃    the pruning that costs the least loss for each weight, wherever it is

Everything here is arithmetic on what `allocation` collects: shares of outliers, curves of errors, counts. An allocation of
an unstructured pattern prunes exactly the number of weights that the pattern would prune in one matrix of the budget's size;
one of an N:M pattern says which layers are pruned at all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from statprune.methods.bounds import Between, Count, check
from statprune.methods.patterns import Unstructured

FLOOR = 0.01
"""An increase of the loss below this fraction of the mean increase counts as this fraction: less is noise."""

_BISECTIONS = 200
"""Halvings of an interval: more than a float64 can tell apart."""


Spread = Annotated[float, Between(0, 1)]
BudgetSparsity = Annotated[float | None, Between(0, 1, without=(0, 1), or_none=True)]


@dataclass(frozen=True)
class Uniform:
    """Every layer as sparse as the pattern says."""


@dataclass(frozen=True)
class Owl:
    """Outlier-weighed layer-wise sparsity (Yin et al. 2024, ICML, arXiv 2310.05175): blocks with more outliers keep more.

    Deviations: weights count alike, where the authors' code has blocks count alike, so that the model's sparsity is exact;
    keep ratios stay within `spread` of the target, where the authors' span `2 spread` between the extreme blocks wherever
    the target is. Theirs and ours are linear in the share of outliers, with the target as their mean.
    """

    threshold: Annotated[float, Between(0.001, 1e6)] = 5.0
    """An entry of `|W| * ||X||` is an outlier above this many times the mean entry of its block."""

    spread: Spread = 0.08
    """How far a block's sparsity may be from the target."""

    sparsity: BudgetSparsity = None
    """Only with N:M patterns: the fraction of the weights in scope that is to be zero."""

    def __post_init__(self) -> None:
        check("owl", Owl, **vars(self))


@dataclass(frozen=True)
class Sensitivity:
    """Measured sensitivity under a global budget: prune where it costs the least loss for each weight.

    Minimises `sum_l dL_l e_l(s_l) / e_l(S)` over the layers' sparsities s_l. dL_l is the loss that pruning layer l alone at the
    target S makes, and e_l(s) the energy of its output error at the sparsity s.

    For a causal language model dL_l is the Kullback-Leibler divergence of its next-token distribution from the dense model's:
    the increase of the cross-entropy that is to be expected where the dense model is right. The increase on the probes' own
    next tokens estimates the same with far more noise, and was negative for a quarter of the layers of a trained model, where
    the divergence never is. For any other model it is the relative error energy of the output.

    Costs one pass of the dense model over the calibration batches, one forward pass over `probes` batches for each layer, and
    five prunings of each layer more: at the bounds, at the target, and once on either side of it.

    Several ranks lay the probes down in turns, one batch each, until there are enough: where the batches were dealt out in
    turns too, these are the ones that a single process measures on.
    """

    spread: Spread = 0.1
    """How far a layer's sparsity may be from the target. CVR+EC at 70 % on a trained LLaMA of 20 M parameters
    (perplexity 24.2 dense over all windows; one probe of 4 x 512 tokens, 30 windows of 512): 28.03 with the same sparsity
    everywhere, 27.00 with 0.1, 27.70 with 0.2. What is extrapolated further from the target is known less well."""

    probes: Annotated[int, Count(1, 10_000)] = 1
    """Calibration batches that the loss is measured on; on all ranks together."""

    sparsity: BudgetSparsity = None
    """Only with N:M patterns: the fraction of the weights in scope that is to be zero."""

    def __post_init__(self) -> None:
        check("sensitivity", Sensitivity, **vars(self))


AllocationRule = Uniform | Owl | Sensitivity

ALLOCATIONS: dict[str, Callable[..., AllocationRule]] = {"uniform": Uniform, "owl": Owl, "sensitivity": Sensitivity}
"""Allocations by the name a recipe uses."""


def outlier_share(entries: Sequence[Tensor], threshold: float) -> float:
    """The share of entries above `threshold` times the mean of them all.

    Args:
        entries: of a block: `|W| * ||X||` of each of its layers, any shapes.
        threshold: see `Owl`.
    """
    size = sum(entry.numel() for entry in entries)
    mean = sum(float(entry.sum(dtype=torch.float64)) for entry in entries) / max(1, size)
    return sum(int((entry > threshold * mean).sum()) for entry in entries) / max(1, size)


def owl_sparsities(shares: Tensor, sizes: Tensor, target: float, spread: float) -> Tensor:
    """Sparsities that fall linearly as the share of outliers rises, within `spread` of the target, which is their mean.

    Args:
        shares: [layers], float64: `outlier_share` of the block that each layer is in.
        sizes: [layers], int64: weights in each layer.
        target: the sparsity of all weights together.
        spread: see `Owl`.

    Returns:
        [layers], float64; may be outside of [0, 1], which `whole_counts` mends.
    """
    from_mean = shares - (shares * sizes).sum() / sizes.sum()
    furthest = from_mean.abs().max()
    return target - spread * from_mean / torch.where(furthest > 0, furthest, 1.0)


def marginal_rates(increases: Tensor, errors: Tensor, at_target: Tensor, points: Tensor) -> Tensor:
    """What a further per cent of each layer costs: slopes of its error curve, scaled to the measured increase of the loss.

    Args:
        increases: [layers], float64: of the loss, with this layer alone pruned at the target.
        errors: [layers, points], float64: the error energy at each sparsity; any unit.
        at_target: [layers], float64: the same at the target.
        points: [points], float64: the sparsities, increasing; 3 or more.

    Returns:
        [layers, points], float64, never falling from point to point: where a curve is not convex, what is behind the fall
        costs as much as what is before it.
    """
    least = FLOOR * increases.clamp_min(0).mean()
    # Where nothing is measured to cost anything, the errors alone decide.
    scale = increases.clamp_min(least) if least > 0 else at_target
    slopes = torch.gradient(errors, spacing=(points,), dim=-1, edge_order=2)[0]
    relative = torch.where(at_target[:, None] > 0, slopes / at_target[:, None], 0.0)
    return torch.cummax(scale[:, None] * relative, dim=-1).values


def least_loss_sparsities(rates: Tensor, points: Tensor, sizes: Tensor, target: float) -> Tensor:
    """The sparsities that cost least together: every layer is pruned until a further weight costs the same everywhere.

    Minimises `sum_l integral of rates_l`, rates being linear between the points, subject to
    `sum_l sizes_l s_l = target sum_l sizes_l`, by bisection on the Lagrange multiplier.

    Args:
        rates: [layers, points], float64, of whole layers (see `marginal_rates`): divided by the size, the cost of one weight.
        points: [points], float64, increasing: the first and the last one are the bounds of every layer.
        sizes: [layers]: weights in each layer.
        target: between the bounds.

    Returns:
        [layers], float64.
    """
    sizes = sizes.double()
    per_weight = rates / sizes[:, None]

    def sparsities(price: Tensor) -> Tensor:
        index = torch.searchsorted(per_weight, price.expand(len(sizes), 1).contiguous(), right=True)[:, 0]
        low, high = (index - 1).clamp_min(0), index.clamp_max(len(points) - 1)
        below, above = (per_weight.gather(-1, at[:, None])[:, 0] for at in (low, high))
        share = torch.where(above > below, (price - below) / (above - below), 0.0).clamp(0, 1)
        return points[low] + share * (points[high] - points[low])

    margin = per_weight.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    low, high = per_weight.min() - margin, per_weight.max() + margin
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_enough = (sparsities(middle) * sizes).sum() >= target * sizes.sum()
        low, high = (low, middle) if is_enough else (middle, high)
    # Where a rate is flat the sparsity jumps at that price: all that jump are equally good, and share what is left.
    few, many = sparsities(low), sparsities(high)
    missing, jump = target * sizes.sum() - (few * sizes).sum(), ((many - few) * sizes).sum()
    return few + (missing / jump).clamp(0, 1) * (many - few) if jump > 0 else many


def whole_counts(sparsities: Tensor, shapes: Sequence[tuple[int, int]], target: float, spread: float) -> list[int]:
    """How many weights each layer loses: whole numbers near the sparsities, and exactly as many together as asked for.

    Args:
        sparsities: [layers], float64: what they should be near; where a bound is in the way, all others move alike.
        shapes: (out, in) of each layer.
        target: the sparsity of all weights together; the number pruned is rounded down.
        spread: how far a layer may be from the target. One weight is kept in every row, as `Unstructured` does.

    Returns:
        Counts whose sum is what `Unstructured(target)` takes from all weights in one row, or less where no more can go.
    """
    sizes = torch.tensor([rows * columns for rows, columns in shapes])
    room = torch.tensor([rows * (columns - 1) for rows, columns in shapes])
    lower = ((target - spread) * sizes).floor().long().clamp_min(0).minimum(room)
    upper = ((target + spread) * sizes).ceil().long().minimum(room)
    total = min(Unstructured(target).pruned_of(1, int(sizes.sum())), int(upper.sum()))

    def shifted(by: float) -> Tensor:
        return ((sparsities + by) * sizes).clamp(lower, upper)

    low, high = -2.0 - float(sparsities.abs().max()), 2.0 + float(sparsities.abs().max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(shifted(middle).sum()) >= total else (middle, high)
    ideal = shifted(high)
    # 0.7 * 30 is 21 to everybody; the sum of such products is not.
    counts = (ideal + 1e-6).floor().long().clamp(lower, upper)
    while missing := total - int(counts.sum()):
        step = 1 if missing > 0 else -1
        is_free = (counts < upper) if step > 0 else (counts > lower)
        order = torch.argsort((ideal - counts) * step, descending=True, stable=True)
        counts[[int(index) for index in order if is_free[index]][: abs(missing)]] += step
    return [int(count) for count in counts]


def choose_layers(harms: Sequence[float], counts: Sequence[int], total: int) -> list[int]:
    """Which layers to prune so that at least `total` weights go, those of the least harm for each weight first.

    Greedy, and then greedily back: a layer that is not needed after all stays dense, the most harmful one first.

    Args:
        harms: of pruning each layer, for each weight that goes.
        counts: how many weights go in each layer.
        total: at most the sum of the counts.

    Returns:
        The layers' numbers, increasing.
    """
    chosen: list[int] = []
    num_pruned = 0
    for index in sorted(range(len(harms)), key=lambda index: harms[index]):
        if num_pruned >= total:
            break
        chosen.append(index)
        num_pruned += counts[index]
    for index in list(reversed(chosen)):
        if num_pruned - counts[index] >= total:
            chosen.remove(index)
            num_pruned -= counts[index]
    return sorted(chosen)


def budget(sparsity: float, num_weights: int) -> int:
    """The least number of zeros among so many weights that makes this sparsity."""
    # 0.07 * 100 is 7.000000000000001 in floating point; nobody who asks for 7 % means 8.
    return math.ceil(sparsity * num_weights - 1e-6)
