"""A model without a graph goes block by block where its blocks can be run by themselves, and else says why not."""

import contextlib
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn

import statprune
from statprune import Recipe
from statprune.commands.display import _steps
from statprune.errors import CalibrationError, NonFiniteError, TracingError
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.blocks import observe_blocks
from statprune.model.inputs import ModelInputs, bind_batches
from statprune.model.layers import find_layers
from statprune.report import PruningReport
from tiny_models import classifier, gpt2, llama, refused, snapshot, t5, tokens

BLOCK = Recipe("cvr+energy", pattern="50%", schedule="block")


@pytest.fixture
def no_graph(monkeypatch):
    """No model can be exported."""

    def fail(model, *_):
        raise TracingError(f"torch.export cannot trace {type(model).__name__}: no reason")

    monkeypatch.setattr("statprune.model.layers.trace", fail)


def by_hooks(model, batches, recipe=BLOCK, call=statprune.prune, **settings):
    with pytest.warns(UserWarning, match="Falling back to module hooks"):
        return call(model, batches, recipe, **settings)


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 3}
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def switch():
    """An encoder and a decoder; every other block has experts, chosen by values."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2}
    experts = {"num_heads": 2, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, **experts, decoder_start_token_id=0)
    ).eval()


class Block(nn.Module):
    """Takes its mask by keyword; returns what comes next second, after a bias that the first block makes for all."""

    def __init__(self, is_first=False):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        if is_first:
            self.bias = nn.Linear(8, 8)

    def forward(self, x, *, bias=None, masks, scale):
        bias = self.bias(x).mean(1, keepdim=True) if bias is None else bias
        return bias, x + scale * self.down(self.up(self.norm(x) + bias).relu()) * masks["keep"]


class Deep(nn.Module):
    """What a model may give its blocks: keywords, lists, plain values of the batch, and masks that not all of them read."""

    def __init__(self, num_blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.tail, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Block(is_first=not index) for index in range(num_blocks))

    def forward(self, x):
        x = self.embed(x)
        even, odd = torch.ones(x.shape[1], 1), (torch.arange(x.shape[1])[:, None] % 2).float()
        bias = None
        for index, layer in enumerate(self.layers):
            bias, x = layer(x, bias=bias, masks={"keep": odd if index % 2 else even}, scale=1 / x.shape[1])
        return self.head(self.tail(x).relu())


def deep_batches():
    torch.manual_seed(1)
    return [torch.randn(2, 6, 8), torch.randn(3, 4, 8), torch.randn(1, 5, 8)]


def text_batches(**more):
    torch.manual_seed(1)
    return [{"input_ids": tokens(2, length), **more} for length in (6, 5, 9)]


def padded_batches():
    batches = text_batches()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -2:] = 0
    return batches


MODELS = {
    "mamba": (mamba, text_batches, [f"backbone.layers.{index}." for index in range(3)]),
    "gpt2": (gpt2, padded_batches, [f"transformer.h.{index}." for index in range(2)]),
    "switch": (
        switch,
        lambda: text_batches(decoder_input_ids=tokens(2, 4)),
        [f"{stack}.block.{index}." for stack in ("encoder", "decoder") for index in range(2)],
    ),
    "deep": (Deep, deep_batches, ["embed", *(f"layers.{index}." for index in range(3)), "tail"]),
}


@torch.no_grad()
def reference(model, batches, sections, recipe=BLOCK):
    """Section by section: the whole model with all pruned weights, and hooks on the section's layers."""
    pruner = recipe.pruner()
    for section in sections:
        layers = {
            name: module
            for name, module in model.named_modules()
            if name.startswith(section) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        }
        seen = defaultdict(list)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None

            def add(module, args, _, seen=seen, mask=mask):
                seen[module].append(args[0].flatten(0, -2) if mask is None else args[0][mask.bool()])

            handles = [module.register_forward_hook(add) for module in layers.values()]
            model(**batch) if isinstance(batch, dict) else model(batch)
            for handle in handles:
                handle.remove()
        for module in layers.values():
            if module not in seen:  # an expert that no token went to
                continue
            moments = InputMoments.zeros(seen[module][0].shape[-1], needs=Statistic.MOMENTS | Statistic.GRAM)
            for inputs in seen[module]:
                moments.add(inputs)
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
            weight.copy_(pruner(weight.clone(), moments).weight)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_block_is_pruned_as_if_the_whole_model_were_run_again_for_it(name, no_graph):
    build, make_batches, sections = MODELS[name]
    batches = make_batches()
    model, expected = build(), reference(build(), batches, sections)
    one_shot = build()
    report = by_hooks(model, batches)
    by_hooks(one_shot, batches, Recipe("cvr+energy", pattern="50%", schedule="one-shot"))
    assert report.schedule == "block (module hooks)"
    dense = snapshot(build())
    pruned = {site.parameter for site in report.sites}
    is_sequential = False
    for parameter, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(parameter), rtol=1e-5, atol=1e-6, msg=parameter)
        assert (parameter in pruned) == (not torch.equal(weight, dense[parameter])), parameter
        is_sequential |= not torch.equal(weight, one_shot.get_parameter(parameter))
    assert is_sequential


@pytest.mark.parametrize("name", ["deep", "switch"])
def test_a_plan_leaves_the_model_and_its_weights_are_those_of_pruning(name, no_graph):
    build, make_batches, _ = MODELS[name]
    batches = make_batches()
    model, pruned = build(), build()
    before = snapshot(model)
    plan = by_hooks(model, batches, call=statprune.plan)
    by_hooks(pruned, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    for parameter, weight in plan.weights.items():
        assert torch.equal(weight, pruned.get_parameter(parameter)), parameter
    assert plan.weights


def test_blocks_by_themselves_give_the_masks_of_the_block_schedule_over_a_graph(monkeypatch):
    batches = padded_batches()
    traced, hooked = llama(), llama()
    expected = statprune.prune(traced, batches, BLOCK)
    assert expected.schedule == "block"

    def fail(*_):
        raise TracingError("torch.export cannot trace it")

    monkeypatch.setattr("statprune.model.layers.trace", fail)
    report = by_hooks(hooked, batches)
    assert [site.name for site in report.sites] == [site.name for site in expected.sites]
    assert report.num_tokens == expected.num_tokens
    for (name, one), (_, other) in zip(traced.named_parameters(), hooked.named_parameters(), strict=True):
        assert torch.equal(one == 0, other == 0), name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


class Looks(nn.Module):
    """Looks at values, which no graph can."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize(
    ("schedule", "method", "reported"),
    [
        ("walk", "wanda", "block (module hooks)"),
        ("block", "wanda", "block (module hooks)"),
        ("one-shot", "wanda", "one-shot (module hooks)"),
        ("walk", "magnitude", "no statistics"),
    ],
)
def test_a_report_says_what_ran_and_the_warning_holds_for_every_schedule(schedule, method, reported):
    model = Looks(Deep())
    match = r"^torch\.export cannot trace Looks: .*\. Falling back to module hooks, where schedules walk and block go by the 3 "
    with pytest.warns(UserWarning, match=match + r"blocks of model\.layers\."):
        report = statprune.prune(model, deep_batches(), Recipe(method, pattern="50%", schedule=schedule))
    assert report.schedule == reported


def test_one_shot_still_sees_the_dense_model(no_graph):
    model, expected = Deep(), Deep()
    by_hooks(model, deep_batches(), Recipe("cvr+energy", pattern="50%", schedule="one-shot"))
    dense = Deep()
    for section in MODELS["deep"][2]:
        alone = reference(Deep(), deep_batches(), [section])
        for name, weight in alone.named_parameters():
            if not torch.equal(weight, dense.get_parameter(name)):
                expected.get_parameter(name).data.copy_(weight)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)


def test_two_stacks_come_in_the_order_in_which_they_run(no_graph):
    class Pair(Chain):
        """Its lists are registered in another order than they run in, and something stands between them."""

        def __init__(self):
            super().__init__()
            self.between, self.first = nn.Linear(8, 8), nn.Sequential(Plain(), Plain())

        def forward(self, x):
            return super().forward(self.between(self.first(x)))

    model, expected, batches = Pair(), Pair(), [torch.randn(4, 8), torch.randn(2, 8)]
    expected.load_state_dict(model.state_dict())
    report = by_hooks(model, batches)
    assert "go by the 2 blocks of first and the 3 blocks of layers." in report.fallback_reason
    sections = ["first.0", "first.1", "between", "layers.0", "layers.1", "layers.2"]
    reference(expected, batches, sections)
    assert list(dict.fromkeys(site.name.removesuffix(".up").removesuffix(".down") for site in report.sites)) == sections
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


# What cannot be run by itself, and why.


class Plain(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Chain(nn.Module):
    block = Plain

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(self.block() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Twice(Chain):
    def forward(self, x):
        return self.head(self.layers[2](self.layers[1](self.layers[0](self.layers[1](x)))))


class Again(Chain):
    def forward(self, x):
        return super().forward(self.layers[0](x))


class Skips(Chain):
    def forward(self, x):
        return self.head(self.layers[1](self.layers[0](x)))


class Glue(Chain):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) * 0.5
        return self.head(x)


class GlueInPlace(Chain):
    """The tensor is the one that came out of the block, with something added to it."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x += 1
        return self.head(x)


class Beside(Chain):
    """Hands the second block on, and what was computed from the first beside it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([TakesTwo() for _ in range(2)])

    def forward(self, x):
        y = x
        for layer in self.layers:
            x = layer(x, y)
            y = x.mean()
        return self.head(x)


class TakesTwo(Plain):
    def forward(self, x, y):
        return super().forward(x) + y


class Number(Beside):
    """The same, as a number."""

    def forward(self, x):
        y = 0.0
        for layer in self.layers:
            x = layer(x, y)
            y = float(x.mean())
        return self.head(x)


class Shared(Chain):
    class block(Plain):
        def forward(self, x):
            return super().forward(self.shared(x))

    def __init__(self):
        super().__init__()
        shared = nn.Linear(8, 8)
        for layer in self.layers:
            layer.shared = shared


class InPlace(Chain):
    class block(Plain):
        def forward(self, x):
            x += self.down(self.up(x).relu())
            return x

    def forward(self, x):
        return super().forward(x.clone())


class Halves(Chain):
    """Writes to its input where torch does not count it; the first run of a block does not show it."""

    class block(Plain):
        def forward(self, x):
            y = super().forward(x)
            if hasattr(self, "writes"):
                x.data.mul_(0.5)
            return y

    def __init__(self):
        super().__init__()
        self.layers[1].writes = True


class Counts(Chain):
    class block(Plain):
        num_calls = 0

        def forward(self, x):
            self.num_calls += 1
            return super().forward(x) * self.num_calls


class Remembers(Chain):
    """Blocks tell each other something in passing, of the batch at hand."""

    class block(Plain):
        def forward(self, x):
            if self.index == 0:
                self.notes["sum"] = x.sum()
            return super().forward(x) + self.notes["sum"]

    def __init__(self):
        super().__init__()
        notes = {}
        for index, layer in enumerate(self.layers):
            layer.index, layer.notes = index, notes


class Noisy(Chain):
    class block(Plain):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x)


class Cache:
    pass


class Cached(Chain):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([TakesCache() for _ in range(2)])

    def forward(self, x):
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache=cache)
        return self.head(x)


class TakesCache(Plain):
    def forward(self, x, cache):
        return super().forward(x)


class Alone(Chain):
    """Its blocks run inside of the model only."""

    class block(Plain):
        def forward(self, x):
            if not self.owner[0].is_running:
                raise ValueError("not without the model")
            return super().forward(x)

    is_running = False

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.owner = [self]

    def forward(self, x):
        self.is_running = True
        x = super().forward(x)
        self.is_running = False
        return x


class Turns(Chain):
    def __init__(self):
        super().__init__()
        self.others = nn.ModuleList(Plain() for _ in range(3))

    def forward(self, x):
        y = x
        for layer, other in zip(self.layers, self.others, strict=True):
            x, y = layer(x), other(y)
        return self.head(x + y)


class Experts(Chain):
    """Like modules that all read the same are no blocks."""

    def forward(self, x):
        return self.head(sum(layer(x) for layer in self.layers))


NO_LIST = "it has no list of like blocks that read each other's outputs"
STATE = "it writes to its inputs, keeps a state, or draws random numbers"
REFUSED = {
    Twice: "layers.1 runs before layers.0",
    Again: "layers.0 is called more than once",
    Skips: "layers.2 does not run",
    Glue: "what layers.1 reads is computed from blocks before it, outside of them",
    GlueInPlace: "what layers.1 reads is computed from blocks before it, outside of them",
    Beside: "what layers.1 reads is computed from blocks before it, outside of them",
    Number: "what layers.1 reads is computed from blocks before it, outside of them",
    Shared: "layers.0.shared runs in several places, in blocks or between them",
    InPlace: "layers.0 writes to its inputs in place",
    Halves: f"layers.1 returns something else when it is run by itself, or again: {STATE}",
    Counts: f"layers.0 returns something else when it is run by itself, or again: {STATE}",
    Remembers: f"layers.1 returns something else when it is run by itself, or again: {STATE}",
    Noisy: f"layers.0 returns something else when it is run by itself, or again: {STATE}",
    Cached: "layers.0 is given a Cache, which may carry a state",
    Alone: "layers.0 cannot be run by itself: not without the model",
    Turns: "layers and others do not run one after the other",
    Experts: NO_LIST,
    classifier: NO_LIST,
}


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_what_cannot_go_block_by_block_stays_one_shot_and_says_why(build, no_graph):
    model = build()
    batches = [torch.randn(4, 8), torch.randn(3, 8)]
    report = by_hooks(model, batches)
    assert report.schedule == "one-shot (module hooks)"
    reason = "Falling back to module hooks with one-shot statistics, for its blocks cannot be run by themselves: "
    assert report.fallback_reason.partition("no reason. ")[2].startswith(f"{reason}{REFUSED[build]}")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_chain_that_all_of_these_differ_from_goes_block_by_block(no_graph):
    listed_twice = Chain()
    listed_twice.all_layers = nn.ModuleList([*listed_twice.layers])
    models = [
        Chain(),
        listed_twice,
        nn.Sequential(Plain(), Plain()),
        nn.Sequential(Plain(), Plain(), nn.Linear(8, 3)),
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)),
    ]
    for model in models:
        report = by_hooks(model, [torch.randn(4, 8), torch.randn(3, 8)], Recipe("wanda", "50%", targets=["*"]))
        assert report.schedule == "block (module hooks)"


def test_the_dense_target_is_the_weight_as_it_is_in_one_shot(no_graph):
    found = []
    for target in ("dense", "pruned"):
        model = Chain()
        by_hooks(model, [torch.randn(9, 8, generator=torch.manual_seed(2))], Recipe("wanda+energy", "50%", target=target))
        found.append(model)
    assert all(torch.equal(one, other) for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True))


class Tires(Chain):
    """Returns less once its weights are pruned."""

    class block(Plain):
        def forward(self, x, y=None):
            x = super().forward(x)
            return x if bool((self.down.weight == 0).any()) else (x, x.sum())

    def forward(self, x):
        y = None
        for layer in self.layers:
            x, y = layer(x, y)
        return self.head(x)


def test_a_block_that_does_something_else_when_it_is_pruned_is_an_error_that_says_so(no_graph):
    match = r"batch 0 cannot go block by block: layers\.0 returns less than for the first batch\. Use schedule 'one-shot'\."
    with pytest.raises(CalibrationError, match=match + " Pruned already: 2 weights before it"):
        by_hooks(Tires(), [torch.randn(4, 8), torch.randn(3, 8)])


def _two_ranks_by_blocks(rank):
    batches = deep_batches()
    model = Deep()

    def fail(*_):
        raise TracingError("not today")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("statprune.model.layers.trace", fail)
        report = by_hooks(model, batches[:2] if rank == 0 else batches[2:])
    return report.schedule, report.num_tokens, dict(model.named_parameters())


def test_statistics_of_all_ranks_are_added_up_block_by_block(two_ranks, no_graph):
    model = Deep()
    report = by_hooks(model, deep_batches())
    for schedule, num_tokens, weights in two_ranks(_two_ranks_by_blocks):
        assert (schedule, num_tokens) == (report.schedule, report.num_tokens)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


class LeavesEarly(Chain):
    """How many blocks run depends on the data."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.mean() > 100:
                break
        return self.head(x)


class Jumps(Chain):
    """Which block reads what depends on the data."""

    def forward(self, x):
        first = self.layers[0](x)
        second = self.layers[1](first)
        return self.head(self.layers[2](first if x.mean() > 100 else second))


@pytest.mark.parametrize(
    ("build", "how"),
    [(LeavesEarly, r"layers\.\d does not run"), (Jumps, r"layers\.2 reads something else than for the first batch")],
)
def test_a_batch_that_takes_another_way_is_refused_before_anything_is_changed(build, how, no_graph):
    model = build()
    batches = [torch.randn(4, 8), torch.full((4, 8), 1e6), torch.randn(4, 8)]
    match = rf"Calibration batch 1 cannot go block by block: {how}\. Use schedule 'one-shot'.*Nothing was changed"
    with pytest.warns(UserWarning, match="go by the 3 blocks of layers"), refused(model, CalibrationError, match):
        statprune.prune(model, batches, BLOCK)
    assert by_hooks(model, batches, Recipe("wanda", "50%", schedule="one-shot")).schedule == "one-shot (module hooks)"


def test_infinite_activations_of_the_first_batch_are_refused_before_anything_is_changed(no_graph):
    model = Chain()
    with torch.no_grad():
        model.layers[1].up.weight.fill_(1e38)
        model.layers[1].up.bias.zero_()
    batches = [torch.randn(4, 8).abs() * 100, torch.zeros(4, 8)]
    with (
        pytest.warns(UserWarning, match="Falling back"),
        refused(model, NonFiniteError, r"input of layers\.1\.down, the first layer where it shows.*Nothing was changed"),
    ):
        statprune.prune(model, batches, BLOCK)


def test_padding_of_an_encoder_decoder_is_refused_here_too(no_graph):
    model, ids = t5(num_layers=2, num_decoder_layers=2), tokens(2, 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": tokens(2, 4)}
    assert by_hooks(model, [batch], "wanda").schedule == "block (module hooks)"
    batch["attention_mask"][0, 2:] = 0
    with (
        pytest.warns(UserWarning, match="Falling back"),
        refused(model, CalibrationError, r"batch 0 has padding.*Give batches without padding\. Nothing was changed"),
    ):
        statprune.prune(model, [batch], "wanda")


def test_the_forward_context_is_around_every_block(no_graph):
    class Half(Chain):
        def forward(self, x):
            return super().forward(x.bfloat16())  # float32 weights, which is an error outside of autocast

    report = by_hooks(Half(), [torch.randn(4, 8)], forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert (report.schedule, len(report.sites)) == ("block (module hooks)", 6)


def observed(model, batches, **settings):
    inputs = bind_batches(model, batches)
    layers = find_layers(model, inputs)
    assert layers.stacks is not None
    return observe_blocks(model, layers.stacks, layers.groups, inputs, **settings)


def test_only_one_block_s_inputs_are_in_memory(no_graph):
    model, alive = Chain(), defaultdict(list)
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, args, output, index=index: alive[index].append(weakref.ref(output)))
    most = 0
    for group, _ in observed(model, [torch.randn(4, 8) for _ in range(5)]):
        held = {index: sum(one() is not None for one in refs) for index, refs in alive.items()}
        if group.name == "head":
            assert not any(held.values())
        else:
            block = int(group.name.split(".")[1])
            assert held == {0: 5 * (block == 1), 1: 5 * (block == 2), 2: 0}, group.name
            most = max(most, sum(held.values()))
    assert most == 5


def test_each_batch_goes_through_a_block_twice_and_through_the_model_three_times_at_most(no_graph):
    model, calls = Chain(), defaultdict(int)
    inputs = bind_batches(model, [torch.randn(4, 8) for _ in range(5)])
    layers = find_layers(model, inputs)
    for name in ("layers.0", "layers.1", "layers.2", "head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    body = [group for group in layers.groups if group.name != "head"]
    for _ in layers.observe(body, inputs):
        pass
    # All see the model once before anything changes; the last block is not run for the sake of blocks behind it.
    assert dict(calls) == {"layers.0": 15, "layers.1": 15, "layers.2": 10, "head": 5}
    calls.clear()
    for _ in layers.observe(layers.groups, inputs):
        pass
    assert dict(calls) == {"layers.0": 20, "layers.1": 20, "layers.2": 15, "head": 10}
    calls.clear()
    for _ in layers.observe([group for group in layers.groups if group.name.startswith("layers.0")], inputs):
        pass
    assert dict(calls) == {"layers.0": 10, "layers.1": 5, "layers.2": 5, "head": 5}


def test_what_is_finished_is_not_observed_again(no_graph):
    finished = {"layers.0.up.weight", "layers.0.down.weight", "layers.1.up.weight", "head.weight"}
    found = {group.name: moments for group, moments in observed(Chain(), [torch.randn(4, 8)], finished=finished)}
    assert [name for name, moments in found.items() if moments is None] == ["layers.0.up", "layers.0.down", "head"]


def test_a_run_that_was_ended_within_a_block_goes_on_to_the_same_weights(no_graph, tmp_path):
    expected, model = Deep(), Deep()
    by_hooks(expected, deep_batches())

    def end(done, *_):
        if done == 5:  # one of two layers of the second block
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        by_hooks(model, deep_batches(), journal=tmp_path, progress=end)
    again = Deep()
    report = by_hooks(again, deep_batches(), journal=tmp_path)
    assert len(report.sites) == 9
    for name, weight in again.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name)), name


class Split(Chain):
    """The embedding's projection and the first block read the same tensor."""

    class block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x)

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(8, 8)

    def forward(self, x):
        y = self.before(x)
        return super().forward(x) + self.head(y)


def test_sites_of_one_group_come_with_their_own_block(no_graph):
    model = Split()
    inputs = bind_batches(model, [torch.randn(4, 8)])
    layers = find_layers(model, inputs)
    assert [site.name for site in layers.groups[0].sites] == ["before", "layers.0.up"]
    found = [[site.name for site in group.sites] for group, _ in layers.observe(layers.groups, inputs)]
    assert found == [["before"], ["layers.0.up"], ["layers.1.up"], ["layers.2.up"], ["head"]]


def test_a_weight_in_the_head_sees_the_pruned_blocks(no_graph):
    model = Chain()
    batch = torch.randn(4, 8)
    for group, moments in observed(model, [batch]):
        if group.name == "head":
            with torch.no_grad():
                expected = nn.Sequential(*model.layers)(batch)
            torch.testing.assert_close(moments.second_moment, expected.double().square().mean(0), check_dtype=False)
            assert expected.abs().max() < 10
        elif group.name == "layers.1.down":
            with torch.no_grad():
                model.layers[1].down.weight.zero_()


@pytest.mark.parametrize(
    ("schedule", "walk"),
    [
        ("block (module hooks)", "the calibration set through the model with hooks, block by block"),
        ("one-shot (module hooks)", "the calibration set through the dense model with hooks, once"),
    ],
)
def test_the_command_says_how_the_calibration_set_went_through(schedule, walk):
    report = PruningReport(Recipe().to_dict(), schedule, fallback_reason="no graph")
    assert _steps(report)["walk"] == f"walk: {walk}"


@pytest.mark.parametrize("allocation", ["curves", "sensitivity"])
def test_allocations_measure_the_dense_model(allocation, no_graph):
    recipe = Recipe("wanda", pattern="50%", schedule="block", allocation=allocation)
    same = Recipe("wanda", pattern="50%", schedule="one-shot", allocation=allocation)
    reports = [by_hooks(Deep(), deep_batches(), one) for one in (recipe, same)]
    assert [report.schedule for report in reports] == ["block (module hooks)", "one-shot (module hooks)"]
    sparsities = [{site.name: site.sparsity for site in report.sites} for report in reports]
    assert sparsities[0] == sparsities[1]
    assert len(set(sparsities[0].values())) > 1


def test_a_model_without_values_is_not_said_to_go_either_way(no_graph):
    with torch.device("meta"):
        model = Chain()
    layers = find_layers(model, [ModelInputs((), {"x": torch.zeros(4, 8, device="meta")})])
    assert layers.reason.endswith(
        "Falling back to module hooks, block by block where the blocks can be run by themselves, which shows with its weights "
        "only."
    )
