"""The arithmetic of allocations: from what was measured of each layer to how many of its weights go.

shares of outliers          -> sparsities      owl
increases of the loss  -> rates -> sparsities  sensitivity
curves of errors       -> rates -> sparsities  curves
sparsities                  -> whole counts, exact together
costs and zeros of choices  -> a choice for each layer, with N:M patterns
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from statprune.methods.patterns import Counted, ModelPattern, Unstructured

FLOOR = 0.01
"""An increase of the loss below this fraction of the mean increase counts as this fraction: less is noise."""

GRID = 200
"""Intervals in which a curve is looked at."""

_BISECTIONS = 200
"""Halvings of an interval: more than a float64 can tell apart."""


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


def curve_at(errors: Tensor, points: Tensor, sparsities: Tensor) -> Tensor:
    """The error of each layer at any sparsity between the points, its logarithm being linear between them.

    Args:
        errors: [layers, points], float64, 0 or more. Where one falls from point to point, which is noise of the measurement,
            it counts as the one before it; one that is next to nothing beside the largest counts as `1e-12` of that.
        points: [points], float64, increasing.
        sparsities: [layers, n], float64, within the points.

    Returns:
        [layers, n], float64.
    """
    least = (1e-12 * errors.max()).clamp_min(torch.finfo(torch.float64).tiny)
    logs = torch.cummax(errors.clamp_min(least), dim=-1).values.log()
    above = torch.searchsorted(points, sparsities.contiguous()).clamp(1, len(points) - 1)
    share = (sparsities - points[above - 1]) / (points[above] - points[above - 1])
    low, high = logs.gather(-1, above - 1), logs.gather(-1, above)
    return (low + share * (high - low)).exp()


def least_error_sparsities(errors: Tensor, points: Tensor, sizes: Tensor, target: float) -> Tensor:
    """The sparsities at which the errors of all layers together are least, as their curves have it (`curve_at`).

    By the greatest convex function below each curve, of which `least_loss_sparsities` gets the slopes.

    Args:
        errors: [layers, points], float64, 0 or more, all in one unit.
        points: [points], float64, increasing: the first and the last one are the bounds of every layer.
        sizes: [layers]: weights in each layer.
        target: between the bounds.

    Returns:
        [layers], float64. By the curves never worse than the target in every layer.
    """
    grid = torch.linspace(float(points[0]), float(points[-1]), GRID + 1, dtype=torch.float64)
    slopes = curve_at(errors, points, grid.expand(len(errors), -1)).diff(dim=-1) / grid.diff()
    rising = torch.tensor([_rising(of_layer) for of_layer in slopes.tolist()], dtype=torch.float64)
    rates = torch.cat([rising[:, :1], (rising[:, 1:] + rising[:, :-1]) / 2, rising[:, -1:]], dim=-1)
    found = least_loss_sparsities(rates, grid, sizes, target)
    # Where a curve is not convex, what is between two tangent points costs more than the tangent has it.
    uniform = torch.full_like(found, target)
    ours, theirs = (float(curve_at(errors, points, tried[:, None]).sum()) for tried in (found, uniform))
    return found if ours <= theirs else uniform


def _rising(slopes: Sequence[float]) -> list[float]:
    """The slopes of the greatest convex function below one with these slopes at even steps: neighbours that fall are pooled."""
    pools: list[tuple[float, int]] = []
    for slope in slopes:
        pools.append((slope, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (second, many), (first, few) = pools.pop(), pools.pop()
            pools.append(((first * few + second * many) / (few + many), few + many))
    return [slope for slope, number in pools for _ in range(number)]


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


def choose(costs: Sequence[Sequence[float]], counts: Sequence[Sequence[int]], total: int) -> list[int]:
    """What to do with each layer so that at least `total` weights go, for little cost together.

    Greedy on the convex hulls of the layers' choices: from one choice to the next where a further weight costs the least. Then
    greedily back: a layer that need not lose so many after all gets the choice that saves most.

    Args:
        costs: of each choice in each layer; the first choice is to do nothing, and costs nothing.
        counts: how many weights go with each choice; 0 with the first.
        total: at most the sum of the layers' highest counts.

    Returns:
        The number of each layer's choice.
    """
    steps = sorted(
        (step for layer, of_layer in enumerate(zip(costs, counts, strict=True)) for step in _steps(layer, *of_layer)),
        key=lambda step: step[0],
    )
    chosen, num_pruned = [0] * len(costs), 0
    for _, layer, choice in steps:
        if num_pruned >= total:
            break
        num_pruned += counts[layer][choice] - counts[layer][chosen[layer]]
        chosen[layer] = choice
    while back := [
        (costs[layer][now] - costs[layer][choice], counts[layer][now] - count, layer, choice)
        for layer, now in enumerate(chosen)
        for choice, count in enumerate(counts[layer])
        if 0 < counts[layer][now] - count <= num_pruned - total and costs[layer][choice] <= costs[layer][now]
    ]:
        _, fewer, layer, chosen_instead = max(back, key=lambda step: step[:2])
        num_pruned -= fewer
        chosen[layer] = chosen_instead
    return chosen


def _steps(layer: int, costs: Sequence[float], counts: Sequence[int]) -> Iterator[tuple[float, int, int]]:
    """(cost of a further weight, layer, choice) along the lower convex hull of a layer's choices."""
    now = 0
    while more := [choice for choice, count in enumerate(counts) if count > counts[now]]:
        rates = {choice: (costs[choice] - costs[now]) / (counts[choice] - counts[now]) for choice in more}
        now = min(more, key=lambda choice: (rates[choice], -counts[choice]))
        yield rates[now], layer, now


def counted_at(sparsity: float, shape: tuple[int, int], pattern: ModelPattern) -> Counted:
    """A matrix [out, in] at this sparsity, one weight in every row being kept."""
    rows, columns = shape
    return pattern.counted(min(round(sparsity * rows * columns), rows * (columns - 1)), columns)


def budget(sparsity: float, num_weights: int) -> int:
    """The least number of zeros among so many weights that makes this sparsity."""
    # 0.07 * 100 is 7.000000000000001 in floating point; nobody who asks for 7 % means 8.
    return math.ceil(sparsity * num_weights - 1e-6)
