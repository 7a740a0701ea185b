"""Imports point one way: a module may use only those before it in ORDER."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import statprune

ORDER = [
    "errors", "statistics", "factorisation", "criteria", "patterns", "allocation", "least_squares", "compensation", "pruning",
    "sparsegpt", "methods", "recipe", "graph", "token_masks", "sites", "selection", "batches", "losses", "segments",
    "tracing", "walk", "hooks", "transform", "report", "finetuning", "allocating", "compress", "survey", "perplexity",
    "experiments", "experiments.results",
    "tuning", "tuning.candidates", "tuning.halving", "tuning.windows", "tuning.shared", "tuning.trials", "tuning.prices",
    "tuning.outcome", "tuning.search", "tuning.running",
    "auto", "data", "checkpoint", "lora", "modules", "probing", "callback",
    "opening", "measuring", "compare", "quickstart", "benchmark",
    "experiments.published", "experiments.grid", "experiments.tables",
    "experiments.plots", "experiments.next_line",
    "experiments.zero_shot", "experiments.runtime", "experiments.definition", "experiments.running",
    "display", "commands.shared", "commands.models", "commands.measurements", "commands", "cli",
]  # fmt: skip
PURE = [
    "statistics", "factorisation", "criteria", "patterns", "allocation", "least_squares", "compensation", "pruning",
    "sparsegpt",
]  # fmt: skip

PACKAGE = Path(statprune.__file__).parent


def imported(source: str) -> set[str]:
    """Dotted names of everything that a module of statprune imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join((["statprune"] if node.level else []) + ([node.module] if node.module else []))
            # `from statprune import recipe` imports a module, `from statprune.recipe import Recipe` a name of one
            is_package = module in ("statprune", "statprune.experiments", "statprune.commands")
            names |= {f"{module}.{alias.name}" for alias in node.names} if is_package else {module}
    return names


def own_modules(names: set[str]) -> set[str]:
    """Which modules of statprune are among them; the package itself counts as one that comes last."""
    inside = [name.removeprefix("statprune").removeprefix(".") for name in names if name.split(".")[0] == "statprune"]
    known = {*ORDER, *all_modules()}
    return {next((name for name in (whole, whole.rpartition(".")[0]) if name in known), "__init__") for whole in inside}


def path_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def all_modules() -> set[str]:
    """Every module of the package by its dotted name; a folder's own file by the folder's."""
    names = [path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
    return {".".join(parts).removesuffix(".__init__") for parts in names} - {"__init__"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from statprune.recipe import Recipe", {"recipe"}),
        ("def f():\n    import statprune.recipe as r", {"recipe"}),
        ("from statprune import recipe, Recipe", {"recipe", "__init__"}),
        ("import statprune", {"__init__"}),
        ("from .recipe import Recipe", {"recipe"}),
        ("from . import recipe", {"recipe"}),
        ("import torch, statprune_other", set()),
        ("from statprune.experiments.grid import Experiment", {"experiments.grid"}),
        ("from statprune.experiments import grid", {"experiments.grid"}),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert own_modules(imported(source)) == expected


def test_every_module_has_its_place_in_the_order():
    assert all_modules() == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_before_it(module):
    used = own_modules(imported(path_of(module).read_text(encoding="utf-8")))
    assert used <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", PURE)
def test_the_mathematics_imports_torch_and_nothing_else(module):
    used = {name.split(".")[0] for name in imported(path_of(module).read_text(encoding="utf-8"))}
    assert used - sys.stdlib_module_names <= {"torch", "statprune"}
    assert "torch" in used


def test_importing_statprune_does_not_import_datasets():
    code = "import sys, statprune; print(*sorted({'datasets', 'statprune'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["statprune"]
