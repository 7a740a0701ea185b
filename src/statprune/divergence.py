"""How far a model's predictions are from another's: the Kullback-Leibler divergence of next-token distributions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from statprune.errors import CalibrationError, NonFiniteError
from statprune.model.undisturbed import eval_mode, without_cache
from statprune.progress import Progress, silent
from statprune.scoring import TOKENS_PER_CHUNK, cause_of_nonfinite, check_windows, total_loss


@dataclass(frozen=True)
class Fidelity:
    """What a pruned model is beside the dense one, on the same windows."""

    perplexity: float

    dense_perplexity: float

    divergence: float
    """Of the next-token distributions from the dense model's: the mean over tokens, in nats; 0 where they are the same."""

    loss: float
    """What is lost: how much higher the negative log-likelihood is, the mean over tokens, in nats."""

    standard_error: float | None
    """Of `loss`, from its spread over the windows, where each is compared with itself; None for a single window."""


@torch.no_grad()
def evaluate_beside(
    model: nn.Module,
    windows: Tensor,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dense: nn.Module | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Fidelity:
    """Perplexity and divergence from the dense model in one pass over the windows.

    Both models predict each batch: that is one more forward pass than `statprune.evaluate` takes, and no logits are kept.

    Args:
        model: a causal language model: returns an object with `logits` for tokens.
        windows: [windows, length], int: each is scored on its own; every token but a window's first counts.
        weights: by parameter name, read in place of the model's own: a pruned twin's (`PruningPlan.weights`).
        dense: what it is compared with; None for `model` with its own weights, where `weights` are a twin's.
        batch_size: windows in one forward pass.
        progress: called after each batch, in windows.

    Raises:
        CalibrationError: as `evaluate`; or the two models' vocabularies differ.
        NonFiniteError: the perplexity or the divergence is NaN or infinite; names the weight that is, if one is.
    """
    original = model if dense is None else dense
    for one in (model, original):
        check_windows(one, windows)
    device = next(model.parameters()).device
    divergence = torch.zeros((), dtype=torch.float64, device=device)
    losses: list[Tensor] = []
    with eval_mode(model), without_cache(model), eval_mode(original), without_cache(original):
        for start in range(0, len(windows), batch_size):
            tokens = windows[start : start + batch_size].long()
            expected = original(tokens.to(next(original.parameters()).device)).logits.to(device)
            tokens = tokens.to(device)
            predicted = functional_call(model, dict(weights or {}), (tokens,)).logits
            if expected.shape != predicted.shape:
                raise CalibrationError(
                    f"evaluate_beside(...): the model predicts {predicted.shape[-1]} tokens and the dense one "
                    f"{expected.shape[-1]}: expected two models of one vocabulary."
                )
            for p, q, targets in zip(expected[:, :-1], predicted[:, :-1], tokens[:, 1:], strict=True):
                losses.append(torch.stack([total_loss(logits, targets) for logits in (p, q)]))
                divergence += total_divergence(p, q)
            progress(min(start + batch_size, len(windows)), len(windows), "windows")
    losses_W2 = torch.stack(losses) / (windows.shape[1] - 1)
    expected_loss, predicted_loss = losses_W2.mean(0).tolist()
    lost_W = losses_W2[:, 1] - losses_W2[:, 0]
    found = Fidelity(
        perplexity=_exp(predicted_loss),
        dense_perplexity=_exp(expected_loss),
        divergence=float(divergence) / (windows.numel() - len(windows)),
        loss=predicted_loss - expected_loss,
        standard_error=float(lost_W.std()) / math.sqrt(len(windows)) if len(windows) > 1 else None,
    )
    if not math.isfinite(found.dense_perplexity):
        raise NonFiniteError(f"The dense perplexity is {found.dense_perplexity}: {cause_of_nonfinite(original, {})}")
    if not (math.isfinite(found.perplexity) and math.isfinite(found.divergence)):
        raise NonFiniteError(
            f"The perplexity is {found.perplexity}, and the divergence from the dense model {found.divergence}: "
            f"{cause_of_nonfinite(model, weights or {})}"
        )
    return found


def _exp(loss: float) -> float:
    """e^loss; infinite where that is beyond a float."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


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
