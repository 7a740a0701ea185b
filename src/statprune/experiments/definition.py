"""An experiment as data: a YAML file with a grid of methods x patterns x calibration sizes x seeds, and a protocol."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import Any, Literal

from statprune.errors import ExperimentError, nearest
from statprune.how import Method, labelled
from statprune.methods.statistics import Statistic
from statprune.model.schedule import Schedule
from statprune.recipe import Recipe, Search
from statprune.strict_yaml import load as load_yaml

Name = Literal["perplexity", "zero-shot", "runtime", "sparsity", "calibration", "ablation", "correction", "frontier"]
NAMES: tuple[Name, ...] = (
    "perplexity",
    "zero-shot",
    "runtime",
    "sparsity",
    "calibration",
    "ablation",
    "correction",
    "frontier",
)
"""The paper's tables 1, 2, 3 and 4, figure 2, table 5; and ours: what better corrections give, and what the best methods lose
and cost beside SparseGPT."""

ALL = "all"
"""Stands for every experiment."""

OWNER: dict[str, Name] = {"sizes": "calibration", "tasks": "zero-shot", "questions": "zero-shot", "rounds": "runtime"}
"""Settings that only one experiment has."""


@dataclass(frozen=True)
class Cell:
    """One thing to measure on a model."""

    measure: Literal["perplexity", "zero-shot", "runtime"]
    label: str
    pattern: str
    how: Recipe | Search | None
    """None for the model as it is."""

    samples: int | None
    """None where nothing is calibrated; so is the seed."""

    seed: int | None


@dataclass(frozen=True)
class Experiment:
    """What to measure, and how. The fields are the keys of `configs/paper/NAME.yaml` and the options of the command.

    Raises:
        ExperimentError: an unknown name, or a value that cannot be.
        RecipeError: a method or a pattern that does not exist.
    """

    name: Name
    model: list[str]
    """Folders or hub names."""

    methods: list[Method]
    patterns: list[str]
    calibration: list[str]
    """As for `statprune prune`."""

    text: list[str]
    """Text files, a token file or a data set's name, to measure perplexity on and to make the next-line task from."""

    windows: int | None = None
    """At most this many windows of the text; None for all."""

    schedule: Schedule = "block"
    samples: int = 128
    """Calibration sequences."""

    sizes: list[int] | None = None
    """Of the experiment `calibration`: several numbers of calibration sequences, in place of `samples`."""

    seeds: tuple[int, ...] | list[int] = (0,)
    tasks: list[str] | None = None
    """Of the experiment `zero-shot`."""

    questions: int | None = None
    """At most this many of each task; None for all, and for 2,600 of `next-line`."""

    rounds: int = 5
    """Of the experiment `runtime`: how often each time is taken; the median counts."""

    seqlen: int | None = None
    """Tokens in a window; None for 2048, or the model's context if that is shorter."""

    batch_size: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_name(self.name)
        for key in (
            "model",
            "methods",
            "patterns",
            "calibration",
            "text",
            "seeds",
            *(["tasks"] if self.measure == "zero-shot" else []),
        ):
            if not getattr(self, key):
                raise ExperimentError(f"The experiment {self.name!r} has no {key}: give --{key}.")
        numbers = {key: getattr(self, key) for key in ("samples", "windows", "questions", "rounds", "batch_size")}
        for key, number in {**numbers, "sizes": min(self.sizes or [1])}.items():
            if number is not None and number < 1:
                raise ExperimentError(
                    f"The experiment {self.name!r} has --{key.replace('_', '-')} {number}: expected at least 1."
                )
        self.cells()

    @classmethod
    def load(cls, name: str, given: Mapping[str, Any]) -> "Experiment":
        """The paper's settings of an experiment, with those that are given in their place.

        Args:
            name: one of `NAMES`.
            given: by field; None stands for the paper's.

        Raises:
            ExperimentError: as the constructor; a key that is none.
            RecipeError: as the constructor.
        """
        _check_name(name)
        source = files("statprune.paper").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        settings = {**load_yaml(source), **{key: value for key, value in given.items() if value is not None}}
        known = [field.name for field in fields(cls)]
        for key in settings:
            if OWNER.get(key, name) != name:
                raise ExperimentError(f"--{key} belongs to the experiment {OWNER[key]!r}, and this is {name!r}: leave it out.")
            if key not in known:
                raise ExperimentError(
                    f"An experiment has no key {key!r}.{nearest(key, known)} Its keys are {', '.join(known)}."
                )
        return cls(**{**settings, "name": name})

    @property
    def measure(self) -> Literal["perplexity", "zero-shot", "runtime"]:
        """What is measured in each cell."""
        return self.name if self.name in ("zero-shot", "runtime") else "perplexity"  # type: ignore[return-value]

    def protocol(self) -> dict[str, Any]:
        """What all cells of an output folder have in common, because numbers do not compare without it."""
        keys = ("calibration", "text", "windows", "seqlen", "batch_size", "dtype", "device")
        return {key: value for key, value in asdict(self).items() if key in keys}

    def cells(self) -> list[Cell]:
        """What to measure on each model, in order; the same cell only once."""
        return list({repr(cell): cell for cell in self._cells()}.values())

    def _cells(self) -> Iterator[Cell]:
        if self.measure != "runtime":
            yield Cell(self.measure, "dense", "", None, None, None)
        for pattern in self.patterns:
            for method in self.methods:
                label, how = labelled(method, pattern=pattern, schedule=self.schedule)
                if isinstance(how, Search) and self.measure == "runtime":
                    raise ExperimentError(f"The experiment runtime times a method, and {label!r} is yet to choose one.")
                if (
                    self.measure == "runtime"
                    and isinstance(how, Recipe)
                    and how.needs & (Statistic.CROSS | Statistic.CURVATURE)
                ):
                    raise ExperimentError(
                        f"The experiment runtime times what one block's own inputs are enough for, and {label!r} needs the "
                        "dense model beside it or gradients. Leave it out, or take its pruning seconds in another experiment."
                    )
                # An allocation measures the dense model, whatever the pruner needs.
                is_calibrated = isinstance(how, Search) or how.allocation != "uniform" or bool(how.needs)
                for samples in self.sizes or [self.samples]:
                    for seed in self.seeds:
                        calibration = (samples, seed) if is_calibrated else (None, None)
                        yield Cell(self.measure, label, how.pattern, how, *calibration)


def load_experiments(name: str, given: Mapping[str, Any]) -> list[Experiment]:
    """The experiment of this name, or every one for `all`: then a setting that only one has goes to that one.

    Args:
        name: one of `NAMES`, or `all`.
        given: as for `Experiment.load`.

    Raises:
        ExperimentError: as `Experiment.load`.
        RecipeError: as `Experiment.load`.
    """
    if name != ALL:
        return [Experiment.load(name, given)]
    own = {one: {key: value for key, value in given.items() if OWNER.get(key, one) == one} for one in NAMES}
    return [Experiment.load(one, settings) for one, settings in own.items()]


def _check_name(name: str) -> None:
    if name not in NAMES:
        known = (*NAMES, ALL)
        raise ExperimentError(f"There is no experiment {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
