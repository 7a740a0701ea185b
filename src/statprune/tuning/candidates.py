"""What is tried: methods by their short names, in the order in which a short budget takes them, and variations of a good one.

Adding a method or a variation is a line here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from statprune.recipe import Recipe, Schedule

BASELINES = ("wanda", "cvr+energy", "sparsegpt")
"""Measured to the end whatever the budget: the field's usual baseline, the paper's method, and the strongest known."""

BASELINE_SCHEDULE: Schedule = "block"
"""The published protocol of Wanda and SparseGPT."""

METHODS = (
    "cvr+least-squares", "ria+least-squares", "wanda+least-squares", "optimal-brain+least-squares", "cvr+activation-energy",
    "ria+energy", "wanda+energy", "optimal-brain+energy", "cvr", "ria", "optimal-brain", "ria+activation-energy",
    "wanda+activation-energy", "optimal-brain+activation-energy", "sparsegpt",
)  # fmt: skip
"""The most promising first, as measured on one small LLaMA. Gradual least squares, which were best there at every pattern and
cost as much as ten of these, are a variation."""

KNOWN_GOOD = ("cvr+least-squares:steps=5", "cvr+least-squares:steps=10", "cvr+least-squares")
"""Tried at once, with the schedule of the baselines, where the budget is too small to look for something better."""

SCHEDULES: tuple[Schedule, ...] = ("block", "walk", "one-shot")
"""Tried with the methods that one-shot statistics have found good; the last only with the best."""

VARIATIONS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "least-squares": {"steps": (5, 10), "damping": (0.1, 0.001)},
    "activation-energy": {"strength": (0.5,)},
    "energy": {"strength": (0.5,)},
    "cvr": {"alpha": (0.0, 0.25, 1.0), "exponent": (0.5,)},
    "ria": {"exponent": (0.25, 1.0)},
    "optimal-brain": {"damping": (0.1,)},
}
"""Other values of settings, by the name of the part that has them, the most promising first; each is tried alone."""

FIELD_VARIATIONS: Mapping[str, tuple[Any, ...]] = {"allocation": ("owl", "sensitivity")}
"""Other values of the recipe's own fields, where it has such a field. Tried with the best method and a schedule of its own."""


def variations(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with one setting changed, for every setting in `VARIATIONS` of its parts."""
    data = recipe.to_dict()
    compensation = data["compensation"]
    parts = [data["criterion"], *(compensation if isinstance(compensation, list) else [compensation])]
    for name, settings in VARIATIONS.items():
        for index, part in enumerate(parts):
            for setting, value in ((setting, value) for setting, values in settings.items() for value in values):
                if part["name"] == name and part[setting] != value:
                    changed = [*parts[:index], {**part, setting: value}, *parts[index + 1 :]]
                    yield Recipe.from_dict({**data, "criterion": changed[0], "compensation": changed[1:]})


def field_variations(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with one field changed, for every field in `FIELD_VARIATIONS` that it has."""
    known = {field.name for field in fields(recipe)}
    for name, values in FIELD_VARIATIONS.items():
        for value in values if name in known else ():
            yield Recipe.from_dict({**recipe.to_dict(), name: value})
