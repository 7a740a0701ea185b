"""Recipe: which criterion, which pattern, which compensation, on which weights, in which order.

A recipe is plain data, the same in Python, in YAML and in `pruning.json`. Each part is a name, or a mapping with the
name and its settings; the settings are the keyword arguments of the function that the name stands for.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from statprune.compensation import COMPENSATIONS
from statprune.criteria import CRITERIA
from statprune.errors import RecipeError, nearest
from statprune.patterns import PATTERNS, SHORTHAND_HELP, Pattern, parse_shorthand
from statprune.pruning import WeightPruner, compose
from statprune.statistics import InputMoments

SCHEDULES = ("walk", "one-shot")
ON_INDIVISIBLE = ("error", "skip")

Part = str | Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How to prune. Bad values are refused here, before a model is touched.

    Raises:
        RecipeError: a name or a setting does not exist, or a value is out of range.
    """

    criterion: Part = "cvr"
    """`"magnitude"`, `"wanda"`, `"cvr"`, or a mapping such as `{"name": "cvr", "alpha": 0.5, "eps": 1e-8}`."""

    pattern: Part = "2:4"
    """`"50%"`, `"2:4"`, or a mapping such as `{"name": "unstructured", "sparsity": 0.5, "rank_over": "row"}` or
    `{"name": "nm", "keep": 2, "of": 4}`."""

    compensation: Part = "energy"
    """`"none"`, `"energy"`, or a mapping such as `{"name": "energy", "clamp": [0.5, 2.0], "strength": 1.0}`."""

    schedule: Literal["walk", "one-shot"] = "walk"
    """`"walk"`: each layer's statistics already see the pruned layers before it. `"one-shot"`: all see the dense model.
    Both take one forward pass over the calibration batches."""

    targets: Sequence[str] | None = None
    """Globs on names, such as `"model.layers.*.mlp.*"`; `*` also crosses dots. None: every linear layer except the
    output layer and weights that are read in more than one place. A name that is matched here is pruned even so."""

    ignore: Sequence[str] = field(default=())
    """Globs on names to leave dense; they win over `targets`."""

    on_indivisible: Literal["error", "skip"] = "error"
    """What to do with a layer whose width an N:M pattern does not divide: refuse, or leave it dense and report it."""

    def __post_init__(self) -> None:
        if not _are_names(() if self.targets is None else self.targets) or not _are_names(self.ignore):
            raise RecipeError(
                f"Recipe(targets={self.targets!r}, ignore={self.ignore!r}): expected lists of names, such as ['*.mlp.*']."
            )
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("on_indivisible", self.on_indivisible, ON_INDIVISIBLE)
        # Frozen: settings are completed once, so that two ways to write a recipe compare and save as one.
        object.__setattr__(self, "targets", None if self.targets is None else tuple(self.targets))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "criterion", _complete("criterion", self.criterion, CRITERIA))
        object.__setattr__(self, "pattern", _complete_pattern(self.pattern))
        object.__setattr__(self, "compensation", _complete("compensation", self.compensation, COMPENSATIONS))
        self._try_out()

    @classmethod
    def parse(cls, method: str, **others: Any) -> "Recipe":
        """A recipe from a method's short name: `"wanda"`, `"cvr+energy"`; the other fields by keyword."""
        criterion, _, compensation = method.partition("+")
        return cls(criterion=criterion, compensation=compensation or "none", **others)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """A recipe from plain data, as YAML and `pruning.json` hold it."""
        known = [part.name for part in fields(cls)]
        for key in data:
            if key not in known:
                raise RecipeError(f"Recipe has no key {key!r}.{nearest(str(key), known)} The keys are {', '.join(known)}.")
        return cls(**data)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file."""
        try:
            data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_YamlLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise RecipeError(f"The recipe {path} cannot be read: {e}") from e
        if not isinstance(data, Mapping):
            raise RecipeError(f"The recipe {path} holds {type(data).__name__}; expected keys such as 'pattern: \"2:4\"'.")
        try:
            return cls.from_dict(data)
        except RecipeError as e:
            raise RecipeError(f"In the recipe {path}: {e}") from e

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every setting spelled out; `Recipe.from_dict` gives an equal recipe back."""
        return {**asdict(self), "targets": None if self.targets is None else list(self.targets), "ignore": list(self.ignore)}

    @property
    def method(self) -> str:
        """The short name, `"cvr+energy"`."""
        criterion, compensation = (_split(part)[0] for part in (self.criterion, self.compensation))
        return criterion if compensation == "none" else f"{criterion}+{compensation}"

    def build_pattern(self) -> Pattern:
        """The pattern object."""
        name, settings = _split(self.pattern)
        pattern: Pattern = PATTERNS[name](**settings)
        return pattern

    def pruner(self) -> WeightPruner:
        """The function that prunes one weight."""
        criterion, criterion_settings = _split(self.criterion)
        compensation, compensation_settings = _split(self.compensation)
        return compose(
            functools.partial(CRITERIA[criterion], **criterion_settings),
            self.build_pattern(),
            functools.partial(COMPENSATIONS[compensation], **compensation_settings),
        )

    def _try_out(self) -> None:
        """Prune a weight of one row, so that a value out of range is refused now and not in the middle of a model."""
        try:
            width = getattr(self.build_pattern(), "of", 2)
            weight = torch.linspace(1.0, 2.0, width)[None]
            self.pruner()(weight, InputMoments.zeros(width).add(weight).add(-weight))
        except (ValueError, TypeError) as e:
            raise RecipeError(
                f"Recipe(criterion={self.criterion}, pattern={self.pattern}, compensation={self.compensation}): {e}"
            ) from e


class _YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-8 is a number; YAML 1.1 asks for a dot, 1.0e-8, and reads the rest as text."""


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _are_names(names: object) -> bool:
    return isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def _one_of(key: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise RecipeError(f"Recipe({key}={value!r}) does not exist.{nearest(str(value), known)} Known: {', '.join(known)}.")


def _split(part: Part) -> tuple[str, dict[str, Any]]:
    """A completed part as its name and its settings."""
    assert isinstance(part, Mapping)
    return part["name"], {key: value for key, value in part.items() if key != "name"}


def _complete(key: str, part: Part, known: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """A part with its name checked and every setting spelled out, defaults included."""
    given = {"name": part} if isinstance(part, str) else dict(part) if isinstance(part, Mapping) else {}
    if not isinstance(given.get("name"), str):
        raise RecipeError(f"Recipe({key}={part!r}): expected a name or a mapping with a 'name'. Known: {', '.join(known)}.")
    _one_of(key, given["name"], list(known))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(known[given["name"]]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or isinstance(known[given["name"]], type)
    }
    for setting in given:
        if setting != "name" and setting not in defaults:
            raise RecipeError(
                f"The {key} {given['name']!r} has no setting {setting!r}.{nearest(str(setting), defaults)} "
                f"Its settings are {', '.join(defaults) or 'none'}."
            )
    complete = {"name": given["name"], **{name: given.get(name, default) for name, default in defaults.items()}}
    if missing := [name for name, value in complete.items() if value is inspect.Parameter.empty]:
        raise RecipeError(f"The {key} {given['name']!r} needs {', '.join(missing)}.")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in complete.items()}


def _complete_pattern(part: Part) -> dict[str, Any]:
    if isinstance(part, int | float):
        raise RecipeError(
            f"Recipe(pattern={part!r}): expected {SHORTHAND_HELP}. In YAML, quote it: an unquoted 2:4 is a number to YAML."
        )
    if isinstance(part, str):
        if part in PATTERNS:
            raise RecipeError(f"Recipe(pattern={part!r}) needs numbers: {SHORTHAND_HELP}.")
        try:
            pattern = parse_shorthand(part)
        except ValueError as e:
            raise RecipeError(f"Recipe(pattern={part!r}): {e}") from e
        if pattern is None:
            raise RecipeError(f"Recipe(pattern={part!r}): expected {SHORTHAND_HELP}, or a mapping with a 'name'.")
        part = {"name": _NAME_OF_PATTERN[type(pattern)], **asdict(pattern)}  # type: ignore[call-overload]
    return _complete("pattern", part, PATTERNS)


_NAME_OF_PATTERN: dict[type, str] = {pattern: name for name, pattern in PATTERNS.items()}
