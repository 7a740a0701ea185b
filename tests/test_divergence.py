import math

import pytest
import torch

from statprune.divergence import total_divergence
from statprune.perplexity import TOKENS_PER_CHUNK


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
    # p = (1, 0), q = (1/2, 1/2): KL = log 2, whether 0 is what is asked for or what float32 makes of e^-120. With q = (0, 1),
    # all but impossible as it is for p, the divergence is how impossible that is.
    expected = torch.tensor([[0.0, impossible]])
    assert float(total_divergence(expected, torch.zeros(1, 2))) == pytest.approx(math.log(2))
    assert float(total_divergence(expected, expected.flip(-1))) == pytest.approx(-impossible)
    assert float(total_divergence(expected, expected)) == 0


def test_a_small_divergence_does_not_drown_in_rounding():
    # For small changes e of the logits KL is half the variance of e under p: 1e-6^2 / 8 where p = 1/2 and e is 0 or 1e-6.
    expected = torch.zeros(1, 2)
    assert float(total_divergence(expected, torch.tensor([[0.0, 2.0**-20]]))) == pytest.approx(2.0**-40 / 8, rel=0.01)
