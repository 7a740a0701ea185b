"""What there is by name: criteria, pruners and compensations, ours and those of installed packages, and pruners built of them.

Packages of others add names through entry points, in the groups

    statprune.criteria        functions like those in `criteria`
    statprune.pruners         classes like `SparseGPT`: a pattern and settings in, a WeightPruner out
    statprune.compensations   functions like those in `compensations`; classes like `LeastSquares`: settings in, such a function
                              out; or functions `(pruner, *, settings) -> pruner`, which may replace what they follow

The settings of each are its keyword-only arguments, or a class's fields, with the bounds that their annotations declare (see
`bounds`); what it is for is the first line of its docstring.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from statprune.errors import RecipeError
from statprune.methods.compensations import COMPENSATIONS, none
from statprune.methods.criteria import CRITERIA
from statprune.methods.patterns import Pattern, Unstructured
from statprune.methods.pruner import CompensatedPruner, MaskPruner, WeightPruner
from statprune.methods.sparsegpt import SparseGPT

NAME = r"[A-Za-z][\w-]*"

PRUNERS: dict[str, Callable[..., WeightPruner]] = {"sparsegpt": SparseGPT}
"""Pruners that choose and update at once, by the name a recipe uses."""

RESERVED = ("auto", "default", "best", "fast", "paper")
"""Names that no criterion may have: where a method is asked for, they stand for the search for one, and for the presets."""


@functools.cache
def known_criteria() -> dict[str, Callable[..., Any]]:
    """Criteria and pruners by name, those of installed packages included.

    Raises:
        RecipeError: an installed package takes a name that is taken, or its entry point cannot be loaded.
    """
    return {**CRITERIA, **_installed("statprune.criteria", known_pruners()), **known_pruners()}


@functools.cache
def known_pruners() -> dict[str, Callable[..., WeightPruner]]:
    """Pruners that choose and update at once, by name; errors as for `known_criteria`."""
    return {**PRUNERS, **_installed("statprune.pruners")}


@functools.cache
def known_compensations() -> dict[str, Callable[..., Any]]:
    """Compensations by name; errors as for `known_criteria`."""
    return {**COMPENSATIONS, **_installed("statprune.compensations")}


def summary(known: Callable[..., Any]) -> str:
    """What a criterion, a pruner or a compensation is: the first line of its docstring."""
    return (inspect.getdoc(known) or "").partition("\n")[0]


def settings_of(known: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults: keyword-only arguments of a function; fields of a class, but the pattern that a pruner gets.

    A setting that has no default is `inspect.Parameter.empty`.
    """
    return {name: parameter.default for name, parameter in _parameters(known).items()}


def kind_of(known: Callable[..., Any], setting: str) -> type | None:
    """The type of a setting's values, by its default or else by its annotation; None where neither tells."""
    parameter = _parameters(known)[setting]
    if parameter.default is None or parameter.default is parameter.empty:
        annotation = getattr(parameter.annotation, "__origin__", parameter.annotation)  # Annotated with its bounds
        return annotation if annotation in (bool, int, float, str) else None
    return type(parameter.default)


def build_pruner(criterion: Mapping[str, Any], pattern: Pattern, compensations: Sequence[Mapping[str, Any]]) -> WeightPruner:
    """The pruner for parts with a `name` and every setting.

    Raises:
        ValueError: a value is out of range.
    """
    name, settings = _split(criterion)
    pruner: WeightPruner = (
        known_pruners()[name](pattern, **settings)
        if name in known_pruners()
        else MaskPruner(functools.partial(known_criteria()[name], **settings), pattern)
    )
    for compensation in compensations or [{"name": "none"}]:
        pruner = _follow(pruner, *_split(compensation))
    return pruner


def usual_ranking(criterion: str) -> str:
    """What unstructured weights compete in where the pattern does not say: the output row, or what a pruner of its own does."""
    return "layer" if criterion in known_pruners() else Unstructured.rank_over


def _follow(pruner: WeightPruner, name: str, settings: dict[str, Any]) -> WeightPruner:
    known = known_compensations()[name]
    if known is none:
        return pruner
    if isinstance(known, type):
        return CompensatedPruner(pruner, known(**settings))
    if "pruner" in inspect.signature(known).parameters:
        following: WeightPruner = known(pruner, **settings)
        return following
    return CompensatedPruner(pruner, functools.partial(known, **settings))


def _split(part: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return part["name"], {key: value for key, value in part.items() if key != "name"}


def _parameters(known: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(known).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or (isinstance(known, type) and name != "pattern")
    }


def _installed(group: str, others: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for entry in entry_points(group=group):
        taken = (
            {*CRITERIA, *PRUNERS, *RESERVED, *others, *found}
            if group != "statprune.compensations"
            else {*COMPENSATIONS, *found}
        )
        origin = f"The entry point {entry.name!r} = {entry.value!r} in {group} (package {entry.dist and entry.dist.name})"
        if entry.name in taken or not re.fullmatch(NAME, entry.name):
            raise RecipeError(
                f"{origin}: expected a name of letters, digits, - and _ that is not taken. Rename or uninstall it."
            )
        try:
            found[entry.name] = entry.load()
        except Exception as e:  # whatever that package's own code raises
            raise RecipeError(f"{origin} cannot be loaded: {type(e).__name__}: {e}. Repair or uninstall it.") from e
        if not callable(found[entry.name]):
            raise RecipeError(f"{origin} is a {type(found[entry.name]).__name__}: expected a function or class.")
    return found
