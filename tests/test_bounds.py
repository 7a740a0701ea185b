"""Settings are finite and bounded when a recipe is made, and what they cannot do shows there."""

import re
from typing import Annotated

import pytest
import torch

import statprune
from statprune.errors import NonFiniteError, RecipeError, SiteError
from statprune.methods.bounds import Between, Count, bounds_in, check
from statprune.methods.budget import ALLOCATIONS
from statprune.methods.compensations import COMPENSATIONS
from statprune.methods.criteria import CRITERIA
from statprune.methods.patterns import NM, PATTERNS
from statprune.methods.registry import PRUNERS, build_pruner, settings_of
from statprune.methods.statistics import InputMoments
from statprune.recipe import Recipe, Search
from tiny_models import classifier, refused

NAMES = {**CRITERIA, **PRUNERS, **COMPENSATIONS, **PATTERNS, **ALLOCATIONS}


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_bounds_that_its_default_is_in(name):
    known, bounds = NAMES[name], bounds_in(NAMES[name])
    for setting, default in settings_of(known).items():
        if isinstance(default, bool | str):
            assert setting not in bounds
        else:
            assert setting in bounds
            assert default is settings_of(NM)["of"] or bounds[setting].holds(default)  # N:M have no default


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cvr:alpha=1e400", "'cvr' has alpha=inf: expected a finite number"),
        ("cvr:alpha=.nan", "'cvr' has alpha=nan: expected a finite number"),
        ("cvr:exponent=1e9", "'cvr' has exponent=1000000000.0: expected a number from 0 to 2"),
        ("ria:exponent=1000", "'ria' has exponent=1000: expected a number from 0 to 4"),
        ("cvr+energy:eps=.inf", "'energy' has eps=inf: expected a finite number"),
        ("cvr+energy:eps=1e30", "'energy' has eps=1e+30: expected a number from 1e-30 to 1,000"),
        ("cvr+energy:clamp=[1, .inf]", "'energy' has clamp=[1, inf]: expected finite numbers"),
        ("cvr+energy:clamp=[1, 2, 3]", "energy(clamp=[1, 2, 3]): expected [low, high]"),
        ("cvr+energy:clamp=[a, b]", "'energy' has clamp=['a', 'b']: expected a number"),
        ("sparsegpt:block_size=1.5", "'sparsegpt' has block_size=1.5: expected a whole number"),
        ("sparsegpt:block_size=70000", "'sparsegpt' has block_size=70000: expected a whole number from 1 to 65,536"),
        ("cvr:alpha=true", "'cvr' has alpha=True: expected a number, not true or false"),
        ("cvr+least-squares:steps=100000000", "'least-squares' has steps=100000000: expected a whole number from 0 to 1,000"),
        ("cvr+least-squares:iterations=1001", "'least-squares' has iterations=1001: expected a whole number from 1 to 1,000"),
        ("cvr:alpha=" + "9" * 5000, "'cvr:alpha=999"),
        ("cvr" + "+energy" * 17, "A method with 17 compensations: expected at most 16"),
        ("cvr" + "+energy" * 2000, "has 14,003 characters: expected at most 10,000"),
    ],
)
def test_settings_out_of_bounds_are_refused(method, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe(method)


def test_a_yaml_number_beyond_float_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("criterion: {name: cvr, alpha: 1e999}")
    with pytest.raises(RecipeError, match=r"has alpha=inf: expected a finite number"):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    "value", [10**400, pytest.param(10**5000, id="5000 digits"), [[[[]]]] * 3, None, "0.5", b"1", 1j, {"a": 1}]
)
def test_values_of_any_kind_are_refused(value):
    with pytest.raises(RecipeError, match=r"The criterion 'cvr' has alpha=.*: expected"):
        Recipe.from_dict({"criterion": {"name": "cvr", "alpha": value}})


def test_lists_in_lists_without_end_are_refused():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for data in ({"criterion": {"name": "cvr", "alpha": deep}}, {"criterion": deep}, {"targets": deep}, {"pattern": deep}):
        with pytest.raises(RecipeError, match="<list too large to show>"):
            Recipe.from_dict(data)


@pytest.mark.parametrize(
    "minutes", [0, -1, float("inf"), float("nan"), 1e9, True, "5", None, pytest.param(10**5000, id="5000 digits")]
)
def test_a_search_takes_up_to_a_week(minutes):
    with pytest.raises(RecipeError, match=r"Search\(minutes=.*\): expected a number from 0 to 10,080, but not 0"):
        Search(minutes=minutes)


@pytest.mark.parametrize("pattern", ["9999999999999999:99999999999999999", "1:1025", "0:4", "9" * 5000 + ":4"])
def test_groups_are_of_a_size_that_there_is(pattern):
    with pytest.raises(RecipeError, match=r"Recipe\(pattern="):
        Recipe(pattern=pattern)


@pytest.mark.parametrize("pattern", ["4:4", "1:1", "0%"])
def test_a_pattern_that_prunes_nothing_is_the_end_of_a_curve(pattern):
    model = classifier()
    before = model[0].weight.clone()
    report = statprune.prune(model, [torch.randn(4, 8)], "wanda", pattern=pattern)
    assert report.sites[0].num_pruned == 0
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("pattern", ["2:4", "512:1024", "99.9%"])
@pytest.mark.parametrize(
    "method",
    ["cvr+least-squares:steps=1000,iterations=1000,tolerance=0", "sparsegpt:block_size=65536", "cvr" + "+energy" * 16],
)
def test_a_recipe_is_tried_out_without_the_work_that_its_settings_ask_for(method, pattern, monkeypatch):
    built = []

    def build(criterion, pattern, compensations):
        built.append([criterion, *compensations])
        pruner = build_pruner(criterion, pattern, compensations)
        return lambda weight, moments: (widths.append(weight.shape), pruner(weight, moments))

    widths = []
    monkeypatch.setattr("statprune.recipe.build_pruner", build)
    Recipe(method, pattern)
    counts = {key: value for part in built[-1] for key, value in part.items() if key in ("steps", "iterations", "block_size")}
    assert all(value == (0 if key == "steps" else 1) for key, value in counts.items())
    ((rows, width),) = widths
    assert rows == 1
    assert width <= 16


def test_functions_refuse_what_a_recipe_refuses():
    check("scaled", scaled, by=2, to=(0.5, 1), other="anything")
    for values, message in [
        ({"by": 2.5}, "scaled(by=2.5): expected a whole number from 1 to 3."),
        ({"by": True}, "scaled(by=True): expected a whole number from 1 to 3."),
        ({"to": (0.5, 7)}, "scaled(to=[0.5, 7]): expected a number from 0 to 1, but not 0."),
        ({"to": [0.0]}, "scaled(to=[0.0]): expected a number"),
        ({"to": None}, "scaled(to=None): expected a number"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            check("scaled", scaled, **values)


def scaled(*, by: Annotated[int, Count(1, 3)] = 1, to: Annotated[tuple, Between(0, 1, without=(0,))] = (1.0,), other=None):
    pass


def test_bounds_of_others_are_read_though_their_annotations_are_texts():
    def known(*, alpha: "Annotated[float, Between(0, 1)]" = 0.5, other: "NotThere" = 1):  # noqa: F821
        pass

    assert bounds_in(known) == {}  # one of them cannot be read, and there may be none

    def readable(*, alpha: "Annotated[float, Between(0, 1)]" = 0.5):
        pass

    assert bounds_in(readable) == {"alpha": Between(0, 1)}


# --- in bounds, and too much for a weight all the same ------------------------------------------------------------------


def test_scores_beyond_float32_are_refused_and_nothing_is_changed():
    model = classifier()
    # The norm of the inputs to the power of 4 is 1e40.
    with refused(model, SiteError, r"0: the criterion's scores are not all finite in float32.*Nothing was changed"):
        statprune.prune(model, [torch.full((2, 8), 1e10)], "ria:exponent=4", pattern="2:4")


@pytest.mark.parametrize("method", ["optimal-brain+energy", "cvr:alpha=4,eps=1e-12+energy:clamp=[1e-30, 1e30]", "sparsegpt"])
@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e6])
def test_what_is_in_bounds_gives_finite_weights(method, scale):
    model = classifier()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    statprune.prune(model, [torch.randn(16, 8)], method)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_weights_beyond_their_dtype_are_refused():
    model = classifier().half()
    with torch.no_grad():
        model[0].weight.mul_(100)
        model[0].weight[:, 0] = 60000 - 16 * torch.arange(12)
    with refused(model, NonFiniteError, r"0: the method makes NaN or infinity of its finite weights, which are torch.float16"):
        statprune.prune(model, [torch.randn(4, 8).half()], "magnitude+energy:clamp=[1.5, 2]", pattern="50%")


def test_a_criterion_that_scores_with_nan_chooses_nothing():
    from statprune.methods.pruner import MaskPruner

    moments = InputMoments.zeros(4).add(torch.eye(4))
    with pytest.raises(ValueError, match="the criterion's scores are not all finite"):
        MaskPruner(lambda weight, moments: weight / 0, NM(2, 4))(torch.zeros(1, 4), moments)
