"""The dense target: two streams against plain forward passes of two models, and the target against a direct solve."""

import copy
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from exports import shared_trace
from statprune.errors import TracingError
from statprune.methods.pruner import PrunedWeight
from statprune.methods.statistics import InputMoments, Statistic
from statprune.methods.target import TARGETS, DenseTarget, PrunedTarget, toward_dense
from statprune.model.inputs import bind_batches, dynamic_dims, example_batch
from statprune.model.layers import Layers
from statprune.model.streams import Executor
from statprune.model.undisturbed import undisturbed
from statprune.model.weights import Dense, InPlace, Twin
from tiny_models import TRANSFORMER, gpt2, llama, snapshot, t5, tokens

CROSS = Statistic.GRAM | Statistic.CROSS


def half(weight: Tensor, *_) -> PrunedWeight:
    """A trivial pruner: the larger half of a row stays."""
    keep = weight.abs() > weight.abs().median(dim=-1, keepdim=True).values
    return PrunedWeight(weight.masked_fill(~keep, 0.0), keep)


def padded_batches():
    batches = []
    for batch, length, kept in ((3, 8, (8, 5, 7)), (2, 8, (3, 8)), (2, 6, (6, 2))):
        mask = (torch.arange(length) < torch.tensor(kept)[:, None]).long()
        batches.append({"input_ids": tokens(batch, length), "attention_mask": mask})
    return batches


def found_in(model, batches) -> Layers:
    inputs = bind_batches(model, batches)
    traced = shared_trace(model, example_batch(inputs), dynamic_dims(inputs))
    return Layers(model, traced.groups, traced.left_out, traced)


def residual_sites(model, batches) -> dict[str, int]:
    """How many tensors each site's result is added to, where there are any."""
    sites = [site for group in found_in(model, batches).groups for site in group.sites]
    return {site.name: len(site.residuals) for site in sites if site.residuals}


def prune_along(model, batches, *, schedule="walk", weights=None, prune=half, needs=CROSS, layers=None, each=None):
    """Walk with two streams and prune by magnitude; the statistics by the group's name."""
    layers = layers or found_in(model, batches)
    weights = weights or InPlace(model)
    found = {}
    inputs = bind_batches(model, batches)
    for group, moments in layers.observe(layers.groups[:-1], inputs, schedule=schedule, needs=needs, weights=weights):
        found[group.name] = moments
        for site in group.sites:
            weights.put(site, prune(site.view(weights.get(site.parameter).detach()), moments, site))
        if each:
            each()
    return found


class Seen:
    """What modules of a model read in full forward passes, without padding, in float64."""

    def __init__(self, model, batches):
        self.inputs = {}
        names = {module: name for name, module in model.named_modules()}

        def see(module, args):
            if args and args[0].is_floating_point():
                self.inputs.setdefault(names[module], []).append(args[0].detach()[mask].double())

        handles = [module.register_forward_pre_hook(see) for module in names if not list(module.children())]
        for batch in batches:
            mask = batch["attention_mask"].bool()
            model(**batch)
        for handle in handles:
            handle.remove()

    def input(self, name) -> Tensor:
        return torch.cat(self.inputs[name])


READS_RESIDUAL = {
    "self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm",
    "attn.c_proj": "ln_1", "mlp.c_proj": "ln_2",
}  # fmt: skip
"""What reads the residual stream that a linear's result is added to, in the same block."""


def expected_target(site, dense, before, now) -> Tensor:
    """sum of (W x_d + h_d - h_p) x_p^T, by its definition."""
    block, own = site.name.rsplit(".", 2)[0], ".".join(site.name.rsplit(".", 2)[1:])
    norm = f"{block}.{READS_RESIDUAL[own]}"
    weight, x_d, x_p = site.view(dense.get_parameter(site.parameter)).double(), before.input(site.name), now.input(site.name)
    return (x_d @ weight.t() + before.input(norm) - now.input(norm)).t() @ x_p


@pytest.mark.parametrize(("build", "schedule"), [(llama, "walk"), (llama, "block"), (gpt2, "walk")])
def test_two_streams_see_what_full_forward_passes_of_two_models_see(build, schedule):
    model, batches = build(), padded_batches()
    dense, layers = copy.deepcopy(model), found_in(model, batches)
    before = now = Seen(dense, batches)
    has_seen_pruned, num_targets = [], 0
    inputs, weights = bind_batches(model, batches), InPlace(model)
    for group, moments in layers.observe(layers.groups[:-1], inputs, schedule=schedule, needs=CROSS, weights=weights):
        begins_block = group.name.endswith(("q_proj", "c_attn"))
        if schedule == "walk" or begins_block:  # the model is now what the statistics have seen
            now = Seen(model, batches)
        if moments.cross is not None or moments.targets:
            has_seen_pruned.append(group.name)
            x_d, x_p = before.input(group.name), now.input(group.name)
            torch.testing.assert_close(moments.gram.double(), x_p.t() @ x_p, rtol=1e-5, atol=1e-4)
            residual = [site for site in group.sites if ".".join(site.name.rsplit(".", 2)[1:]) in READS_RESIDUAL]
            assert moments.targets.keys() == {site.parameter for site in residual}
            for site in residual:
                num_targets += 1
                expected = expected_target(site, dense, before, now)
                torch.testing.assert_close(moments.targets[site.parameter].double(), expected, rtol=1e-5, atol=1e-4)
            assert (moments.cross is None) == bool(residual)
            if moments.cross is not None:
                torch.testing.assert_close(moments.cross.double(), x_d.t() @ x_p, rtol=1e-5, atol=1e-4)
        for site in group.sites:
            weights.put(site, half(site.view(model.get_parameter(site.parameter).detach())))
    names = [group.name for group in layers.groups[:-1]]
    assert has_seen_pruned == (names[1:] if schedule == "walk" else names[4:])
    assert num_targets == (4 if schedule == "walk" else 2)


# --- the weight that comes nearest -----------------------------------------------------------------------------------


def nearest(weight, x_p, wanted, damping, start) -> Tensor:
    """argmin over W' of sum |wanted - W' x_p|^2 + damping * sum_j H_jj |W'_j - start_j|^2, by a direct solve in float64."""
    gram = x_p.t() @ x_p
    penalty = damping * gram.diagonal().diag()
    return torch.linalg.solve(gram + penalty, (wanted.t() @ x_p + start @ penalty).t()).t()


def pair_of_streams(residual: bool, num_tokens=200):
    torch.manual_seed(1)
    weight, x_p = torch.randn(6, 10), torch.randn(num_tokens, 10) * torch.logspace(-2, 2, 10)
    x_d = x_p + 0.3 * torch.randn(num_tokens, 10) * x_p.std(0)
    drift = torch.randn(num_tokens, 6) if residual else torch.zeros(num_tokens, 6)
    moments = InputMoments.zeros(10, CROSS, has_cross=not residual, targets={"w": 6} if residual else {})
    for some in torch.arange(num_tokens).split(90):
        moments.add(x_p[some]).add_dense(x_p[some], x_d[some], {"w": x_d[some] @ weight.t() + drift[some]} if residual else {})
    return weight, moments, x_p.double(), x_d.double() @ weight.double().t() + drift.double()


@pytest.mark.parametrize("residual", [False, True], ids=["cross", "residual"])
@pytest.mark.parametrize(("share", "damping"), [(1.0, 0.01), (0.5, 0.01), (1.0, 0.0), (0.25, 3.0)])
def test_the_target_solves_its_normal_equations(residual, share, damping):
    weight, moments, x_p, dense_output = pair_of_streams(residual)
    wide = weight.double()
    wanted = share * dense_output + (1 - share) * x_p @ wide.t()
    expected = nearest(wide, x_p, wanted, damping, wide)
    found = toward_dense(weight, moments, "w", share=share, damping=damping)
    assert found.dtype == torch.float32
    scale = x_p.square().sum(0).sqrt()  # in the units of the outputs
    torch.testing.assert_close(found.double() * scale, expected * scale, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found, weight, rtol=1e-2)
    assert torch.equal(found, DenseTarget(share=share, damping=damping)(weight, moments, "w"))


def test_by_hand():
    """One channel: H = 4, C = 8, damping 1: w (8 + 4) / (4 + 4); with R = 2 beside it (8 + 2 + 4) / 8."""
    x_p, x_d = torch.tensor([[2.0]]), torch.tensor([[4.0]])
    moments = InputMoments.zeros(1, CROSS, has_cross=True).add(x_p).add_dense(x_p, x_d, {})
    assert toward_dense(torch.ones(1, 1), moments, "w", damping=1.0).item() == pytest.approx(12 / 8)
    moments = InputMoments.zeros(1, CROSS, targets={"w": 1}).add(x_p).add_dense(x_p, x_d, {"w": x_d + 1})
    assert toward_dense(torch.ones(1, 1), moments, "w", damping=1.0).item() == pytest.approx(14 / 8)


def test_a_share_of_0_and_statistics_of_one_stream_give_the_weight_back():
    weight, moments, x_p, _ = pair_of_streams(residual=False)
    assert torch.equal(toward_dense(weight, moments, "w", share=0), weight)
    alone = InputMoments.zeros(10, CROSS).add(x_p)
    assert torch.equal(toward_dense(weight, alone, "w"), weight)
    assert torch.equal(toward_dense(weight, None, "w"), weight)
    assert toward_dense(weight.bfloat16(), None, "w").dtype == torch.float32
    assert PrunedTarget()(weight, moments, "w") is weight


def test_a_channel_that_was_always_0_keeps_its_weights():
    weight = torch.randn(3, 4)
    x_p = torch.randn(50, 4)
    x_p[:, 2] = 0
    moments = InputMoments.zeros(4, CROSS, has_cross=True).add(x_p).add_dense(x_p, torch.randn(50, 4), {})
    for damping in (0.0, 0.01):
        found = toward_dense(weight, moments, "w", damping=damping)
        assert torch.equal(found[:, 2], weight[:, 2])
        assert not torch.isclose(found[:, [0, 1, 3]], weight[:, [0, 1, 3]]).any()


def test_fewer_tokens_than_channels_need_a_damping():
    weight, x_p = torch.randn(3, 8), torch.randn(4, 8)
    moments = InputMoments.zeros(8, CROSS, has_cross=True).add(x_p).add_dense(x_p, torch.randn(4, 8), {})
    assert torch.isfinite(toward_dense(weight, moments, "w")).all()
    with pytest.raises(ValueError, match=r"cannot be factorised with a damping of 0\..*dense:damping=0.1"):
        toward_dense(weight, moments, "w", damping=0.0)


def test_what_float32_cannot_hold_is_refused():
    x_p = torch.full((2, 2), 3e19)
    moments = InputMoments.zeros(2, CROSS, has_cross=True).add(x_p).add_dense(x_p, x_p, {})
    with pytest.raises(ValueError, match="the dense target"):
        toward_dense(torch.randn(3, 2), moments, "w")
    x_p = torch.eye(2)
    moments = InputMoments.zeros(2, CROSS, has_cross=True).add(x_p).add_dense(x_p, 1e38 * x_p, {})
    with pytest.raises(ValueError, match="the dense target is too large for float32"):
        toward_dense(torch.full((1, 2), 100.0), moments, "w")


def test_one_factorisation_serves_all_layers_of_a_group(monkeypatch):
    weight, moments, _, _ = pair_of_streams(residual=False)
    first = toward_dense(weight, moments, "w")
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    assert torch.equal(toward_dense(weight, moments, "v"), first)


@pytest.mark.parametrize(("setting", "value"), [("share", 1.1), ("share", -0.1), ("damping", -1.0), ("damping", 101.0)])
def test_settings_have_bounds(setting, value):
    with pytest.raises(ValueError, match=rf"dense\({setting}="):
        DenseTarget(**{setting: value})
    with pytest.raises(ValueError, match=rf"dense\({setting}="):
        toward_dense(torch.ones(1, 1), None, "w", **{setting: value})


def test_what_the_targets_need():
    assert TARGETS["pruned"]().needs == TARGETS["dense"](share=0).needs == Statistic.NONE
    assert TARGETS["dense"]().needs == CROSS


# --- along the walk --------------------------------------------------------------------------------------------------


def test_where_nothing_was_pruned_each_weight_is_its_own_target():
    model, batches = llama(), padded_batches()
    expected = snapshot(model)
    for group, moments in prune_along(model, batches, prune=lambda weight, *_: PrunedWeight(weight, weight != 0)).items():
        layers = [site for one in found_in(model, batches).groups if one.name == group for site in one.sites]
        for site in layers:
            weight = expected[site.parameter]
            torch.testing.assert_close(toward_dense(weight, moments, site.parameter), weight, rtol=0, atol=1e-5)


def toward(weight, moments, site) -> PrunedWeight:
    return half(toward_dense(weight, moments, site.parameter).to(weight.dtype))


@pytest.mark.parametrize("schedule", ["walk", "block"])
def test_in_place_and_aside_give_the_same_bits_and_aside_leaves_the_model(schedule):
    models, batches = [llama(), llama()], padded_batches()
    twin, before = Twin(models[0]), snapshot(models[0])
    prune_along(models[0], batches, schedule=schedule, weights=twin, prune=toward)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(models[0]).items())
    prune_along(models[1], batches, schedule=schedule, prune=toward)
    assert len(twin.pruned) == 14
    for name, weight in twin.pruned.items():
        assert torch.equal(weight, models[1].get_parameter(name)), name


@pytest.mark.parametrize(("build", "schedule"), [(llama, "walk"), (llama, "block"), (gpt2, "walk")])
def test_the_dense_target_brings_the_outputs_nearer_to_the_dense_models(build, schedule):
    batches = padded_batches()
    dense = build()(**batches[0]).logits
    errors = []
    for prune in (lambda weight, *_: half(weight), toward):
        model = build()
        prune_along(model, batches, schedule=schedule, prune=prune)
        errors.append((model(**batches[0]).logits - dense)[batches[0]["attention_mask"].bool()].square().mean().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("observed", ["one-shot", "hooks"])
def test_where_no_statistic_has_seen_pruned_weights_the_target_is_the_weight(observed):
    model, batches = llama(), padded_batches()
    layers, before = found_in(model, batches), snapshot(model)
    if observed == "hooks":
        layers = Layers(model, layers.groups, layers.left_out, None, "no graph")
    found = prune_along(model, batches, schedule="one-shot", layers=layers)
    assert len(found) == 8
    for group in layers.groups[:-1]:
        moments = found[group.name]
        assert moments.gram is not None
        assert (moments.cross, moments.targets) == (None, {})
        for site in group.sites:
            weight = before[site.parameter]
            assert torch.equal(toward_dense(weight, moments, site.parameter), weight)


class Written(nn.Module):
    """Writes to its residual stream in place, and to its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x.mul_(0.5)
        h = x * 1
        part = h[:, :4]
        h.add_(self.a(h.tanh()))
        part.mul_(2)  # through a view of it
        h += self.b(h.tanh())
        return self.head((h + self.c(h.relu())).tanh())


def test_the_two_streams_do_not_write_to_each_others_values():
    torch.manual_seed(0)
    model, batches = Written().eval(), [torch.randn(20, 8), torch.randn(9, 8)]
    given, dense, layers = copy.deepcopy(batches), copy.deepcopy(model), found_in(model, batches)
    residual = {site.name: len(site.residuals) for group in layers.groups for site in group.sites}
    assert residual == {"a": 1, "b": 1, "c": 1, "head": 0}
    weights = InPlace(model)

    def streams(one) -> list[tuple[Tensor, Tensor]]:
        """(x, h) of each layer."""
        h = 0.5 * torch.cat(given).double()
        found = []
        for name, activation in (("a", torch.tanh), ("b", torch.tanh), ("c", torch.relu)):
            layer = one.get_submodule(name)
            x = activation(h)
            found.append((x, h))
            h = h + x @ layer.weight.double().t() + layer.bias.double()
            h = torch.cat([2 * h[:, :4], h[:, 4:]], 1) if name == "a" else h
        return found

    for (group, moments), place in zip(
        layers.observe(layers.groups[:3], bind_batches(model, batches), needs=CROSS, weights=weights), range(3), strict=True
    ):
        (x_d, h_d), (x_p, h_p) = streams(dense)[place], streams(model)[place]
        torch.testing.assert_close(moments.gram.double(), x_p.t() @ x_p, rtol=1e-5, atol=1e-4)
        site = group.sites[0]
        if place:
            expected = (x_d @ dense.get_parameter(site.parameter).double().t() + h_d - h_p).t() @ x_p
            torch.testing.assert_close(moments.targets[site.parameter].double(), expected, rtol=1e-5, atol=1e-4)
        weights.put(site, half(model.get_parameter(site.parameter).detach()))
    assert all(torch.equal(*pair) for pair in zip(batches, given, strict=True))


def test_a_model_that_writes_to_a_buffer_is_refused_where_two_streams_would_run():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.register_buffer("num_calls", torch.zeros(()))

        def forward(self, x):
            self.num_calls.add_(1)
            return self.head(self.up(x).relu())

    model, batches = Counting(), [torch.randn(4, 8)]
    before = snapshot(model)
    with pytest.raises(TracingError, match=r"the dense target runs the model twice.*buffer num_calls.*use target 'pruned'"):
        prune_along(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    with undisturbed(model):
        assert prune_along(model, batches, schedule="one-shot").keys() == {"up"}


def test_tokens_that_are_chosen_by_their_values_are_not_paired():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.expert, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.up(x)
            return self.head(self.expert(x[x[:, 0] > 0]).relu().sum(0, keepdim=True))

    found = prune_along(Chosen(), [torch.randn(40, 8), torch.randn(40, 8)])
    assert (found["expert"].cross, found["expert"].targets) == (None, {})


def test_autocast_around_the_model_is_not_around_the_sums():
    model, batches = llama(), padded_batches()
    dense, layers, weights = copy.deepcopy(model), found_in(model, batches), InPlace(model)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        before = Seen(dense, batches)
    observed = layers.observe(
        layers.groups[:-1], bind_batches(model, batches), needs=CROSS, weights=weights, forward_context=autocast
    )
    for group, moments in observed:
        with autocast():
            now = Seen(model, batches)
        for site in group.sites:
            if site.parameter in moments.targets:
                expected = expected_target(site, dense, before, now)
                difference = (moments.targets[site.parameter] - expected).norm() / expected.norm()
                assert difference < 1e-4, site.name
            weights.put(site, half(model.get_parameter(site.parameter).detach()))


def _observed_on(rank, world_size) -> dict[str, list[Tensor]]:
    torch.manual_seed(3)
    model, batches = llama(), [*padded_batches(), *padded_batches()[:1]]
    found = prune_along(model, batches[rank::world_size], layers=found_in(model, batches), prune=toward)
    return {
        name: [*moments.totals(), *([moments.cross] if moments.cross is not None else [])] for name, moments in found.items()
    }


def test_ranks_add_up_both_streams_and_prune_alike(two_ranks):
    first, second = two_ranks(_observed_on, 2)
    alone = _observed_on(0, 1)
    for name, expected in alone.items():
        assert len(first[name]) == len(second[name]) == len(expected)
        for mine, theirs, one in zip(first[name], second[name], expected, strict=True):
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-3)


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_the_prefix_that_both_streams_share_runs_once(monkeypatch):
    model, batches = llama(), padded_batches()
    runs, run = Counter(), Executor.run

    def counted(self, node, environment):
        runs[str(node.args[1].target) if node.target is torch.ops.aten.linear.default else node.target] += 1
        return run(self, node, environment)

    monkeypatch.setattr(Executor, "run", counted)
    prune_along(model, batches)
    assert runs[torch.ops.aten.embedding.default] == 3
    assert runs["model.layers.0.self_attn.q_proj.weight"] == 6
    assert runs["model.layers.0.mlp.down_proj.weight"] == 6
    assert "model.layers.1.mlp.down_proj.weight" not in runs


@pytest.mark.parametrize(("schedule", "kind"), [("walk", InPlace), ("block", InPlace), ("walk", Twin)])
def test_dense_copies_are_released_behind_their_last_reader(monkeypatch, schedule, kind):
    model, batches = llama(), padded_batches()[:1]
    copies, most = {}, []
    keep = Dense.keep

    def kept(self, site):
        keep(self, site)
        if self._kept[site.parameter].data_ptr() != model.get_parameter(site.parameter).data_ptr():
            copies[site.parameter] = weakref.ref(self._kept[site.parameter])

    monkeypatch.setattr(Dense, "keep", kept)
    prune_along(
        model, batches, schedule=schedule, weights=kind(model),
        each=lambda: most.append(sum(copy() is not None for copy in copies.values())),
    )  # fmt: skip
    if kind is Twin:
        assert not copies
    else:
        assert len(copies) == 14
        assert max(most) == (4 if schedule == "walk" else 7)  # two neighbouring groups; one block


# --- which layers end in a residual stream ---------------------------------------------------------------------------


def of_family(name, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TRANSFORMER, "num_hidden_layers": 1, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


FAMILIES = {
    "llama": (llama, {"self_attn.o_proj": 1, "mlp.down_proj": 1}),
    "gpt2": (gpt2, {"attn.c_proj": 1, "mlp.c_proj": 1}),
    "parallel attention": (lambda: of_family("gpt_neox"), {"attention.dense": 1, "mlp.dense_4h_to_h": 2}),
    "norms behind each layer": (lambda: of_family("olmo2", num_key_value_heads=2), {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_streams_of_families(family):
    build, expected = FAMILIES[family]
    batches = padded_batches() if family in ("llama", "gpt2") else [tokens(2, 6)]
    found = residual_sites(build(), batches)
    assert {".".join(name.split(".")[-2:]): number for name, number in found.items()} == expected


def test_residual_streams_of_an_encoder_decoder():
    found = residual_sites(t5(), [{"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 5)}])
    ends = [f"encoder.block.0.layer.{name}" for name in ("0.SelfAttention.o", "1.DenseReluDense.wo")]
    ends += [f"decoder.block.0.layer.{name}" for name in ("0.SelfAttention.o", "1.EncDecAttention.o", "2.DenseReluDense.wo")]
    assert found == dict.fromkeys(ends, 1)


BIAS = torch.ones(8)

SHAPES = {
    "added": (lambda h, y: h + y, 1),
    "in place": (lambda h, y: y.add_(h), 1),
    "through dropout, a view and a cast": (lambda h, y: h + nn.functional.dropout(y, 0.5, False).double().view(6, 8), 1),
    "with a bias on the way": (lambda h, y: (y + BIAS) + h, 1),
    "in a row": (lambda h, y: (y + h) + h.tanh(), 1),  # the tanh is not there yet
    "scaled": (lambda h, y: torch.add(h, y, alpha=2), 0),
    "scaled residual": (lambda h, y: 2 * h + y, 1),
    "a product between": (lambda h, y: h + 2 * y, 0),
    "an activation between": (lambda h, y: h + y.relu(), 0),
    "broadcast": (lambda h, y: h[:1] + y, 0),
    "with itself": (lambda h, y: y + y, 0),
    "to what follows from it": (lambda h, y: y + y.tanh() * h, 0),
    "subtracted": (lambda h, y: h - y, 0),
    "transposed": (lambda h, y: (h[:8] if h.shape[0] > 8 else torch.cat([h, h])[:8]) + torch.cat([y, y])[:8].t(), 0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_streams_of_small_graphs(shape):
    combine, expected = SHAPES[shape]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            scaled = 2 * h if shape == "scaled residual" else h
            y = self.second(scaled.tanh())
            return self.head((combine(h, y) if shape != "scaled residual" else scaled + y).tanh().float())

    assert residual_sites(Model().eval(), [torch.randn(6, 8)]).get("second", 0) == expected
