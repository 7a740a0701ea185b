"""What is tried: recipes and methods, in the order in which a short budget takes them, and variations of a good one.

Adding a method or a variation is a line here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from statprune.grammar import write_method
from statprune.methods.statistics import Statistic
from statprune.model.schedule import Schedule
from statprune.recipe import Recipe

Keys = Mapping[str, str]
"""Of a candidate, those keys of a recipe that are its own."""

BASELINES: tuple[Keys, ...] = (
    {"method": "wanda", "schedule": "block"},
    {"method": "paper"},
    {"method": "sparsegpt", "schedule": "block"},
    {"method": "best"},
)
"""Measured to the end whatever the budget: the field's usual baselines with their published schedule, the paper's method, and
the best there is."""

KNOWN_GOOD: tuple[Keys, ...] = ({"method": "default"}, {"method": "fast"})
"""Tried right after the baselines, so that a small budget is not used up before."""

UNSHARED: Schedule = "block"
"""Of methods that are tried where the budget is too small for a pass that many share."""

METHODS = (
    "cvr+least-squares", "ria+least-squares", "wanda+least-squares", "optimal-brain+least-squares", "cvr+activation-energy",
    "ria+energy", "wanda+energy", "optimal-brain+energy", "cvr", "ria", "optimal-brain", "ria+activation-energy",
    "wanda+activation-energy", "optimal-brain+activation-energy", "sparsegpt",
)  # fmt: skip
"""The most promising first, as measured on one small LLaMA."""

SCHEDULES: tuple[Schedule, ...] = ("block", "walk", "one-shot")
"""Tried with the methods that one-shot statistics have found good; the last only with the best."""

VARIATIONS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "least-squares": {"steps": (6, 15, 40), "damping": (0.1, 0.001)},
    "loss-aware": {"shrinkage": (0.1, 0.6), "steps": (0, 15), "iterations": (40,)},
    "activation-energy": {"strength": (0.5,)},
    "energy": {"strength": (0.5,)},
    "cvr": {"alpha": (0.0, 0.25, 1.0), "exponent": (0.5,)},
    "ria": {"exponent": (0.25, 1.0)},
    "optimal-brain": {"damping": (0.1,)},
}
"""Other values of settings, by the name of the part that has them, the most promising first; each is tried alone."""

TARGETS = ("dense", "dense:damping=1.0", "dense:share=0.5", "pruned")
"""Tried with the best of what has a schedule of its own: under one-shot they are the same."""

ALLOCATIONS = ("curves", "sensitivity", "owl", "uniform")
"""Tried with the best, where the pattern is unstructured: with N:M patterns an allocation prunes fewer weights, and does not
compare."""


def uses_gradients(recipe: Recipe) -> bool:
    """Whether the dense model goes backward for it."""
    return Statistic.CURVATURE in recipe.needs


def refinements(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with another target, another setting or another allocation, one at a time."""
    yield from (replace(recipe, target=text) for text in TARGETS if recipe.target != text)
    yield from variations(recipe)
    yield from allocations(recipe)


def variations(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with one setting changed, for every setting in `VARIATIONS` of its parts."""
    parts = [recipe.criterion, *recipe.compensation]
    for name, settings in VARIATIONS.items():
        for index, part in enumerate(parts):
            for setting, value in ((setting, value) for setting, values in settings.items() for value in values):
                # A mask is reached in steps by what follows the criterion at once.
                if part["name"] == name and part[setting] != value and (setting != "steps" or index == 1):
                    changed = [*parts[:index], {**part, setting: value}, *parts[index + 1 :]]
                    yield replace(recipe, method=write_method(changed[0], changed[1:]))


def allocations(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with every other allocation that prunes as many weights."""
    if recipe.build_pattern().is_unstructured:
        own = recipe.allocation.partition(":")[0]
        yield from (replace(recipe, allocation=name) for name in ALLOCATIONS if name != own)
