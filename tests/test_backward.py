"""The backward pass block by block, against that of the whole model in memory, bit for bit."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from statprune.disk.skeleton import open_skeleton
from statprune.disk.streamed import Streamed
from statprune.errors import CalibrationError, SiteError, TracingError
from statprune.model.backward import output_grams_streamed
from statprune.model.gradients import output_grams
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.undisturbed import undisturbed
from statprune.perplexity import evaluate, evaluate_streamed
from storage import Storage, without_values
from tiny_models import TRANSFORMER, classifier, gpt2, llama, tokens


def padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def both(model, batches, chosen=lambda site: True, **settings):
    """Grams in memory and streamed, the latter of a model without values; and the storage that it read."""
    inputs = bind_batches(model, batches)
    layers = find_layers(model, inputs)
    sites = [site for group in layers.groups for site in group.sites if chosen(site)]
    storage = Storage(model)
    with undisturbed(model):
        expected = output_grams(model, sites, inputs, **settings)
        skeleton = dataclasses.replace(layers, model=without_values(model))
        found = output_grams_streamed(skeleton, sites, inputs, storage, **settings)
    return expected, found, storage


def assert_equal(expected, found):
    assert found.num_tokens == expected.num_tokens
    assert found.sums.keys() == expected.sums.keys()
    for name, total in expected.sums.items():
        assert total.abs().max() > 0
        assert torch.equal(found.sums[name], total), name


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (llama, [padded(2, 12), padded(2, 12), padded(3, 12)]),
        (lambda: llama(tie_word_embeddings=True, num_key_value_heads=2).bfloat16(), [tokens(2, 12)] * 2),
        (gpt2, [tokens(2, 9), tokens(2, 9)]),
    ],
)
def test_they_are_those_of_the_whole_model_and_one_block_is_there(make, batches):
    expected, found, storage = both(make(), batches)
    assert_equal(expected, found)
    assert storage.most_blocks == 1
    assert not storage.there
    assert {count for name, count in storage.reads.items() if ".layers." in name or ".h." in name} == {2}


def test_weights_that_are_read_from_files(tiny_model_folder):
    skeleton = open_skeleton(tiny_model_folder)
    weights = Streamed(skeleton, None, torch.device("cpu"))
    inputs = bind_batches(skeleton.model, [tokens(2, 8), tokens(2, 8)])
    layers = find_layers(skeleton.model, inputs)
    sites = [site for group in layers.groups for site in group.sites]
    found = output_grams_streamed(layers, sites, inputs, weights)
    perplexity = evaluate_streamed(skeleton.model, inputs[0].kwargs["input_ids"], weights)
    weights.close()
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    with undisturbed(model):
        expected = output_grams(model, sites, inputs)
    for name, total in expected.sums.items():  # grouped queries without padding
        torch.testing.assert_close(found.sums[name], total, rtol=0, atol=1e-6 * float(total.abs().max()))
    assert perplexity == evaluate(model, inputs[0].kwargs["input_ids"])


def test_with_grouped_queries_and_no_padding_they_differ_in_last_bits():
    # The model has a kernel for it then, the graph repeats the keys: sums of gradients over heads are added up elsewhere.
    expected, found, _ = both(llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), [tokens(2, 32)])
    for name, total in expected.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=0, atol=1e-6 * float(total.abs().max()))


def test_blocks_before_the_first_layer_that_is_asked_for_run_forward_alone():
    steps = []
    expected, found, storage = both(
        llama(num_hidden_layers=3), [padded(2, 8)] * 3,
        lambda site: ".layers.1.mlp" in site.parameter,
        tokens=20, progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert_equal(expected, found)
    assert storage.reads["model.layers.0.mlp.up_proj.weight"] == 1
    assert storage.reads["model.layers.1.mlp.up_proj.weight"] == 2
    # Two batches hold 20 tokens: five segments forward but for the last, and from the last to the second layer backward.
    streamed = steps[2:]
    assert streamed == [(done, 14, "gradients") for done in range(1, 15)]


class Wired(LlamaForCausalLM):
    """Blocks that read what the first one made, a detached value, and their own in-place results."""

    def forward(self, input_ids=None, **kwargs):
        hidden = self.model.embed_tokens(input_ids)
        first = hidden
        for number, layer in enumerate(self.model.layers):
            hidden = self.wire(layer.mlp, hidden, first)
            first = hidden if number == 0 else first
        return CausalLMOutput(logits=self.lm_head(hidden))

    def wire(self, mlp, hidden, first):
        result = mlp(torch.tanh(hidden + first) * first)
        result.mul_(2)
        return result + hidden * hidden.detach().abs().mean() + first


class WithoutGradients(Wired):
    def wire(self, mlp, hidden, first):
        with torch.no_grad():
            scale = hidden.abs().mean()
        return mlp(hidden) / scale + first


class Writing(Wired):
    def wire(self, mlp, hidden, first):
        if first is not hidden:
            first.add_(1)
        return mlp(hidden) + first.clone()


def wired(kind):
    torch.manual_seed(0)
    return kind(LlamaConfig(**{**TRANSFORMER, "num_hidden_layers": 3})).eval()


def test_a_value_that_many_blocks_read_and_one_without_gradients():
    assert_equal(*both(wired(Wired), [tokens(2, 8), tokens(2, 8)])[:2])


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (WithoutGradients, r"WithoutGradients computes without gradients in a part of it \(abs\)"),
        (Writing, r"writes in place to a value .* that several blocks read"),
    ],
)
def test_what_a_graph_cannot_tell_or_do_twice_is_refused(kind, match):
    with pytest.raises(TracingError, match=rf"loss-aware, streamed: .*{match}.*without --stream"):
        both(wired(kind), [tokens(2, 8)])


def test_what_cannot_be_streamed_is_refused():
    model = llama()
    inputs = bind_batches(model, [tokens(2, 8)])
    layers = find_layers(model, inputs)
    sites = [site for group in layers.groups for site in group.sites]
    with pytest.raises(CalibrationError, match="a `loss` of your own is given the whole model"):
        output_grams_streamed(layers, sites, inputs, Storage(model), loss=lambda model, batch, index: model(**batch.kwargs))
    with pytest.raises(TracingError, match=r"there is no graph of the model\. a reason"):
        output_grams_streamed(dataclasses.replace(layers, traced=None, reason="a reason"), sites, inputs, Storage(model))
    elsewhere = dataclasses.replace(sites[0], parameter="gone.weight", name="gone")
    with pytest.raises(SiteError, match="no gradient reached gone"):
        output_grams_streamed(layers, [*sites, elsewhere], inputs, Storage(model))
    other = classifier()
    given = bind_batches(other, [torch.randn(4, 8)])
    with pytest.raises(CalibrationError, match="Sequential is no causal language model"):
        output_grams_streamed(find_layers(other, given), [], given, Storage(other))
