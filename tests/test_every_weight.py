"""Modules with several matrices in one weight, or that read it in their own way: it is pruned whole, or named with a reason."""

import warnings

import pytest
import torch
from torch import nn

import statprune
from tiny_models import changed, snapshot

WIDTH = 8


class Around(nn.Module):
    """A linear layer, the module and an output layer; with `branching`, no graph can hold it, and it computes the same."""

    def __init__(self, inner: nn.Module, branching: bool):
        super().__init__()
        self.before, self.inner, self.head = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, 3)
        self.branching = branching

    def forward(self, x):
        if self.branching and x.sum() > 1e9:
            return x
        result = self.inner(self.before(x))
        return self.head(result[0] if isinstance(result, tuple) else result)


class SelfAttention(nn.MultiheadAttention):
    def __init__(self, **settings):
        super().__init__(WIDTH, 2, batch_first=True, **settings)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class CrossAttention(SelfAttention):
    """The first rows of its weight multiply other tokens than the rest."""

    def forward(self, x):
        others = x + 1
        return nn.MultiheadAttention.forward(self, x, others, others)[0]


class NarrowKeys(SelfAttention):
    """Keys and values of another width have weights of their own."""

    def __init__(self):
        super().__init__(kdim=4, vdim=4)

    def forward(self, x):
        return nn.MultiheadAttention.forward(self, x, x[..., :4], x[..., :4])[0]


class Decoder(nn.TransformerDecoderLayer):
    def __init__(self):
        super().__init__(WIDTH, 2, 16, batch_first=True)

    def forward(self, x):
        return super().forward(x, x + 1)


class OverTime(nn.Module):
    """A convolution over [batch, length, channels]."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return self.convolution(x.mT).mT


class InHalves(nn.Linear):
    """The halves of its weight multiply different tokens."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        first, second = self.weight.split(WIDTH // 2)
        return torch.cat([nn.functional.linear(x, first), nn.functional.linear(x + 1, second)], -1)


MODULES = {
    "attention": SelfAttention,
    "attention with a bias as a key": lambda: SelfAttention(add_bias_kv=True),
    "cross attention": CrossAttention,
    "attention to narrow keys": NarrowKeys,
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True),
    "decoder layer": Decoder,
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "lstm both ways": lambda: nn.LSTM(WIDTH, WIDTH // 2, 2, batch_first=True, bidirectional=True),
    "lstm with projections": lambda: nn.LSTM(WIDTH, 16, proj_size=WIDTH, batch_first=True),
    "gru": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    "pointwise convolution": lambda: OverTime(nn.Conv1d(WIDTH, WIDTH, 1)),
    "grouped convolution": lambda: OverTime(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
    "depthwise convolution": lambda: OverTime(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
    "transposed convolution": lambda: OverTime(nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
    "linear layer read in halves": InHalves,
}

REASONS = {
    "attention": {},
    "cross attention": {"in_proj_weight": "read by split_with_sizes, not by a linear layer"},
    "attention to narrow keys": {},
    "encoder layer": {},
    "decoder layer": {"multihead_attn.in_proj_weight": "read by split_with_sizes, not by a linear layer"},
    "gru": {"weight_ih_l0": "read by gru, not by a linear layer", "weight_hh_l0": "read by gru, not by a linear layer"},
    "pointwise convolution": {"convolution": "read by conv1d, not by a linear layer"},
    "grouped convolution": {"convolution": "read by conv1d, not by a linear layer"},
    "linear layer read in halves": {"": "read by split, not by a linear layer"},
}
"""Along the graph, of the module's own weights."""


def prune(name, branching):
    torch.manual_seed(0)
    model = Around(MODULES[name]() if isinstance(name, str) else name, branching).eval()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its recurrent layers
        report = statprune.prune(model, [torch.randn(4, 5, WIDTH) for _ in range(2)])
    return model, before, report


def assert_whole_or_named(model, before, report):
    parameters = dict(model.named_parameters())
    pruned = {site.parameter for site in report.sites}
    assert changed(model, before) == pruned
    for parameter in pruned:
        non_zeros = parameters[parameter].unflatten(-1, (-1, 4)).count_nonzero(-1)
        assert (non_zeros == 2).all(), parameter  # in all rows: of the queries, the keys and the values
    named = {one.name: one.reason for one in report.left_out}
    assert all(named.values())
    others = {name if name in parameters else f"{name}.weight" for name in named}
    assert not pruned & others
    assert pruned | others == {name for name, parameter in parameters.items() if parameter.ndim >= 2}


@pytest.mark.parametrize("name", MODULES)
def test_along_the_graph(name):
    model, before, report = prune(name, branching=False)
    assert report.fallback_reason is None
    assert_whole_or_named(model, before, report)
    if name in REASONS:
        own = {one.name.removeprefix("inner").removeprefix("."): one.reason for one in report.left_out if one.name != "head"}
        assert own == REASONS[name]


@pytest.mark.parametrize("name", MODULES)
def test_with_module_hooks(name):
    model, before, report = prune(name, branching=True)
    assert report.fallback_reason is not None
    assert_whole_or_named(model, before, report)
    if name == "attention":  # in_proj is no module, and out_proj one that is not called
        assert {"inner.in_proj_weight", "inner.out_proj"} <= {one.name for one in report.left_out}


def parametrized(parametrize):
    return parametrize(nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_weight_that_is_computed_of_others_is_left_out_with_them(kind, branching):
    inner = parametrized(getattr(nn.utils.parametrizations, kind))
    model, before, report = prune(inner, branching)
    assert_whole_or_named(model, before, report)
    assert [site.parameter for site in report.sites] == ["before.weight"]


class Heads(nn.Module):
    """An output layer for each of several codebooks, side by side."""

    def __init__(self, join):
        super().__init__()
        self.body, self.heads = nn.Linear(WIDTH, WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.join = join

    def forward(self, x):
        hidden = self.body(x)
        return self.join([head(hidden).tanh() for head in self.heads])


@pytest.mark.parametrize("join", [torch.stack, torch.cat])
def test_output_layers_side_by_side_stay_dense(join):
    report = statprune.prune(Heads(join), [torch.randn(4, WIDTH)], statprune.Recipe("magnitude"))
    assert [site.name for site in report.sites] == ["body"]
    assert {one.name: one.reason for one in report.left_out} == {f"heads.{index}": "feeds the output" for index in range(3)}


def test_what_is_laid_beside_the_input_is_no_output_layer():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return torch.cat([self.body(x), x], -1)

    report = statprune.prune(Beside(), [torch.randn(4, WIDTH)], statprune.Recipe("magnitude"))
    assert [site.name for site in report.sites] == ["body"]
