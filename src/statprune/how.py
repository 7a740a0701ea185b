"""Whatever says how to prune, as a recipe or a search: texts, mappings, files, options, methods with a label."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statprune.errors import RecipeError
from statprune.grammar import complete_parts, read_method, write_method
from statprune.recipe import Recipe, Search, is_auto, load_yaml, scope_to_dict

How = Recipe | Search | str | Mapping[str, Any]
"""A recipe, a search, a method's short name (`"cvr+energy"`, `"auto:minutes=5"`), or a mapping of a recipe's keys."""


def read_how(how: How | None = None, **others: Any) -> Recipe | Search:
    """A recipe or a search from whatever says how to prune.

    Args:
        how: None for the default recipe.
        others: fields by keyword, `criterion` and `compensation` too; they win over `how`, and None stands for nothing given.

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
            f"how={how!r} is a {type(how).__name__}: expected a Recipe, a Search, a method's short name such as 'cvr+energy', "
            "or a mapping of a recipe's keys."
        )
    is_search = isinstance(how, Search) and "method" not in others and "criterion" not in others
    if isinstance(how, Search) and not is_search:
        data.pop("minutes")
    replaced = _in_place_of(data, others)
    if "method" in replaced:
        data = {key: value for key, value in data.items() if key not in ("criterion", "compensation")}
    merged = {**data, **replaced}
    if is_search or is_auto(merged.get("method", merged.get("criterion"))):
        return Search.from_dict(merged)
    return Recipe.from_dict(merged)


def read_yaml(path: str | Path) -> Recipe | Search:
    """A recipe or a search from a YAML file, as `read_how` takes it; errors as for `Recipe.from_yaml`."""
    return load_yaml(path, read_how)


Method = str | Mapping[str, Any]
"""A short name such as `"cvr+energy"`, or a mapping with `method` or else `criterion` and `compensation`, and perhaps a `label`
to show it by, a `schedule` and an `allocation`."""


def labelled(method: Method, **others: Any) -> tuple[str, Recipe | Search]:
    """A method's label, and its recipe or search; the other fields by keyword, which the method's own win over.

    Raises:
        RecipeError: the mapping has other keys; or as the constructors.
    """
    keys = {"method"} if isinstance(method, str) else {key for key in method if key != "label"}
    allowed = {"schedule", "allocation"} | ({"method"} if "method" in keys else {"criterion", "compensation"})
    if not keys <= allowed:
        assert isinstance(method, Mapping)
        raise RecipeError(
            f"The method {dict(method)} has the keys {', '.join(map(str, method))}: expected `method`, or else `criterion` and "
            "`compensation`; and perhaps `label`, `schedule` and `allocation`."
        )
    own = {"method": method} if isinstance(method, str) else {key: method[key] for key in keys}
    if is_auto(own.get("method", own.get("criterion"))):
        others = {key: value for key, value in others.items() if key not in ("schedule", "allocation")}
    how = read_how({**others, **own})
    usual = str(method) if isinstance(method, str) else how.method
    if isinstance(how, Recipe) and how.allocation != "uniform":
        usual = f"{usual} ({how.allocation.partition(':')[0]})"
    return str(method.get("label", usual)) if isinstance(method, Mapping) else usual, how


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
    method = write_method(*complete_parts(parts["criterion"] or "cvr", parts["compensation"] or "none"))
    return {**{key: value for key, value in others.items() if key not in ("criterion", "compensation")}, "method": method}
