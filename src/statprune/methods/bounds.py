"""Bounds of settings, written where a setting is declared, and the one place where they are checked.

alpha: Annotated[float, Between(0, 4)] = 0.5        a number
steps: Annotated[int, Count(0, 1000)] = 0           a whole number
clamp: Annotated[tuple[float, float], Between(1e-30, 1e30)] = (0.5, 2.0)        each number of a list

They stand in the signature of a function or behind a field of a dataclass; packages of others write theirs the same way. A
recipe is checked against them when it is made, and the functions call `check` for those who call them without a recipe.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Between:
    """A finite number in an interval, its ends included."""

    low: float
    high: float

    without: tuple[float, ...] = ()
    """Numbers in it that are left out, such as an end."""

    def holds(self, value: object) -> bool:
        """Whether a number is within, or all numbers of a list. None, where a setting may have none, always is."""
        if isinstance(value, tuple | list):
            return all(self._has(one) for one in value)
        return value is None or self._has(value)

    def _has(self, value: object) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high and value not in self.without  # type: ignore[operator]

    def __str__(self) -> str:
        but = f", but not {' or '.join(f'{one:,g}' for one in self.without)}" if self.without else ""
        return f"a number from {self.low:,g} to {self.high:,g}{but}"


@dataclass(frozen=True)
class Count(Between):
    """A whole number in an interval. What takes time by the number: a recipe tries itself out with the lowest."""

    def _has(self, value: object) -> bool:
        return isinstance(value, int) and super()._has(value)

    def __str__(self) -> str:
        return f"a whole{super().__str__().removeprefix('a')}"


@functools.cache
def bounds_in(known: Callable[..., Any]) -> dict[str, Between]:
    """The bounds that a function's or a class's arguments declare, by name."""
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(known, eval_str=True).parameters
    except NameError:  # annotations of others that only their type checker can read
        parameters = inspect.signature(known).parameters
    found = {
        name: [one for one in getattr(parameter.annotation, "__metadata__", ()) if isinstance(one, Between)]
        for name, parameter in parameters.items()
    }
    return {name: bounds[0] for name, bounds in found.items() if bounds}


def check(name: str, known: Callable[..., Any], **values: Any) -> None:
    """Raise ValueError for a value outside of the bounds that a function or a class declares for it.

    Args:
        name: what the user calls it.
        known: the function or class.
        values: of its settings; those without bounds may be anything.
    """
    for setting, bounds in bounds_in(known).items():
        if setting in values and not bounds.holds(values[setting]):
            value = values[setting]
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{name}({setting}={shown}): expected {bounds}.")


def is_finite(value: object) -> bool:
    """Whether a setting's value holds no NaN and no infinity; what is no number does not."""
    if isinstance(value, tuple | list):
        return all(is_finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)
