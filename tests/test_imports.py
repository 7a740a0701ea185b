"""Imports point one way: a room may use those on the floors below it, and nothing goes round in a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import statprune

# A room is a file or a folder of the package. Those on one floor may use each other, as the files of one folder may.
FLOORS = """
    __init__  __main__
    commands
    experiments
    training
    api  streaming  acceleration
    tuning
    engine  allocation  selection  agreement  sharing
    checkpoint
    card  companions  contents  disk  hub  output  page  verification
    loading  configuration  completeness  weight_files
    perplexity  divergence  report  data  results  zeros  how  recipe  grammar  presets  record
    model
    methods
    markdown  plain  clock  progress  ranks  strict_yaml  errors  versions
"""
HEIGHTS = {room: height for height, floor in enumerate(reversed(FLOORS.strip().splitlines())) for room in floor.split()}
PACKAGE = Path(statprune.__file__).parent


def modules(package: Path) -> dict[str, Path]:
    """Every module by its dotted name without `statprune.`; a folder's own file, too, has a name: `tuning.__init__`."""
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}


MODULES = modules(PACKAGE)


class Imports(ast.NodeVisitor):
    """Dotted names of what a module imports, wherever in it the import stands: `x` for `x` and `x.name` for a name of it."""

    def __init__(self, module: str) -> None:
        self.package = ["statprune", *module.split(".")[:-1]]
        self.running: set[str] = set()
        """What is imported where the code runs; not what only a type checker reads."""
        self.all: set[str] = set()
        self._is_running = True

    def visit_Import(self, node: ast.Import) -> None:
        self._add({alias.name for alias in node.names})

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = self.package[: len(self.package) + 1 - node.level] if node.level else []
        module = [*package, *([node.module] if node.module else [])]
        self._add({".".join([*module, alias.name]) for alias in node.names})

    def visit_If(self, node: ast.If) -> None:
        is_for_types = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        before, self._is_running = self._is_running, self._is_running and not is_for_types
        for statement in node.body:
            self.visit(statement)
        self._is_running = before
        for statement in node.orelse:
            self.visit(statement)

    def _add(self, names: set[str]) -> None:
        self.all |= names
        if self._is_running:
            self.running |= names


def imports(module: str, source: str) -> Imports:
    found = Imports(module)
    found.visit(ast.parse(source))
    return found


def own_modules(names: set[str], known: dict[str, Path] = MODULES) -> set[str]:
    """Which modules of statprune are among them: of `statprune.a.b` the module a.b, or a, whichever there is."""
    found = set()
    for name in names:
        first, *parts = name.split(".")
        if first != "statprune":
            continue
        candidates = [
            ".".join(parts),
            ".".join([*parts, "__init__"]),
            ".".join(parts[:-1]),
            ".".join([*parts[:-1], "__init__"]),
        ]
        found.add(next((one for one in candidates if one in known), name))
    return found


USED = {module: imports(module, path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


TREE = dict.fromkeys(["__init__", "recipe", "tuning.__init__", "tuning.search", "tuning.clock"], Path())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from statprune.recipe import Recipe", {"recipe"}),
        ("def f():\n    import statprune.recipe as r", {"recipe"}),
        ("from statprune import recipe, Recipe", {"recipe", "__init__"}),
        ("import statprune", {"__init__"}),
        ("import torch, statprune_other", set()),
        ("from statprune.tuning import search", {"tuning.search"}),
        ("from statprune.tuning import search, Tuned", {"tuning.search", "tuning.__init__"}),
        ("from statprune.tuning.search import Search", {"tuning.search"}),
        ("import statprune.tuning", {"tuning.__init__"}),
        ("from statprune.gone import x", {"statprune.gone.x"}),
        ("from . import search", {"tuning.search"}),
        ("from .clock import Stopwatch", {"tuning.clock"}),
        ("from .. import recipe", {"recipe"}),
        ("from ..recipe import Recipe", {"recipe"}),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert own_modules(imports("tuning.clock", source).all, TREE) == expected


def test_what_only_a_type_checker_reads_does_not_run():
    found = imports("recipe", "if TYPE_CHECKING:\n    import statprune.api\nelse:\n    import statprune.errors\nimport ast")
    assert found.running == {"statprune.errors", "ast"}
    assert found.all == {"statprune.api", "statprune.errors", "ast"}


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} == set(HEIGHTS)


@pytest.mark.parametrize("name", HEIGHTS)
def test_a_room_uses_only_those_below_it_and_beside_it(name):
    upwards = [
        f"{module} imports {used}"
        for module, found in USED.items()
        for used in own_modules(found.all)
        if room(module) == name and HEIGHTS.get(room(used), len(HEIGHTS)) > HEIGHTS[name]
    ]
    assert not upwards, "\n".join(upwards)


def refuse_circles(used: dict[str, Imports]) -> None:
    known = dict.fromkeys(used, Path())
    graphlib.TopologicalSorter({module: own_modules(found.running, known) for module, found in used.items()}).prepare()


def test_nothing_imports_itself_in_a_circle():
    refuse_circles(USED)


def test_a_circle_is_found():
    there = "from statprune.tuning import search"
    for back in ("import statprune.recipe", "def f():\n    from .. import recipe"):
        with pytest.raises(graphlib.CycleError):
            refuse_circles({"recipe": imports("recipe", there), "tuning.search": imports("tuning.search", back)})
    back = "if TYPE_CHECKING:\n    from statprune import recipe"
    refuse_circles({"recipe": imports("recipe", there), "tuning.search": imports("tuning.search", back)})


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "methods"])
def test_the_mathematics_imports_torch_and_numpy_and_nothing_else(module):
    used = {name.partition(".")[0] for name in USED[module].all}
    assert used - sys.stdlib_module_names <= {"torch", "numpy", "statprune"}
    assert {room(one) for one in own_modules(USED[module].all)} <= {"methods", "errors"}


def test_importing_statprune_does_not_import_datasets():
    code = "import sys, statprune; print(*sorted({'datasets', 'statprune'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["statprune"]
