"""How far a model's predictions are from another's: the Kullback-Leibler divergence of next-token distributions."""

import torch
from torch import Tensor

from statprune.perplexity import TOKENS_PER_CHUNK


def total_divergence(expected: Tensor, predicted: Tensor) -> Tensor:
    """The sum over positions of the Kullback-Leibler divergence of what is predicted from what was expected, float64, in nats.

    Args:
        expected: [..., vocabulary], logits of any float dtype.
        predicted: [..., vocabulary], logits of what is measured.
    """
    total = torch.zeros((), dtype=torch.float64, device=predicted.device)
    pairs = (logits.flatten(0, -2).split(TOKENS_PER_CHUNK) for logits in (expected, predicted))
    for expected_TV, predicted_TV in zip(*pairs, strict=True):
        log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (expected_TV, predicted_TV))
        p, difference = log_p.exp(), log_p - log_q
        # sum p d = sum p d + q - p, as both distributions sum to 1. No term is negative then, so that small ones do not drown
        # in the rounding of large ones that cancel. Near d = 0 the term is p (d + e^-d - 1), which does not cancel itself.
        near = p * (difference + torch.expm1(-difference))
        far = torch.where(p > 0, p * difference, 0.0) + log_q.exp() - p
        total += torch.where(difference.abs() < 1, near, far).sum(dtype=torch.float64)
    return total
