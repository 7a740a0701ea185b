"""Gradients of the loss with respect to the outputs of linear layers, against autograd token by token."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from statprune.errors import CalibrationError, NonFiniteError, SiteError
from statprune.model import gradients
from statprune.model.gradients import output_grams
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from tiny_models import classifier, gpt2, llama, tokens


def sites_of(model, inputs):
    return [site for group in find_layers(model, inputs).groups for site in group.sites if not site.feeds_output]


def token_by_token(model, module, batches, loss):
    """Mean over tokens of g g^T at a module's output, each token's product on its own, float64."""
    total, num_tokens = 0.0, 0
    for batch in batches:
        outputs: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        value = loss(model, batch)
        handle.remove()
        (gradient,) = torch.autograd.grad(value, outputs)
        rows = gradient.double().flatten(0, -2)
        total = total + sum(torch.outer(row, row) for row in rows)
        num_tokens += len(rows)
    return total / num_tokens


def next_token(model, batch):
    logits, mask = model(**batch.kwargs).logits.double(), batch.kwargs.get("attention_mask")
    labels = batch.kwargs["input_ids"][:, 1:]
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.sum() if mask is None else losses[mask[:, 1:] != 0].sum()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_they_are_those_of_autograd_for_each_token(make):
    model = make()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    given = [{"input_ids": tokens(2, 12), "attention_mask": mask}, {"input_ids": tokens(2, 12), "attention_mask": mask}]
    inputs = bind_batches(model, given)
    sites = sites_of(model, inputs)
    curvature = output_grams(model, sites, inputs)
    assert len(sites) >= 4
    for site in sites:
        expected = token_by_token(model, model.get_submodule(site.name), inputs, next_token)
        torch.testing.assert_close(curvature.gram(site.parameter).double(), expected, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(curvature.diagonal(site.parameter).double(), expected.diagonal(), rtol=1e-3, atol=1e-7)


class Functional(nn.Module):
    """Products in several ways, one weight read twice, one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 6))
        self.unused = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        hidden = torch.tanh(x @ self.first.t())
        return torch.matmul(torch.tanh(hidden @ self.second), self.second)


def test_a_loss_of_any_module_and_a_weight_that_is_read_twice():
    model = Functional()
    inputs = bind_batches(model, [torch.randn(5, 8, generator=torch.Generator().manual_seed(1))])
    sites = {site.parameter: site for site in sites_of_functional(model, inputs)}
    curvature = output_grams(
        model, list(sites.values()), inputs, loss=lambda model, batch, index: model(**batch.kwargs).square().sum()
    )
    x = inputs[0].kwargs["x"]
    first = (x @ model.first.t()).detach().requires_grad_()
    middle = (torch.tanh(first) @ model.second).detach().requires_grad_()
    last = (torch.tanh(middle) @ model.second).detach().requires_grad_()
    last.square().sum().backward()
    (torch.tanh(middle) @ model.second).backward(last.grad)
    (torch.tanh(first) @ model.second).backward(middle.grad)
    torch.testing.assert_close(curvature.gram("first"), first.grad.t() @ first.grad / 5)
    both = torch.cat([middle.grad, last.grad])
    torch.testing.assert_close(curvature.gram("second"), both.t() @ both / 5)


def sites_of_functional(model, inputs):
    return [site for group in find_layers(model, inputs).groups for site in group.sites]


def test_the_model_is_left_as_it_was():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inputs = bind_batches(model, [tokens(2, 8)])
    sites = sites_of(model, inputs)
    with torch.inference_mode():  # as Lightning validates
        curvature = output_grams(model, sites, bind_batches(model, [inputs[0].kwargs["input_ids"].clone()]))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(total.is_inference() for total in curvature.sums.values())
    torch.testing.assert_close(curvature.sums, output_grams(model, sites, inputs).sums)


def test_only_as_many_batches_as_were_asked_for():
    model = llama()
    inputs = bind_batches(model, [tokens(2, 8) for _ in range(4)])
    sites, told = sites_of(model, inputs), []
    curvature = output_grams(model, sites, inputs, tokens=20, progress=lambda *step: told.append(step))
    assert curvature.num_tokens == 32
    assert told == [(1, 2, "gradients"), (2, 2, "gradients")]
    torch.testing.assert_close(curvature.sums, output_grams(model, sites, inputs[:2]).sums)


def test_where_memory_is_short_they_lie_in_a_file(monkeypatch, tmp_path):
    model = llama()
    inputs = bind_batches(model, [tokens(2, 8)])
    sites = sites_of(model, inputs)
    expected = output_grams(model, sites, inputs)
    monkeypatch.setattr(gradients, "_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    curvature = output_grams(model, sites, inputs)
    (folder,) = tmp_path.iterdir()
    assert sum(file.stat().st_size for file in folder.iterdir()) == 4 * sum(site.shape[0] ** 2 for site in sites)
    torch.testing.assert_close(curvature.sums, expected.sums)
    del curvature
    assert not list(tmp_path.iterdir())


def test_what_has_no_loss_or_no_gradient_is_refused():
    model = classifier()
    inputs = bind_batches(model, [torch.randn(4, 8)])
    sites = sites_of_functional(model, inputs)
    with pytest.raises(
        CalibrationError, match=r"loss-aware: Sequential is no causal language model.* Give prune and plan a `loss`"
    ):
        output_grams(model, sites, inputs)
    with pytest.raises(CalibrationError, match=r"is a tensor \(4, 3\): expected a scalar tensor"):
        output_grams(model, sites, inputs, loss=lambda model, batch, index: model(*batch.args, **batch.kwargs))
    with pytest.raises(CalibrationError, match=r"is a float: expected a scalar tensor"):
        output_grams(model, sites, inputs, loss=lambda model, batch, index: 1.0)
    with pytest.raises(CalibrationError, match=r"is a tensor \(\) without a gradient"):
        output_grams(model, sites, inputs, loss=lambda model, batch, index: torch.ones(()))
    with pytest.raises(CalibrationError, match=r"the loss of calibration batch 0: .*shape"):
        output_grams(model, sites, inputs, loss=lambda model, batch, index: model(torch.ones(2, 3)).sum())
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in the gradient at the output of 0"):
        output_grams(
            model, sites, inputs, loss=lambda model, batch, index: model(*batch.args, **batch.kwargs).sum() * torch.inf
        )
    first = model[0]
    with pytest.raises(SiteError, match=r"no gradient reached 2"):
        output_grams(model, sites, inputs, loss=lambda model, batch, index: first(*batch.args, **batch.kwargs).sum())
