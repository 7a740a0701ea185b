"""A whole forward pass block by block, with a store of weights that holds what was prepared and gives nothing else."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from statprune.errors import CalibrationError, NonFiniteError, TracingError
from statprune.model.cuts import cut_into_blocks, outputs_of
from statprune.model.forward import bytes_between_blocks, forward
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.undisturbed import without_cache
from statprune.perplexity import evaluate, evaluate_streamed
from storage import Storage, without_values
from tiny_models import VOCABULARY, gpt2, llama, t5, tokens


def graph_of(model, batches):
    inputs = bind_batches(model, batches)
    traced = find_layers(model, inputs).traced
    assert traced is not None
    return traced, inputs


def t5_batch(batch):
    return {"input_ids": tokens(batch, 8), "decoder_input_ids": tokens(batch, 6)}


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (llama, [tokens(2, 12), tokens(2, 12), tokens(1, 12)]),
        (lambda: llama(tie_word_embeddings=True).bfloat16(), [tokens(2, 9)]),
        (gpt2, [{"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64).tril(6)}] * 2),
        (t5, [t5_batch(2), t5_batch(2)]),
    ],
)
def test_each_batch_gives_what_the_model_gives_and_one_block_is_there(make, batches):
    model = make()
    traced, inputs = graph_of(model, batches)
    storage = Storage(model)
    numbers = []
    for number, output in forward(traced, inputs, storage):
        with torch.no_grad(), without_cache(model):
            expected = model(**inputs[number].kwargs)
        assert type(output) is type(expected)
        assert torch.equal(output.logits, expected.logits)
        numbers.append(number)
    assert numbers == list(range(len(inputs)))
    assert not storage.there
    assert storage.most_blocks == 1
    assert all(count == 1 for name, count in storage.reads.items() if name not in ("lm_head.weight", "shared.weight"))


def test_a_tied_weight_is_not_held_in_between():
    model = gpt2()
    traced, inputs = graph_of(model, [tokens(2, 8)])
    storage = Storage(model)
    for _ in forward(traced, inputs, storage):
        pass
    assert storage.reads["lm_head.weight"] == 2  # the embedding, and the last product
    assert all("lm_head.weight" not in held for held in storage.history if any(".h." in name for name in held))


def test_between_blocks_the_residual_stream_is_held_and_nothing_else():
    model = llama()
    traced, _ = graph_of(model, [tokens(2, 12)])
    segments = cut_into_blocks(traced)
    weights = [{name.rpartition("layers.")[2].partition(".")[0] for name in segment.weights} for segment in segments]
    assert weights == [{"model"}, {"model", "0"}, {"1"}, {"model", "lm_head"}]
    assert bytes_between_blocks(traced) == 4 * 2 * 12 * 16
    assert [node for segment in segments for node in segment.steps][-1] in outputs_of(traced)


def test_one_batch_of_outputs_is_there_at_a_time():
    model = llama()
    traced, inputs = graph_of(model, [tokens(2, 12)] * 3)
    before: list[weakref.ref] = []
    for _, output in forward(traced, inputs, Storage(model)):
        gc.collect()
        assert all(logits() is None for logits in before)
        before.append(weakref.ref(output.logits))
        del output
    assert len(before) == 3


def test_who_stops_early_leaves_no_weight_behind():
    model = llama()
    traced, inputs = graph_of(model, [tokens(2, 12)] * 2)
    storage = Storage(model)
    running = forward(traced, inputs, storage)
    next(running)
    assert storage.there
    running.close()
    assert not storage.there


def test_a_graph_without_an_output_of_its_inputs_is_refused():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return self.weight

    model = Constant()
    traced, inputs = graph_of(model, [torch.ones(2, 2)])
    with pytest.raises(TracingError, match="computes no output of the model"):
        next(forward(traced, inputs, Storage(model)))


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(tie_word_embeddings=True, hidden_size=32).bfloat16()])
def test_a_streamed_perplexity_is_that_of_the_model_bit_for_bit(make):
    model = make()
    windows = torch.randint(0, VOCABULARY, (5, 16))
    told = []
    storage = Storage(model)
    found = evaluate_streamed(without_values(model), windows, storage, batch_size=2, progress=lambda *step: told.append(step))
    assert found == evaluate(model, windows, batch_size=2)
    assert told == [(2, 5, "windows"), (4, 5, "windows"), (5, 5, "windows")]
    assert storage.most_blocks == 1
    assert not storage.there


def test_rounds_read_the_weights_again_and_give_the_same():
    model = llama()
    windows = torch.randint(0, VOCABULARY, (5, 16))
    expected = evaluate(model, windows)
    traced, _ = graph_of(model, [windows[:1]])
    for tokens_per_round, rounds in ((None, 1), (80, 1), (40, 3), (1, 5)):
        storage = Storage(model)
        found = evaluate_streamed(model, windows, storage, traced=traced, tokens_per_round=tokens_per_round)
        assert found == expected
        assert storage.reads["model.layers.1.mlp.up_proj.weight"] == rounds


def test_a_graph_for_other_windows_is_made_again():
    model = llama()
    windows = torch.randint(0, VOCABULARY, (2, 16))
    traced, _ = graph_of(model, [{"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}])
    assert evaluate_streamed(model, windows, Storage(model), traced=traced) == evaluate(model, windows)


def test_what_cannot_be_measured_is_refused():
    model = llama()
    with pytest.raises(CalibrationError, match="tokens from 3 to 48"):
        evaluate_streamed(model, torch.tensor([[3, VOCABULARY]]), Storage(model))
    with pytest.raises(CalibrationError, match=r"Evaluation batch 0: .* longer than the model's context"):
        evaluate_streamed(gpt2(), tokens(1, 40), Storage(gpt2()))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"The perplexity is nan: NaN or infinity in model.layers.1.mlp.up_proj.weight"):
        evaluate_streamed(without_values(model), tokens(2, 8), Storage(broken))
