"""Methods as data: what there is by name, and the short names in which a recipe, a command or an experiment asks for it.

    wanda                           a criterion
    cvr+energy                      a criterion, and a compensation of what it leaves
    sparsegpt+energy                a pruner that chooses and updates at once, and a compensation on top
    cvr+least-squares+energy        several compensations, one after the other
    cvr:alpha=0.25+energy:column    with settings: NAME=VALUE, or the bare name of a switch, which turns the other switches off

Packages of others add names through entry points, in the groups `statprune.criteria` (functions like those in `criteria`),
`statprune.pruners` (classes like `SparseGPT`: a pattern and settings in, a WeightPruner out) and `statprune.compensations`
(functions like those in `compensation`, or classes like `LeastSquares`: settings in, such a function out).
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

import yaml
from torch import Tensor

from statprune.errors import RecipeError, nearest
from statprune.methods.compensations import COMPENSATIONS
from statprune.methods.criteria import CRITERIA
from statprune.methods.patterns import Pattern, Unstructured
from statprune.methods.pruner import CompensatedPruner, MaskPruner, WeightPruner
from statprune.methods.sparsegpt import SparseGPT

Part = str | Mapping[str, Any]
"""A name, with settings or without (`"cvr:alpha=0.25"`), or a mapping with `name` and the settings."""

PRUNERS: dict[str, Callable[..., WeightPruner]] = {"sparsegpt": SparseGPT}
"""Pruners that choose and update at once, by the name a recipe uses."""

AUTO = "auto"
"""The criterion of a recipe that is yet to be chosen, by trying out others (see `tuning`)."""


def auto(*, minutes: float = 10.0) -> None:
    """The settings of `auto`: the minutes that trying out may take.

    Raises:
        ValueError: no minutes.
    """
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < math.inf:
        raise ValueError(f"auto(minutes={minutes}): expected a number above 0.")


class YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-8 is a number; YAML 1.1 asks for a dot, 1.0e-8, and reads the rest as text."""


class _YamlDumper(yaml.SafeDumper):
    """Quotes the text that YamlLoader would take for a number."""


for _kind in (YamlLoader, _YamlDumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


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


def _installed(group: str, others: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for entry in entry_points(group=group):
        taken = (
            {**CRITERIA, **PRUNERS, AUTO: auto, **others, **found}
            if group != "statprune.compensations"
            else {**COMPENSATIONS, **found}
        )
        origin = f"The entry point {entry.name!r} = {entry.value!r} in {group} (package {entry.dist and entry.dist.name})"
        if entry.name in taken or not re.fullmatch(_NAME, entry.name):
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


def build_pruner(criterion: Mapping[str, Any], pattern: Pattern, compensations: Sequence[Mapping[str, Any]]) -> WeightPruner:
    """The pruner for completed parts (see `complete`)."""
    name, settings = split(criterion)
    pruner: WeightPruner = (
        known_pruners()[name](pattern, **settings)
        if name in known_pruners()
        else MaskPruner(functools.partial(known_criteria()[name], **settings), pattern)
    )
    for compensation in compensations or [{"name": "none"}]:
        pruner = CompensatedPruner(pruner, build_compensation(compensation))
    return pruner


def build_compensation(part: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The function for a completed part."""
    name, settings = split(part)
    known = known_compensations()[name]
    return known(**settings) if isinstance(known, type) else functools.partial(known, **settings)


def usual_ranking(criterion: str) -> str | None:
    """What unstructured weights compete in where the pattern does not say: the output row, or what a pruner of its own does.

    None for `auto`: that is for the method that will be chosen.
    """
    if criterion == AUTO:
        return None
    return Unstructured.rank_over if criterion not in known_pruners() else "layer"


def parse(method: str) -> tuple[Part, list[Part]]:
    """A method's short name as (criterion, compensations).

    Raises:
        RecipeError: it is not of the form `CRITERION[:SETTINGS][+COMPENSATION[:SETTINGS]]...`.
    """
    # A plus inside of a number (1e+3) separates nothing.
    parts = re.split(r"\+(?=[A-Za-z])", method) if isinstance(method, str) else []
    if not parts or not all(re.fullmatch(rf"{_NAME}(:.+)?", part, re.DOTALL) for part in parts):
        raise RecipeError(
            f"The method {method!r} is not understood: expected CRITERION or CRITERION+COMPENSATION, each with settings or "
            "without, such as 'wanda', 'cvr+energy' or 'cvr:alpha=0.25+energy:column'."
        )
    return parts[0], list(parts[1:])


def format_method(criterion: Mapping[str, Any], compensations: Sequence[Mapping[str, Any]]) -> str:
    """The short name of completed parts; `parse` gives them back."""
    return "+".join(
        [
            _format(criterion, {**known_criteria(), AUTO: auto}),
            *(_format(part, known_compensations()) for part in compensations),
        ]
    )


def split(part: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A completed part as its name and its settings."""
    return part["name"], {key: value for key, value in part.items() if key != "name"}


def one_of(key: str, value: object, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raise RecipeError, with the nearest known name, where the value is none of them."""
    if value not in known:
        raise RecipeError(f"Recipe({key}={value!r}) does not exist.{nearest(str(value), known)} Known: {', '.join(known)}.")


def complete(key: str, part: object, known: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """A part with its name checked and every setting spelled out, defaults included.

    Raises:
        RecipeError: no such name or setting, or a setting is missing.
    """
    given = _read(key, part, known) if isinstance(part, str) else dict(part) if isinstance(part, Mapping) else {}
    if not isinstance(given.get("name"), str):
        raise RecipeError(f"Recipe({key}={part!r}): expected a name or a mapping with a 'name'. Known: {', '.join(known)}.")
    one_of(key, given["name"], known)
    defaults = _settings(known[given["name"]])
    for setting in given:
        if setting != "name" and setting not in defaults:
            raise RecipeError(
                f"The {key} {given['name']!r} has no setting {setting!r}.{nearest(str(setting), defaults)} "
                f"Its settings are {', '.join(defaults) or 'none'}."
            )
    for setting, default in defaults.items():
        if isinstance(default, bool) and not isinstance(given.get(setting, default), bool):
            raise RecipeError(f"The {key} {given['name']!r} has {setting}={given[setting]!r}: expected true or false.")
    whole = {"name": given["name"], **{name: given.get(name, default) for name, default in defaults.items()}}
    if missing := [name for name, value in whole.items() if value is inspect.Parameter.empty]:
        raise RecipeError(f"The {key} {given['name']!r} needs {', '.join(missing)}.")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in whole.items()}


_NAME = r"[A-Za-z][\w-]*"


def _settings(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults: keyword-only arguments of a function; fields of a class, but the pattern that a pruner gets."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY or (isinstance(function, type) and parameter.name != "pattern")
    }


def _read(key: str, text: str, known: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """`NAME:SETTING=VALUE,...` as a mapping."""
    name, _, rest = text.partition(":")
    one_of(key, name, known)
    defaults = _settings(known[name])
    switches = [setting for setting, default in defaults.items() if isinstance(default, bool)]
    given: dict[str, Any] = {"name": name}
    seen: set[str] = set()
    for item in re.split(r",(?![^\[]*\])", rest) if rest else []:  # not at the comma inside of [0.5, 2]
        setting, equals, value = (word.strip() for word in item.partition("="))
        if setting == "name" and equals:
            raise RecipeError(f"The {key} {name!r} has no setting 'name'. Its settings are {', '.join(defaults) or 'none'}.")
        if setting in seen:
            raise RecipeError(f"Recipe({key}={text!r}): {setting!r} is given twice.")
        seen.add(setting)
        if equals:
            given[setting] = _value(text, value)
        elif setting in switches:
            # 'energy:column' is the column step alone.
            given = {**dict.fromkeys(switches, False), **given, setting: True}
        else:
            raise RecipeError(
                f"Recipe({key}={text!r}): {setting!r} is no switch.{nearest(setting, switches)} Expected NAME=VALUE"
                + (f", or one of {', '.join(switches)}." if switches else ".")
                + f" The settings of {name} are {', '.join(defaults) or 'none'}."
            )
    return given


def _value(text: str, value: str) -> Any:
    try:
        return yaml.load(value, Loader=YamlLoader)
    except yaml.YAMLError as e:
        raise RecipeError(f"In {text!r}, {value!r} is no value: {str(e).splitlines()[0]}.") from e


def _format(part: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]) -> str:
    """The name, and the settings that are not the default."""
    name, settings = split(part)
    usual = complete("part", {"name": name}, known)
    changed = {key: value for key, value in settings.items() if value != usual[key]}
    switches = [key for key, value in usual.items() if isinstance(value, bool)]
    words = []
    if any(key in changed for key in switches):
        on = [key for key in switches if settings[key]]
        words = on or [f"{key}=false" for key in switches]
        changed = {key: value for key, value in changed.items() if key not in switches}
    words += [f"{key}={_text(value)}" for key, value in changed.items()]
    return f"{name}:{','.join(words)}" if words else name


def _text(value: Any) -> str:
    """YAML on one line; `_value` reads it back."""
    return yaml.dump(value, Dumper=_YamlDumper, default_flow_style=True, width=math.inf).splitlines()[0]
