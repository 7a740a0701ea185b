"""Allocation from end to end, on models of a few hundred weights."""

import re

import pytest
import torch
from torch import nn

import statprune
from statprune import Recipe
from statprune.allocation import allocate
from statprune.checkpoint import save, verify
from statprune.errors import CalibrationError, CheckpointError, NonFiniteError, SiteError
from statprune.methods.patterns import Counted, Unstructured
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.weights import InPlace
from statprune.record import write_record
from statprune.selection import select
from tiny_models import classifier, llama, refused, snapshot, t5, tokens


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [tokens(2, 9) for _ in range(3)]


@pytest.fixture(scope="module")
def traced(model, batches):
    return find_layers(model, bind_batches(model, batches))


def zeros(twin):
    return {name: int((weight == 0).sum()) for name, weight in twin.weights.items()}


@pytest.mark.parametrize("allocation", ["owl", "sensitivity", "curves"])
@pytest.mark.parametrize(
    ("method", "schedule"), [("cvr+energy", "walk"), ("sparsegpt", "block"), ("magnitude", "walk"), ("wanda", "one-shot")]
)
def test_the_whole_model_has_exactly_the_zeros_asked_for(model, batches, traced, allocation, method, schedule):
    before = snapshot(model)
    recipe = Recipe(method, pattern="55.3%", allocation=allocation, schedule=schedule)
    twin = statprune.plan(model, batches, recipe, traced=traced)
    expected = Unstructured(0.553).pruned_of(1, twin.report.num_weights)
    assert sum(zeros(twin).values()) == sum(site.num_pruned for site in twin.report.sites) == expected
    spread = recipe.build_allocation().spread
    for site in twin.report.sites:
        assert 0.553 - spread - 1 / site.num_weights <= site.sparsity <= 0.553 + spread + 1 / site.num_weights
        pattern = Counted(**{key: value for key, value in site.pattern.items() if key != "name"})
        assert pattern.num_pruned == site.num_pruned
        assert pattern.holds(twin.weights[site.parameter])
    assert len({round(site.sparsity, 2) for site in twin.report.sites}) > 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


def test_owl_keeps_more_where_there_are_outliers(batches):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, :12] *= 100
    twin = statprune.plan(model, batches, Recipe("wanda", pattern="50%", allocation="owl:spread=0.1"))
    sparsity = {site.name: site.sparsity for site in twin.report.sites}
    assert {round(value, 1) for name, value in sparsity.items() if "layers.0" in name} == {0.6}
    assert {round(value, 1) for name, value in sparsity.items() if "layers.1" in name} == {0.4}


def test_sensitivity_prunes_what_the_loss_does_not_feel(batches):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight *= 1e-6  # so that nothing in this attention matters
        model.lm_head.weight *= 30
    recipe = Recipe("wanda", pattern="50%", allocation="sensitivity:spread=0.3,probes=3")
    twin = statprune.plan(model, batches, recipe)
    sparsity = {site.name: site.sparsity for site in twin.report.sites}
    attention = [name for name in sparsity if "layers.0.self_attn" in name]
    assert len(attention) == 4
    assert all(sparsity[name] > 0.65 for name in attention)


def test_uniform_does_what_was_done_before_and_measures_nothing(model, batches, traced):
    selection = select(traced.groups, traced.left_out, Recipe(pattern="50%"))
    found = allocate(traced, selection, [], Recipe(pattern="50%"), InPlace(model))
    assert found.selection is selection
    assert found.patterns == {}


@pytest.mark.parametrize("allocation", ["owl:spread=0", "sensitivity:spread=0", "curves:spread=0"])
def test_no_spread_is_the_same_sparsity_everywhere(model, batches, traced, allocation):
    twin = statprune.plan(model, batches, Recipe("wanda", pattern="50%", allocation=allocation), traced=traced)
    assert {site.sparsity for site in twin.report.sites} == {0.5}


@pytest.mark.parametrize("allocation", ["owl", "sensitivity", "curves"])
def test_an_nm_pattern_leaves_layers_dense_and_says_why(model, batches, traced, allocation):
    recipe = Recipe("wanda", pattern="2:4", allocation=f"{allocation}:sparsity=0.3")
    twin = statprune.plan(model, batches, recipe, traced=traced)
    everything = statprune.plan(model, batches, Recipe("wanda", pattern="2:4"), traced=traced).report
    reached = sum(zeros(twin).values()) / everything.num_weights
    pruned = {site.name: site.num_pruned for site in twin.report.sites}
    assert reached >= 0.3
    assert all(reached - number / everything.num_weights < 0.3 for number in pruned.values())
    dense = [one for one in twin.report.left_out if "allocation" in one.reason]
    assert {one.name for one in dense} | set(pruned) == {site.name for site in everything.sites}
    assert dense[0].reason == (
        f"dense by the allocation {allocation}: 2:4 in the other layers makes {100 * reached:.4g} % of the weights in scope "
        "zero, 30 % were asked for"
    )
    assert all(site.pattern is None for site in twin.report.sites)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity", "curves"])
def test_a_saved_model_is_verified_layer_by_layer(batches, tmp_path, allocation):
    model = llama()
    report = statprune.prune(model, batches, Recipe(pattern="50%", allocation=allocation))
    assert "% of a layer" in str(report)
    folder = save(model, report, tmp_path / "sparse")
    record = verify(folder)
    assert record["recipe"]["allocation"]["name"] == allocation
    assert [site["sparsity"] for site in record["sites"]] == [site.sparsity for site in report.sites]
    assert sum(site["num_zeros"] for site in record["sites"]) == report.num_weights // 2
    site = record["sites"][0]
    for changed, broken in (
        ({"pattern": {**site["pattern"], "num_pruned": site["num_pruned"] + 1}}, "number of pruned weights with"),
        ({"sparsity": 0.123}, "sparsity: expected 0.123"),
        ({"pattern": {"name": "unknown"}}, "is damaged: KeyError"),
    ):
        sites = [{**site, **changed}, *record["sites"][1:]]
        write_record(folder, {**record, "sites": sites})
        with pytest.raises(CheckpointError, match=broken):
            verify(folder)


def test_what_is_no_language_model_is_measured_by_the_error_of_its_output():
    model, batches = classifier(), [torch.randn(6, 8) for _ in range(2)]
    with torch.no_grad():
        model[0].weight *= 1e-4  # next to its bias nobody will miss it
        model[0].bias.fill_(1.0)
    twin = statprune.plan(model, batches, Recipe("wanda", pattern="50%", allocation="sensitivity:spread=0.2"))
    sparsity = {site.name: site.sparsity for site in twin.report.sites}
    assert sparsity["0"] == pytest.approx(0.7, abs=0.02)
    assert sum(zeros(twin).values()) == 96


def test_an_encoder_decoder_with_padding_is_shared_out_too():
    batch = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64), "labels": tokens(2, 6)}
    batch["attention_mask"][1, 4:] = 0
    for allocation in ("owl", "sensitivity", "curves"):
        twin = statprune.plan(t5(), [batch], Recipe("wanda", pattern="50%", allocation=allocation))
        assert sum(zeros(twin).values()) == twin.report.num_weights // 2


class Branching(nn.Module):
    """Decides by its data, so it cannot be exported."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu() if float(x.sum()) < 1e9 else x
        return self.head(x)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity", "curves"])
def test_a_model_without_a_graph_is_shared_out_by_its_hooks(allocation):
    with pytest.warns(UserWarning, match="Falling back to module hooks"):
        twin = statprune.plan(Branching(), [torch.randn(5, 8)], Recipe("wanda", pattern="50%", allocation=allocation))
    assert sum(zeros(twin).values()) == 96


def test_progress_is_shown_for_every_layer_that_is_measured(model, batches, traced):
    seen = []
    recipe = Recipe("wanda", pattern="50%", allocation="sensitivity")
    statprune.plan(model, batches, recipe, traced=traced, progress=lambda *step: seen.append(step))
    assert seen[0] == (1, 14, "sensitivity of model.layers.0.self_attn.q_proj")
    assert seen[13][:2] == (14, 14)


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return {"result": [self.head(self.body(x))]}


def test_what_cannot_be_measured_is_refused_and_nothing_is_changed(batches):
    recipe = Recipe("wanda", pattern="50%", allocation="sensitivity")
    silent = Silent()
    with refused(silent, CalibrationError, "Silent returns no tensor to compare. Use 'owl'"):
        statprune.prune(silent, [torch.randn(3, 4)], recipe)
    zero = classifier()
    with torch.no_grad():
        zero[4].weight.zero_()
        zero[4].bias.zero_()
    with refused(zero, CalibrationError, "the model's output is 0 everywhere, or all padding"):
        statprune.prune(zero, [torch.randn(3, 8)], recipe)
    recipe = Recipe("sparsegpt:damping=1e-30", pattern="50%", allocation="sensitivity")
    huge = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with refused(huge, SiteError, "0: the Gram of its inputs cannot be factorised"):
        statprune.prune(huge, [torch.ones(3, 4)], recipe)


def test_a_loss_that_is_not_finite_names_the_layer(batches, monkeypatch):
    model = llama()
    values = iter([float("nan"), *[1.0] * 20])
    monkeypatch.setattr(
        "statprune.allocation.probes.total_divergence", lambda *_: torch.tensor(next(values), dtype=torch.float64)
    )
    with refused(model, NonFiniteError, re.escape("is nan with model.layers.0.self_attn.q_proj pruned")):
        statprune.prune(model, batches, Recipe("wanda", pattern="50%", allocation="sensitivity"))


def _zeros_by_loss(rank, num_ranks, probes):
    torch.manual_seed(1)
    every = [tokens(2, 9) for _ in range(4)]
    recipe = Recipe("wanda", pattern="50%", allocation=f"sensitivity:probes={probes}")
    return zeros(statprune.plan(llama(), every[rank::num_ranks], recipe))


def test_all_ranks_come_to_the_allocation_of_one_process_with_all_the_data(two_ranks):
    for probes in (1, 3):
        first, second = two_ranks(_zeros_by_loss, 2, probes)
        assert first == second == _zeros_by_loss(0, 1, probes)
