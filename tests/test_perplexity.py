import math

import pytest
import torch
import torchmetrics.text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from statprune import Perplexity
from statprune.errors import CalibrationError, NonFiniteError
from statprune.perplexity import evaluate
from statprune.scoring import TOKENS_PER_CHUNK
from tiny_models import llama, tokens


def logits_and_targets(batch=3, length=7, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, length, vocabulary, generator=generator),
        torch.randint(vocabulary, (batch, length), generator=generator),
    )


def test_uniform_logits_give_the_vocabulary_size():
    metric = Perplexity()
    metric.update(torch.zeros(2, 5, 50), torch.zeros(2, 5, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(50)


def test_by_hand():
    """Probabilities 3/4 and 1/4: the mean loss is (ln 4/3 + ln 4) / 2, so the perplexity is sqrt(16/3)."""
    logits = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0]]])
    metric = Perplexity()
    metric.update(logits, torch.tensor([[0, 1]]))
    assert metric.compute().item() == pytest.approx(math.sqrt(16 / 3))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 30), st.integers(0, 999))
def test_equals_torchmetrics_on_ordinary_float32_logits(batch, length, vocabulary, seed):
    logits, targets = logits_and_targets(batch, length, vocabulary, seed)
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    for metric in (ours, theirs):
        metric.update(logits, targets)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_an_unlikely_token_costs_its_cross_entropy_and_not_infinity():
    logits, targets = torch.tensor([[[200.0, 0.0]]]), torch.tensor([[1]])
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    ours.update(logits, targets)
    theirs.update(logits, targets)
    assert ours.negative_log_likelihood.item() == pytest.approx(200)
    assert theirs.compute().isinf()


def test_bfloat16_logits_are_widened_first():
    logits, targets = logits_and_targets(vocabulary=300)
    narrow, wide = Perplexity(), Perplexity()
    narrow.update(logits.bfloat16(), targets)
    wide.update(logits.bfloat16().float(), targets)
    assert narrow.compute() == wide.compute()


def test_counting_goes_on_beyond_what_float32_can_count():
    metric = Perplexity()
    metric.num_tokens += 2**24
    metric.update(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64))
    assert metric.num_tokens == 2**24 + 1
    assert metric.negative_log_likelihood.dtype == torch.float64


def test_chunks_do_not_change_the_sum():
    logits, targets = logits_and_targets(batch=2, length=TOKENS_PER_CHUNK, vocabulary=5)
    metric = Perplexity()
    metric.update(logits, targets)
    expected = nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert metric.negative_log_likelihood.item() == pytest.approx(expected.item(), rel=1e-6)
    assert metric.num_tokens == targets.numel()


def test_the_ignored_index_does_not_count():
    logits, targets = logits_and_targets()
    short, ignoring = Perplexity(), Perplexity()
    short.update(logits[:, :4], targets[:, :4])
    ignored = targets.clone()
    ignored[:, 4:] = -100
    ignoring.update(logits, ignored)
    assert ignoring.compute().item() == pytest.approx(short.compute().item())


def test_next_token_shifts_by_one_and_leaves_padding_out():
    logits, tokens = logits_and_targets(batch=1, length=5)
    shifted, padded = Perplexity(), Perplexity()
    shifted.update(logits[:, :3], tokens[:, 1:4])
    padded.update_next_token(logits, tokens, torch.tensor([[1, 1, 1, 1, 0]]))
    assert padded.compute().item() == pytest.approx(shifted.compute().item())
    assert padded.num_tokens == 3


def test_batches_add_up():
    logits, targets = logits_and_targets(batch=4)
    whole, parts = Perplexity(), Perplexity()
    whole.update(logits, targets)
    for part in range(4):
        parts.update(logits[part : part + 1], targets[part : part + 1])
    assert parts.compute().item() == pytest.approx(whole.compute().item())


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"preds \(2, 3, 5\), target \(2, 4\).*expected a target of shape \(2, 3\)"):
        Perplexity().update(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


class Echo(nn.Module):
    """Predicts that the next token is the same one, with probability 3/4 among 4 tokens' worth of equal others."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens):
        class Output:
            logits = nn.functional.one_hot(tokens, 4).float() * math.log(9.0) * self.scale

        return Output


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluate_counts_every_token_but_the_first_of_each_window(batch_size):
    """Always right: probability 9/12 each."""
    model = Echo().train()
    assert evaluate(model, torch.full((3, 4), 2), batch_size=batch_size) == pytest.approx(12 / 9)
    assert model.training


def test_evaluate_tells_each_batch():
    told = []
    evaluate(Echo(), torch.full((3, 4), 2), batch_size=2, progress=lambda *step: told.append(step))
    assert told == [(2, 3, "windows"), (3, 3, "windows")]


def test_evaluate_builds_no_key_value_cache_and_leaves_the_setting_as_it_was():
    model = llama()
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    evaluate(model, tokens(3, 8), batch_size=2)
    assert [output.past_key_values for output in outputs] == [None, None]
    assert model.config.use_cache
    assert model(tokens(1, 4)).past_key_values is not None


def test_evaluate_refuses_what_has_no_next_token():
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        evaluate(Echo(), torch.zeros(3, 1, dtype=torch.int64))


@pytest.mark.parametrize("token", [-1, 48, 2**31])
def test_evaluate_refuses_tokens_that_the_model_does_not_have(token):
    windows = tokens(3, 8)
    windows[1, 2] = token
    with pytest.raises(CalibrationError, match=rf"tokens from .*{token}.*: the model's vocabulary has 48"):
        evaluate(llama(), windows)
    with pytest.raises(CalibrationError, match=r"dtype torch.float32.*expected tokens, whole numbers"):
        evaluate(llama(), windows.float())


def test_a_perplexity_that_is_no_number_names_the_weight():
    model, windows = llama(), tokens(3, 8)
    name = "model.layers.1.mlp.down_proj.weight"
    spoilt = {name: model.get_parameter(name).clone().fill_(math.inf)}
    with pytest.raises(NonFiniteError, match=rf"The perplexity is nan: NaN or infinity in {name}"):
        evaluate(model, windows, weights=spoilt)
    assert math.isfinite(evaluate(model, windows))
    with torch.no_grad():
        model.get_parameter(name).fill_(1e38)
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(1e38)
    with pytest.raises(NonFiniteError, match="all weights are finite, so the model's activations overflow in float32"):
        evaluate(model, windows)


def test_a_metric_that_was_reset_in_inference_mode_measures_on_outside_of_it():
    metric = Perplexity()
    with torch.inference_mode():
        metric.update(torch.zeros(2, 4), torch.tensor([0, 1]))
        metric.reset()
    metric.update(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert metric.compute() == pytest.approx(4.0)
