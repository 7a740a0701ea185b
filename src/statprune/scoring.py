"""What predictions of tokens are worth, whatever adds them up: torchmetrics, which takes seconds to import, stays outside."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from statprune.errors import CalibrationError
from statprune.model.kinds import vocabulary_and_context
from statprune.model.weights import named_tensors

TOKENS_PER_CHUNK = 1024
"""Logits are widened to float32 this many tokens at a time: 512 MB for a vocabulary of 128 Ki."""


def total_loss(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The sum over tokens of the negative log-likelihood, float64, in nats.

    Args:
        logits: [tokens, vocabulary], of any float dtype.
        targets: [tokens], int64: what each should have predicted, or `ignore_index`.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for some, theirs in zip(logits.split(TOKENS_PER_CHUNK), targets.split(TOKENS_PER_CHUNK), strict=True):
        total += cross_entropy(some.float(), theirs, ignore_index=ignore_index, reduction="none").sum(dtype=torch.float64)
    return total


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Refuse what the model cannot be measured on.

    Raises:
        CalibrationError: as `evaluate`.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2 or windows.is_floating_point():
        raise CalibrationError(
            f"evaluate(windows of shape {tuple(windows.shape)} and dtype {windows.dtype}): expected tokens, whole numbers, "
            "[windows, at least 2 tokens]."
        )
    vocabulary, _ = vocabulary_and_context(model)
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
        raise CalibrationError(
            f"evaluate(windows with tokens from {lowest} to {highest}): the model's vocabulary has {vocabulary}. Was the text "
            "tokenized with another model's tokenizer?"
        )


def cause_of_nonfinite(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Why a perplexity is not finite, as far as the weights tell."""
    return cause_among({**named_tensors(model), **weights}.items(), model)


def cause_among(tensors: Iterable[tuple[str, Tensor]], model: nn.Module) -> str:
    """The same, of tensors that come one by one.

    Args:
        tensors: with their names.
        model: whose dtype is named where all of them are finite.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"NaN or infinity in {name}. Was the checkpoint saved whole?"
    dtype = next(model.parameters()).dtype
    advice = " Compute in float32 or bfloat16." if dtype is torch.float16 else ""
    return f"all weights are finite, so the model's activations overflow in {str(dtype).removeprefix('torch.')}.{advice}"
