import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from statprune.divergence import Fidelity, evaluate_beside, total_divergence
from statprune.errors import CalibrationError, NonFiniteError
from statprune.perplexity import evaluate
from statprune.scoring import TOKENS_PER_CHUNK
from tiny_models import llama, tokens


def test_the_divergence_is_that_of_the_distributions():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = log(2 / sqrt(3)); the logits' own level says nothing.
    expected, predicted = torch.tensor([[5.0, 5.0]]), torch.tensor([[0.0, math.log(3)]])
    assert float(total_divergence(expected, predicted)) == pytest.approx(math.log(2 / math.sqrt(3)))
    many = torch.randn(2, TOKENS_PER_CHUNK, 3)
    p, q = many.softmax(-1), (2 * many).softmax(-1)
    by_hand = (p * (p / q).log()).sum(dtype=torch.float64)
    assert float(total_divergence(many, 2 * many)) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(total_divergence(many, many + 3)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("impossible", [-math.inf, -90.0, -120.0])
def test_what_the_dense_model_rules_out_counts_by_what_remains(impossible):
    # p = (1, 0), q = (1/2, 1/2): KL = log 2, whether 0 is asked for or what float32 makes of e^-120. With q = (0, 1), all
    # but impossible as it is for p, the divergence is how impossible that is.
    expected = torch.tensor([[0.0, impossible]])
    assert float(total_divergence(expected, torch.zeros(1, 2))) == pytest.approx(math.log(2))
    assert float(total_divergence(expected, expected.flip(-1))) == pytest.approx(-impossible)
    assert float(total_divergence(expected, expected)) == 0


def test_a_small_divergence_does_not_drown_in_rounding():
    # For small changes e of the logits KL is half the variance of e under p: 1e-6^2 / 8 where p = 1/2 and e is 0 or 1e-6.
    expected = torch.zeros(1, 2)
    assert float(total_divergence(expected, torch.tensor([[0.0, 2.0**-20]]))) == pytest.approx(2.0**-40 / 8, rel=0.01)


class Bigrams(nn.Module):
    """Says what comes next by the last token alone; its weight holds the probabilities, a row a token."""

    def __init__(self, *probabilities):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens):
        return SimpleNamespace(logits=self.weight[tokens])


DENSE, PRUNED = Bigrams((1 / 2, 1 / 2), (3 / 4, 1 / 4)), Bigrams((1 / 4, 3 / 4), (3 / 4, 1 / 4))
WINDOWS = torch.tensor([[0, 0, 1], [0, 1, 0]])
"""Two predictions each: after (0, 0), and after (0, 1)."""


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("is_twin", [True, False])
def test_one_pass_gives_what_was_lost_by_hand(batch_size, is_twin):
    how = {"weights": {"weight": PRUNED.weight.detach()}} if is_twin else {"dense": DENSE}
    told = []
    found = evaluate_beside(
        DENSE if is_twin else PRUNED, WINDOWS, **how, batch_size=batch_size, progress=lambda *step: told.append(step)
    )
    # After 0 the divergence is log(2 / sqrt(3)), three times; after 1 nothing has changed.
    assert found.divergence == pytest.approx(3 / 4 * math.log(2 / math.sqrt(3)))
    # Dense: three times 1/2 and once 3/4. Pruned: 1/4, 3/4 (loss of the first window), 3/4, 3/4.
    assert found.dense_perplexity == pytest.approx((3 / 4 / 8) ** -0.25)
    assert found.perplexity == pytest.approx((3**3 / 4**4) ** -0.25)
    # Lost in the first window: (log 2 + log 2/3) / 2, in the second log 2/3 and 0.
    first, second = math.log(4 / 3) / 2, math.log(2 / 3) / 2
    assert found.loss == pytest.approx((first + second) / 2)
    assert found.standard_error == pytest.approx((first - second) / 2)
    assert told[-1] == (2, 2, "windows")


def test_a_model_beside_itself_has_lost_nothing():
    model, windows = llama().train(), tokens(3, 8)
    found = evaluate_beside(model, windows, batch_size=2)
    assert found == Fidelity(found.perplexity, found.perplexity, 0.0, 0.0, 0.0)
    assert found.perplexity == pytest.approx(evaluate(model, windows, batch_size=2), rel=1e-12)
    assert evaluate_beside(model, windows[:1]).standard_error is None
    assert model.training
    assert model.config.use_cache


def test_what_does_not_compare_is_refused():
    other = Bigrams(*torch.full((3, 3), 1 / 3).tolist())
    with pytest.raises(CalibrationError, match="the model predicts 2 tokens and the dense one 3: expected two models of one"):
        evaluate_beside(DENSE, WINDOWS, dense=other)
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        evaluate_beside(DENSE, WINDOWS[:, :1])


def test_what_is_no_number_names_the_weight_of_the_model_it_is_in():
    model, windows = llama(), tokens(2, 8)
    name = "model.layers.1.mlp.down_proj.weight"
    spoilt = {name: torch.full_like(model.get_parameter(name), math.nan)}
    with pytest.raises(NonFiniteError, match=rf"^The perplexity is nan, .*: NaN or infinity in {name}"):
        evaluate_beside(model, windows, weights=spoilt)
    impossible = Bigrams((1.0, 0.0), (0.0, 1.0))
    with pytest.raises(
        NonFiniteError, match=r"^The perplexity is 1.*, and the divergence from the dense model inf: NaN or inf"
    ):
        evaluate_beside(impossible, torch.zeros(1, 3, dtype=torch.int64), dense=DENSE)
    with pytest.raises(NonFiniteError, match=r"^The dense perplexity is inf: NaN or infinity in weight"):
        evaluate_beside(DENSE, WINDOWS, dense=impossible)
