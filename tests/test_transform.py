"""The two ways to land pruned weights: a twin graph that leaves the model alone, and the model itself."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import statprune
from statprune.errors import SiteError, TracingError
from statprune.methods.pruner import PrunedWeight
from statprune.model.inputs import bind_batches
from statprune.model.sites import LinearSite
from statprune.model.transform import PruneLinears
from statprune.model.weights import InPlace
from tiny_models import classifier, gpt2, llama, refused, snapshot, tokens

RECIPE = statprune.Recipe(pattern="2:4")


class Transposed(nn.Module):
    """Reads its weights through transposes and casts that come before the products."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        a, b = self.a.t(), self.b.detach()
        return self.head((x @ a).relu() @ b)


CASES = {
    "llama, one shape": (lambda: llama(num_hidden_layers=1), [tokens(2, 6)]),
    "gpt2, three shapes": (lambda: gpt2(n_layer=1), [tokens(2, 6), tokens(3, 4), tokens(1, 5)]),
    "bare parameters": (Transposed, [torch.randn(4, 8), torch.randn(3, 8)]),
    "classifier": (classifier, [torch.randn(4, 8), torch.randn(1, 8)]),
}


def output(result):
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request):
    build, batches = CASES[request.param]
    torch.manual_seed(0)
    return build(), batches


@torch.no_grad()
def test_the_twin_computes_what_the_committed_model_computes_and_leaves_the_model_alone(case):
    model, batches = case
    before = snapshot(model)
    plan = statprune.plan(model, batches, RECIPE)
    graph_module = plan.traced.graph_module
    named = [inputs.kwargs for inputs in bind_batches(model, batches)]
    dense = [output(graph_module(**inputs)) for inputs in named]
    twin = PruneLinears(plan.weights)(graph_module).graph_module
    from_twin = [output(twin(**inputs)) for inputs in named]
    from_plan = [output(plan.graph_module()(**inputs)) for inputs in named]
    from_functional_call = [output(functional_call(model, plan.weights, (batch,))) for batch in batches]

    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    assert all(torch.equal(output(graph_module(**inputs)), old) for inputs, old in zip(named, dense, strict=True))

    report = statprune.prune(model, batches, RECIPE)
    committed = [output(model(batch)) for batch in batches]
    for index, expected in enumerate(committed):
        assert not torch.equal(expected, dense[index])
        assert torch.equal(from_twin[index], expected)
        assert torch.equal(from_plan[index], expected)
        assert torch.equal(from_functional_call[index], expected)

    assert plan.weights.keys() == {site.parameter for site in report.sites}
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in plan.weights.items())
    assert plan.report.sites == report.sites
    assert plan.report.left_out == report.left_out


@torch.no_grad()
def test_a_plan_and_a_commit_agree_on_a_tied_weight_that_is_asked_for():
    model, batches = gpt2(n_layer=1), [tokens(2, 6)]
    recipe = statprune.Recipe(pattern="2:4", targets=["*"])
    plan = statprune.plan(model, batches, recipe)
    from_twin = plan.graph_module()(input_ids=batches[0]).logits
    statprune.prune(model, batches, recipe)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(plan.weights["lm_head.weight"], model.transformer.wte.weight)
    assert torch.equal(from_twin, model(batches[0], use_cache=False).logits)  # the embedding reads the pruned weight too


def another_gpt2():
    """Of the architecture of `gpt2(n_layer=1)`, with other weights."""
    model = gpt2(n_layer=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_the_graph_of_another_instance_reads_a_tied_pruned_weight_in_every_place():
    model, batches = another_gpt2(), [tokens(2, 6)]
    recipe = statprune.Recipe(pattern="2:4", targets=["*"])
    traced = statprune.plan(gpt2(n_layer=1), batches, recipe).traced
    plan = statprune.plan(model, batches, recipe, traced=traced)
    from_twin = plan.graph_module()(input_ids=batches[0]).logits
    plan.apply_(model)
    assert torch.equal(from_twin, model(batches[0], use_cache=False).logits)


def test_a_plan_and_a_commit_agree_on_what_comes_after_a_second_use_of_a_tied_weight():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)], nn.LayerNorm(8))
    model[1].weight = model[0].weight
    batches, recipe = [torch.randn(16, 8)], statprune.Recipe("wanda+energy", targets=["*"])
    plan = statprune.plan(model, batches, recipe)
    from_twin = plan.graph_module()(input=batches[0])
    statprune.prune(model, batches, recipe)
    assert plan.weights.keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in plan.weights.items())
    assert torch.equal(from_twin, model(batches[0]))


def test_weights_of_another_model_are_refused():
    model = classifier()
    graph_module = statprune.plan(model, [torch.randn(2, 8)], RECIPE).traced.graph_module
    with refused(model, SiteError, r"does not read body\.weight\. Was it traced from another model\?"):
        PruneLinears({"body.weight": torch.zeros(8, 8)})(graph_module)


def test_a_plan_without_a_graph_says_why():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x) if x.sum() > 0 else x)

    model = Branching()
    with pytest.warns(UserWarning, match="Falling back"):
        plan = statprune.plan(model, [torch.ones(2, 8)], RECIPE)
    assert plan.weights.keys() == {"a.weight"}
    with refused(model, TracingError, r"There is no graph: torch\.export cannot trace Branching: .*functional_call"):
        plan.graph_module()


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_is_the_same_parameter_and_memory(layout, dtype):
    model = nn.Module()
    model.a, model.b = nn.Linear(4, 3, dtype=dtype), nn.Linear(4, 3, dtype=dtype)
    model.b.weight = model.a.weight  # tied
    parameter, address, version = model.a.weight, model.a.weight.data_ptr(), model.a.weight._version
    site = LinearSite("a", "a.weight", layout, (3, 4) if layout == "out_in" else (4, 3))
    weight = torch.arange(12.0).view(site.shape).to(dtype)
    InPlace(model).put(site, PrunedWeight(weight, weight != 0))
    assert model.a.weight is parameter
    assert model.b.weight is parameter
    assert parameter.data_ptr() == address
    assert parameter.requires_grad
    assert parameter._version > version  # autograd and the like can see the write
    assert torch.equal(parameter, weight if layout == "out_in" else weight.t())


def test_an_optimizer_goes_on_with_the_parameters_that_it_has():
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters())
    statprune.prune(model, [torch.randn(4, 8)], RECIPE)
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    kept = model[0].weight != 0
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight != 0, kept)  # nothing holds the mask; that is the callback's work


@torch.no_grad()
def test_pruning_inside_an_autocast_region_leaves_no_dense_copies_in_its_cache():
    model, x = classifier(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(x)  # casts the weights, and torch keeps the casts until the region ends
        statprune.prune(model, [x], RECIPE)
        inside = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert torch.equal(inside, expected)
    assert not torch.equal(inside, dense)


def test_pruning_again_keeps_what_is_pruned():
    model, x = classifier(), torch.randn(16, 8)
    statprune.prune(model, [x], RECIPE)
    zeros = copy.deepcopy({name: p == 0 for name, p in model.named_parameters()})
    statprune.prune(model, [x], RECIPE)
    assert all(torch.equal(p == 0, zeros[name]) for name, p in model.named_parameters())
