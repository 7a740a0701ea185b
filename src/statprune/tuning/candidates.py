"""What is tried: methods by their short names, in the order in which a short budget takes them, and variations of a good one.

Adding a method or a variation is a line here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from statprune.grammar import write_method
from statprune.model.schedule import Schedule
from statprune.recipe import Recipe

BASELINES = ("wanda", "cvr+energy", "sparsegpt")
"""Measured to the end whatever the budget: the field's usual baseline, the paper's method, and the strongest known."""

BASELINE_SCHEDULE: Schedule = "block"
"""The published protocol of Wanda and SparseGPT."""

METHODS = (
    "cvr+least-squares", "ria+least-squares", "wanda+least-squares", "optimal-brain+least-squares", "cvr+activation-energy",
    "ria+energy", "wanda+energy", "optimal-brain+energy", "cvr", "ria", "optimal-brain", "ria+activation-energy",
    "wanda+activation-energy", "optimal-brain+activation-energy", "sparsegpt",
)  # fmt: skip
"""The most promising first, as measured on one small LLaMA."""

KNOWN_GOOD = ("cvr+least-squares:steps=15", "cvr+least-squares")
"""The first is tried right after the baselines: on two small models of two families it lost least at every sparsity. The others
are tried where the budget is too small to look for something better."""

SCHEDULES: tuple[Schedule, ...] = ("block", "walk", "one-shot")
"""Tried with the methods that one-shot statistics have found good; the last only with the best."""

VARIATIONS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "least-squares": {"steps": (15, 40), "damping": (0.1, 0.001)},
    "activation-energy": {"strength": (0.5,)},
    "energy": {"strength": (0.5,)},
    "cvr": {"alpha": (0.0, 0.25, 1.0), "exponent": (0.5,)},
    "ria": {"exponent": (0.25, 1.0)},
    "optimal-brain": {"damping": (0.1,)},
}
"""Other values of settings, by the name of the part that has them, the most promising first; each is tried alone."""

ALLOCATIONS = ("sensitivity", "owl")
"""Tried with the best method and a schedule of its own, where the pattern is unstructured: with N:M patterns an allocation
prunes fewer weights, and does not compare."""


def variations(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with one setting changed, for every setting in `VARIATIONS` of its parts."""
    parts = [recipe.criterion, *recipe.compensation]
    for name, settings in VARIATIONS.items():
        for index, part in enumerate(parts):
            for setting, value in ((setting, value) for setting, values in settings.items() for value in values):
                if part["name"] == name and part[setting] != value:
                    changed = [*parts[:index], {**part, setting: value}, *parts[index + 1 :]]
                    yield replace(recipe, method=write_method(changed[0], changed[1:]))


def allocations(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with every other allocation that prunes as many weights."""
    if recipe.build_pattern().is_unstructured:
        yield from (replace(recipe, allocation=name) for name in ALLOCATIONS if recipe.allocation != name)
