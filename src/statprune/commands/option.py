"""The options of a command: of its function's arguments, and of the fields of the dataclasses of `options` among these.

An argument of a simple type is one option, explained in the function's docstring. An argument whose type is a dataclass of
`options` stands for all of its fields, which are options of their own, explained under the field.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from docstring_parser import parse_from_object

from statprune.commands import options

POSITIONAL = ("model", "folder", "name", "adapter", "repository")
"""Arguments that stand without an option's name."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One word of the command line, or a name and one word or several."""

    name: str
    kind: Any
    default: Any
    """`Parameter.empty` where it must be given."""

    help: str
    group: str | None
    """The heading it stands under; None for a command's own."""

    @property
    def is_positional(self) -> bool:
        """Whether it stands without a name."""
        return self.name in POSITIONAL and self.kind is str

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is Parameter.empty

    @property
    def word(self) -> str:
        """How it is typed, or shown where it stands without a name."""
        return self.name.upper() if self.is_positional else f"--{self.name.replace('_', '-')}"

    @property
    def item(self) -> Any:
        """The type of each word, where several may follow; else None."""
        lists = [kind for kind in (self.kind, *get_args(self.kind)) if get_origin(kind) is list]
        return get_args(lists[0])[0] if lists else None

    @property
    def metavar(self) -> str:
        """What stands for its words in a help."""
        if self.choices:
            return f"{{{','.join(self.choices)}}}"
        return "N" if {int, float} & self.kinds else self.name.upper()

    @property
    def kinds(self) -> set[Any]:
        """The types that a word may be read as."""
        kind = self.item or self.kind
        return {one for one in (kind, *get_args(kind)) if get_origin(one) is not UnionType and one is not NoneType}

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The words that there are, where there are no others."""
        return next((get_args(kind) for kind in self.kinds if get_origin(kind) is Literal), None)

    @property
    def expected(self) -> str:
        """What a word of it should be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return "a whole number" if int in self.kinds else "a number" if float in self.kinds else "a text"

    @property
    def room(self) -> float:
        """How many words belong to it."""
        return 0 if self.kind is bool else 1 if self.item is None else math.inf


@cache
def options_of(function: Callable[..., dict[str, Any]]) -> list[Option]:
    """All options of a command, in the order of its arguments."""
    helps = {parameter.arg_name: parameter.description for parameter in parse_docstring(function.__doc__ or "").params}
    kinds = get_type_hints(function)
    found: list[Option] = []
    for name, parameter in signature(function).parameters.items():
        if dataclasses.is_dataclass(kinds[name]):
            found += _fields(kinds[name], parameter.default)
        else:
            text = helps.get(name) or _shared_helps()[name]
            found.append(Option(name, kinds[name], parameter.default, text, None))
    return [*found, *_fields(options.ShowOptions, Parameter.empty)]


def _fields(kind: Any, default: Any) -> Iterator[Option]:
    """The fields of a dataclass of options, its own before those that it inherits."""
    kinds = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    owners: list[Any] = [owner for owner in kind.__mro__ if dataclasses.is_dataclass(owner)]
    for owner in owners:
        helps = _helps_of_fields(owner)
        for name in owner.__annotations__:
            usual = Parameter.empty if known[name].default is dataclasses.MISSING else known[name].default
            value = usual if default is Parameter.empty else getattr(default, name)
            yield Option(name, kinds[name], value, helps[name], first_line(owner))


@cache
def _helps_of_fields(kind: type) -> dict[str, str]:
    """What is written under the fields that a dataclass itself declares."""
    return {parameter.arg_name: parameter.description or "" for parameter in parse_from_object(kind).params}


@cache
def _shared_helps() -> dict[str, str]:
    """What is written under the fields of all options, for commands that have one of them alone."""
    kinds = [kind for kind in vars(options).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return {name: text for kind in kinds for name, text in _helps_of_fields(kind).items()}


def first_line(thing: Any) -> str:
    """Of a docstring."""
    return (thing.__doc__ or "").partition("\n")[0]
