"""Recipe: which criterion, which pattern, which compensation, on which weights, in which order.

A recipe is plain data, the same in Python, in YAML and in `pruning.json`. Each part is a name, or a mapping with the
name and its settings; the settings are the keyword arguments of the function that the name stands for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from statprune.errors import RecipeError, nearest
from statprune.grammar import (
    AUTO,
    Part,
    YamlLoader,
    auto,
    build_pruner,
    complete,
    format_method,
    known_compensations,
    known_criteria,
    one_of,
    parse,
    split,
    usual_ranking,
)
from statprune.methods.budget import ALLOCATIONS, AllocationRule
from statprune.methods.patterns import NM, PATTERNS, SHORTHAND_HELP, Pattern, Unstructured, parse_shorthand
from statprune.methods.pruner import WeightPruner
from statprune.methods.statistics import InputMoments

Schedule = Literal["walk", "block", "one-shot"]
SCHEDULES = ("walk", "block", "one-shot")
ON_INDIVISIBLE = ("error", "skip")


@dataclass(frozen=True)
class Recipe:
    """How to prune. Bad values are refused here, before a model is touched.

    Raises:
        RecipeError: a name or a setting does not exist, or a value is out of range.
    """

    criterion: Part = "cvr"
    """`"magnitude"`, `"wanda"`, `"ria"`, `"z-pruner"`, `"cvr"`, or `"sparsegpt"`, which also updates what it keeps. With
    settings `"cvr:alpha=0.25"`, or a mapping such as `{"name": "cvr", "alpha": 0.25}`. `"auto"`, or `"auto:minutes=5"`: the
    criterion, the compensation and the schedule are chosen by trying them out on the calibration batches (see `tune`); the
    recipe's own compensation and schedule then do not count."""

    pattern: Part = "2:4"
    """`"50%"`, `"2:4"`, or a mapping such as `{"name": "unstructured", "sparsity": 0.5, "rank_over": "row"}` or
    `{"name": "nm", "keep": 2, "of": 4}`. Unstructured weights compete within their output row where `rank_over` does not say
    otherwise, and with sparsegpt within a block of columns."""

    compensation: Part | Sequence[Part] = "energy"
    """`"none"`, `"energy"`, `"activation-energy"` or `"least-squares"`, with settings `"energy:column"`, or a mapping such as
    `{"name": "energy", "clamp": [0.5, 2.0]}`; or a list of these, which are applied one after the other."""

    schedule: Schedule = "walk"
    """`"walk"`: each layer's statistics already see all pruned layers before it. `"block"`: those in the blocks before its own,
    as Wanda's and SparseGPT's code has it. `"one-shot"`: all see the dense model. `"block"` takes two forward passes over
    the calibration batches, the others one."""

    targets: Sequence[str] | None = None
    """Globs on names, such as `"model.layers.*.mlp.*"`; `*` also crosses dots. None: every linear layer except the
    output layer and weights that are read in more than one place. A name that is matched here is pruned even so."""

    ignore: Sequence[str] = field(default=())
    """Globs on names to leave dense; they win over `targets`."""

    on_indivisible: Literal["error", "skip"] = "error"
    """What to do with a layer whose width an N:M pattern does not divide: refuse, or leave it dense and report it."""

    allocation: Part = "uniform"
    """How the sparsity is shared out: `"uniform"`, every layer alike; `"owl"`, blocks with more outliers keep more;
    `"sensitivity"`, by the measured harm of pruning each layer. With settings `"owl:spread=0.1"`, or a mapping. An unstructured
    pattern's sparsity is then that of all weights together. With an N:M pattern `{"name": "owl", "sparsity": 0.4}` says which
    fraction of the weights is to be zero, and the allocation which layers stay dense."""

    def __post_init__(self) -> None:
        if not _are_names(() if self.targets is None else self.targets) or not _are_names(self.ignore):
            raise RecipeError(
                f"Recipe(targets={self.targets!r}, ignore={self.ignore!r}): expected lists of names, such as ['*.mlp.*']."
            )
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("on_indivisible", self.on_indivisible, ON_INDIVISIBLE)
        # Frozen: settings are completed once, so that two ways to write a recipe compare and save as one.
        object.__setattr__(self, "targets", None if self.targets is None else tuple(self.targets))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "criterion", complete("criterion", self.criterion, {**known_criteria(), AUTO: auto}))
        object.__setattr__(self, "pattern", _complete_pattern(self.pattern, usual_ranking(split(self._criterion)[0])))
        # "energy" is the field's default, which nobody may have asked for.
        compensation = "none" if self.is_auto and self.compensation == "energy" else self.compensation
        object.__setattr__(self, "compensation", _complete_compensations(compensation))
        object.__setattr__(self, "allocation", complete("allocation", self.allocation, ALLOCATIONS))
        self._try_out()
        self._check_allocation()

    @classmethod
    def parse(cls, method: str, **others: Any) -> "Recipe":
        """A recipe from a method's short name, such as `"cvr+energy"` or `"cvr:alpha=0.25+energy:column"`; the rest by keyword.

        Raises:
            RecipeError: as the constructor.
        """
        criterion, compensations = parse(method)
        return cls(criterion=criterion, compensation=compensations, **others)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """A recipe from plain data, as YAML and `pruning.json` hold it; `method: cvr+energy` may stand for its two parts."""
        known = [*(part.name for part in fields(cls)), "method"]
        for key in data:
            if key not in known:
                raise RecipeError(f"Recipe has no key {key!r}.{nearest(str(key), known)} The keys are {', '.join(known)}.")
        if "method" not in data:
            return cls(**data)
        if {"criterion", "compensation"} & data.keys():
            raise RecipeError("Recipe: `method` stands for `criterion` and `compensation`; expected the one or the others.")
        return cls.parse(**data)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file."""
        try:
            data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=YamlLoader)
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
    def is_auto(self) -> bool:
        """Whether the method is yet to be chosen."""
        return bool(self._criterion["name"] == AUTO)

    @property
    def method(self) -> str:
        """The short name, with what is not a default: `"cvr+energy"`; `Recipe.parse` takes it."""
        return format_method(self._criterion, self._compensations)

    def build_pattern(self) -> Pattern:
        """The pattern object."""
        assert isinstance(self.pattern, Mapping)
        name, settings = split(self.pattern)
        pattern: Pattern = PATTERNS[name](**settings)
        return pattern

    def build_allocation(self) -> AllocationRule:
        """The allocation object."""
        assert isinstance(self.allocation, Mapping)
        name, settings = split(self.allocation)
        return ALLOCATIONS[name](**settings)

    def pruner(self, pattern: Pattern | None = None) -> WeightPruner:
        """The function that prunes one weight, with a pattern of its own where an allocation gives it one.

        Raises:
            RecipeError: the recipe is `auto`, and no method was chosen yet.
        """
        if self.is_auto:
            raise RecipeError(
                f"Recipe(criterion={self.method!r}) names no method yet: expected one such as 'cvr', or the recipe that "
                "statprune.tune chooses for this model. statprune.prune and plan, the callback and the command choose it."
            )
        return build_pruner(self._criterion, pattern or self.build_pattern(), self._compensations)

    @property
    def _criterion(self) -> Mapping[str, Any]:
        assert isinstance(self.criterion, Mapping)
        return self.criterion

    @property
    def _compensations(self) -> list[Mapping[str, Any]]:
        """As they are applied, without `none`."""
        parts = [self.compensation] if isinstance(self.compensation, Mapping) else self.compensation
        return [part for part in parts if isinstance(part, Mapping) and part["name"] != "none"]

    def _try_out(self) -> None:
        """Prune a weight of one row, so that a value out of range is refused now and not in the middle of a model."""
        try:
            width = getattr(self.build_pattern(), "of", 2)
            if self.is_auto:
                auto(**split(self._criterion)[1])
                if self._compensations:
                    raise ValueError("auto chooses the compensation itself: leave it out.")
                return
            moments = InputMoments.zeros(width, gram=True).add(torch.eye(width)).add(-torch.eye(width))
            self.pruner()(torch.linspace(1.0, 2.0, width)[None], moments)
        except (ValueError, TypeError) as e:
            raise RecipeError(
                f"Recipe(criterion={self.criterion}, pattern={self.pattern}, compensation={self.compensation}): {e}"
            ) from e

    def _check_allocation(self) -> None:
        try:
            rule, pattern = self.build_allocation(), self.build_pattern()
        except (ValueError, TypeError) as e:
            raise RecipeError(f"Recipe(allocation={self.allocation}): {e}") from e
        assert isinstance(self.allocation, Mapping)
        name, sparsity = self.allocation["name"], getattr(rule, "sparsity", None)
        if name == "uniform":
            return
        if self.is_auto:
            raise RecipeError(
                f"Recipe(criterion={self.method!r}, allocation={name!r}): `auto` tries allocations itself. Leave it out, or "
                "name a method."
            )
        if isinstance(pattern, NM) and not 0 < (sparsity or 0) <= 1 - pattern.keep / pattern.of:
            raise RecipeError(
                f"Recipe(pattern='{pattern}', allocation={name!r}) with sparsity={sparsity}: with {pattern} every layer that "
                "is pruned is equally sparse, and the allocation chooses the ones that stay dense. Expected a sparsity of all "
                f"of them together, up to {1 - pattern.keep / pattern.of:g}, such as '{name}:sparsity=0.1'."
            )
        if isinstance(pattern, Unstructured) and sparsity is not None:
            raise RecipeError(
                f"Recipe(pattern='{pattern}', allocation={name!r}) with sparsity={sparsity}: the pattern says it already. "
                "Leave the allocation's out; it is for N:M patterns."
            )


Method = str | Mapping[str, Any]
"""A short name such as `"cvr+energy"`, or a mapping with `method` or else `criterion` and `compensation`, and perhaps a `label`
to show it by, a `schedule` and an `allocation`."""


def labelled(method: Method, **others: Any) -> tuple[str, Recipe]:
    """A method's label and its recipe; the recipe's other fields by keyword, which the method's own win over.

    Raises:
        RecipeError: the mapping has other keys; or as the recipe.
    """
    if isinstance(method, str):
        return method, Recipe.parse(method, **others)
    settings = {key: value for key, value in method.items() if key not in ("label", "method")}
    allowed = {"schedule", "allocation"} | (set() if "method" in method else {"criterion", "compensation"})
    if not set(settings) <= allowed:
        raise RecipeError(
            f"The method {dict(method)} has the keys {', '.join(map(str, method))}: expected `method`, or else `criterion` and "
            "`compensation`; and perhaps `label`, `schedule` and `allocation`."
        )
    others = {**others, **settings}
    recipe = Recipe.parse(method["method"], **others) if "method" in method else Recipe(**others)
    assert isinstance(recipe.allocation, Mapping)
    allocation = recipe.allocation["name"]
    usual = recipe.method if allocation == "uniform" else f"{recipe.method} ({allocation})"
    return str(method.get("label", usual)), recipe


def _are_names(names: object) -> bool:
    return isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def _complete_pattern(part: Part, rank_over: str | None) -> dict[str, Any]:
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
        settings = {"sparsity": pattern.sparsity} if isinstance(pattern, Unstructured) else asdict(pattern)  # type: ignore[call-overload]
        part = {"name": _NAME_OF_PATTERN[type(pattern)], **settings}
    if isinstance(part, Mapping) and part.get("name") == "unstructured":
        is_open = rank_over is None and "rank_over" not in part
        completed = complete("pattern", {"rank_over": rank_over or Unstructured.rank_over, **part}, PATTERNS)
        return {key: value for key, value in completed.items() if not (is_open and key == "rank_over")}
    return complete("pattern", part, PATTERNS)


def _complete_compensations(given: Part | Sequence[Part]) -> dict[str, Any] | list[dict[str, Any]]:
    """One completed part, `none` among them, or a list of several."""
    parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    completed = [complete("compensation", part, known_compensations()) for part in parts]
    applied = [part for part in completed if part["name"] != "none"]
    return applied if len(applied) > 1 else (applied or [{"name": "none"}])[0]


_NAME_OF_PATTERN: dict[type, str] = {pattern: name for name, pattern in PATTERNS.items()}
