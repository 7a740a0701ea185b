"""Where weights are read from and where pruned ones land; which of them the walk is done with, and when."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

import statprune
from statprune.errors import NonFiniteError, SiteError
from statprune.methods.pruner import PrunedWeight
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.storage import refuse_sharded
from statprune.model.weights import Dense, InPlace, Twin, check_and_sum_weights, hold_
from tiny_models import changed, classifier, gpt2, llama, refused, snapshot, tokens


def pruned(weight):
    return PrunedWeight(weight, weight != 0)


def test_in_place_reads_and_writes_the_model():
    model = classifier()
    layers = find_layers(model, bind_batches(model, [torch.randn(4, 8)]))
    weights, site = InPlace(model), layers.groups[0].sites[0]
    assert weights.is_in_place
    assert weights.get("0.weight") is model[0].weight
    weights.put(site, pruned(torch.ones(12, 8)))
    assert torch.equal(model[0].weight, torch.ones(12, 8))
    assert ("0.bias" in weights, "lifted_tensor_0" in weights) == (True, False)


def test_a_twin_reads_what_was_put_under_every_name_and_leaves_the_model_alone():
    model = gpt2(n_layer=1)  # lm_head is tied to the embedding, and Conv1D stores its weights as [in, out]
    layers = find_layers(model, bind_batches(model, [tokens(2, 6)]))
    sites = {site.parameter: site for group in layers.groups for site in group.sites}
    before, weights = snapshot(model), Twin(model)
    head, body = sites["lm_head.weight"], sites["transformer.h.0.mlp.c_fc.weight"]
    weights.put(head, pruned(torch.full(head.shape, 2.0)))
    weights.put(body, pruned(torch.arange(float(body.shape[0] * body.shape[1])).view(body.shape)))
    assert not weights.is_in_place
    assert weights.get("transformer.wte.weight") is weights.get("lm_head.weight") is weights.pruned["lm_head.weight"]
    assert torch.equal(body.view(weights.get(body.parameter))[0, :3], torch.tensor([0.0, 1.0, 2.0]))
    assert weights.pruned[body.parameter].is_contiguous()
    assert changed(model, before) == set()


class Remembering(InPlace):
    """Notes what is read and what is released."""

    def __init__(self, model):
        super().__init__(model)
        self.reads, self.released = [], []

    def get(self, name):
        self.reads.append((name, len(self.released)))
        return super().get(name)

    def release(self, names):
        self.released.append(list(names))


@pytest.mark.parametrize("schedule", ["walk", "block", "one-shot"])
def test_every_weight_is_released_once_after_its_last_read(schedule):
    model = llama()
    layers = find_layers(model, bind_batches(model, [tokens(2, 6)]))
    weights, groups = Remembering(model), layers.groups[:-1]  # without lm_head
    for group, _ in layers.observe(groups, bind_batches(model, [tokens(2, 6)]), schedule=schedule, weights=weights):
        for site in group.sites:  # as the engine does
            weights.get(site.parameter)
    released = [name for names in weights.released for name in names]
    assert len(released) == len(set(released))
    assert {name for name, _ in weights.reads} == set(released)
    when = {name: index for index, names in enumerate(weights.released) for name in names}
    assert all(index <= when[name] for name, index in weights.reads)
    # As soon as it can be: the first block's weights go before the last block is done.
    if schedule == "walk":
        assert when["model.layers.0.self_attn.q_proj.weight"] < when["model.layers.1.self_attn.q_proj.weight"]
        assert len(weights.released) == 2 * len(groups)  # what only ran, and what was pruned


@pytest.fixture
def mesh():
    """One process is a mesh too."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_refused_by_name_before_anything_is_read(mesh):
    model = classifier()
    refuse_sharded(model)
    for placement in (Shard(0), Replicate()):
        sharded = DTensor.from_local(model[2].weight.detach(), mesh, [placement])
        model[2].weight = nn.Parameter(sharded)
        for call in (statprune.prune, statprune.plan):
            with pytest.raises(SiteError, match=r"The parameter 2\.weight is sharded \(a DTensor"):
                call(model, [torch.randn(4, 8)])
        model = classifier()


def test_held_places_are_exact_zeros_whatever_was_written_there():
    parameter = nn.Parameter(torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]]))
    hold_(parameter, torch.tensor([[True, False], [False, True]]))
    assert parameter.tolist() == [[1.0, 0.0], [0.0, -2.0]]
    assert not torch.signbit(parameter[0, 1])


class Breaking:
    """A pruner that needs no statistics, and cannot prune the second weight."""

    def __init__(self):
        self.calls = 0

    def __call__(self, weight, moments):
        self.calls += 1
        if self.calls == 2:
            raise ValueError("too hard.")
        return pruned(weight * 0)


def test_a_method_without_statistics_that_fails_midway_says_how_much_is_pruned(monkeypatch):
    breaking = Breaking()
    magnitude = statprune.Recipe("magnitude")
    pruner = magnitude.pruner()
    monkeypatch.setattr(type(pruner), "__call__", lambda self, weight, moments: breaking(weight, moments))
    with pytest.raises(SiteError, match=r"2: too hard\. Pruned already: 1 weight before it\. Reload the model\."):
        statprune.prune(classifier(), [torch.randn(4, 8)], magnitude)
    breaking.calls = 0
    with refused(model := classifier(), SiteError, r"2: too hard\. Nothing was changed\."):
        statprune.plan(model, [torch.randn(4, 8)], magnitude)


def test_the_public_names_are_all_there():
    assert set(statprune.__all__) <= set(dir(statprune))
    assert all(getattr(statprune, name) is not None for name in statprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        getattr(statprune, "prun")  # noqa: B009


def _sum(values):
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(values, requires_grad=False))
    return check_and_sum_weights(module)["weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.complex64])
@pytest.mark.parametrize("shape", [(5, 7), (16, 8), (1,), (600, 70)])
def test_a_checksum_tells_every_bit_and_every_place(dtype, shape, monkeypatch):
    monkeypatch.setattr("statprune.model.weights._WORDS", 1000)  # more than one chunk, and a rest
    values = torch.randint(-100, 100, shape).to(dtype)
    known = _sum(values)
    bits = values.view(-1).view(torch.uint8)
    for place in [0, len(bits) - 1, *torch.randint(len(bits), (20,)).tolist()]:
        other = bits.clone()
        other[place] ^= 1 << place % 6  # makes no infinity of a number as small as these
        assert _sum(other.view(dtype).view(shape)) != known
    assert _sum(values.clone()) == known
    if values.numel() > 1:
        assert len({known, _sum(-values), _sum(values.roll(1, 0)), _sum(values.flip(0))}) == 4


def test_a_checksum_is_of_values_and_not_of_how_they_are_stored():
    values = torch.randn(30, 33)
    unaligned = torch.empty(30 * 33 + 1)[1:].view(30, 33).copy_(values)
    assert _sum(values) == _sum(values.t().contiguous().t()) == _sum(unaligned)
    assert _sum(torch.zeros(3, 0)) == 0


def test_two_changes_of_sign_do_not_cancel():
    values = torch.ones(64, dtype=torch.float64)  # whose signs are the highest bits of words
    sums = {_sum(values)}
    for first in range(8):
        for second in range(first):
            values[[first, second]] = -1
            sums.add(_sum(values))
            values[[first, second]] = 1
    assert len(sums) == 1 + 28


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checksum_is_not_made_of_what_is_not_finite(value):
    model = classifier()
    with torch.no_grad():
        model[2].weight[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in the parameter 2\.weight"):
        check_and_sum_weights(model)


@pytest.mark.parametrize("kind", [InPlace, Twin])
def test_a_dense_weight_stays_what_it_was_under_every_name_until_it_is_released(kind):
    model = gpt2(n_layer=1)
    layers = find_layers(model, bind_batches(model, [tokens(2, 6)]))
    head = next(site for group in layers.groups for site in group.sites if site.parameter == "lm_head.weight")
    weights, before = kind(model), snapshot(model)
    dense = Dense(weights)
    dense.keep(head)
    weights.put(head, pruned(torch.zeros(head.shape)))
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert torch.equal(dense.get(name), before[name])
        assert not weights.get(name).any()
    assert dense.get("transformer.ln_f.weight") is weights.get("transformer.ln_f.weight")
    assert ("lm_head.weight" in dense, "nowhere" in dense) == (True, False)
    dense.release(["lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"])
    assert not dense.get("lm_head.weight").any()
