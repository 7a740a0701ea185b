"""The walk against what it replaces: plain forward passes over the model, block by block, with module hooks."""

import copy
import dataclasses
import gc
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import statprune
from exports import shared_trace
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import bind_batches, dynamic_dims, example_batch
from statprune.model.observe import fit_mask
from statprune.model.segments import batch_independent
from statprune.model.streams import Executor
from statprune.model.walk import walk
from statprune.model.weights import InPlace
from tiny_models import llama, t5, tokens

RECIPE = statprune.Recipe("cvr+energy", "50%")
IN_ORDER = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
IN_ORDER += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
LLAMA_GROUPS = [[f"model.layers.{layer}.{name}" for name in group] for layer in (0, 1) for group in IN_ORDER]


def padded(batch, length, *kept):
    """Random tokens; row i keeps its first `kept[i]`."""
    mask = torch.zeros(batch, length, dtype=torch.long)
    for row, num_kept in enumerate(kept):
        mask[row, :num_kept] = 1
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def padded_batches():
    return [padded(3, 8, 8, 5, 7), padded(2, 8, 3, 8), padded(2, 6, 6, 2)]


def plain_moments(model, name, batches, mask_name="attention_mask") -> InputMoments:
    """What a module's inputs sum up to over full forward passes of the model as it is, by definition and without padding."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for batch in batches:
        model(**batch)
    handle.remove()
    kept = [x[batch[mask_name].bool()] for x, batch in zip(seen, batches, strict=True)]
    x = torch.cat([part.flatten(0, -2) for part in kept]).double()
    return InputMoments(torch.tensor(len(x)), x.sum(0), x.square().sum(0))


def prune_plainly(model, groups, batches, recipe, *, sequential):
    """Block-sequential pruning as Wanda's code does it, with a full forward pass for each group."""
    dense, pruner = copy.deepcopy(model), recipe.pruner()
    with torch.no_grad():
        for group in groups:
            moments = plain_moments(model if sequential else dense, group[0], batches)
            for name in group:
                weight = model.get_submodule(name).weight
                weight.copy_(pruner(weight, moments).weight)
    return model


def traced_with(model, batches):
    """The graph, for batches of the shapes of these, and the batches bound to it."""
    inputs = bind_batches(model, batches)
    return shared_trace(model, example_batch(inputs), dynamic_dims(inputs)), inputs


def observe(model, batches, traced=None):
    """Every group's statistics, by the group's name; nothing is pruned."""
    traced, inputs = (traced, bind_batches(model, batches)) if traced else traced_with(model, batches)
    return {group.name: moments for group, moments in walk(traced, traced.groups, inputs, InPlace(model))}


@pytest.fixture(scope="module")
def traced_llama():
    """A model that nothing here changes, batches, and its graph for them."""
    torch.manual_seed(1)
    model, batches = llama(), [*padded_batches(), padded(2, 6, 4, 4)]
    return model, batches, *traced_with(model, batches)


def assert_same_weights(left, right, **tolerance):
    for (name, one), (_, other) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_same_moments(left, right, rtol=1e-6):
    assert left.keys() == right.keys()
    for name, moments in left.items():
        assert moments.num_tokens == right[name].num_tokens, name
        torch.testing.assert_close(moments.sum, right[name].sum, rtol=rtol, atol=1e-5)
        torch.testing.assert_close(moments.sum_sq, right[name].sum_sq, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("schedule", ["walk", "one-shot"])
def test_the_walk_equals_block_by_block_pruning_with_full_forward_passes(schedule):
    batches = padded_batches()
    expected = prune_plainly(llama(), LLAMA_GROUPS, batches, RECIPE, sequential=schedule == "walk")
    model = llama()
    recipe = dataclasses.replace(RECIPE, schedule=schedule)
    report = statprune.prune(model, batches, recipe)
    assert [site.name for site in report.sites] == [name for group in LLAMA_GROUPS for name in group]
    assert_same_weights(model, expected, rtol=1e-6, atol=1e-6)


def test_the_two_schedules_differ():
    batches = [tokens(2, 6)]
    model = llama(num_hidden_layers=1)
    weights = [statprune.plan(model, batches, statprune.Recipe(schedule=schedule)).weights for schedule in ("walk", "one-shot")]
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights[0][first], weights[1][first])
    assert not torch.equal(weights[0][last], weights[1][last])


def test_statistics_equal_those_of_plain_forward_hooks(traced_llama):
    model, batches, traced, _ = traced_llama
    expected = {group[0]: plain_moments(model, group[0], batches) for group in [*LLAMA_GROUPS, ["lm_head"]]}
    assert_same_moments(observe(model, batches, traced), expected)


def test_padding_does_not_count_whatever_it_holds():
    model = llama(num_hidden_layers=1)
    tight = [padded(2, 6, 6, 4), padded(2, 5, 2, 5)]
    wide = []
    for batch in tight:
        extra = {"input_ids": tokens(2, 3), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
        wide.append({name: torch.cat([batch[name], extra[name]], dim=1) for name in batch})
        inside = wide[-1]["attention_mask"] == 0
        wide[-1]["input_ids"][inside] = tokens(2, wide[-1]["input_ids"].shape[1])[inside]
    traced, _ = traced_with(model, tight)
    found = observe(model, wide, traced)
    assert_same_moments(found, observe(model, tight, traced))
    assert int(found["model.layers.0.self_attn.q_proj"].num_tokens) == 17


def test_a_mask_of_ones_changes_nothing():
    model, ids = llama(num_hidden_layers=1), tokens(2, 6)
    with_mask = observe(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert_same_moments(with_mask, observe(model, [ids]), rtol=0)


@pytest.mark.parametrize("varied", [True, False], ids=["lengths vary", "one length"])
def test_encoder_and_decoder_each_have_their_own_mask_even_of_equal_shape(varied):
    model = t5()
    encoder = [padded(2, 6, 6, 3), padded(2, 5 if varied else 6, 2, 4)]
    decoder = [padded(2, 6, 1, 5), padded(2, 5 if varied else 6, 5, 2)]
    batches = [
        {**left, "decoder_input_ids": right["input_ids"], "decoder_attention_mask": right["attention_mask"]}
        for left, right in zip(encoder, decoder, strict=True)
    ]
    found = observe(model, batches)
    masks = {
        "encoder.block.0.layer.0.SelfAttention.q": "attention_mask",
        "encoder.block.0.layer.1.DenseReluDense.wo": "attention_mask",
        "decoder.block.0.layer.0.SelfAttention.q": "decoder_attention_mask",
        "decoder.block.0.layer.1.EncDecAttention.q": "decoder_attention_mask",
        "decoder.block.0.layer.1.EncDecAttention.k": "attention_mask",
        "decoder.block.0.layer.2.DenseReluDense.wi": "decoder_attention_mask",
    }
    expected = {name: plain_moments(model, name, batches, mask) for name, mask in masks.items()}
    assert_same_moments({name: found[name] for name in masks}, expected)


def test_without_a_decoder_mask_all_tokens_of_the_decoder_count():
    batch = {**padded(2, 6, 6, 3), "decoder_input_ids": tokens(2, 6)}
    found = observe(t5(), [batch])
    assert int(found["encoder.block.0.layer.0.SelfAttention.q"].num_tokens) == 9
    assert int(found["decoder.block.0.layer.0.SelfAttention.q"].num_tokens) == 12


class TimeFirst(nn.Module):
    """Works on [length, batch, channels], as XLNet does."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(48, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.body(self.embed(input_ids).transpose(0, 1).contiguous())
        return self.head((hidden * attention_mask.t()[..., None]).relu()).transpose(0, 1)


def test_a_mask_finds_its_tokens_where_length_comes_first():
    model, batch = TimeFirst(), padded(2, 5, 5, 2)
    kept = model.embed(batch["input_ids"])[batch["attention_mask"].bool()].double()
    torch.testing.assert_close(observe(model, [batch])["body"].sum, kept.sum(0))


def test_a_mask_fits_tokens_in_any_of_the_usual_layouts_and_nothing_else():
    mask = torch.ones(2, 3)
    assert fit_mask(None, torch.empty(2, 3, 8)) is None
    assert fit_mask(mask, torch.empty(2, 3, 8)) is mask
    assert fit_mask(mask, torch.empty(6, 8)) is mask
    assert fit_mask(mask, torch.empty(2, 1, 3, 8)) is mask
    assert fit_mask(mask, torch.empty(3, 2, 8)).shape == (3, 2)
    assert fit_mask(mask, torch.empty(2, 8)) is None  # pooled
    assert fit_mask(mask, torch.empty(2, 4, 8)) is None  # with prefix tokens


def test_results_do_not_depend_on_how_tokens_are_batched():
    model, ids = llama(num_hidden_layers=1), tokens(6, 5)
    traced, _ = traced_with(model, ids.split(4))
    whole, uneven, singles = (observe(model, ids.split(size), traced) for size in (6, 4, 1))
    assert_same_moments(whole, uneven)
    assert_same_moments(whole, singles)
    models = [llama(num_hidden_layers=1) for _ in range(2)]
    for model, size in zip(models, (6, 4), strict=True):
        statprune.prune(model, ids.split(size), RECIPE)
    assert_same_weights(*models, rtol=1e-5, atol=1e-5)


def test_every_node_runs_once_for_each_batch_and_what_no_group_needs_never(monkeypatch, traced_llama):
    model, _, traced, inputs = traced_llama
    runs, run = Counter(), Executor.run

    def counted(self, node, environment):
        runs[node] += 1
        return run(self, node, environment)

    monkeypatch.setattr(Executor, "run", counted)
    groups = traced.groups[:-1]  # without lm_head
    assert [group for group, _ in walk(traced, groups, inputs, InPlace(model))] == list(groups)

    shared = batch_independent(traced)
    assert {node for node in runs if node in shared}, "rotary tables and causal masks"
    assert all(count == (3 if node in shared else 4) for node, count in runs.items())  # four batches of three shapes
    products = {node.args[1].target for node in runs if node.target is torch.ops.aten.linear.default}
    assert products == {site.parameter for group in groups[:-1] for site in group.sites}  # the last down_proj is not needed


def test_values_that_depend_on_the_batch_are_never_shared(traced_llama):
    _, _, traced, _ = traced_llama
    shared = batch_independent(traced)
    batch_values = {node for node in traced.graph_module.graph.nodes if node.op == "placeholder"}
    for node in traced.graph_module.graph.nodes:
        is_size = not isinstance(node.meta.get("val"), Tensor)
        if not is_size and any(read in batch_values for read in node.all_input_nodes):
            batch_values.add(node)
    assert not shared & batch_values


def test_a_value_that_is_written_to_is_never_shared_between_batches():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            total = torch.zeros(8)
            total[:4] += x.sum(0)[:4]
            return self.head(self.body(x + total).relu())

    batches = [torch.ones(2, 8), torch.ones(2, 8)]
    x = torch.tensor([3.0] * 4 + [1.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(observe(Model(), batches)["body"].sum, 4 * x)


def test_a_copy_made_before_its_source_is_written_to_has_statistics_of_its_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = x * 2
            before = x.clone()
            x.add_(1)
            return self.head(self.a(before) + self.b(x))

    found = observe(Model(), [torch.ones(3, 8)])
    assert found["a"].mean.tolist() == [2.0] * 8
    assert found["b"].mean.tolist() == [3.0] * 8


def test_inputs_and_buffers_that_a_model_writes_to_are_left_as_they_were():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body, self.head = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.register_buffer("num_calls", torch.zeros(()))

        def forward(self, x):
            self.num_calls.add_(1)
            x.sub_(1)
            return self.head(self.body(self.norm(x)).relu())

    model, batches = Model(), [torch.randn(4, 8), torch.randn(3, 8)]
    buffers, copies = copy.deepcopy(dict(model.named_buffers())), copy.deepcopy(batches)
    report = statprune.prune(model, batches)
    assert report.schedule == "walk"
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(*pair) for pair in zip(batches, copies, strict=True))


def test_a_parameter_and_a_learned_constant_can_be_the_input_of_a_linear():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(3, 8))
            self.project, self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.body(x).relu() @ self.project(self.queries).t() @ self.queries)

    model = Queries()
    found = observe(model, [torch.randn(4, 8), torch.randn(2, 8)])
    # Read once for each batch, which changes no mean.
    torch.testing.assert_close(found["project"].mean, model.queries.detach().double().mean(0))


def test_a_cast_of_a_weight_before_its_cut_does_not_keep_the_dense_weight():
    class Early(nn.Module):
        """Casts and transposes its weights before it computes what they multiply."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
            self.head = nn.Linear(8, 2, dtype=torch.float64)

        def forward(self, x):
            a, b = self.a.double(), self.b.t().to(torch.float64)
            return self.head((x.double() @ a).relu() @ b)

    batches, recipe = [torch.randn(16, 8)], statprune.Recipe("wanda+energy", "50%", targets=["*"])
    model = Early()
    twin = statprune.plan(model, batches, recipe)
    expected = copy.deepcopy(model)
    with torch.no_grad():  # by hand: b is pruned with the statistics of the pruned a
        x = batches[0].double()
        for name, view in (("a", lambda w: w.t()), ("b", lambda w: w)):
            weight = view(expected.get_parameter(name))
            moments = InputMoments(torch.tensor(len(x)), x.sum(0), x.square().sum(0))
            weight.copy_(recipe.pruner()(weight, moments).weight)
            x = (x @ expected.a.double()).relu()
    statprune.prune(model, batches, recipe)
    for name in ("a", "b"):
        assert torch.equal(twin.weights[name], model.get_parameter(name))
        torch.testing.assert_close(model.get_parameter(name), expected.get_parameter(name))


def largest_cut(num_layers: int, needs: Statistic) -> int:
    """Bytes of all tensors that the walk has made and that are alive at the widest cut."""
    model = llama(num_hidden_layers=num_layers)
    traced, inputs = traced_with(model, [tokens(4, 16), tokens(4, 16)])
    weights = InPlace(model)
    sizes: list[int] = []

    def measure():
        made = [thing for thing in gc.get_objects() if type(thing) is Tensor]
        sizes.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}.values()))

    gc.collect()
    gc.freeze()  # what there is now is not among gc.get_objects()
    try:
        for _ in walk(traced, traced.groups, inputs, weights, needs=needs):
            measure()
    finally:
        gc.unfreeze()
    return max(sizes)


@pytest.mark.parametrize("needs", [Statistic.MOMENTS, Statistic.CROSS])
def test_what_the_walk_holds_does_not_grow_with_the_number_of_layers(needs):
    hidden_states = 2 * 4 * 16 * 16 * 4  # two batches of 4 x 16 tokens of 16 float32
    two, five = largest_cut(2, needs), largest_cut(5, needs)
    assert two > hidden_states * (2 if needs is Statistic.CROSS else 1)
    assert five == two


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_pruning_inside_any_grad_mode_leaves_ordinary_parameters(context):
    model = llama(num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with context():
        statprune.prune(model, [tokens(2, 6)], RECIPE)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight"
    ]
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(tokens(2, 6)).logits.sum().backward()
    optimizer.step()


def test_the_grad_mode_outside_changes_no_number():
    ids, models = tokens(2, 6), [llama(num_hidden_layers=1) for _ in range(2)]
    statprune.prune(models[0], [ids], RECIPE)
    with torch.inference_mode():
        statprune.prune(models[1], [ids.clone()], RECIPE)
    assert_same_weights(*models, rtol=0, atol=0)


def test_a_model_in_training_mode_is_calibrated_without_dropout_and_keeps_its_modes():
    ids, models = tokens(2, 6), [llama(num_hidden_layers=1, attention_dropout=0.5) for _ in range(2)]
    statprune.prune(models[0], [ids], RECIPE)
    models[1].train()
    models[1].model.layers[0].mlp.eval()  # frozen
    modes = {name: module.training for name, module in models[1].named_modules()}
    statprune.prune(models[1], [ids], RECIPE)
    assert_same_weights(*models, rtol=0, atol=0)
    assert {name: module.training for name, module in models[1].named_modules()} == modes


def test_the_forward_context_is_around_the_model_code():
    model, name, ids = llama(num_hidden_layers=1), "model.layers.0.mlp.down_proj", tokens(2, 6)
    traced, inputs = traced_with(model, [ids])

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    walked = walk(traced, traced.groups, inputs, InPlace(model), forward_context=autocast)
    found = {group.name: moments for group, moments in walked}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    in_float32 = plain_moments(model, name, [batch])
    with autocast():
        expected = plain_moments(model, name, [batch])
    assert_same_moments({name: found[name]}, {name: expected}, rtol=1e-3)
    assert not torch.allclose(expected.sum_sq, in_float32.sum_sq, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_is_pruned_exactly(dtype):
    model = llama(num_hidden_layers=1).to(dtype)
    report = statprune.prune(model, [tokens(2, 6), tokens(2, 6)], statprune.Recipe(pattern="2:4"))
    assert report.schedule == "walk"
    for site in report.sites:
        weight = model.get_parameter(site.parameter)
        assert weight.dtype == dtype
        assert (weight.unflatten(-1, (-1, 4)).count_nonzero(-1) == 2).all()
