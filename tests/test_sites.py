"""Which weights are found in a graph, how they are grouped and named, and why the others are left out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from statprune.errors import TracingError
from statprune.model.inputs import ModelInputs, bind_batches, dynamic_dims, example_batch
from statprune.model.sites import LinearSite
from statprune.model.trace import trace
from tiny_models import VOCABULARY, classifier, gpt2, llama, t5, tokens


def traced(model, *batches):
    inputs = bind_batches(model.eval(), batches)
    return trace(model, example_batch(inputs), dynamic_dims(inputs))


def site_names(found):
    return [[site.name for site in group.sites] for group in found.groups]


def sites_by_name(found):
    return {site.name: site for group in found.groups for site in group.sites}


def left_out(found):
    return {one.name: one.reason for one in found.left_out}


class Functional(nn.Module):
    """A product of the input and a bare parameter, which is not the output: a scale comes after it."""

    def __init__(self, multiply, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.scale = nn.Parameter(torch.ones(()))
        self.multiply = multiply

    def forward(self, x):
        return self.multiply(x, self.w) * self.scale


@pytest.mark.parametrize(
    ("multiply", "shape", "layout"),
    [
        pytest.param(F.linear, (4, 6), "out_in", id="F.linear(x, w)"),
        pytest.param(lambda x, w: F.linear(x, w.t()), (6, 4), "in_out", id="F.linear(x, w.t())"),
        pytest.param(lambda x, w: F.linear(x, w.transpose(0, 1)), (6, 4), "in_out", id="F.linear(x, w.transpose(0, 1))"),
        pytest.param(lambda x, w: F.linear(x, w.T), (6, 4), "in_out", id="F.linear(x, w.T)"),
        pytest.param(lambda x, w: F.linear(x, w.double().float()), (4, 6), "out_in", id="F.linear(x, w.double().float())"),
        pytest.param(lambda x, w: x @ w, (6, 4), "in_out", id="x @ w"),
        pytest.param(lambda x, w: x @ w.t(), (4, 6), "out_in", id="x @ w.t()"),
        pytest.param(lambda x, w: x @ w.t().t(), (6, 4), "in_out", id="x @ w.t().t()"),
        pytest.param(lambda x, w: torch.mm(x[:, 0], w), (6, 4), "in_out", id="mm(x, w)"),
        pytest.param(lambda x, w: torch.addmm(x[0, 0, :4], x[:, 0], w), (6, 4), "in_out", id="addmm(b, x, w)"),
        pytest.param(lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2), (4, 6), "out_in", id="w @ x^T"),
        pytest.param(lambda x, w: (w.t() @ x.mT).mT, (6, 4), "in_out", id="w^T @ x^T"),
    ],
)
def test_a_product_with_a_bare_parameter_is_a_site(multiply, shape, layout):
    found = traced(Functional(multiply, *shape), torch.randn(3, 5, 6))
    assert found.groups[0].sites == (LinearSite("w", "w", layout, (4, 6)),)
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("multiply", "shape", "reason"),
    [
        pytest.param(lambda x, w: w @ x, (4, 5), "read by matmul, not by a linear layer", id="tokens are not last"),
        pytest.param(lambda x, w: torch.einsum("bti,io->bto", x, w), (6, 4), "read by einsum", id="einsum"),
        pytest.param(lambda x, w: x[..., :4] * w, (5, 4), "read by mul, not by a linear layer", id="elementwise"),
        pytest.param(lambda x, w: F.linear(x, w * 2), (4, 6), "read by mul, not by a linear layer", id="scaled weight"),
        pytest.param(lambda x, w: torch.bmm(x, w.transpose(0, 1)), (6, 3, 4), "read by transpose", id="another transpose"),
        pytest.param(lambda x, _: x[..., :4], (4, 6), "not read in this forward pass", id="unused"),
    ],
)
def test_any_other_use_of_a_parameter_is_left_out_with_the_reason(multiply, shape, reason):
    found = traced(Functional(multiply, *shape), torch.randn(3, 5, 6))
    assert found.groups == ()
    assert left_out(found)["w"].startswith(reason)


class Block(nn.Module):
    """Attention over itself or over a context, as `transformers` writes it, with bare linears."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, context=None):
        x = self.norm(x)
        context = x if context is None else context
        return x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, ids, context=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x))


def test_linears_that_read_the_same_tensor_are_one_group_in_execution_order():
    found = traced(Decoder(), tokens(2, 5))
    assert site_names(found) == [
        ["blocks.0.q", "blocks.0.k", "blocks.0.v"], ["blocks.0.o"], ["blocks.1.q", "blocks.1.k", "blocks.1.v"], ["blocks.1.o"],
        ["head"],
    ]  # fmt: skip


def test_all_layers_that_read_a_context_are_one_group():
    found = traced(Decoder(), {"ids": tokens(2, 5), "context": torch.randn(2, 3, 8)})
    assert site_names(found) == [
        ["blocks.0.q"], ["blocks.0.k", "blocks.0.v", "blocks.1.k", "blocks.1.v"], ["blocks.0.o"],
        ["blocks.1.q"], ["blocks.1.o"],
        ["head"],
    ]  # fmt: skip


def test_cross_attention_of_a_transformers_model_reads_the_encoder_output_as_one_group():
    found = traced(t5(num_layers=2), {"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 4)})
    cross = [group for group in site_names(found) if "decoder.block.0.layer.1.EncDecAttention.k" in group]
    assert cross == [[f"decoder.block.{block}.layer.1.EncDecAttention.{name}" for block in (0, 1) for name in "kv"]]


def test_casts_views_and_dropout_on_the_way_to_a_linear_do_not_split_a_group():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            x = x.relu()
            y = self.a(self.dropout(x)) + self.b(x.reshape(-1, 8).contiguous().float()).view(2, 3, 4)
            return self.head(self.c(x.reshape(2, 6, 4)).mean(1))[..., None] + y.sum()

    # x.reshape(2, 6, 4) has other channels, so c reads something else.
    assert site_names(traced(Model(), torch.randn(2, 3, 8))) == [["a", "b"], ["c"], ["head"]]


def test_the_output_layer_is_found_behind_slices_casts_soft_caps_and_buffers():
    class Model(nn.Module):
        def __init__(self, finish):
            super().__init__()
            self.body, self.head, self.finish = nn.Linear(8, 8), nn.Linear(8, 4), finish
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x):
            return self.finish(self.head(self.body(x).relu()), self)

    finishes = {
        "as it is": lambda y, _: y,
        "slice and cast": lambda y, _: y[:, -1].double(),
        "soft cap": lambda y, _: 30.0 * torch.tanh(y / 30.0),
        "buffer": lambda y, model: y + model.shift.to(torch.float32),
        "size of the batch": lambda y, _: y / y.shape[0],
        "in a structure": lambda y, _: {"logits": y, "more": [y.argmax(-1)]},
    }
    for name, finish in finishes.items():
        found = traced(Model(finish), torch.randn(3, 5, 8), torch.randn(2, 5, 8))
        assert [site.name for site in sites_by_name(found).values() if site.feeds_output] == ["head"], name
    assert not sites_by_name(traced(Decoder(), tokens(2, 5)))["blocks.1.o"].feeds_output


def test_the_key_projection_is_no_output_layer_because_a_cache_holds_its_result():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama(num_hidden_layers=1)

        def forward(self, input_ids, **others):
            return self.model(input_ids=input_ids, **others)

    model = Wrapper()
    assert model.model.config.use_cache
    found = traced(model, {"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)})
    assert [site.name for site in sites_by_name(found).values() if site.feeds_output] == ["model.lm_head"]
    assert model.model.config.use_cache


def test_a_weight_that_two_linears_read_says_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.body(self.body(x).relu()).relu())

    site = sites_by_name(traced(Model(), torch.randn(2, 8)))["body"]
    assert (site.num_reads, site.default_exclusion) == (2, "read in 2 places")


def test_a_cast_of_a_weight_does_not_count_as_a_second_read():
    # As in routers of mixtures of experts; torch.export adds an assertion on the weight's dtype.
    found = traced(Functional(lambda x, w: F.linear(x.double(), w.to(torch.float64)), 4, 6), torch.randn(3, 6))
    assert sites_by_name(found)["w"].default_exclusion is None


@pytest.mark.parametrize("build", [gpt2, t5])
def test_a_tied_weight_has_the_name_of_the_layer_that_multiplies_by_it(build):
    model = build(tie_word_embeddings=True)
    batch = {"input_ids": tokens(2, 5)} if build is gpt2 else {"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 4)}
    site = sites_by_name(traced(model, batch))["lm_head"]
    assert site.parameter == "lm_head.weight"
    tied = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is model.lm_head.weight}
    assert {site.parameter, *site.aliases} == tied
    assert len(tied) > 1
    assert site.default_exclusion.startswith("feeds the output, tied to ")


def test_a_module_under_two_names_is_one_site_with_an_alias():
    model = classifier()
    model.add_module("again", nn.Identity())
    model.again.inner = model[0]
    site = sites_by_name(traced(model, torch.randn(2, 8)))["0"]
    assert site.aliases == ("again.inner.weight",)
    assert site.default_exclusion == "tied to again.inner.weight"


def test_conv1d_of_gpt2_is_stored_in_out_and_seen_out_in():
    model = gpt2()
    site = sites_by_name(traced(model, tokens(2, 5)))["transformer.h.0.attn.c_attn"]
    parameter = model.get_parameter(site.parameter)
    assert (site.layout, site.shape, tuple(parameter.shape)) == ("in_out", (48, 16), (16, 48))
    view = site.view(parameter)
    assert view.shape == site.shape
    assert view.data_ptr() == parameter.data_ptr()


def test_convolutions_embeddings_and_unused_layers_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(VOCABULARY, 8), nn.Conv1d(8, 8, 3)
            self.unused, self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, ids):
            return self.head(self.body(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)).relu())

    found = traced(Model(), tokens(2, 6))
    assert site_names(found) == [["body"], ["head"]]
    assert left_out(found) == {
        "embed": "embedding",
        "conv": "read by conv1d, not by a linear layer",
        "unused": "not read in this forward pass",
    }


def test_layers_in_an_autocast_region_are_left_out_with_the_reason_and_the_others_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.inside, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x).relu()
            with torch.autocast("cpu", enabled=False):
                x = self.inside(x.float())
            return self.head(x.relu())

    found = traced(Model(), torch.randn(2, 8))
    assert site_names(found) == [["a"], ["head"]]
    assert left_out(found) == {"inside": "read inside a region of its own (wrap_with_autocast), which is not looked into"}


def test_layers_under_activation_checkpointing_are_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(checkpoint(lambda y: self.a(y).relu(), x, use_reentrant=False))

    assert site_names(traced(Model(), torch.randn(2, 8))) == [["a"], ["head"]]


def test_torch_s_own_transformer_layer_is_found():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 2))
    found = traced(model, torch.randn(2, 5, 8), torch.randn(3, 4, 8))
    assert site_names(found) == [["0.self_attn.in_proj_weight"], ["0.self_attn.out_proj"], ["0.linear1"], ["0.linear2"], ["2"]]


def test_a_model_that_writes_to_its_own_weights_has_no_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            self.a.weight.div_(2)
            return self.head(self.a(x).relu())

    with pytest.raises(TracingError, match=r"Model.forward writes to its parameter a\.weight"):
        traced(Model(), torch.randn(2, 8))


@pytest.mark.parametrize("build", [llama, gpt2, classifier])
def test_a_model_on_the_meta_device_has_the_same_sites(build):
    inputs = torch.randn(2, 8) if build is classifier else tokens(2, 5)
    real = traced(build(), inputs)
    with torch.device("meta"):
        model = build()
    example = bind_batches(model, [inputs])[0]
    assert all(tensor.is_meta for tensor in example.tensors())
    on_meta = trace(model, example)
    assert [group.sites for group in on_meta.groups] == [group.sites for group in real.groups]
    assert on_meta.left_out == real.left_out


class TestTracing:
    """What `trace` takes, and how it leaves the model."""

    @pytest.mark.parametrize(
        ("forward", "batches"),
        [
            pytest.param(lambda self, x: self.run(x), [torch.randn(2, 8), torch.randn(1, 8)], id="a tensor"),
            pytest.param(lambda self, x, /: self.run(x), [(torch.randn(2, 8),), (torch.randn(1, 8),)], id="positional only"),
            pytest.param(lambda self, *args: self.run(*args), [(torch.randn(2, 8),), (torch.randn(1, 8),)], id="*args"),
            pytest.param(
                lambda self, x, *rest: self.run(x + rest[0]),
                [(torch.randn(2, 8), torch.randn(2, 8)), (torch.randn(1, 8), torch.randn(1, 8))],
                id="x, *rest",
            ),
            pytest.param(
                lambda self, **named: self.run(named["x"]), [{"x": torch.randn(2, 8)}, {"x": torch.randn(1, 8)}], id="**named"
            ),
            pytest.param(
                lambda self, x, **more: self.run(x + more["b"] - more["a"]),
                [{"x": torch.randn(2, 8), "a": torch.randn(8), "b": torch.randn(2, 8)},
                 {"b": torch.randn(1, 8), "a": torch.randn(8), "x": torch.randn(1, 8)}],
                id="x, **more in another order",
            ),
            pytest.param(
                lambda self, xs, scale: self.run(xs["a"][0] * scale + xs["a"][1]),
                [{"xs": {"a": [torch.randn(2, 8), torch.randn(8)]}, "scale": 2.0},
                 {"xs": {"a": [torch.randn(1, 8), torch.randn(8)]}, "scale": 2.0}],
                id="nested, and a number",
            ),
            pytest.param(lambda self, x, y: self.run(x if y is None else y), [(torch.randn(2, 8), None)], id="None"),
        ],
    )  # fmt: skip
    def test_any_signature_of_forward(self, forward, batches):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.run = classifier()

        Model.forward = forward
        model = Model()
        inputs = bind_batches(model, batches)
        found = trace(model, example_batch(inputs), dynamic_dims(inputs))
        assert site_names(found) == [["run.0"], ["run.2"], ["run.4"]]
        for batch in inputs:
            expected = model(*batch.args, **batch.kwargs)
            assert torch.equal(found.graph_module(*batch.args, **batch.kwargs), expected)

    def test_sizes_of_one_are_not_taken_for_constants(self):
        model = Decoder()
        found = traced(model, tokens(1, 7), tokens(3, 1))
        for batch in (tokens(1, 7), tokens(3, 1), tokens(2, 2), tokens(1, 1)):
            torch.testing.assert_close(found.graph_module(ids=batch), model(batch))

    def test_equal_sizes_are_not_taken_for_one_size(self):
        model = Decoder()
        found = traced(model, tokens(6, 6), tokens(2, 3))
        ids = tokens(4, 7)
        torch.testing.assert_close(found.graph_module(ids=ids), model(ids))

    def test_the_model_is_left_as_it_was(self):
        model = llama(num_hidden_layers=1)
        model.train()
        model.model.layers[0].mlp.eval()
        modes, attributes = {name: module.training for name, module in model.named_modules()}, set(vars(model))
        trace(model, ModelInputs((), {"input_ids": tokens(2, 5)}))
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert set(vars(model)) == attributes
        assert model.config.use_cache
