"""Weights that are not whole in the model: shards of FSDP2 on two ranks, and where accelerate has put them."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.func import functional_call

import statprune
from statprune.errors import SiteError
from tiny_models import changed, llama, snapshot, tokens

METHODS = ["wanda", "paper", "default", "best"]


def batches():
    torch.manual_seed(5)
    return [tokens(2, 12) for _ in range(4)]


def sharded_llama():
    model = llama(num_key_value_heads=2)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def whole(model):
    return {name: one.full_tensor() if isinstance(one, DTensor) else one.detach() for name, one in model.named_parameters()}


def _sharded_and_whole(rank, method):
    mine = batches()[rank::2]
    copied = llama(num_key_value_heads=2)
    expected = statprune.prune(copied, mine, method)
    model = sharded_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    before = whole(model)
    plan = statprune.plan(model, mine, method)
    is_unchanged = all(torch.equal(one, before[name]) for name, one in whole(model).items())
    kept = {name: one.full_tensor() for name, one in plan.weights.items()}
    report = statprune.prune(model, mine, method)
    after = whole(model)
    wanted = dict(copied.named_parameters())
    model(mine[0]).logits.square().sum().backward()
    optimizer.step()  # the parameters are still the ones that it holds
    return {
        "unchanged by a plan": is_unchanged,
        "as with whole weights": all(torch.equal(after[name], wanted[name]) for name in wanted),
        "as planned": all(torch.equal(after[name], one) for name, one in kept.items()),
        "report": report.sites == expected.sites,
        "same parameters": all(one is other for one, other in zip(model.parameters(), parameters, strict=True)),
        "a part on each rank": sum(one.to_local().numel() for one in model.parameters())
        < sum(one.numel() for one in wanted.values()),
        "trained": not torch.equal(whole(model)["lm_head.weight"], after["lm_head.weight"]),
    }


@pytest.mark.parametrize("method", METHODS)
def test_sharded_weights_are_pruned_to_the_bit_as_whole_ones_are(two_ranks, method):
    for found in two_ranks(_sharded_and_whole, method):
        assert found == dict.fromkeys(found, True)


def _refused(rank, kind):
    model = llama()
    before = snapshot(model)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    if kind == "tensor parallel":
        parallelize_module(model.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    elif kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        for parameter in model.parameters():  # as deepspeed.zero.Init leaves them
            parameter.ds_id, parameter.data = 0, torch.empty(0)
    try:
        statprune.prune(model, batches()[:1], "wanda")
    except SiteError as e:
        return str(e)
    return before


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("tensor parallel", "tensor parallelism.*Prune before parallelize_module"),
        ("fsdp1", "FSDP1.*ModelParallelStrategy"),
        ("zero3", "ZeRO-3"),
    ],
)
def test_other_kinds_of_shards_are_refused_by_name(two_ranks, kind, named):
    for message in two_ranks(_refused, kind):
        assert re.search(named, message)


class Net(nn.Module):
    """Two layers that nobody has names for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.second(self.first(x).relu()).relu())


def offloaded(model):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("method", METHODS[:3])
def test_weights_in_host_memory_are_pruned_where_they_are(method):
    expected, model = llama(), offloaded(llama())
    assert all(parameter.is_meta for parameter in model.parameters())
    report = statprune.prune(expected, batches(), method)
    dense = model(batches()[0]).logits
    plan = statprune.plan(model, batches(), method)
    assert torch.equal(model(batches()[0]).logits, dense)
    found = statprune.prune(model, batches(), method)
    assert found.sites == report.sites
    assert torch.equal(model(batches()[0]).logits, expected(batches()[0]).logits)
    pruned = functional_call(llama(), plan.weights, (batches()[0],)).logits
    assert torch.equal(pruned, expected(batches()[0]).logits)


def test_loss_aware_methods_too():
    expected, model = llama(num_key_value_heads=2), offloaded(llama(num_key_value_heads=2))
    statprune.prune(expected, batches(), "best")
    statprune.prune(model, batches(), "best")
    assert torch.equal(model(batches()[0]).logits, expected(batches()[0]).logits)


def test_a_module_of_anybody_is_pruned_where_it_is():
    torch.manual_seed(1)
    inputs = [torch.randn(4, 8) for _ in range(3)]
    expected, model = Net(), offloaded(Net())
    statprune.prune(expected, inputs, "wanda")
    statprune.prune(model, inputs, "wanda")
    assert torch.equal(model(inputs[0]), expected(inputs[0]))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("auto:minutes=1", "'auto:minutes=1' tries recipes out on the whole model"),
        (
            {"method": "wanda", "pattern": "50%", "allocation": "sensitivity"},
            "runs the whole model for each layer",
        ),
    ],
)
def test_what_runs_the_whole_model_is_refused_where_accelerate_would_put_the_dense_weights_back(how, named):
    with pytest.raises(SiteError, match=rf"The weights are in host memory, .*{named}"):
        statprune.plan(offloaded(llama()), batches(), how)


def test_weights_on_disk_are_refused_by_name(tmp_path):
    from accelerate import disk_offload

    model = disk_offload(llama(), str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(SiteError, match=r"offloaded to disk by accelerate.*--stream"):
        statprune.prune(model, batches(), "wanda")


def test_nothing_changes_where_something_is_refused():
    model = llama()
    before = snapshot(model)
    model.model.layers[0].mlp.up_proj.weight.ds_id = 0
    with pytest.raises(SiteError, match="ZeRO-3"):
        statprune.prune(model, batches(), "wanda")
    assert changed(model, before) == set()
