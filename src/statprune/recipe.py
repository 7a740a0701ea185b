"""Recipe: which method, which pattern, on which weights, in which order. Search: the same, with the method to be found.

A recipe is total: it can prune. It is plain data, hashable, the same in Python, in YAML and in `pruning.json`: each part is a
text (see `grammar`), and the settings in it are the keyword arguments of the function that its name stands for. What it leaves
open is what the method's preset has (see `presets`), and after construction nothing is open.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml

from statprune.errors import RecipeError, nearest, shown
from statprune.grammar import (
    Whole,
    complete,
    complete_parts,
    complete_pattern,
    one_of,
    read_method,
    read_pattern,
    split,
    write,
    write_method,
    write_pattern,
)
from statprune.methods.bounds import Between, Count, bounds_in, check
from statprune.methods.budget import ALLOCATIONS, AllocationRule, Curves, Sensitivity
from statprune.methods.patterns import NM, PATTERNS, ModelPattern, Pattern
from statprune.methods.pruner import WeightPruner
from statprune.methods.registry import build_pruner, known_compensations, known_criteria
from statprune.methods.statistics import InputMoments, Statistic
from statprune.methods.target import TARGETS, Target
from statprune.model.schedule import SCHEDULES, Schedule
from statprune.presets import DEFAULT, PRESETS, USUAL_CRITERION, Preset
from statprune.strict_yaml import YamlDumper, load, problem

_Read = TypeVar("_Read")

Minutes = Annotated[float, Between(0, 7 * 24 * 60, without=(0,))]

OnIndivisible = Literal["error", "skip"]
ON_INDIVISIBLE = ("error", "skip")

_OPEN: Any = None
"""Of a field that takes what the method's preset has. Afterwards it is a text, which its type says."""

_TRIED_WIDTH = 16
"""Columns of the weight that a recipe tries itself out on, at most."""


@dataclass(frozen=True)
class Recipe:
    """How to prune: the method, the pattern, the schedule, the target, the allocation, and which layers.

    Bad values are refused here, before a model is touched. Texts are stored in their shortest form, so that two ways to write a
    recipe compare and save as one, and a preset as what it stands for: `Recipe("best", pattern="50%")` equals the recipe that
    spells it out. What is given beside a preset wins: `Recipe("best", target="pruned")`. Where no preset says otherwise, the
    schedule is walk, the target pruned and the allocation uniform.

    Raises:
        RecipeError: a name or a setting does not exist, or a value is out of range; a preset with settings or compensations.
    """

    method: str = DEFAULT
    """What chooses the weights, and what corrects those that stay: `"wanda"`, `"cvr+energy"`, `"sparsegpt"`, with settings
    `"cvr:alpha=0.25+energy:column"`, with several corrections one after the other. Or a preset: `"default"`, `"best"`,
    `"fast"`, or `"paper"`, which is the paper's method."""

    pattern: str = "2:4"
    """`"50%"`, or `"2:4"`, `"4:8"`, any N:M. Unstructured weights compete within their output row, and with sparsegpt within a
    block of columns; `"50%:rank_over=layer"` and `"50%:rank_over=row"` say otherwise."""

    schedule: Schedule = _OPEN
    """`"walk"`: each layer's statistics already see all pruned layers before it. `"block"`: those in the blocks before its own,
    as Wanda's and SparseGPT's code has it. `"one-shot"`: all see the dense model. `"block"` takes two forward passes over
    the calibration batches, the others one. A model that cannot be exported has `"block"` for `"walk"`, or one-shot, with a
    warning."""

    targets: tuple[str, ...] | None = None
    """Globs on names, such as `"model.layers.*.mlp.*"`; `*` also crosses dots. None: every linear layer except the
    output layer and weights that are read in more than one place. A name that is matched here is pruned even so. A list will
    do; it is kept as a tuple."""

    ignore: tuple[str, ...] = ()
    """Globs on names to leave dense; they win over `targets`."""

    on_indivisible: OnIndivisible = "error"
    """What to do with a layer whose width an N:M pattern does not divide: refuse, or leave it dense and report it."""

    allocation: str = _OPEN
    """How the sparsity is shared out: `"uniform"`, every layer alike; `"owl"`, blocks with more outliers keep more;
    `"sensitivity"`, by the measured harm of pruning each layer. With settings `"owl:spread=0.1"`. An unstructured pattern's
    sparsity is then that of all weights together. With an N:M pattern `"owl:sparsity=0.4"` says which fraction of the weights
    is to be zero, and the allocation which layers stay dense."""

    target: str = _OPEN
    """What each layer is to give: `"pruned"`, what its dense weight makes of the inputs that the pruned layers before it give;
    `"dense"`, what the dense model has there, so that a layer also makes up for those before it. `"dense:share=0.5"` lies
    between. `"dense"` takes a forward pass of the dense model more."""

    def __post_init__(self) -> None:
        texts = {"method": self.method, "allocation": self.allocation, "target": self.target}
        _check_texts("Recipe", **{key: text for key, text in texts.items() if text is not None or key == "method"})
        if is_auto(self.method):
            raise RecipeError(
                f"Recipe(method={self.method!r}): a recipe names its method. statprune.Search(minutes=...) finds one; prune, "
                "plan and the command take it, or the text 'auto:minutes=10', in a recipe's place."
            )
        preset = PRESETS.get(self.method, Preset("", self.method))
        criterion, compensations = read_method(preset.method)
        pattern = complete_pattern(_read_pattern("Recipe", self.pattern), criterion["name"])
        schedule = preset.schedule if self.schedule is None else self.schedule
        one_of("schedule", schedule, SCHEDULES)
        usual = preset.unstructured_allocation if _built(pattern, PATTERNS).is_unstructured else preset.allocation
        allocation = complete("allocation", usual if self.allocation is None else self.allocation, ALLOCATIONS)
        target = complete("target", preset.target if self.target is None else self.target, TARGETS)
        # Frozen: two ways to write one thing become the same text here, once.
        object.__setattr__(self, "method", write_method(criterion, compensations))
        object.__setattr__(self, "pattern", write_pattern(pattern, criterion["name"]))
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "allocation", write(allocation, ALLOCATIONS))
        object.__setattr__(self, "target", write(target, TARGETS))
        _keep_scope(self)
        self._try_out()
        self._check_allocation(allocation)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """A recipe from plain data, as YAML and `pruning.json` hold it: parts may be texts, or mappings with every setting.

        `criterion` and `compensation` (one, or a list) may stand in the place of `method`. A criterion alone is the whole
        method; a compensation alone goes with the criterion of the default. Where both ways are there they must agree.

        Raises:
            RecipeError: as the constructor; an unknown key; `method` and its parts differ.
        """
        _check_keys("Recipe", data, [*(one.name for one in fields(cls)), "criterion", "compensation"])
        given = {key: value for key, value in data.items() if key not in ("criterion", "compensation")}
        if {"criterion", "compensation"} & data.keys():
            parts = complete_parts(data.get("criterion", USUAL_CRITERION), data.get("compensation", "none"))
            method = write_method(*parts)
            if "method" in data and write_method(*read_method(data["method"])) != method:
                raise RecipeError(
                    f"Recipe: method {data['method']!r} and criterion and compensation {method!r} differ: expected one of them."
                )
            given["method"] = method
        for key, text in _TEXTS.items():
            if isinstance(given.get(key), Mapping):
                given[key] = text(given[key])
        return cls(**given)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file.

        Raises:
            RecipeError: it cannot be read, or as `from_dict`; names the file.
        """
        return load_yaml(path, cls.from_dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every setting spelled out; `Recipe.from_dict` gives an equal recipe back."""
        return {
            "method": self.method,
            "criterion": self.criterion,
            "compensation": list(self.compensation),
            **scope_to_dict(self),
            "pattern": self._pattern,
            "allocation": complete("allocation", self.allocation, ALLOCATIONS),
            "target": complete("target", self.target, TARGETS),
        }

    def to_yaml(self) -> str:
        """The fields as they are, for a file that people read; `Recipe.from_yaml` gives an equal recipe back."""
        return yaml.dump(scope_to_dict(self), Dumper=YamlDumper, sort_keys=False)

    @property
    def criterion(self) -> Whole:
        """What scores the weights: its name and every setting."""
        return read_method(self.method)[0]

    @property
    def compensation(self) -> tuple[Whole, ...]:
        """What corrects the weights that stay, as they are applied: names and every setting."""
        return tuple(read_method(self.method)[1])

    @property
    def conditions(self) -> str:
        """Under which the method works, for people: the schedule, and allocation and target where they are not the usual."""
        others = [text for text, usual in ((self.allocation, "uniform"), (self.target, "pruned")) if text != usual]
        return ", ".join([self.schedule, *others])

    def build_pattern(self) -> ModelPattern:
        """The pattern object."""
        return _built(self._pattern, PATTERNS)

    def build_allocation(self) -> AllocationRule:
        """The allocation object."""
        return _built(complete("allocation", self.allocation, ALLOCATIONS), ALLOCATIONS)

    def build_target(self) -> Target:
        """The target object."""
        name, settings = split(complete("target", self.target, TARGETS))
        return TARGETS[name](**settings)

    def pruner(self, pattern: Pattern | None = None) -> WeightPruner:
        """The function that prunes one weight, with a pattern of its own where an allocation gives it one."""
        return build_pruner(self.criterion, pattern or self.build_pattern(), self.compensation)

    @property
    def needs(self) -> Statistic:
        """What is collected for it, of each layer's inputs and of the loss."""
        return self.pruner().needs | self.build_target().needs

    @property
    def probes_whole_model(self) -> bool:
        """Whether its allocation runs the whole model for each layer."""
        allocation = self.build_allocation()
        return isinstance(allocation, Sensitivity) or (isinstance(allocation, Curves) and Statistic.CURVATURE not in self.needs)

    @property
    def _pattern(self) -> Whole:
        return complete_pattern(read_pattern(self.pattern), self.criterion["name"])

    def _try_out(self) -> None:
        """Prune a weight of one row, so that a value out of range is refused now and not in the middle of a model.

        A few milliseconds whatever the settings: with narrow groups, and without the work that a setting asks for.
        """
        try:
            pattern = self.build_pattern()
            self.pruner()
            if (pattern.group_size or 0) > _TRIED_WIDTH:
                pattern = NM(1, 2)
            width = pattern.group_size or 2
            moments = InputMoments.zeros(width, Statistic.GRAM).add(torch.eye(width)).add(-torch.eye(width))
            moments = moments.with_output_gram(torch.ones(1, 1))
            criterion = _least_work(self.criterion, known_criteria())
            compensation = [_least_work(part, known_compensations()) for part in self.compensation]
            build_pruner(criterion, pattern, compensation)(torch.linspace(1.0, 2.0, width)[None], moments)
        except Exception as e:  # whatever the code of another package raises
            named = f"{type(e).__name__}: {e}" if not isinstance(e, ValueError | TypeError) else str(e)
            raise RecipeError(f"Recipe(method={self.method!r}, pattern={self.pattern!r}): {named}") from e

    def _check_allocation(self, allocation: Whole) -> None:
        try:
            rule, pattern = self.build_allocation(), self.build_pattern()
            self.build_target()
        except (ValueError, TypeError) as e:
            raise RecipeError(f"Recipe(allocation={self.allocation!r}, target={self.target!r}): {e}") from e
        name, sparsity = allocation["name"], getattr(rule, "sparsity", None)
        if name == "uniform":
            return
        if not pattern.is_unstructured and not 0 < (sparsity or 0) <= pattern.sparsity:
            raise RecipeError(
                f"Recipe(pattern='{pattern}', allocation={name!r}) with sparsity={sparsity}: with {pattern} every layer that "
                "is pruned is equally sparse, and the allocation chooses the ones that stay dense. Expected a sparsity of all "
                f"of them together, up to {pattern.sparsity:g}, such as '{name}:sparsity=0.1'."
            )
        if pattern.is_unstructured and getattr(rule, "mixed", False):
            raise RecipeError(
                f"Recipe(pattern='{pattern}', allocation={name!r}) with mixed: there is nothing to mix. Leave it out; it is "
                "for N:M patterns."
            )
        if pattern.is_unstructured and sparsity is not None:
            raise RecipeError(
                f"Recipe(pattern='{pattern}', allocation={name!r}) with sparsity={sparsity}: the pattern says it already. "
                "Leave the allocation's out; it is for N:M patterns."
            )


@dataclass(frozen=True)
class Search:
    """What to look for: the method, schedule, target and allocation that lose least on this model, by trying (see `tune`).

    Wherever a recipe can stand it can stand too, also as the text `"auto"` or `"auto:minutes=5"`. What it gives is a recipe.

    Raises:
        RecipeError: a value is out of range.
    """

    pattern: str = "2:4"
    """As a recipe's; what unstructured weights compete in is each method's own where it is left open."""

    minutes: Minutes = 10.0
    """How long the trying may take; at most a week."""

    targets: tuple[str, ...] | None = None
    """As a recipe's."""

    ignore: tuple[str, ...] = ()
    """As a recipe's."""

    on_indivisible: OnIndivisible = "error"
    """As a recipe's."""

    gradients: bool = True
    """Whether to try what takes the dense model backward once, which needs memory for the activations of a batch."""

    def __post_init__(self) -> None:
        try:
            check("Search", Search, minutes=self.minutes)
        except ValueError as e:
            raise RecipeError(str(e)) from e
        if not isinstance(self.gradients, bool):
            raise RecipeError(f"Search(gradients={shown(self.gradients)}): expected true or false.")
        object.__setattr__(self, "pattern", write_pattern(_read_pattern("Search", self.pattern)))
        _keep_scope(self)
        self.recipe("magnitude")  # a pattern or a scope that cannot be is refused now

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Search":
        """A search from plain data; `method: auto:minutes=5` may stand in the place of `minutes`, and so on.

        Raises:
            RecipeError: as the constructor; a key that a search has not, as it is what is looked for.
        """
        given = dict(data)
        method, *compensations = re.split(r"\+(?=[A-Za-z])", str(given.pop("method", given.pop("criterion", AUTO))))
        given |= {"compensation": "+".join(compensations)} if compensations else {}
        _, own = split(complete("method", method, {AUTO: _auto}))
        for key in SEARCHED:
            if key in given:
                raise RecipeError(
                    f"Search({key}={given[key]!r}): the search tries these itself. Leave it out, or name a method."
                )
        _check_keys("Search", given, [one.name for one in fields(cls)])
        given = {**(own if ":" in method else {}), **given}
        if isinstance(given.get("pattern"), Mapping):
            given["pattern"] = _TEXTS["pattern"](given["pattern"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `Search.from_dict` gives an equal one back."""
        return scope_to_dict(self)

    @property
    def method(self) -> str:
        """The text that stands for it: `"auto"`, with the settings that are not the default."""
        return write({"name": AUTO, "minutes": self.minutes, "gradients": self.gradients}, {AUTO: _auto})

    def build_pattern(self) -> ModelPattern:
        """The pattern object, as most methods have it."""
        return self.recipe("magnitude").build_pattern()

    def recipe(self, method: str, **own: Any) -> Recipe:
        """A candidate, with a schedule, a target and an allocation of its own where it has them."""
        scope = {"targets": self.targets, "ignore": self.ignore, "on_indivisible": self.on_indivisible}
        return Recipe(method, self.pattern, **scope, **own)  # type: ignore[arg-type]


AUTO = "auto"
"""Where a method is asked for, this asks for a search."""

SEARCHED = ("schedule", "allocation", "target", "compensation")
"""Keys of a recipe that a search finds out, beside the criterion."""


def is_auto(method: object) -> bool:
    """Whether a method's text asks for a search."""
    return isinstance(method, str) and re.split("[:+]", method)[0] == AUTO


def _auto(*, minutes: Minutes = 10.0, gradients: bool = True) -> None:
    """The settings of the text `auto`."""


def _built(part: Whole, known: Mapping[str, Callable[..., _Read]]) -> _Read:
    """The object of a completed part."""
    name, settings = split(part)
    return known[name](**settings)


def _least_work(part: Whole, known: Mapping[str, Callable[..., Any]]) -> Whole:
    """The part with the lowest number of steps and the like."""
    counts = {key: bounds.low for key, bounds in bounds_in(known[part["name"]]).items() if isinstance(bounds, Count)}
    return {key: counts.get(key, value) for key, value in part.items()}


def load_yaml(path: str | Path, read: Callable[[Mapping[str, Any]], _Read]) -> _Read:
    """What `read` makes of a YAML file's keys; RecipeError, naming the file, where it cannot be read."""
    try:
        data = load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # a name with a NUL byte in it is a ValueError; so is a text that is not UTF-8
        raise RecipeError(f"The recipe {path} cannot be read: {e}") from e
    except yaml.YAMLError as e:
        raise RecipeError(f"The recipe {path} cannot be read: {problem(e)}.") from e
    if not isinstance(data, Mapping):
        raise RecipeError(f"The recipe {path} holds {type(data).__name__}; expected keys such as 'pattern: \"2:4\"'.")
    try:
        return read(data)
    except RecipeError as e:
        raise RecipeError(f"In the recipe {path}: {e}") from e


def _check_keys(kind: str, data: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"{kind} has no key {shown(key)}.{nearest(key, known)} The keys are {', '.join(known)}.")


def _check_texts(kind: str, **values: object) -> None:
    for key, value in values.items():
        if not isinstance(value, str):
            raise RecipeError(
                f"{kind}({key}={shown(value)}): expected a text, such as 'cvr:alpha=0.25+energy' or 'owl:spread=0.1'; "
                f"{kind}.from_dict takes mappings."
            )


def _read_pattern(kind: str, pattern: object) -> Whole:
    if not isinstance(pattern, str | int | float):
        raise RecipeError(
            f"{kind}(pattern={shown(pattern)}): expected a text, such as '50%' or '2:4'; {kind}.from_dict takes mappings."
        )
    return read_pattern(pattern)


def _keep_scope(how: Recipe | Search) -> None:
    """Check what both kinds say about layers, and keep lists of names as tuples."""
    one_of("on_indivisible", how.on_indivisible, ON_INDIVISIBLE)
    if not _are_names(() if how.targets is None else how.targets) or not _are_names(how.ignore):
        raise RecipeError(
            f"{type(how).__name__}(targets={shown(how.targets)}, ignore={shown(how.ignore)}): expected lists of names, such as "
            "['*.mlp.*']."
        )
    object.__setattr__(how, "targets", None if how.targets is None else tuple(how.targets))
    object.__setattr__(how, "ignore", tuple(how.ignore))


def scope_to_dict(how: Recipe | Search) -> dict[str, Any]:
    """The fields, with lists in the place of tuples."""
    return {**asdict(how), "targets": None if how.targets is None else list(how.targets), "ignore": list(how.ignore)}


def _are_names(names: object) -> bool:
    return isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


_TEXTS: dict[str, Any] = {
    "pattern": lambda part: write_pattern(read_pattern(part)),
    "allocation": lambda part: write(complete("allocation", part, ALLOCATIONS), ALLOCATIONS),
    "target": lambda part: write(complete("target", part, TARGETS), TARGETS),
}
"""How a mapping of the part becomes its text."""
