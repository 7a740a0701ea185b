"""The calibration windows, cut in two halves: one to prune on, one to score on."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from statprune.errors import CalibrationError, ModelError
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import is_causal
from statprune.model.observe import ForwardContext
from statprune.model.undisturbed import eval_mode, without_cache
from statprune.perplexity import Perplexity
from statprune.ranks import ProcessGroup, collective
from statprune.tuning.overlap import shared_share, warn_of_shared

INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Halves:
    """Batches of model inputs."""

    pruning: list[dict[str, Tensor]]
    """Windows 0, 2, 4 ... of the calibration set."""

    scoring: list[dict[str, Tensor]]
    """Windows 1, 3, 5 ..."""

    batch_size: int
    """Windows in a batch, at most: as many as the largest given batch has."""

    shared: float
    """Share of the held-out tokens, in [0, 1], that stand in pruning windows too (see `shared_share`)."""


def check_has_perplexity(model: nn.Module) -> None:
    """Raise ModelError where the model is no causal language model of transformers, so that there is no perplexity."""
    if not is_causal(model):
        raise ModelError(
            f"The model is a {type(model).__name__}, not a causal language model of transformers: its perplexity, by which a "
            "recipe is chosen, cannot be measured. Give a recipe with a method, such as 'cvr+least-squares'."
        )


def halve(inputs: Sequence[ModelInputs]) -> Halves:
    """Deal the windows out in turns, so that both halves hold the same kinds of text.

    Args:
        inputs: token windows, on the model's device.

    Raises:
        CalibrationError: fewer than two windows, or inputs that are no tokens and mask of them.

    Warns:
        CalibrationWarning: the halves have much in common.
    """
    windows = [window for batch in inputs for window in _windows(batch)]
    if len(windows) < 2:
        raise CalibrationError(
            "The calibration set is a single window: expected at least 2 to choose a recipe, one to prune on and one to score "
            "on. Give more --samples, or a recipe with a method."
        )
    size = max(next(iter(batch.kwargs.values())).shape[0] for batch in inputs)
    pruning, scoring = _batches(windows[::2], size), _batches(windows[1::2], size)
    shared = shared_share(pruning, scoring)
    warn_of_shared(shared)
    return Halves(pruning, scoring, size, shared)


class Scorer:
    """Perplexity of one twin, on more and more of the held-out batches; under DDP, on those of all ranks."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        weights: Mapping[str, Tensor],
        forward_context: ForwardContext,
        process_group: ProcessGroup = None,
    ) -> None:
        self.model, self.batches, self.weights, self.forward_context = model, batches, dict(weights), forward_context
        self.process_group = process_group
        self.metric = Perplexity(process_group=process_group).to(next(model.parameters()).device)
        self.done = 0

    @torch.no_grad()
    def upto(self, num_batches: int) -> float:
        """The perplexity on the first so many batches; what was run before is not run again."""
        with eval_mode(self.model), without_cache(self.model):
            for batch in self.batches[self.done : num_batches]:
                with self.forward_context():
                    logits = functional_call(self.model, self.weights, (), dict(batch)).logits
                self.metric.update_next_token(logits, batch["input_ids"], batch.get("attention_mask"))
        self.done = max(self.done, num_batches)
        with collective(self.process_group, f"the perplexity of {num_batches} batches"):
            return float(self.metric.compute())


def _windows(batch: ModelInputs) -> list[dict[str, Tensor]]:
    shapes = {tuple(value.shape) for value in batch.kwargs.values() if isinstance(value, Tensor)}
    if batch.args or not {"input_ids"} <= batch.kwargs.keys() <= set(INPUTS) or len(shapes) != 1 or len(min(shapes)) != 2:
        given = ", ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in batch.kwargs.items())
        raise CalibrationError(
            f"The calibration batches have the inputs {given}: to choose a recipe, expected input_ids [batch, length], and "
            "perhaps an attention_mask of the same shape."
        )
    return [dict(zip(batch.kwargs, rows, strict=True)) for rows in zip(*batch.kwargs.values(), strict=True)]


def _batches(windows: Sequence[dict[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    """Windows of one length that follow each other, as many at once as there may be."""
    runs = [list(run) for _, run in itertools.groupby(windows, key=lambda window: len(window["input_ids"]))]
    chunks = [run[start : start + size] for run in runs for start in range(0, len(run), size)]
    return [{name: torch.stack([window[name] for window in chunk]) for name in chunk[0]} for chunk in chunks]
