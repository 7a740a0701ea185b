"""Whatever says how to prune, as a recipe or a search: texts, mappings, files, options, methods with a label."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statprune.errors import RecipeError, shown
from statprune.grammar import complete_parts, read_method, write_method
from statprune.presets import PRESETS, USUAL_CRITERION
from statprune.recipe import Recipe, Search, is_auto, load_yaml, scope_to_dict

How = Recipe | Search | str | Mapping[str, Any]
"""A recipe, a search, a method's short name (`"best"`, `"cvr+energy"`, `"auto:minutes=5"`), or a mapping of a recipe's keys."""


_OWN = ("schedule", "target", "allocation")
"""What a method may have of its own."""


def read_how(how: How | None = None, **others: Any) -> Recipe | Search:
    """A recipe or a search from whatever says how to prune.

    Args:
        how: None for the default recipe.
        others: fields by keyword, `criterion` and `compensation` too; they win over `how`, and None stands for nothing given.
            A preset among them is a whole recipe, whose schedule, target and allocation win over those of `how` too.

    Raises:
        RecipeError: as the constructors; it is nothing of the kind.
    """
    others = {key: value for key, value in others.items() if value is not None}
    if not others and isinstance(how, Recipe | Search):
        return how
    if isinstance(how, str):
        data: dict[str, Any] = {"method": how}
    elif isinstance(how, Recipe | Search):
        data = scope_to_dict(how)
    elif isinstance(how, Mapping) or how is None:
        data = dict(how or {})
    else:
        raise RecipeError(
            f"how={shown(how)} is a {type(how).__name__}: expected a Recipe, a Search, a method's short name such as 'best', "
            "or a mapping of a recipe's keys."
        )
    is_search = isinstance(how, Search) and "method" not in others and "criterion" not in others
    if isinstance(how, Search) and not is_search:
        data = {key: value for key, value in data.items() if key not in ("minutes", "gradients")}
    replaced = _in_place_of(data, others)
    if "method" in replaced:
        data = {key: value for key, value in data.items() if key not in ("criterion", "compensation")}
    if _is_preset(others.get("method")):
        data = {key: value for key, value in data.items() if key not in _OWN}
    merged = {**data, **replaced}
    if is_search or is_auto(merged.get("method", merged.get("criterion"))):
        return Search.from_dict(merged)
    return Recipe.from_dict(merged)


def read_yaml(path: str | Path) -> Recipe | Search:
    """A recipe or a search from a YAML file, as `read_how` takes it; errors as for `Recipe.from_yaml`."""
    return load_yaml(path, read_how)


Method = str | Mapping[str, Any]
"""A short name such as `"best"` or `"wanda"`, or a mapping with `method` or else `criterion` and `compensation`, and perhaps a
`label` to show it by, a `schedule`, a `target` and an `allocation`."""


def labelled(method: Method, **others: Any) -> tuple[str, Recipe | Search]:
    """A method's label, and its recipe or search; the other fields by keyword, which the method's own win over.

    What a preset has is its own. Its label is its name; another method's says where allocation or target are not the usual.

    Raises:
        RecipeError: the mapping has other keys; or as the constructors.
    """
    keys = {"method"} if isinstance(method, str) else {key for key in method if key != "label"}
    allowed = {*_OWN} | ({"method"} if "method" in keys else {"criterion", "compensation"})
    if not keys <= allowed:
        assert isinstance(method, Mapping)
        raise RecipeError(
            f"The method {dict(method)} has the keys {', '.join(map(str, method))}: expected `method`, or else `criterion` and "
            "`compensation`; and perhaps `label`, `schedule`, `target` and `allocation`."
        )
    own = {"method": method} if isinstance(method, str) else {key: method[key] for key in keys}
    name = own.get("method", own.get("criterion"))
    if is_auto(name) or _is_preset(name):
        others = {key: value for key, value in others.items() if key not in _OWN}
    how = read_how({**others, **own})
    if isinstance(method, Mapping) and "label" in method:
        return str(method["label"]), how
    usual = str(method) if isinstance(method, str) else str(name) if _is_preset(name) else how.method
    if isinstance(how, Recipe):
        told = {"allocation": how.allocation.partition(":")[0], "target": how.target}
        words = [told[key] for key in told if (key in keys if _is_preset(name) else told[key] not in ("uniform", "pruned"))]
        usual += f" ({', '.join(words)})" if words else ""
    return usual, how


def _is_preset(method: object) -> bool:
    return isinstance(method, str) and method in PRESETS


def _in_place_of(data: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The others, with what one part of a method leaves of the other one spelled out."""
    if "method" in others or not {"criterion", "compensation"} & others.keys():
        return dict(others)
    criterion, compensations = data.get("criterion"), data.get("compensation")
    if "method" in data:
        criterion, compensations = read_method(data["method"])
    parts = {"criterion": criterion, "compensation": compensations, **others}
    if is_auto(parts["criterion"]):
        return {**others, "method": parts["criterion"]}
    method = write_method(*complete_parts(parts["criterion"] or USUAL_CRITERION, parts["compensation"] or "none"))
    return {**{key: value for key, value in others.items() if key not in ("criterion", "compensation")}, "method": method}
