"""The paper's numbers, as data: what stands beside a measured number, and what is known to be wrong with it.

configs/paper/published.yaml -> Published -> value(experiment, model, method, pattern)
                                             notes(experiment, model, method, pattern)
"""

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from statprune.errors import ResultsError
from statprune.strict_yaml import load as load_yaml

ANY_PATTERN = "*"
"""The pattern of a number whose pattern the paper does not state."""


@dataclass(frozen=True)
class KnownError:
    """What is wrong with some published numbers; an empty field concerns all of its kind."""

    note: str
    experiments: frozenset[str]
    methods: frozenset[str]
    patterns: frozenset[str]
    models: frozenset[str]
    """As the paper calls them."""

    def concerns(self, experiment: str, model: str, method: str, pattern: str) -> bool:
        """Whether the number in this place of this table is meant."""
        chosen = (self.experiments, self.models, self.methods, self.patterns)
        return all(not some or one in some for some, one in zip(chosen, (experiment, model, method, pattern), strict=True))


@dataclass(frozen=True)
class Published:
    """The tables of a paper.

    A method is a recipe's short name such as `wanda+energy`, or `dense`; a model is the last part of its folder's or hub
    name, in upper or lower case.
    """

    source: str
    """Title and authors."""

    places: Mapping[str, str]
    """Table and section, by experiment."""

    models: Mapping[str, str]
    """What the paper calls a model, by the last part of its name on the hub in lower case."""

    values: Mapping[tuple[str, str, str, str], float]
    """By experiment, the paper's name of the model, method and pattern."""

    known_errors: tuple[KnownError, ...]

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Published":
        """Read the tables from a YAML file; None for those that come with the package.

        Raises:
            ResultsError: the file cannot be read, or does not hold such tables.
        """
        try:
            file = importlib.resources.files("statprune.paper") / "published.yaml" if path is None else Path(path)
            return cls._from_dict(load_yaml(file.read_text(encoding="utf-8")))
        except (OSError, ImportError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as e:
            called = "" if path is None else repr(str(path))
            raise ResultsError(
                f"Published.load({called}): {type(e).__name__}: {e}. Expected a YAML file with source, models, tables and "
                "known_errors, as configs/paper/published.yaml; where that one is missing, install statprune again."
            ) from e

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> "Published":
        tables = data["tables"]
        kinds = ("experiments", "methods", "patterns", "models")
        return cls(
            source=data["source"],
            places={experiment: table["place"] for experiment, table in tables.items()},
            models={_last_part(name): model for model, names in data["models"].items() for name in names},
            values={
                (experiment, model, method, pattern): float(value)
                for experiment, table in tables.items()
                for method, pattern, *values in table["rows"]
                for model, value in zip(table["models"], values, strict=True)
            },
            known_errors=tuple(
                KnownError(note=error["note"], **{kind: frozenset(error.get(kind, ())) for kind in kinds})
                for error in data["known_errors"]
            ),
        )

    def value(self, experiment: str, model: str, method: str, pattern: str) -> float | None:
        """The published number; None where there is none. Accuracy is in %, runtime in seconds."""
        column = self.models.get(_last_part(model), "")
        exact = self.values.get((experiment, column, method, pattern))
        return self.values.get((experiment, column, method, ANY_PATTERN)) if exact is None else exact

    def notes(self, experiment: str, model: str, method: str, pattern: str) -> tuple[str, ...]:
        """What is known to be wrong with the published number, a sentence each; empty where there is no number."""
        if self.value(experiment, model, method, pattern) is None:
            return ()
        column = self.models[_last_part(model)]
        return tuple(error.note for error in self.known_errors if error.concerns(experiment, column, method, pattern))


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
