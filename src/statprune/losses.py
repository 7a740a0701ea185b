"""What a model predicts, and how badly: shared by whatever measures a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from statprune.batches import is_transformers_model

TOKENS_PER_CHUNK = 1024
"""Logits are widened to float32 this many tokens at a time: 512 MB for a vocabulary of 128 Ki."""

IGNORED = -100
"""A target that does not count."""


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


def next_tokens(tokens: Tensor, attention_mask: Tensor | None = None, ignore_index: int = IGNORED) -> Tensor:
    """The targets of a causal model's logits [batch, length - 1], int64, with `ignore_index` where the target is padding.

    Args:
        tokens: [batch, length], int.
        attention_mask: [batch, length], 0 where the token is padding.
        ignore_index: see `total_loss`.
    """
    target = tokens.long()
    if attention_mask is not None:
        target = target.masked_fill(attention_mask == 0, ignore_index)
    return target[:, 1:]


def total_loss(logits: Tensor, target: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """The sum of the negative log-likelihoods, float64, from a float32 log-sum-exp.

    Args:
        logits: [..., vocabulary], any float dtype.
        target: [...], int64.
        ignore_index: targets with this value add nothing.
    """
    logits_TV, target_T = logits.flatten(0, -2), target.flatten()
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, targets in zip(logits_TV.split(TOKENS_PER_CHUNK), target_T.split(TOKENS_PER_CHUNK), strict=True):
        losses = cross_entropy(part.float(), targets, ignore_index=ignore_index, reduction="none")
        total += losses.sum(dtype=torch.float64)
    return total
