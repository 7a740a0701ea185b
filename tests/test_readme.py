"""What the documentation says must be there: files, sections, commands, names and defaults."""

import itertools
import re
import shlex
import shutil
from inspect import Parameter
from pathlib import Path

import pytest

from statprune import Recipe
from statprune.checkpoint import verify
from statprune.commands import COMMANDS
from statprune.commands.cli import parse
from statprune.grammar import complete
from statprune.methods.budget import ALLOCATIONS
from statprune.methods.patterns import PATTERNS, parse_shorthand
from statprune.methods.registry import known_compensations, known_criteria, settings_of
from statprune.methods.target import TARGETS
from statprune.model.schedule import SCHEDULES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "configs" / "paper" / "README.md", *sorted((ROOT / "src").rglob("README.md"))]
of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def lines(page: Path) -> list[str]:
    return page.read_text(encoding="utf-8").splitlines()


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks in a language; "" are those of the command line."""
    parts = re.split(r"^```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    # Text, opening fence, code, closing fence, text, ...
    return [code for fence, code in zip(parts[1::4], parts[2::4], strict=True) if fence == language]


def anchors(page: Path) -> set[str]:
    """The sections, as links name them."""
    heads = [line.lstrip("#").strip().lower() for line in lines(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads}


def commands(page: Path) -> list[list[str]]:
    """The words of the command lines behind `statprune`; a backslash breaks a line that is one."""
    joined = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in joined if line.startswith("statprune ")]


def rows(head: str) -> list[list[str]]:
    """The cells of the README's table that begins like this."""
    found = lines(README)
    start = next(number for number, line in enumerate(found) if line.startswith(head))
    table = itertools.takewhile(lambda line: line.startswith("|"), found[start + 2 :])
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]


def methods() -> dict[str, dict[str, str]]:
    """The table of methods: by part and name, the settings as they are written."""
    found: dict[str, dict[str, str]] = {}
    for part, name, _, settings in rows("| | name | what it does | settings"):
        if part:
            found[part] = part_of = {}
        part_of[name.strip("`")] = settings.strip("`")
    return found


def test_the_readme_is_short():
    assert len(lines(README)) <= 180


@of_every_page
def test_lines_can_be_read(page):
    # Tables of results and pictures cannot be broken; the top README has none that need to be.
    long = [line for line in lines(page) if len(line) > 120 and not (page != README and line.startswith(("|", "!")))]
    assert not long


@of_every_page
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in (target for target in targets if "://" not in target):
        path, _, section = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not section or section in anchors(found), target


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        linked = [(page.parent / target).resolve() for target in targets if "://" not in target]
        linked = [path / "README.md" if path.is_dir() else path for path in linked]
        waiting += [path for path in linked if path in PAGES and path not in reached]
    assert reached == set(PAGES)


def test_there_is_one_command_for_the_tests_and_ci_finds_it():
    pattern = re.search(r"s/\^\\\((.*)\\\)\$/", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert pattern is not None
    assert len([line for line in lines(README) if re.fullmatch(pattern[1], line)]) == 1


@of_every_page
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # --config configs/sweep.yaml
    for words in commands(page):
        parse(words)


def test_commands_are_found():
    assert ["verify", "sparse"] in commands(README)
    assert all(commands(page) for page in PAGES if page.parent.name in ("paper", "tuning", "training"))


def test_every_command_is_in_the_table():
    named = [row[0].strip("`").split()[0] for row in rows("| command |")]
    assert sorted([*named, "quickstart"]) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("part", "known"),
    [
        ("criterion", known_criteria()),
        ("compensation", known_compensations()),
        ("target", TARGETS),
        ("allocation", ALLOCATIONS),
    ],
    ids=["criterion", "compensation", "target", "allocation"],
)
def test_the_table_of_methods_has_every_name_and_every_setting_with_its_default(part, known):
    written = methods()[part]
    assert written.keys() == known.keys()
    for name, settings in written.items():
        expected = settings_of(known[name])
        assert re.findall(r"(\w+)=", settings) == list(expected), name
        # As a user would type it: what is written gives what is not written.
        text = f"{name}:{settings}" if settings else name
        assert complete(part, text, known) == complete(part, name, known), name


def test_the_table_of_methods_has_the_patterns_and_the_schedules():
    written = methods()
    assert written.keys() == {"criterion", "compensation", "pattern", "schedule", "target", "allocation"}
    assert tuple(written["schedule"]) == SCHEDULES
    shown = {type(parse_shorthand(text)): settings for text, settings in written["pattern"].items()}
    assert shown.keys() == set(PATTERNS.values())
    for pattern, settings in shown.items():
        defaults = {key: value for key, value in settings_of(pattern).items() if value is not Parameter.empty}
        assert settings == ",".join(f"{key}={value}" for key, value in defaults.items())


@pytest.fixture
def quickstart(tmp_path, monkeypatch, tiny_model_folder):
    """A folder in which there is what the quickstart leaves, of a model that is quick to prune."""
    dense = shutil.copytree(tiny_model_folder, tmp_path / "statprune-quickstart" / "dense")
    config = (dense / "config.json").read_text()
    (dense / "config.json").write_text(config.replace('"max_position_embeddings": 64', '"max_position_embeddings": 128'))
    (tmp_path / "statprune-quickstart" / "texts").mkdir()
    for name, num_lines in (("training", 1000), ("held-out", 100)):
        text = "".join(f"{number} to be or not to be, that is the question\n" for number in range(num_lines))
        (tmp_path / "statprune-quickstart" / "texts" / f"{name}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page: Path) -> None:
    """All Python of a page, from above to below, as somebody does who reads it."""
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")  # Lightning's, about a logger
def test_the_python_of_the_readme_runs(quickstart):
    run_python(README)
    written = {path.name for path in quickstart.iterdir() if (path / "pruning.json").is_file()}
    assert written == {"sparse-by-hand", "sparse-by-lightning", "sparse-finetuned"}
    assert all(verify(quickstart / name)["recipe"] == Recipe().to_dict() for name in written)


@pytest.mark.slow
def test_the_python_of_the_choice_runs(quickstart, capsys):
    run_python(ROOT / "src" / "statprune" / "tuning" / "README.md")
    assert "| schedules |" in capsys.readouterr().out
