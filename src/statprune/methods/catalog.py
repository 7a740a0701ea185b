"""What there is by name, with its settings and its summary, read from the source and not imported.

The command line shows it in every help, and would spend its time on importing torch. The tables themselves (`CRITERIA` and
others) stay the only place where names are kept: what is read here is their code. What packages of others add is imported.
"""

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from typing import Any

GROUPS = ("statprune.criteria", "statprune.pruners", "statprune.compensations")
"""Of the entry points that packages of others have for us."""


@dataclass(frozen=True)
class Entry:
    """What a help says of one name."""

    summary: str
    """The first line of the docstring; empty where there is none."""

    settings: dict[str, Any]
    """Names and defaults; `inspect.Parameter.empty` where there is no default."""


@functools.cache
def catalog() -> dict[str, dict[str, Entry]]:
    """Criteria, compensations, patterns, allocations and targets, in the order of their tables.

    Raises:
        RecipeError: a package of others has an entry point that cannot be used.
    """
    patterns, allocations = _table("patterns", "PATTERNS"), _table("budget", "ALLOCATIONS")
    if any(entry_points(group=group) for group in GROUPS):
        from statprune.methods.registry import known_compensations, known_criteria

        criteria, compensations = _imported(known_criteria()), _imported(known_compensations())
    else:
        criteria = _table("criteria", "CRITERIA") | _table("registry", "PRUNERS")
        compensations = _table("compensations", "COMPENSATIONS")
    targets = _table("target", "TARGETS")
    return {
        "criteria": criteria, "compensations": compensations, "patterns": patterns, "allocations": allocations,
        "targets": targets,
    }  # fmt: skip


def _imported(known: Mapping[str, Callable[..., Any]]) -> dict[str, Entry]:
    from statprune.methods.registry import settings_of, summary

    return {name: Entry(summary(entry), settings_of(entry)) for name, entry in known.items()}


def _table(module: str, name: str) -> dict[str, Entry]:
    """The entries of a table: a dict of names at the top of a module of `methods`."""
    table = _definition(f"statprune.methods.{module}", name)
    assert isinstance(table[1], ast.Dict), f"{module}.{name} is no dict of names"
    return {
        ast.literal_eval(key): _entry(*_definition(table[0], ast.unparse(value)))
        for key, value in zip(table[1].keys, table[1].values, strict=True)
        if key is not None
    }


def _entry(module: str, node: ast.AST) -> Entry:
    assert isinstance(node, ast.FunctionDef | ast.ClassDef), f"{module}: a table holds {type(node).__name__}"
    settings = _arguments(node) if isinstance(node, ast.FunctionDef) else _fields(node)
    return Entry((ast.get_docstring(node) or "").partition("\n")[0], dict(settings))


def _arguments(function: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        yield argument.arg, _value(default)


def _fields(kind: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Of a dataclass; the pattern that a pruner gets is no setting."""
    for node in kind.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id != "pattern":
            yield node.target.id, _value(node.value)


def _value(default: ast.expr | None) -> Any:
    return Parameter.empty if default is None else ast.literal_eval(default)


def _definition(module: str, name: str) -> tuple[str, ast.AST]:
    """(module, what stands for a name there), followed to where it is defined."""
    for node in _source(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in [target.id for target in targets if isinstance(target, ast.Name)]:
                return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.asname or alias.name for alias in node.names]:
            original = next(alias.name for alias in node.names if name == (alias.asname or alias.name))
            return _definition(node.module, original)
    raise LookupError(f"{module} defines no {name}")


@functools.cache
def _source(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
