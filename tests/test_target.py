"""The dense target: two streams against plain forward passes of two models, and the target against a direct solve."""

import copy

import pytest
import torch
from torch import Tensor

from exports import shared_trace
from statprune.methods.pruner import PrunedWeight
from statprune.methods.statistics import Statistic
from statprune.model.inputs import bind_batches, dynamic_dims, example_batch
from statprune.model.layers import Layers
from statprune.model.weights import InPlace
from tiny_models import llama, tokens

CROSS = Statistic.GRAM | Statistic.CROSS


def half(weight: Tensor) -> PrunedWeight:
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


def residual_sites(model, batch) -> dict[str, int]:
    """How many tensors each site's result is added to, where there are any."""
    sites = [site for group in found_in(model, [batch]).groups for site in group.sites]
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
            weights.put(site, prune(site.view(weights.get(site.parameter).detach())))
        if each:
            each()
    return found


class Seen:
    """What modules of a model read and give in full forward passes, without padding, in float64."""

    def __init__(self, model, batches):
        self.inputs, self.outputs = {}, {}
        names = {module: name for name, module in model.named_modules()}

        def see(module, args, output):
            for where, value in ((self.inputs, args[:1]), (self.outputs, (output,))):
                if value and isinstance(value[0], Tensor) and value[0].is_floating_point():
                    where.setdefault(names[module], []).append(value[0].detach()[self.mask].double())

        handles = [module.register_forward_hook(see) for module in names]
        for batch in batches:
            self.mask = batch["attention_mask"].bool()
            model(**batch)
        for handle in handles:
            handle.remove()

    def input(self, name) -> Tensor:
        return torch.cat(self.inputs[name])


NORMS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
"""What reads the residual stream that a LLaMA's linear is added to."""


@pytest.mark.parametrize("schedule", ["walk", "block"])
def test_two_streams_see_what_full_forward_passes_of_two_models_see(schedule):
    model, batches = llama(), padded_batches()
    dense, layers = copy.deepcopy(model), found_in(model, batches)
    before = Seen(dense, batches)
    checked = []
    inputs, weights = bind_batches(model, batches), InPlace(model)
    for group, moments in layers.observe(layers.groups[:-1], inputs, schedule=schedule, needs=CROSS, weights=weights):
        if schedule == "walk" or group.name.endswith("q_proj"):  # the model is now what the statistics have seen
            now = Seen(model, batches)
        if group.name == "model.layers.0.self_attn.q_proj" or (schedule == "block" and ".0." in group.name):
            assert moments.cross is None
            assert not moments.targets
        else:
            x_d, x_p = before.input(group.name), now.input(group.name)
            torch.testing.assert_close(moments.gram.double(), x_p.t() @ x_p, rtol=1e-5, atol=1e-4)
            block, _, own = group.name.removeprefix("model.layers.").partition(".")
            if own in NORMS:
                norm = f"model.layers.{block}.{NORMS[own]}"
                weight = dense.get_parameter(group.sites[0].parameter).double()
                expected = weight @ x_d.t() @ x_p + (before.input(norm) - now.input(norm)).t() @ x_p
                assert moments.cross is None
                assert moments.targets.keys() == {group.sites[0].parameter}
                torch.testing.assert_close(moments.targets[group.sites[0].parameter].double(), expected, rtol=1e-5, atol=1e-4)
            else:
                assert not moments.targets
                torch.testing.assert_close(moments.cross.double(), x_d.t() @ x_p, rtol=1e-5, atol=1e-4)
            checked.append(group.name)
        for site in group.sites:
            weights.put(site, half(model.get_parameter(site.parameter).detach()))
    assert len(checked) == (7 if schedule == "walk" else 4)
