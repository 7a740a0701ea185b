"""Sorting networks: the k-th of a few numbers, for very many groups of them at once, by minima and maxima of whole lanes.

2:4    a = max(x0, x1)   c = max(x2, x3)        second highest = max(min(a, c), max(b, d))
       b = min(x0, x1)   d = min(x2, x3)
"""

import functools
from typing import Literal

Comparison = tuple[int, int, Literal["low", "high", "both"]]
"""(a lane, one further on, which of the two outcomes is read later): the lower one takes the first's place."""


@functools.cache
def selection_network(size: int, position: int) -> tuple[Comparison, ...]:
    """What to compare, in order, for the number at a position in ascending order to be in the lane of that number.

    Batcher's odd-even merge sort (1968), without the comparisons, and the halves of comparisons, that this one does not need.

    Args:
        size: of a group, 1 at least.
        position: from 0.
    """
    needed = {position}
    used: list[Comparison] = []
    for low, high in reversed(_batcher(size)):
        if low in needed or high in needed:
            used.append((low, high, "both" if {low, high} <= needed else "low" if low in needed else "high"))
            needed |= {low, high}
    return tuple(reversed(used))


def _batcher(size: int) -> list[tuple[int, int]]:
    """Compare and exchange in this order, and any numbers are in ascending order."""
    pairs = []
    run = 1
    while run < size:
        distance = run
        while distance:
            pairs += [
                (start + offset, start + offset + distance)
                for start in range(distance % run, size - distance, 2 * distance)
                for offset in range(min(distance, size - start - distance))
                if (start + offset) // (2 * run) == (start + offset + distance) // (2 * run)
            ]
            distance //= 2
        run *= 2
    return pairs
