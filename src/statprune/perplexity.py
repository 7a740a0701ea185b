"""Perplexity, as a torchmetrics Metric that stays right on long runs, low precision and bad models."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from statprune.errors import CalibrationError, NonFiniteError, TracingError
from statprune.model.forward import forward
from statprune.model.inputs import ModelInputs, dynamic_dims, example_batch
from statprune.model.kinds import predictions_of, vocabulary_and_context
from statprune.model.sites import TracedModel
from statprune.model.trace import check_traced, trace
from statprune.model.undisturbed import eval_mode, undisturbed, without_cache
from statprune.model.weights import Segmented, named_tensors
from statprune.progress import Progress, silent
from statprune.ranks import collective

TOKENS_PER_CHUNK = 1024
"""Logits are widened to float32 this many tokens at a time: 512 MB for a vocabulary of 128 Ki."""


class Perplexity(Metric):
    """`exp` of the mean negative log-likelihood per token.

    Equal to `torchmetrics.text.Perplexity` in float32 on ordinary logits, and unlike it: log-sum-exp in float32 instead of
    `softmax().log()`, which is infinite where the cross-entropy is 200; a float64 sum and an int64 count, where float32
    stops counting at 2**24 tokens. Ranks add up.

    Args:
        ignore_index: targets with this value do not count.
        kwargs: see `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    negative_log_likelihood: Tensor
    num_tokens: Tensor

    def __init__(self, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.add_state("negative_log_likelihood", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add tokens.

        Args:
            preds: [..., vocabulary], logits of any float dtype.
            target: [...], int64: the token that each logit vector should have predicted, or `ignore_index`.

        Raises:
            ValueError: the leading shapes differ.
        """
        if preds.shape[:-1] != target.shape:
            raise ValueError(
                f"Perplexity.update(preds {tuple(preds.shape)}, target {tuple(target.shape)}): "
                f"expected a target of shape {tuple(preds.shape[:-1])}, one for each logit vector."
            )
        total = total_loss(preds.flatten(0, -2), target.flatten(), ignore_index=self.ignore_index)
        # Not in place: a reset in inference mode, as at the end of `trainer.validate`, leaves tensors that refuse it later.
        self.negative_log_likelihood = self.negative_log_likelihood + total
        self.num_tokens = self.num_tokens + (target != self.ignore_index).sum()

    def update_next_token(self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
        """Add a causal model's predictions: logits [batch, length, vocabulary] at a position are for the next token.

        Args:
            logits: [batch, length, vocabulary].
            tokens: [batch, length], int: the model's input, or its labels, where `ignore_index` does not count.
            attention_mask: [batch, length], 0 where the token is padding.
        """
        target = tokens.long()
        if attention_mask is not None:
            target = target.masked_fill(attention_mask == 0, self.ignore_index)
        self.update(logits[:, :-1], target[:, 1:])

    def compute(self) -> Tensor:
        """The perplexity of everything added, float64; NaN where nothing was."""
        return (self.negative_log_likelihood / self.num_tokens).exp()


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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 1,
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> float:
    """Perplexity of a causal language model on token windows; in a `torch.distributed` run, on those of all ranks together.

    Args:
        model: returns an object with `logits` for tokens.
        windows: [windows, length], int: each is scored on its own; every token but a window's first counts.
        batch_size: windows in one forward pass.
        weights: by parameter name, read in place of the model's own: a pruned twin's (`PruningPlan.weights`).
        progress: called after each batch, in windows.

    Raises:
        CalibrationError: there is no window, or windows of one token; tokens that are none, or beyond the vocabulary.
        NonFiniteError: the perplexity is NaN or infinite; names the weight that is, if one is.
    """
    check_windows(model, windows)
    device = next(model.parameters()).device
    metric = Perplexity().to(device)
    with eval_mode(model), without_cache(model):
        for start in range(0, len(windows), batch_size):
            tokens = windows[start : start + batch_size].to(device).long()
            metric.update_next_token(functional_call(model, dict(weights or {}), (tokens,)).logits, tokens)
            progress(min(start + batch_size, len(windows)), len(windows), "windows")
    with collective(None, "the perplexity"):  # of the windows of all ranks
        perplexity = float(metric.compute())
    if not math.isfinite(perplexity):
        raise NonFiniteError(f"The perplexity is {perplexity}: {cause_of_nonfinite(model, weights or {})}")
    return perplexity


def evaluate_streamed(
    model: nn.Module,
    windows: Tensor,
    weights: Segmented,
    *,
    batch_size: int = 1,
    traced: TracedModel | None = None,
    tokens_per_round: int | None = None,
    progress: Progress = silent,
) -> float:
    """`evaluate` with the weights of one block in memory: block by block over many windows, every weight from `weights`.

    The numbers are those of the model's graph, op for op. Where the graph runs the model's own kernels they are those of
    `evaluate`, bit for bit: so it is for LLaMA and GPT-2 on a CPU, in float32 and bfloat16.

    Args:
        model: as `evaluate`; its parameters may be without values.
        windows: as `evaluate`.
        weights: every parameter and buffer of the model.
        batch_size: windows in one forward pass.
        traced: the model's graph, if there is one; made where it does not hold for these windows.
        tokens_per_round: this many tokens' values are held between two blocks, in whole batches, at least one; each round
            reads every weight once. By default one round. `model.forward.bytes_between_blocks` tells a batch's bytes.
        progress: called when a batch is scored, in windows.

    Raises:
        CalibrationError: as `evaluate`.
        NonFiniteError: as `evaluate`.
        TracingError: the model cannot be exported, so that it cannot be run block by block.
    """
    check_windows(model, windows)
    device = next(model.parameters()).device
    batches = [ModelInputs((), {"input_ids": tokens.to(device).long()}) for tokens in windows.split(batch_size)]
    metric, num_scored = Perplexity().to(device), 0
    per_round = len(batches) if tokens_per_round is None else max(1, tokens_per_round // (batch_size * windows.shape[1]))
    graph = _graph_for(model, batches, traced)
    with undisturbed(model):
        for start in range(0, len(batches), per_round):
            some = batches[start : start + per_round]
            for number, output in forward(graph, some, weights, name="Evaluation batch"):
                logits, tokens = predictions_of(output), some[number].kwargs["input_ids"]
                assert logits is not None, "a causal language model gives logits"
                metric.update_next_token(logits, tokens)
                del output, logits
                num_scored += len(tokens)
                progress(num_scored, len(windows), "windows")
        with collective(None, "the perplexity"):  # of the windows of all ranks
            perplexity = float(metric.compute())
        if not math.isfinite(perplexity):
            names = list(named_tensors(model))
            raise NonFiniteError(f"The perplexity is {perplexity}: {_cause(_one_by_one(weights, names), model)}")
    return perplexity


def _graph_for(model: nn.Module, batches: Sequence[ModelInputs], traced: TracedModel | None) -> TracedModel:
    if traced is not None:
        with contextlib.suppress(TracingError):
            check_traced(model, traced, batches)
            return traced
    with undisturbed(model):
        return trace(model, example_batch(batches), dynamic_dims(batches), batches)


def _one_by_one(weights: Segmented, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        weights.prepare([name])
        yield name, weights.get(name)
        weights.release([name])


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
    return _cause({**named_tensors(model), **weights}.items(), model)


def _cause(tensors: Iterable[tuple[str, Tensor]], model: nn.Module) -> str:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"NaN or infinity in {name}. Was the checkpoint saved whole?"
    dtype = next(model.parameters()).dtype
    advice = " Compute in float32 or bfloat16." if dtype is torch.float16 else ""
    return f"all weights are finite, so the model's activations overflow in {str(dtype).removeprefix('torch.')}.{advice}"
