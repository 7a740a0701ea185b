"""What a model predicts, and how far that is from what it predicted before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from statprune.model.inputs import is_transformers_model

TOKENS_PER_CHUNK = 1024
"""Logits are widened to float32 this many tokens at a time, as in `perplexity`."""


def predictions_of(output: Any) -> Tensor | None:
    """The tensor that a model predicts with: its logits, its only tensor, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits", next(iter(output.values()), None))
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    return logits if isinstance(logits, Tensor) else None


def is_causal(model: nn.Module) -> bool:
    """Whether logits at a position are for the next token."""
    if not is_transformers_model(model):
        return False
    return bool(model.can_generate() and not model.config.is_encoder_decoder)  # type: ignore[operator,union-attr]


def total_divergence(expected: Tensor, predicted: Tensor) -> Tensor:
    """The sum over positions of the Kullback-Leibler divergence from what was expected, float64.

    Args:
        expected: [..., vocabulary], logits of any float dtype.
        predicted: [..., vocabulary], logits of what is measured.
    """
    total = torch.zeros((), dtype=torch.float64, device=predicted.device)
    pairs = (logits.flatten(0, -2).split(TOKENS_PER_CHUNK) for logits in (expected, predicted))
    for expected_TV, predicted_TV in zip(*pairs, strict=True):
        log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (expected_TV, predicted_TV))
        p = log_p.exp()
        # sum p d = sum p (d + e^-d - 1), as both distributions sum to 1. No term is negative, so that small ones do not drown
        # in the rounding of large ones that cancel. What is impossible has a logarithm of -inf.
        difference = torch.where(p > 0, log_p - log_q, 0.0)
        total += (p * (difference + torch.expm1(-difference))).sum(dtype=torch.float64)
    return total
