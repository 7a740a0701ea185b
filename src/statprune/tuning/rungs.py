"""Successive halving, as functions of numbers alone: who goes on, and how many can be afforded.

    rung          statistics        scored on              who
    methods       one walk, shared  a quarter of the text  the listed methods, in their order
    variations    one walk, shared  a quarter of the text  the best two, with one setting changed
    schedules     one each          a half of the text     the best third of both, with real schedules
    the end       of that rung      all of the text        who was among the best three of that rung when it was scored

The last step is that of asynchronous halving (Li et al. 2020, arXiv 1810.05934): a twin goes on while it is in memory, instead
of being pruned a second time when its rung is complete. The best of a rung is always among those that go on.
"""

import math
from collections.abc import Sequence

FRACTIONS = (0.25, 0.5, 1.0)
"""Of the held-out batches, that the rungs are scored on."""

PARENTS = 2
"""Methods whose variations are tried."""

FINALISTS = 3
"""How many a twin of the last rung must be among to be scored on everything."""

FIRST_SHARE, SECOND_SHARE = 0.4, 0.4
"""Of the seconds left, that the first two rungs may take each; the last takes the rest."""


def ranking(scores: Sequence[float]) -> list[int]:
    """Indices from the lowest score to the highest; NaN comes last, and of equals the first comes first."""
    return sorted(range(len(scores)), key=lambda index: math.inf if math.isnan(scores[index]) else scores[index])


def survivors(scores: Sequence[float], keep_one_in: int = 3) -> list[int]:
    """Indices of the best, one in so many and at least one, the best first."""
    return ranking(scores)[: math.ceil(len(scores) / keep_one_in)]


def goes_on(scores: Sequence[float], finalists: int = FINALISTS) -> bool:
    """Whether the last of these scores is among the best so far."""
    return len(scores) - 1 in ranking(scores)[:finalists]


def affordable(costs: Sequence[float], seconds: float) -> list[int]:
    """Indices of those that are paid for: each that still fits; what is known already (0) always does."""
    chosen = []
    for index, cost in enumerate(costs):
        if cost == 0 or cost <= seconds:
            chosen.append(index)
            seconds -= cost
    return chosen


def num_batches(rung: int, batches: int) -> int:
    """How many of the held-out batches a rung (0, 1 or 2) is scored on: at least one."""
    return min(batches, max(1, round(FRACTIONS[rung] * batches)))
