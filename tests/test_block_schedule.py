"""Schedule "block" against the published loop: a full forward pass of the module for each block, with hooks on its layers."""

import copy
import gc
import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import statprune
from exports import shared_trace
from statprune import Recipe
from statprune.errors import SiteError, TracingError
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import bind_batches, dynamic_dims, example_batch
from statprune.model.segments import blocks
from statprune.model.sites import InputGroup, LinearSite
from statprune.model.streams import Executor
from statprune.model.walk import walk
from statprune.model.weights import InPlace
from tiny_models import classifier, gpt2, llama, refused, t5, tokens

METHODS = ["wanda", "cvr+energy", "sparsegpt"]


def recipe_of(method: str, schedule: str = "block") -> Recipe:
    return Recipe(method, pattern="50%", schedule=schedule)


def padded(length, *kept):
    """Random tokens; row i keeps its first `kept[i]`."""
    mask = (torch.arange(length) < torch.tensor(kept)[:, None]).long()
    return {"input_ids": tokens(len(kept), length), "attention_mask": mask}


def for_decoder(encoder, decoder):
    return {**encoder, "decoder_input_ids": decoder["input_ids"], "decoder_attention_mask": decoder["attention_mask"]}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def mask_of(name: str, batch) -> Tensor | None:
    """The mask of the tokens that a layer sees."""
    if not isinstance(batch, dict):
        return None
    reads_decoder = name.startswith("decoder.") and "EncDecAttention.k" not in name and "EncDecAttention.v" not in name
    return batch["decoder_attention_mask" if reads_decoder else "attention_mask"]


@torch.no_grad()
def published_loop(model: nn.Module, block_names: list[str], batches, recipe: Recipe) -> nn.Module:
    """Each block: all inputs of all its layers while it is still dense, then prune them all, then the next one."""
    pruner = recipe.pruner()
    for block in block_names:
        layers = {f"{block}.{name}": one for name, one in model.get_submodule(block).named_modules() if is_linear(one)}
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        handles = [
            layer.register_forward_hook(lambda _, args, output, inputs=seen[name]: inputs.append(args[0].clone()))
            for name, layer in layers.items()
        ]
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch.clone())
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            moments = InputMoments.zeros(seen[name][0].shape[-1], needs=Statistic.GRAM)
            for batch, inputs in zip(batches, seen[name], strict=True):
                moments.add(inputs, mask_of(name, batch))
            weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
            weight.copy_(pruner(weight.clone(), moments).weight)
    return model


class Mixing(nn.Module):
    """A residual block of two layers, beside one layer that is a block by itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Mixing(), Mixing(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), Mixing(), nn.Linear(8, 3)).eval()


MODELS = {
    "llama": (llama, ["model.layers.0", "model.layers.1"]),
    "gpt2": (gpt2, ["transformer.h.0", "transformer.h.1"]),
    "t5": (lambda: t5(num_layers=2), ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    "sequential": (sequential, ["0", "1", "2", "3"]),
}


def batches_for(name: str):
    """With padding, and of several shapes."""
    torch.manual_seed(1)
    if name == "sequential":
        return [torch.randn(5, 8), torch.randn(3, 8), torch.randn(5, 8)]
    batches = [padded(8, 8, 5, 7), padded(8, 3, 8), padded(6, 6, 2), padded(6, 4, 4)]
    if name == "t5":
        return [for_decoder(one, padded(length, *rows)) for one, length, rows in zip(
            batches, (5, 7, 5, 4), ((5, 1, 4), (7, 3), (2, 5), (4, 4)), strict=True)]  # fmt: skip
    return batches


@pytest.fixture(scope="module")
def traced():
    """The graph of each model for its batches, by name; the models stay as they are."""
    found = {}

    def of(name):
        if name not in found:
            model, batches = MODELS[name][0](), batches_for(name)
            inputs = bind_batches(model, batches)
            found[name] = model, batches, shared_trace(model, example_batch(inputs), dynamic_dims(inputs), inputs)
        return found[name]

    return of


def assert_same_weights(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_published_loop(traced, name, method):
    model, batches, graph = traced(name)
    twin = statprune.plan(model, batches, recipe_of(method), traced=graph)
    assert twin.report.schedule == "block"
    expected = published_loop(copy.deepcopy(model), MODELS[name][1], batches, recipe_of(method))
    changed = {key: one.detach() for key, one in expected.named_parameters() if not torch.equal(one, model.get_parameter(key))}
    assert_same_weights(twin.weights, changed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "sequential"])
def test_the_three_schedules_differ_where_they_should(traced, name):
    model, batches, graph = traced(name)
    walked, blocked, at_once = (
        statprune.plan(model, batches, recipe_of("wanda", schedule), traced=graph).weights
        for schedule in ("walk", "block", "one-shot")
    )
    order = list(blocked)
    in_first = [key for key in order if key.startswith(("model.layers.0.", "0."))]
    first = next(iter(order))
    assert torch.equal(walked[first], blocked[first])
    assert all(torch.equal(blocked[key], at_once[key]) for key in in_first)
    assert not torch.equal(blocked[in_first[-1]], walked[in_first[-1]])
    assert not torch.equal(blocked[order[-1]], at_once[order[-1]])


@pytest.mark.parametrize("method", METHODS)
def test_pruning_in_place_and_planning_give_the_same(traced, method):
    model, batches, graph = traced("llama")
    twin = statprune.plan(model, batches, recipe_of(method), traced=graph)
    pruned = copy.deepcopy(model)
    report = statprune.prune(pruned, batches, recipe_of(method))
    assert report.schedule == "block"
    assert [site.parameter for site in report.sites] == list(twin.weights)
    for name, weight in twin.weights.items():
        assert torch.equal(weight, pruned.get_parameter(name)), name


def test_a_selection_of_layers_is_observed_block_by_block(traced):
    model, batches, graph = traced("llama")
    recipe = Recipe("wanda", pattern="50%", schedule="block", targets=["*.o_proj", "*.down_proj"])
    twin = statprune.plan(model, batches, recipe, traced=graph)
    expected = copy.deepcopy(model)
    for layer in range(2):
        own = {f"model.layers.{layer}.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}
        whole = published_loop(copy.deepcopy(expected), [f"model.layers.{layer}"], batches, recipe)
        with torch.no_grad():
            for name in own:
                expected.get_parameter(name).copy_(whole.get_parameter(name))
    assert_same_weights(
        twin.weights, {name: expected.get_parameter(name).detach() for name in twin.weights}, rtol=1e-5, atol=1e-6
    )
    assert len(twin.weights) == 4


# --- in-place writes -------------------------------------------------------------------------------------------------


class AddsInPlace(Mixing):
    def forward(self, x):
        x += self.down(torch.relu(self.up(x)))
        return x


class AddsThroughAView(Mixing):
    def forward(self, x):
        update, left = self.down(torch.relu(self.up(x))), x[..., :4]
        left.add_(update[..., :4])
        x.narrow(-1, 4, 4).mul_(0.5)
        return x


class WritesBetweenItsLayers(Mixing):
    """The second layer reads what the block has already written."""

    def forward(self, x):
        hidden = self.up(x)
        x.mul_(0.5).add_(hidden[..., :8])
        return x + self.down(torch.cat([x, x[..., :4]], dim=-1))


class KeepsTwoViews(Mixing):
    """Two names of one memory cross the border of the block, and it is written to through one of them."""

    def forward(self, pair):
        x, view = pair
        view += self.down(torch.relu(self.up(x)))[..., :4]
        return x, view


class TwoViews(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([KeepsTwoViews(), KeepsTwoViews(), KeepsTwoViews()]), nn.Linear(8, 3)

    def forward(self, x):
        x = x * 2
        pair = x, x[..., 2:6]
        for block in self.blocks:
            pair = block(pair)
        return self.head(pair[0])


@pytest.mark.parametrize("block", [AddsInPlace, AddsThroughAView, WritesBetweenItsLayers, KeepsTwoViews])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_rehearsal_writes_to_copies(block, method):
    if block is KeepsTwoViews:
        model, names = TwoViews().eval(), ["blocks.0", "blocks.1", "blocks.2"]
    else:
        model, names = nn.Sequential(block(), block(), block(), nn.Linear(8, 3)).eval(), ["0", "1", "2"]
    batches = [torch.randn(6, 8), torch.randn(4, 8)]
    before = copy.deepcopy(batches)
    expected = published_loop(copy.deepcopy(model), names, batches, recipe_of(method))
    twin = statprune.plan(model, batches, recipe_of(method))
    assert twin.report.schedule == "block"
    assert all(torch.equal(*pair) for pair in zip(batches, before, strict=True))
    assert len(twin.weights) == 6
    for name, weight in twin.weights.items():
        torch.testing.assert_close(weight, expected.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
    statprune.prune(model, batches, recipe_of(method))
    assert_same_weights(twin.weights, {name: model.get_parameter(name).detach() for name in twin.weights}, rtol=0, atol=0)


class Counting(Mixing):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls.add_(1)
        return super().forward(x) / self.num_calls


def test_a_model_that_writes_to_a_buffer_is_refused_and_the_other_schedules_take_it():
    model, batches = nn.Sequential(Counting(), Counting(), nn.Linear(8, 3)).eval(), [torch.randn(6, 8)]
    for action in (statprune.prune, statprune.plan):
        with refused(model, TracingError, r"writes to its buffer .*num_calls when it runs: use schedule 'walk'"):
            action(model, batches, recipe_of("wanda"))
    for schedule in ("walk", "one-shot"):
        assert statprune.plan(model, batches, recipe_of("wanda", schedule)).report.schedule == schedule


def test_a_buffer_is_written_to_where_no_block_runs_twice():
    model = nn.Sequential(nn.Linear(8, 8), Counting(), nn.Linear(8, 3)).eval()
    recipe = Recipe("wanda", pattern="50%", schedule="block", targets=["0", "1.up"])
    twin = statprune.plan(model, [torch.randn(6, 8)], recipe)
    assert (twin.report.schedule, list(twin.weights)) == ("block", ["0.weight", "1.up.weight"])
    assert model[1].num_calls == 0


# --- what it costs ---------------------------------------------------------------------------------------------------


def count_runs(monkeypatch, model, graph, batches, groups, schedule="block") -> Counter:
    """How often the linear of each parameter runs, over all batches."""
    runs, run = Counter(), Executor.run

    def counted(self, node, environment):
        if node.target is torch.ops.aten.linear.default:
            runs[node.args[1].target] += 1
        return run(self, node, environment)

    monkeypatch.setattr(Executor, "run", counted)
    for _ in walk(graph, groups, batches, InPlace(model), schedule=schedule):
        pass
    return runs


def test_layers_run_at_most_twice_and_those_behind_the_last_group_never(monkeypatch, traced):
    model, batches, graph = traced("llama")
    runs = count_runs(monkeypatch, model, graph, bind_batches(model, batches), graph.groups[:-1])  # without lm_head
    first = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    # A rehearsal ends where its last group has seen its inputs, so the last layer of a block runs once: pruned.
    expected = {f"model.layers.0.{name}.weight": 8 for name in first}
    expected |= {"model.layers.0.mlp.down_proj.weight": 4}
    expected |= {f"model.layers.1.{name}.weight": 4 for name in first}
    assert runs == expected


def test_blocks_of_one_group_are_not_rehearsed(monkeypatch):
    model, batches = classifier(), bind_batches(classifier(), [torch.randn(5, 8)] * 3)
    graph = shared_trace(model, batches[0])
    assert count_runs(monkeypatch, model, graph, batches, graph.groups[:2]) == {"0.weight": 3}


def test_where_every_block_has_one_group_it_is_the_walk():
    model, batches = classifier(), [torch.randn(5, 8), torch.randn(5, 8)]
    plans = [statprune.plan(model, batches, recipe_of("wanda", schedule)) for schedule in ("block", "walk")]
    assert_same_weights(plans[0].weights, plans[1].weights, rtol=0, atol=0)


def held(num_layers: int) -> tuple[int, int]:
    """Bytes of the tensors made by the walk that are alive: at most while a block is pruned, and at the end of everything."""
    model = llama(num_hidden_layers=num_layers)
    inputs = bind_batches(model, [tokens(4, 16), tokens(4, 16)])
    graph = shared_trace(model, inputs[0])
    weights = InPlace(model)
    sizes: list[int] = []

    def measure():
        gc.collect()
        made = [thing for thing in gc.get_objects() if type(thing) is Tensor]
        sizes.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}.values()))

    gc.collect()
    gc.freeze()  # what there is now is not among gc.get_objects()
    try:
        for _ in walk(graph, graph.groups[:-1], inputs, weights, schedule="block"):
            measure()
        del _
        most = max(sizes)
        measure()
    finally:
        gc.unfreeze()
    return most, sizes[-1]


def test_what_a_rehearsal_makes_is_gone_when_the_block_is_pruned_and_nothing_grows_with_the_depth():
    two, five = held(2), held(5)
    # Two batches of 4 x 16 tokens of 16 float32: the residual stream, the block's normed input, and little besides (the
    # statistics, and what the last group saw of the last batch). All values of a block would be more than twelve times as much.
    hidden_states = 2 * 4 * 16 * 16 * 4
    assert 2 * hidden_states < two[0] < 4 * hidden_states
    assert five[0] == two[0]
    assert two[1] == five[1] == 0


def test_values_of_a_rehearsal_die_as_soon_as_nothing_in_it_reads_them(monkeypatch, traced):
    """The same number of values is alive in a late block as in an early one, and far fewer than the graph has."""
    model, batches = llama(num_hidden_layers=4), [tokens(2, 6)]
    graph = shared_trace(model, bind_batches(model, batches)[0])
    alive: list[tuple[str, int]] = []
    run = Executor.run

    def counted(self, node, environment):
        if node.target is torch.ops.aten.linear.default:
            alive.append((node.args[1].target, sum(isinstance(value, Tensor) for value in environment.values())))
        return run(self, node, environment)

    monkeypatch.setattr(Executor, "run", counted)
    for _ in walk(graph, graph.groups[:-1], bind_batches(model, batches), InPlace(model), schedule="block"):
        pass
    first_time = dict(reversed(alive))
    by_layer = [
        [number for name, number in first_time.items() if f".layers.{layer}." in name and "down_proj" not in name]
        for layer in range(4)
    ]
    assert by_layer[1] == by_layer[2] == by_layer[3]
    assert max(itertools.chain(*by_layer)) < 20


# --- blocks ----------------------------------------------------------------------------------------------------------


def group(*names: str) -> InputGroup:
    return InputGroup(tuple(LinearSite(name, f"{name}.weight", "out_in", (8, 8)) for name in names))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m.layers.0.q", "m.layers.0.o", "m.layers.1.q", "m.layers.1.o"], [2, 2]),
        (["m.layers.1.q", "m.layers.10.q", "m.layers.10.o"], [1, 2]),
        (["encoder.block.0.a", "encoder.block.0.b", "decoder.block.0.a", "decoder.block.0.b"], [2, 2]),
        (["h.0.experts.0.up", "h.0.experts.1.up", "h.1.experts.0.up"], [2, 1]),  # the outermost number counts
        (["embed_in", "h.0.a", "h.0.b", "project_out", "pooler"], [1, 2, 1, 1]),
        (["embed.project", "embed.project2"], [1, 1]),
        (["0", "2"], [1, 1]),
        (["h.0.a", "h.1.a", "h.0.b"], [1, 1, 1]),  # only neighbours
        (["layer1.a", "layer1.b"], [1, 1]),  # a number within a word is no index
        ([], []),
    ],
)
def test_blocks_by_hand(names, expected):
    groups = [group(name) for name in names]
    found = blocks(groups)
    assert [len(members) for members in found] == expected
    assert list(itertools.chain(*found)) == groups


def test_layers_that_share_their_inputs_with_an_earlier_block_are_pruned_with_their_own():
    shared = group("decoder.0.cross.k", "decoder.0.cross.v", "decoder.1.cross.k", "decoder.1.cross.v")
    found = blocks([group("decoder.0.q"), shared, group("decoder.0.o"), group("decoder.1.q"), group("decoder.1.o")])
    names = [sorted(site.name for one in members for site in one.sites) for members in found]
    assert names == [
        ["decoder.0.cross.k", "decoder.0.cross.v", "decoder.0.o", "decoder.0.q"],
        ["decoder.1.cross.k", "decoder.1.cross.v", "decoder.1.o", "decoder.1.q"],
    ]


# --- a graph that is used again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["walk", "block", "one-shot"])
def test_a_graph_from_an_earlier_plan_saves_the_export(monkeypatch, schedule):
    model, batches = llama(num_hidden_layers=1), [tokens(2, 6), tokens(3, 5)]
    first = statprune.plan(model, batches, recipe_of("cvr+energy", schedule))
    monkeypatch.setattr("statprune.model.layers.trace", lambda *_: pytest.fail("exported again"))
    again = statprune.plan(model, batches, recipe_of("cvr+energy", schedule), traced=first.traced)
    assert again.traced is first.traced
    assert_same_weights(again.weights, first.weights, rtol=0, atol=0)
    assert [one.parameter for one in again.report.sites] == [one.parameter for one in first.report.sites]
    assert again.report.left_out == first.report.left_out
    assert (again.report.num_batches, again.report.num_tokens) == (2, 27)
    # Other recipes, and other batches of shapes that the graph was made for.
    other = statprune.plan(model, [tokens(4, 9)], recipe_of("wanda", "walk"), traced=first.traced)
    assert other.report.num_tokens == 36
    with pytest.raises(SiteError, match="matches no weight"):
        statprune.plan(model, batches, Recipe(targets=["*.nothing"]), traced=first.traced)


def test_a_model_is_pruned_through_its_own_graph_after_its_weights_have_changed():
    model, batches = classifier(), [torch.randn(6, 8)]
    graph = statprune.plan(model, batches, recipe_of("wanda")).traced
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter))
    again = statprune.plan(model, batches, recipe_of("wanda"), traced=graph)
    assert_same_weights(again.weights, statprune.plan(model, batches, recipe_of("wanda")).weights, rtol=0, atol=0)


@pytest.fixture(scope="module")
def traced_once():
    """A model, and its graph for one shape."""
    model = llama(num_hidden_layers=1)
    return model, statprune.plan(model, [tokens(2, 6)], recipe_of("wanda")).traced


@pytest.mark.parametrize("shape", [(2, 7), (3, 6)])
def test_a_graph_that_was_made_for_another_shape_is_refused(traced_once, shape):
    model, graph = traced_once
    with refused(model, TracingError, r"for the shapes of calibration batch 1: .*Guard failed"):
        statprune.plan(model, [tokens(2, 6), tokens(*shape)], recipe_of("wanda"), traced=graph)


def test_a_graph_that_was_made_for_other_inputs_is_refused(traced_once):
    model, graph = traced_once
    for batches in ([padded(6, 6, 6)], [{"inputs_embeds": torch.randn(2, 6, 16)}]):
        with refused(model, TracingError, "was traced with the inputs input_ids.*expected the same"):
            statprune.plan(model, batches, recipe_of("wanda"), traced=graph)


def test_a_graph_of_fewer_inputs_than_it_was_made_for_is_refused():
    model = llama(num_hidden_layers=1)
    graph = statprune.plan(model, [padded(6, 6, 6)], recipe_of("wanda")).traced
    with refused(model, TracingError, "was traced with the inputs input_ids.*expected the same"):
        statprune.plan(model, [tokens(2, 6)], recipe_of("wanda"), traced=graph)


def test_a_graph_of_another_model_is_refused(traced_once):
    _, graph = traced_once
    for model in (
        llama(num_hidden_layers=2),
        llama(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2),  # the same shapes, other heads
        llama(num_hidden_layers=1, rms_norm_eps=1e-3),
        llama(num_hidden_layers=1).bfloat16(),
    ):
        with refused(model, TracingError, "that of another model than this LlamaForCausalLM"):
            statprune.plan(model, [tokens(2, 6)], recipe_of("wanda"), traced=graph)


class Scaled(nn.Module):
    """What its graph holds as a constant is no parameter."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.body, self.head = scale, nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x * self.scale).relu())


@pytest.mark.parametrize("other", [3.0, torch.tensor(3.0)])
def test_an_attribute_that_the_graph_holds_makes_another_model(other):
    batches = [torch.randn(4, 8)]
    graph = statprune.plan(Scaled(2.0), batches, recipe_of("wanda")).traced
    model = Scaled(other)
    with refused(model, TracingError, "that of another model than this Scaled"):
        statprune.plan(model, batches, recipe_of("wanda"), traced=graph)


@pytest.mark.parametrize("schedule", ["walk", "block", "one-shot"])
def test_the_graph_of_one_instance_runs_another_bit_for_bit(traced_once, schedule):
    _, graph = traced_once
    other = llama(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.rand_like(parameter))
        other.model.rotary_emb.inv_freq.mul_(0.5)  # a buffer is the instance's own as well
    batches = [tokens(2, 6), tokens(2, 6)]
    own = statprune.plan(other, batches, recipe_of("cvr+energy", schedule))
    through = statprune.plan(other, batches, recipe_of("cvr+energy", schedule), traced=graph)
    assert own.traced is not graph
    assert through.traced is graph
    assert_same_weights(own.weights, through.weights, rtol=0, atol=0)
    twin = through.graph_module()
    assert torch.equal(twin(input_ids=batches[0]).logits, own.graph_module()(input_ids=batches[0]).logits)
    report = through.apply_(other)
    assert report is through.report
    assert all(torch.equal(other.get_parameter(name), weight) for name, weight in own.weights.items())


def test_a_plan_is_applied_whole_or_not_at_all():
    model, other = classifier(), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    plan = statprune.plan(model, [torch.randn(5, 8)], recipe_of("wanda"))
    with refused(other, SiteError, r"2\.weight \(8, 12\) belongs to another model: Sequential has 2\.weight \(4, 12\)"):
        plan.apply_(other)
    with refused(other, SiteError, r"Sequential has no such parameter"):
        statprune.PruningPlan({"9.weight": torch.zeros(2, 2)}).apply_(other)
