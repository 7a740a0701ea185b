"""How a recipe's parts are written: short texts for people, mappings with every setting for files, and the way between them.

wanda                           a criterion
cvr+energy                      a criterion, and a compensation of what it leaves
sparsegpt+energy                a pruner that chooses and updates at once, and a compensation on top
cvr+least-squares+energy        several compensations, one after the other
best                            a preset, which stands alone, for a whole recipe
cvr:alpha=0.25+energy:column    with settings: NAME=VALUE, or the bare name of a switch, which turns the other switches off
50%   2:4   50%:rank_over=layer                 patterns
uniform   owl:spread=0.1                        allocations
pruned   dense:share=0.5                        targets

text  ->  read_method, read_pattern, complete  ->  {"name": "cvr", "alpha": 0.25, "exponent": 0.25, "eps": 1e-08}
text  <-  write_method, write_pattern, write   <-
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import yaml

from statprune.errors import RecipeError, nearest, shown
from statprune.methods.bounds import bounds_in, is_finite
from statprune.methods.patterns import PATTERNS, SHORTHAND_HELP, ModelPattern, parse_shorthand
from statprune.methods.registry import NAME, kind_of, known_compensations, known_criteria, settings_of, usual_ranking
from statprune.presets import PRESETS
from statprune.strict_yaml import YamlDumper, load, problem

Part = str | Mapping[str, Any]
"""A name, with settings or without (`"cvr:alpha=0.25"`), or a mapping with `name` and the settings."""

Whole = dict[str, Any]
"""A part as a mapping with its `name` and every setting."""


LONGEST = 10_000
"""Characters in a part's text, and settings in its mapping."""

MOST_COMPENSATIONS = 16


def read_method(method: object) -> tuple[Whole, list[Whole]]:
    """A method's short name as (criterion, compensations), with every setting; `none` is no compensation.

    Raises:
        RecipeError: it is not of the form `CRITERION[:SETTINGS][+COMPENSATION[:SETTINGS]]...`, or a name or setting does not
            exist.
    """
    check_length("method", method)
    # A plus inside of a number (1e+3) separates nothing.
    parts = re.split(r"\+(?=[A-Za-z])", method) if isinstance(method, str) else []
    if not parts or not all(re.fullmatch(rf"{NAME}(:.+)?", part, re.DOTALL) for part in parts):
        raise RecipeError(
            f"The method {shown(method)} is not understood: expected CRITERION or CRITERION+COMPENSATION, each with settings "
            "or without, such as 'wanda', 'cvr+energy' or 'cvr:alpha=0.25+energy:column'."
        )
    if len(parts) == 1 and (name := parts[0].partition(":")[0]) not in PRESETS:
        one_of("criterion", name, {**known_criteria(), **PRESETS})
    return complete_parts(parts[0], parts[1:])


def complete_parts(criterion: Part, compensation: Part | Sequence[Part]) -> tuple[Whole, list[Whole]]:
    """A criterion and one or several compensations, as texts or mappings, with every setting; `none` is no compensation.

    Raises:
        RecipeError: a name or setting does not exist, or the criterion is a preset.
    """
    named = criterion.get("name") if isinstance(criterion, Mapping) else criterion
    name = named.partition(":")[0] if isinstance(named, str) else named
    if isinstance(name, str) and name in PRESETS:
        raise RecipeError(
            f"{name!r} is a preset, which stands for a whole recipe: give it alone, as the method, without settings or "
            f"compensations. To change its method, spell that out: {PRESETS[name].method!r}."
        )
    several = isinstance(compensation, Sequence) and not isinstance(compensation, str)
    given = list(compensation) if several else [compensation]
    if len(given) > MOST_COMPENSATIONS:
        raise RecipeError(f"A method with {len(given):,} compensations: expected at most {MOST_COMPENSATIONS}.")
    completed = [complete("compensation", part, known_compensations()) for part in given]
    return complete("criterion", criterion, known_criteria()), [part for part in completed if part["name"] != "none"]


def write_method(criterion: Whole, compensations: Sequence[Whole]) -> str:
    """The short name of completed parts, with what is not a default; `read_method` gives them back."""
    return "+".join([write(criterion, known_criteria()), *(write(part, known_compensations()) for part in compensations)])


def read_pattern(part: object) -> Whole:
    """A pattern's text or mapping with the settings that it has; what unstructured weights compete in may be left open.

    Raises:
        RecipeError: it is no pattern.
    """
    if isinstance(part, int | float):
        raise RecipeError(
            f"Recipe(pattern={shown(part)}): expected {SHORTHAND_HELP}. In YAML, quote it: an unquoted 2:4 is a number to YAML."
        )
    given = part
    if isinstance(part, str):
        check_length("pattern", part)
        if part in PATTERNS:
            raise RecipeError(f"Recipe(pattern={shown(part)}) needs numbers: {SHORTHAND_HELP}.")
        numbers, settings = _split_pattern(part)
        try:
            pattern = parse_shorthand(numbers)
        except ValueError as e:
            raise RecipeError(f"Recipe(pattern={shown(part)}): {e}") from e
        if pattern is None:
            raise RecipeError(f"Recipe(pattern={shown(part)}): expected {SHORTHAND_HELP}, or a mapping with a 'name'.")
        name = _name_of(pattern)
        values = {key: getattr(pattern, key) for key in _NUMBERS[name]}
        others = _read("pattern", f"{name}:{settings}", PATTERNS)
        if twice := [key for key in values if key in others]:
            raise RecipeError(f"Recipe(pattern={shown(part)}): {numbers!r} says {' and '.join(twice)} already. Leave them out.")
        given = {**others, **values}
    whole = complete("pattern", given, PATTERNS)
    try:
        PATTERNS[whole["name"]](**split(whole)[1])
    except (ValueError, TypeError) as e:
        raise RecipeError(f"Recipe(pattern={shown(part)}): {e}") from e
    is_open = isinstance(given, Mapping) and "rank_over" not in given
    return {key: value for key, value in whole.items() if not (is_open and key == "rank_over")}


def complete_pattern(pattern: Whole, criterion: str) -> Whole:
    """The same with what was left open, which is what the criterion has by default."""
    is_open = pattern["name"] == "unstructured" and "rank_over" not in pattern
    return {**pattern, "rank_over": usual_ranking(criterion)} if is_open else pattern


def write_pattern(pattern: Whole, criterion: str | None = None) -> str:
    """The text of a pattern; what is the criterion's default is left out, where there is a criterion."""
    name, settings = split(pattern)
    text = _percent(settings["sparsity"]) if name == "unstructured" else f"{settings['keep']}:{settings['of']}"
    usual = {"rank_over": usual_ranking(criterion)} if criterion is not None else {}
    words = [
        f"{key}={_text(value)}" for key, value in settings.items() if key not in _NUMBERS[name] and usual.get(key) != value
    ]
    return f"{text}:{','.join(words)}" if words else text


def split(part: Whole) -> tuple[str, dict[str, Any]]:
    """A completed part as its name and its settings."""
    return part["name"], {key: value for key, value in part.items() if key != "name"}


def check_length(key: str, text: object) -> None:
    """Raise RecipeError for a text that is longer than any part's, before it is looked into."""
    if isinstance(text, str) and len(text) > LONGEST:
        raise RecipeError(f"Recipe({key}=...) has {len(text):,} characters: expected at most {LONGEST:,}.")


def one_of(key: str, value: object, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raise RecipeError, with the nearest known name, where the value is none of them."""
    if value not in known:
        raise RecipeError(f"Recipe({key}={shown(value)}) does not exist.{nearest(value, known)} Known: {', '.join(known)}.")


def complete(key: str, part: object, known: Mapping[str, Callable[..., Any]]) -> Whole:
    """A part with its name checked and every setting spelled out, defaults included.

    Raises:
        RecipeError: no such name or setting, a setting is missing, or a value is of another kind than the setting, not finite
            or outside of the bounds that the setting declares.
    """
    given = _read(key, part, known) if isinstance(part, str) else dict(part) if isinstance(part, Mapping) else {}
    if not isinstance(given.get("name"), str):
        raise RecipeError(
            f"Recipe({key}={shown(part)}): expected a name or a mapping with a 'name'. Known: {', '.join(known)}."
        )
    name = given["name"]
    one_of(key, name, known)
    defaults = settings_of(known[name])
    for setting in given:
        if setting != "name" and setting not in defaults:
            raise RecipeError(
                f"The {key} {name!r} has no setting {shown(setting)}.{nearest(setting, defaults)} "
                f"Its settings are {', '.join(defaults) or 'none'}."
            )
    for setting in defaults.keys() & given.keys():
        kind = kind_of(known[name], setting)
        bounds = bounds_in(known[name]).get(setting)
        expected = _mismatch(given[setting], kind)
        if expected is None and bounds is not None and not bounds.holds(given[setting]):
            expected = str(bounds)
        if expected is not None:
            raise RecipeError(f"The {key} {name!r} has {setting}={shown(given[setting])}: expected {expected}.")
    whole = {"name": name, **{setting: given.get(setting, default) for setting, default in defaults.items()}}
    if missing := [setting for setting, value in whole.items() if value is inspect.Parameter.empty]:
        raise RecipeError(f"The {key} {name!r} needs {', '.join(missing)}.")
    return {setting: list(value) if isinstance(value, tuple) else value for setting, value in whole.items()}


def write(part: Whole, known: Mapping[str, Callable[..., Any]]) -> str:
    """A completed part as text: the name, and the settings that are not the default."""
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


_NUMBERS = {"unstructured": ("sparsity",), "nm": ("keep", "of")}
"""The settings that a pattern's shorthand is made of."""


def _split_pattern(text: str) -> tuple[str, str]:
    """`50%:rank_over=layer` as `50%` and `rank_over=layer`; the colon of 2:4 stands between two numbers."""
    found = re.fullmatch(r"([^:]*%|[^:]*:[^:]*)(?::(.*))?", text)
    return (found[1], found[2] or "") if found else (text, "")


def _name_of(pattern: ModelPattern) -> str:
    return next(name for name, kind in PATTERNS.items() if type(pattern) is kind)


def _percent(sparsity: float) -> str:
    """The percentage that reads back as this fraction."""
    text = f"{Decimal(repr(float(sparsity))) * 100:f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def _mismatch(value: object, kind: type | None) -> str | None:
    """What was expected, where a value is of another kind than its setting."""
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) and (kind is None or kind in (int, float)):
        return "a number, not true or false"
    if not is_finite(value):
        return "finite numbers" if isinstance(value, tuple | list) else "a finite number"
    if kind is int and not isinstance(value, int):
        return "a whole number"
    if kind is float and not isinstance(value, int | float):
        return "a number"
    if kind in (tuple, list) and not isinstance(value, tuple | list):
        return "a list"
    if kind is str and not isinstance(value, str):
        return "a text"
    return None


def _read(key: str, text: str, known: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """`NAME:SETTING=VALUE,...` as a mapping."""
    check_length(key, text)
    name, _, rest = text.partition(":")
    one_of(key, name, known)
    defaults = settings_of(known[name])
    switches = [setting for setting, default in defaults.items() if isinstance(default, bool)]
    given: dict[str, Any] = {"name": name}
    seen: set[str] = set()
    for item in re.split(r",(?![^\[]*\])", rest) if rest else []:  # not at the comma inside of [0.5, 2]
        setting, equals, value = (word.strip() for word in item.partition("="))
        if setting == "name" and equals:
            raise RecipeError(f"The {key} {name!r} has no setting 'name'. Its settings are {', '.join(defaults) or 'none'}.")
        if setting in seen:
            raise RecipeError(f"Recipe({key}={shown(text)}): {setting!r} is given twice.")
        seen.add(setting)
        if equals:
            given[setting] = _value(text, value)
        elif setting in switches:
            # 'energy:column' is the column step alone.
            given = {**dict.fromkeys(switches, False), **given, setting: True}
        else:
            raise RecipeError(
                f"Recipe({key}={shown(text)}): {setting!r} is no switch.{nearest(setting, switches)} Expected NAME=VALUE"
                + (f", or one of {', '.join(switches)}." if switches else ".")
                + f" The settings of {name} are {', '.join(defaults) or 'none'}."
            )
    return given


def _value(text: str, value: str) -> Any:
    try:
        return load(value)
    except yaml.YAMLError as e:
        raise RecipeError(f"In {shown(text)}, {shown(value)} is no value: {problem(e)}.") from e


def _text(value: Any) -> str:
    """YAML on one line; `_value` reads it back."""
    return yaml.dump(value, Dumper=YamlDumper, default_flow_style=True, width=math.inf).splitlines()[0]
