"""YAML in which nothing is guessed, wherever it is read."""

import re

import pytest
import yaml

from statprune.commands.cli import main
from statprune.errors import ExperimentError, RecipeError, ResultsError
from statprune.experiments.definition import Experiment
from statprune.experiments.published import Published
from statprune.how import read_yaml
from statprune.recipe import Recipe
from statprune.strict_yaml import DEEPEST, YamlDumper, load, problem

TWICE = "method: wanda\npattern: '2:4'\npattern: '4:8'\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_what_there_is_in_yaml_is_read_as_ever():
    text = "a: {b: [1, 2.5, 1e-8, -3e5, true, null, 'x', 2001-01-02]}\nc: &c {d: 1}\ne: *c\nf: {<<: *c, d: 2, g: 0x1f}\n"
    ordinary = yaml.safe_load(text)
    ordinary["a"]["b"][2:4] = [1e-8, -3e5]  # texts to YAML 1.1
    assert load(text) == ordinary
    assert load("") is None
    assert load(yaml.dump({"a": ["1e5", 1e5, "2:4"]}, Dumper=YamlDumper)) == {"a": ["1e5", 1e5, "2:4"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWICE, "the key 'pattern' is there twice; leave one out, line 3"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "the key 'b' is there twice; leave one out, line 4"),
        ("1: a\n0x1: b\n", "the key '0x1' is there twice; leave one out, line 2"),
        ("- {a: 1, a: 1}", "the key 'a' is there twice"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", "the key '<<' is there twice"),
        ("!!set {a, a}", "the key 'a' is there twice"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"nested deeper than {DEEPEST} levels, line 1"),
        ("[" * 100_000, "nested deeper than"),
        ("{a: " * 5_000, "nested deeper than"),
        ("- " * 5_000, "nested deeper than"),
        (BOMB, "more than 100,000 values, aliases written out, line"),
        ("a: &a [*a]", "a value that holds itself"),
        ("a: &a {b: *a}", "a value that holds itself"),
        ("a: *nowhere", "found undefined alias 'nowhere', line 1"),
        ("a: " + "9" * 5000, "is no int, line 1"),
        ("a: 2001-99-99", "'2001-99-99' is no timestamp, line 1"),
        ("a: !!int x", "'x' is no int, line 1"),
        ("a: !!float ''", "'' is no float, line 1"),
        ("a: !!timestamp x", "'x' is no timestamp, line 1"),
        ("a: !!bool x", "'x' is no bool, line 1"),
        ("? [a]\n: 1", "found unhashable key, line 1"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("--- a\n--- b", "but found another document, line 2"),
        ("a: \x00", "special characters are not allowed"),
        ("a: [1", "expected ',' or ']'"),
    ],
)
def test_what_is_dangerous_or_ambiguous_is_a_yaml_error_with_its_line(text, message):
    with pytest.raises(yaml.YAMLError) as caught:
        load(text)
    assert message in problem(caught.value)


@pytest.mark.parametrize("text", [TWICE, BOMB, "criterion:\n  name: cvr\n  alpha: 1\n  alpha: 2\n", "[" * 10_000])
@pytest.mark.parametrize("read", [Recipe.from_yaml, read_yaml])
def test_recipes_are_read_so(tmp_path, text, read):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"The recipe {re.escape(str(path))} cannot be read: .*, line \d"):
        read(path)


def test_published_tables_are_read_so(tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text("source: x\nsource: y\n")
    with pytest.raises(ResultsError, match="the key 'source' is there twice"):
        Published.load(path)


def test_task_files_are_read_so(tmp_path):
    pytest.importorskip("lm_eval")
    from statprune.experiments.zero_shot import ZeroShot

    path = tmp_path / "task.yaml"
    path.write_text("task: a\ntask: b\n")
    with pytest.raises(ExperimentError, match=r"task\.yaml cannot be read.*the key 'task' is there twice"):
        ZeroShot([str(path)])


def test_settings_of_experiments_are_read_so():
    assert Experiment.load("perplexity", {"model": ["x"], "text": ["y"], "calibration": ["z"]}).samples


@pytest.mark.parametrize("content", ["samples: 2\nsamples: 4\n", BOMB, "[" * 10_000])
def test_options_of_the_command_are_read_so(tmp_path, capsys, content):
    path = tmp_path / "options.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(["prune", "MODEL", "--output", "out", "--config", str(path)])
    assert caught.value.code == 2
    assert re.search(r"--config \S+ cannot be read: .*, line \d", " ".join(capsys.readouterr().err.split()))
