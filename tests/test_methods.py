"""Methods by short names, and those that installed packages add."""

import importlib
import json
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statprune
from statprune import Recipe
from statprune.checkpoint import verify
from statprune.commands.cli import main
from statprune.errors import RecipeError
from statprune.methods.catalog import catalog
from statprune.methods.compensations import COMPENSATIONS
from statprune.methods.criteria import CRITERIA
from statprune.methods.registry import PRUNERS, known_compensations, known_criteria, known_pruners, summary
from statprune.methods.sparsegpt import SparseGPT
from statprune.methods.statistics import InputMoments, Statistic
from tiny_models import llama, tokens

quick = settings(max_examples=60, deadline=None, derandomize=True)

# --- the grammar -----------------------------------------------------------------------------------------------------

positive = st.floats(1e-30, 1e3)
exponents = st.one_of(st.floats(0, 4), st.integers(0, 4))
CRITERION_SETTINGS = {
    "magnitude": {},
    "wanda": {},
    "ria": {"exponent": exponents},
    "z-pruner": {},
    "cvr": {"alpha": exponents, "exponent": st.floats(0, 2), "eps": st.floats(1e-12, 1e3)},
    "optimal-brain": {"damping": st.floats(1e-30, 100)},
    "sparsegpt": {"block_size": st.integers(1, 4096), "damping": st.one_of(st.floats(1e-6, 100), st.integers(1, 9))},
}
ENERGY_SETTINGS = {
    "column": st.booleans(),
    "row": st.booleans(),
    "eps": positive,
    "clamp": st.tuples(st.floats(1e-9, 1), st.floats(1, 1e20)).map(list),
    "strength": st.floats(0, 1),
}
COMPENSATION_SETTINGS = {
    "none": {},
    "energy": ENERGY_SETTINGS,
    "activation-energy": ENERGY_SETTINGS,
    "least-squares": {
        "iterations": st.integers(1, 99),
        "tolerance": st.floats(0, 0.9),
        "damping": st.floats(0, 10),
    },
    "loss-aware": {
        "iterations": st.integers(1, 99),
        "shrinkage": st.floats(0.01, 1),
        "damping": st.floats(0, 10),
    },
}


def from_parts(criterion, pattern, compensation="none", schedule="walk"):
    return Recipe.from_dict({"criterion": criterion, "pattern": pattern, "compensation": compensation, "schedule": schedule})


def parts(known):
    return st.sampled_from(sorted(known)).flatmap(
        lambda name: st.fixed_dictionaries({"name": st.just(name)}, optional=known[name])
    )


def test_all_methods_are_tried_here():
    assert CRITERION_SETTINGS.keys() == known_criteria().keys() == {*CRITERIA, *PRUNERS}
    assert COMPENSATION_SETTINGS.keys() == known_compensations().keys() == COMPENSATIONS.keys()
    assert known_pruners() == {"sparsegpt": SparseGPT}


@quick
@given(parts(CRITERION_SETTINGS), st.lists(parts(COMPENSATION_SETTINGS), max_size=3))
def test_the_short_name_of_a_recipe_gives_the_recipe_back(criterion, compensations):
    recipe = from_parts(criterion, "2:4", compensations)
    assert Recipe(recipe.method, pattern="2:4") == recipe
    assert Recipe(recipe.method, pattern="2:4").method == recipe.method


@pytest.mark.parametrize(
    ("method", "criterion", "compensation"),
    [
        ("wanda", "wanda", "none"),
        ("cvr+energy", "cvr", "energy"),
        ("cvr:alpha=0.25", {"name": "cvr", "alpha": 0.25}, "none"),
        ("cvr:alpha=0.25,eps=1e-6+none", {"name": "cvr", "alpha": 0.25, "eps": 1e-6}, "none"),
        ("cvr: alpha = 0.25 , eps = 1e-6+energy", {"name": "cvr", "alpha": 0.25, "eps": 1e-6}, "energy"),
        ("cvr:eps=1e+3", {"name": "cvr", "eps": 1000.0}, "none"),
        ("cvr:eps=1e+3+energy:eps=1.5E+2", {"name": "cvr", "eps": 1e3}, {"name": "energy", "eps": 150.0}),
        ("cvr:alpha=+1+energy", {"name": "cvr", "alpha": 1}, "energy"),
        ("ria:exponent=1", {"name": "ria", "exponent": 1}, "none"),
        ("sparsegpt:block_size=64,damping=0.1", {"name": "sparsegpt", "block_size": 64, "damping": 0.1}, "none"),
        ("wanda+energy:column", "wanda", {"name": "energy", "column": True, "row": False}),
        ("wanda+energy:row", "wanda", {"name": "energy", "column": False, "row": True}),
        ("wanda+energy:column,row", "wanda", "energy"),
        ("wanda+energy:row,eps=1e-5", "wanda", {"name": "energy", "column": False, "eps": 1e-5}),
        ("wanda+energy:eps=1e-5,row", "wanda", {"name": "energy", "column": False, "eps": 1e-5}),
        ("wanda+energy:column=false", "wanda", {"name": "energy", "column": False}),
        ("wanda+energy:column=false,row=false", "wanda", {"name": "energy", "column": False, "row": False}),
        ("wanda+energy:clamp=[0.25, 4],row", "wanda", {"name": "energy", "column": False, "clamp": [0.25, 4]}),
        ("wanda+energy:clamp=[0.25,4],strength=0.5", "wanda", {"name": "energy", "clamp": [0.25, 4], "strength": 0.5}),
        ("wanda+energy:clamp=[0.5, 1e+3]", "wanda", {"name": "energy", "clamp": [0.5, 1000.0]}),
    ],
)  # fmt: skip
def test_a_short_name_and_mappings_make_equal_recipes(method, criterion, compensation):
    recipe = Recipe(method, pattern="4:8", schedule="block")
    assert recipe == from_parts(criterion, "4:8", compensation, "block")
    assert Recipe(recipe.method, pattern="4:8", schedule="block") == recipe


@pytest.mark.parametrize(
    ("method", "shortest"),
    [
        ("cvr:alpha=0.5,exponent=0.25+energy:column,row", "cvr+energy"),
        ("cvr:alpha=0.25+none", "cvr:alpha=0.25"),
        ("cvr:exponent=0.5,alpha=1", "cvr:alpha=1,exponent=0.5"),
        ("wanda+energy:row=false", "wanda+energy:column"),
        ("wanda+energy:row=false,column=false", "wanda+energy:column=false,row=false"),
        ("wanda+energy:clamp=[1, 3],column", "wanda+energy:column,clamp=[1, 3]"),
    ],
)
def test_a_recipe_is_called_by_what_is_not_a_default(method, shortest):
    assert Recipe(method).method == shortest


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("wnada", "Recipe(criterion='wnada') does not exist. Did you mean 'wanda'? Known: magnitude, wanda, ria, "),
        ("sparse-gpt", "Did you mean 'sparsegpt'?"),
        ("zpruner", "Did you mean 'z-pruner'?"),
        ("energy", "Recipe(criterion='energy') does not exist."),
        ("wnada:exponent=1", "Recipe(criterion='wnada') does not exist. Did you mean 'wanda'?"),
        ("cvr+enrgy:column", "Recipe(compensation='enrgy') does not exist. Did you mean 'energy'? Known: none, energy, "),
        ("cvr+wanda", "Recipe(compensation='wanda') does not exist."),
        ("cvr:alhpa=1", "The criterion 'cvr' has no setting 'alhpa'. Did you mean 'alpha'? Its settings are alpha, exponent,"),
        ("cvr+energy:clmp=[1, 2]", "The compensation 'energy' has no setting 'clmp'. Did you mean 'clamp'?"),
        ("wanda:alpha=1", "The criterion 'wanda' has no setting 'alpha'. Its settings are none."),
        ("cvr:=1", "The criterion 'cvr' has no setting ''."),
        ("sparsegpt:pattern=2:4", "The criterion 'sparsegpt' has no setting 'pattern'. Its settings are block_size, damping."),
        ("cvr:name=wanda", "The criterion 'cvr' has no setting 'name'."),
        ("cvr+energy:colum", "'colum' is no switch. Did you mean 'column'? Expected NAME=VALUE, or one of column, row. "
                             "The settings of energy are column, row, eps, clamp, strength."),
        ("cvr+energy:clamp", "'clamp' is no switch. Expected NAME=VALUE, or one of column, row."),
        ("cvr:alpha", "Recipe(criterion='cvr:alpha'): 'alpha' is no switch. Expected NAME=VALUE. The settings of cvr are"),
        ("wanda:fast", "'fast' is no switch. Expected NAME=VALUE. The settings of wanda are none."),
        ("cvr:alpha=1,", "'' is no switch."),
        ("cvr:alpha=1,,eps=1", "'' is no switch."),
        ("cvr:alpha=[1", "In 'cvr:alpha=[1', '[1' is no value: expected ',' or ']'"),
        ("cvr:alpha=much", "The criterion 'cvr' has alpha='much': expected a number"),
        ("cvr:alpha=", "The criterion 'cvr' has alpha=None: expected a number"),
        ("cvr:alpha=-1", "'cvr' has alpha=-1: expected a number from 0 to 4"),
        ("sparsegpt:damping=0", "'sparsegpt' has damping=0: expected a number from 1e-30 to 100"),
        ("cvr+energy:clamp=[2, 0.5]", "energy(clamp=[2, 0.5]): expected [low, high]"),
        ("cvr+energy:clamp=2", "The compensation 'energy' has clamp=2: expected a list"),
        *((method, f"The method {method!r} is not understood: expected CRITERION or CRITERION+COMPENSATION, each with settings "
                   "or without, such as 'wanda', 'cvr+energy' or 'cvr:alpha=0.25+energy:column'.")
          for method in ("", "+", "+energy", "cvr+", "cvr:", "cvr+energy:", ":alpha=1", "cvr energy", "cvr + energy",
                         "cvr+energy+5", "50%", "2:4", "-cvr")),
        *((method, f"Recipe(method={method!r}): expected a text") for method in (None, 5, ["cvr"])),
    ],
)  # fmt: skip
def test_a_short_name_that_makes_no_sense_is_refused(method, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe(method)


@pytest.mark.parametrize("value", ["maybe", "2", "[true]", "1.0"])
def test_a_switch_takes_true_and_false_only(value):
    with pytest.raises(RecipeError, match="column"):
        Recipe(f"wanda+energy:column={value}")


@pytest.mark.parametrize("method", ["cvr:alpha=true", "cvr:alpha=yes", "sparsegpt:block_size=true", "ria:exponent=off"])
def test_true_and_false_are_no_numbers(method):
    with pytest.raises(RecipeError, match="expected a number, not true or false"):
        Recipe(method)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("cvr:alpha=1e400", "finite number"),
        ("cvr:eps=.nan", "finite number"),
        ("wanda+energy:clamp=[0.5, .inf]", "finite numbers"),
        ("sparsegpt:block_size=1.5", "whole number"),
        ("cvr+least-squares:steps=2.5", "whole number"),
    ],
)
def test_a_setting_takes_numbers_of_its_kind(method, expected):
    with pytest.raises(RecipeError, match=f"expected (a )?{expected}"):
        Recipe(method)


@pytest.mark.parametrize("name", ["energy", "activation-energy"])
def test_an_error_names_the_compensation_that_was_asked_for(name):
    with pytest.raises(RecipeError, match=rf"'{name}' has eps=0: expected a number from 1e-30 to 1,000"):
        Recipe(f"wanda+{name}:eps=0")


def test_every_method_says_in_a_line_what_it_is():
    for known in (known_criteria(), known_compensations()):
        lines = [summary(function) for function in known.values()]
        assert all(lines)
        assert len(set(lines)) == len(lines)


def test_a_setting_given_twice_is_refused():
    with pytest.raises(RecipeError, match="alpha"):
        Recipe("cvr:alpha=1,alpha=2")


# --- methods of installed packages -----------------------------------------------------------------------------------

SOURCE = '''
from dataclasses import dataclass

import torch

from statprune.methods.patterns import Pattern
from statprune.methods.pruner import PrunedWeight
from statprune.methods.statistics import Statistic, needs


@needs(Statistic.NONE)
def smallest(weight, moments=None, *, power: float = 1.0):
    """Keeps what others prune."""
    if not power > 0:
        raise ValueError(f"smallest(power={power}): expected power > 0.")
    return -weight.float().abs() ** power


def mean_only(weight, moments):
    """Declares nothing, so it gets the moments."""
    return weight.float().abs() * moments.mean.abs().float()


@dataclass(frozen=True)
class Halved:
    """A pruner of its own, which halves what it keeps."""

    pattern: Pattern
    factor: float = 0.5
    weights: tuple[float, ...] = ()

    needs = Statistic.GRAM

    def fits(self, in_features):
        return self.pattern.fits(in_features)

    def __call__(self, weight, moments):
        assert moments.gram.shape[-1] == weight.shape[-1]
        keep = self.pattern(weight.abs())
        return PrunedWeight((weight * self.factor).masked_fill(~keep, 0.0), keep)


@needs(Statistic.NONE)
def negated(original, pruned, keep, moments=None, *, loudly: bool = False, label: str = "plain"):
    return pruned * (-10 if loudly else -1)
'''
ENTRY_POINTS = """
[statprune.criteria]
smallest = {module}:smallest
mean_only = {module}:mean_only

[statprune.pruners]
halved = {module}:Halved

[statprune.compensations]
negated = {module}:negated
"""
MODULE = "methods_of_another_package"


def forget():
    """What a process that starts anew would look up again."""
    for known in (known_criteria, known_pruners, known_compensations, catalog):
        known.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a package with these entry points, and its module; all is gone after the test."""
    folder = tmp_path / "site"
    folder.mkdir()

    def install(entry_points=ENTRY_POINTS, source=SOURCE, package="another-package"):
        (folder / f"{MODULE}.py").write_text(source)
        info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points.format(module=MODULE))
        importlib.invalidate_caches()
        forget()
        return folder

    monkeypatch.syspath_prepend(str(folder))
    yield install
    sys.modules.pop(MODULE, None)
    forget()


def test_an_installed_package_adds_names(install):
    assert "smallest" not in known_criteria()
    install()
    assert known_criteria().keys() == {*CRITERIA, *PRUNERS, "smallest", "mean_only", "halved"}
    assert known_pruners().keys() == {"sparsegpt", "halved"}
    assert known_compensations().keys() == {*COMPENSATIONS, "negated"}
    with pytest.raises(RecipeError, match=r"Did you mean 'smallest'\? Known: magnitude, .*smallest"):
        Recipe("smalest")


def test_names_are_looked_up_once(install, monkeypatch):
    install()
    Recipe("smallest+negated")
    monkeypatch.setattr("statprune.methods.registry.entry_points", lambda **group: pytest.fail("looked up again"))
    Recipe("halved+negated")


def test_what_they_add_is_used_as_what_there_is(install):
    install()
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    moments = InputMoments.zeros(4, needs=Statistic.GRAM).add(torch.tensor([[9.0, 0.0, 1.0, 1.0]]))
    for method, needed, expected in [
        ("smallest", Statistic.NONE, [1, 0, 2, 0]),
        ("smallest+negated", Statistic.NONE, [-1, 0, -2, 0]),
        ("smallest+negated:loudly", Statistic.NONE, [-10, 0, -20, 0]),
        ("mean_only", Statistic.MOMENTS, [1, 0, 0, 3]),
        ("halved", Statistic.GRAM, [0, -2, 0, 1.5]),
        ("halved:factor=0.25+negated", Statistic.GRAM, [0, 1, 0, -0.75]),
    ]:
        pruner = Recipe(method, pattern="2:4").pruner()
        assert pruner.needs is needed, method
        assert pruner(weight, moments).weight[0].tolist() == expected, method


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("smallest:power=0", "smallest(power=0): expected power > 0"),
        ("smallest:powr=1", "The criterion 'smallest' has no setting 'powr'. Did you mean 'power'? Its settings are power."),
        ("halved:pattern=1", "The criterion 'halved' has no setting 'pattern'. Its settings are factor, weights."),
        ("wanda+negated:loudl", "'loudl' is no switch. Did you mean 'loudly'? Expected NAME=VALUE, or one of loudly."),
    ],
)
def test_their_settings_are_checked_as_all_are(install, method, message):
    install()
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe(method)


@pytest.mark.parametrize(
    "part",
    [
        {"name": "negated", "label": "plain text"},
        {"name": "negated", "label": "1e-3"},
        {"name": "negated", "label": "", "loudly": True},
    ],
)
def test_settings_that_are_text_survive_the_short_name(install, part):
    install()
    recipe = from_parts("smallest", "2:4", part)
    assert Recipe(recipe.method) == recipe


@pytest.mark.parametrize("length", [0, 1, 3, 60])
def test_lists_of_any_length_survive_the_short_name(install, length):
    install()
    recipe = from_parts({"name": "halved", "weights": [index / 7 for index in range(length)]}, "2:4")
    assert Recipe(recipe.method) == recipe


def test_a_model_is_pruned_by_a_method_of_another_package(install):
    install()
    model, dense = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    report = statprune.prune(model, [tokens(2, 6)], Recipe("halved:factor=0.25+negated", pattern="2:4"))
    assert report.recipe["criterion"] == {"name": "halved", "factor": 0.25, "weights": []}
    for site in report.sites:
        before, after = (one.get_parameter(site.parameter) for one in (dense, model))
        kept = after != 0
        assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        assert torch.equal(after[kept], before[kept] / -4)


def test_the_command_knows_the_methods_of_installed_packages(install, tmp_path, tiny_model_folder):
    install()
    options = ["--criterion", "smallest:power=2", "--compensation", "negated", "--seqlen", "8", "--samples", "2"]
    assert main(["prune", tiny_model_folder, "--output", str(tmp_path / "out"), *options]) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["recipe"]["criterion"] == {"name": "smallest", "power": 2}
    assert [one["name"] for one in record["recipe"]["compensation"]] == ["negated"]
    verify(tmp_path / "out")


def test_a_folder_keeps_its_promises_for_those_who_have_not_got_the_package(install, tmp_path, tiny_model_folder):
    site = install()
    options = ["--criterion", "smallest", "--compensation", "negated", "--seqlen", "8", "--samples", "2"]
    assert main(["prune", tiny_model_folder, "--output", str(tmp_path / "out"), *options]) == 0
    sys.path.remove(str(site))
    forget()
    assert verify(tmp_path / "out")["recipe"]["criterion"]["name"] == "smallest"


@pytest.mark.parametrize(
    ("entry_points", "origin"),
    [
        (
            "[statprune.criteria]\nwanda = {module}:smallest\n",
            "'wanda' = '{module}:smallest' in statprune.criteria",
        ),
        (
            "[statprune.criteria]\nsparsegpt = {module}:smallest\n",
            "'sparsegpt' = '{module}:smallest' in statprune.criteria",
        ),
        ("[statprune.pruners]\ncvr = {module}:Halved\n", "'cvr' = '{module}:Halved' in statprune.pruners"),
        ("[statprune.compensations]\nenergy = {module}:negated\n", "'energy' = '{module}:negated' in statprune.compensations"),
        (
            "[statprune.criteria]\na+b = {module}:smallest\n",
            "'a+b' = '{module}:smallest' in statprune.criteria",
        ),
        ("[statprune.criteria]\n2:4 = {module}:smallest\n", "in statprune.criteria"),
        ("[statprune.criteria]\nauto = {module}:smallest\n", "'auto' = "),
        ("[statprune.criteria]\nbest = {module}:smallest\n", "'best' = "),
        ("[statprune.pruners]\npaper = {module}:Halved\n", "'paper' = "),
    ],
)
def test_a_name_that_is_taken_or_is_none_is_refused(install, entry_points, origin):
    install(entry_points)
    with pytest.raises(RecipeError, match=r"\(package another-package\): expected a name of letters.*not taken") as caught:
        Recipe()
    assert origin.format(module=MODULE) in str(caught.value)
    assert "Rename or uninstall it." in str(caught.value)


def test_two_packages_with_one_name_are_refused(install):
    install("[statprune.criteria]\nmine = {module}:smallest\n", package="one")
    install("[statprune.criteria]\nmine = {module}:mean_only\n", package="other")
    with pytest.raises(RecipeError, match=r"'mine' = .* \(package (one|other)\): expected a name .* that is not taken"):
        Recipe()


def test_a_criterion_and_a_pruner_of_one_name_are_refused(install):
    install("[statprune.criteria]\nmine = {module}:smallest\n\n[statprune.pruners]\nmine = {module}:Halved\n")
    with pytest.raises(RecipeError, match=r"'mine' = .* that is not taken"):
        Recipe("mine")


def test_a_compensation_may_have_the_name_of_a_criterion(install):
    install("[statprune.compensations]\nwanda = {module}:negated\n")
    assert Recipe("wanda+wanda").method == "wanda+wanda"


@pytest.mark.parametrize(
    ("entry_points", "source", "reason"),
    [
        ("[statprune.criteria]\nmine = {module}:nothing\n", SOURCE, "AttributeError: "),
        ("[statprune.criteria]\nmine = no_such_module_anywhere:f\n", SOURCE, "ModuleNotFoundError: No module named"),
        ("[statprune.pruners]\nmine = {module}:f\n", "raise OSError('no licence')", "OSError: no licence"),
        ("[statprune.compensations]\nmine = {module}:f\n", "def f(:", "SyntaxError: "),
    ],
)
def test_an_entry_point_that_cannot_be_loaded_is_named(install, entry_points, source, reason):
    install(entry_points, source)
    with pytest.raises(RecipeError, match=rf"The entry point 'mine' = .* cannot be loaded: {reason}") as caught:
        Recipe()
    assert "(package another-package)" in str(caught.value)
    assert "Repair or uninstall it." in str(caught.value)


@pytest.mark.parametrize("group", ["criteria", "pruners", "compensations"])
def test_an_entry_point_that_is_no_function_is_named(install, group):
    install(f"[statprune.{group}]\nmine = {{module}}:NUMBER\n", "NUMBER = 5")
    with pytest.raises(RecipeError, match="mine"):
        Recipe("wanda+mine" if group == "compensations" else "mine")


def test_afterwards_the_names_are_what_they_were():
    assert "smallest" not in known_criteria()
    assert known_pruners().keys() == PRUNERS.keys()
