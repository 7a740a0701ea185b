"""Results put together: by model, label, pattern, calibration."""

import functools
import math
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from statprune.errors import RecipeError
from statprune.experiments.grid import finished
from statprune.methods.patterns import ModelPattern
from statprune.recipe import Recipe
from statprune.results import DENSE, Result

Key = TypeVar("Key", bound=Hashable)


def group(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    """The results by key, in the order of first appearance."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def pruned(results: Iterable[Result]) -> list[Result]:
    """All but those of the dense model."""
    return [r for r in results if r.label != DENSE]


def dense_perplexity(results: Iterable[Result]) -> float | None:
    """That of the dense model, where it was measured; the results are of one model."""
    return next(iter(finished([r for r in results if r.label == DENSE], "perplexity")), None)


def by_sparsity(patterns: Iterable[str]) -> list[str]:
    """The patterns in order: unstructured ones by what they ask for, then N:M, then what says nothing."""

    def place(pattern: str) -> tuple[bool, float]:
        found = pattern_of(pattern)
        return (True, math.inf) if found is None else (not found.is_unstructured, found.sparsity)

    return sorted(patterns, key=place)


def sparsity(pattern: str) -> float:
    """The fraction of zeros that a pattern asks for, 0.5 for `50%` and for `2:4`; NaN where its name does not say."""
    found = pattern_of(pattern)
    return math.nan if found is None else found.sparsity


@functools.cache
def pattern_of(text: str) -> ModelPattern | None:
    """The pattern that this text stands for in a recipe; None where it stands for none."""
    try:
        return Recipe("magnitude", text).build_pattern()
    except RecipeError:
        return None
