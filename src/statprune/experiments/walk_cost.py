"""What the walk costs: the same batches through the plain model and through the walk, in turns on one machine."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from statprune.experiments.cost import measured
from statprune.model.inputs import bind_batches, dynamic_dims, example_batch
from statprune.model.trace import eval_mode, trace
from statprune.model.walk import walk
from statprune.progress import Progress, silent
from statprune.recipe import Recipe
from statprune.selection import select


@dataclass(frozen=True)
class WalkCost:
    """Seconds of each round; compare within a round, and quote the ratio."""

    export: float
    forward: tuple[float, ...]
    """The plain model over all batches."""
    walk: tuple[float, ...]
    """The walk over the same batches, statistics included, without pruning."""

    @property
    def ratios(self) -> list[float]:
        """Walk over forward, round by round."""
        return [walk / forward for walk, forward in zip(self.walk, self.forward, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)


@torch.no_grad()
def measure_walk(model: nn.Module, batches: Sequence[Tensor], *, rounds: int = 5, progress: Progress = silent) -> WalkCost:
    """Time the walk against a plain forward pass, after one round that does not count.

    Args:
        model: a causal language model.
        batches: token tensors.
        rounds: how many to count; a round times both, one after the other.
        progress: called after each round.
    """
    inputs = bind_batches(model, batches)
    device = next(model.parameters()).device
    with measured(device) as export:
        traced = trace(model, example_batch(inputs), dynamic_dims(inputs))
    groups = select(traced.groups, traced.left_out, Recipe(pattern="50%")).groups
    times: list[tuple[float, float]] = []
    with eval_mode(model):
        for index in range(rounds + 1):
            with measured(device) as forward:
                for batch in inputs:
                    model(**batch.kwargs, use_cache=False)
            with measured(device) as walked:
                walk(traced, groups, inputs, lambda group, moments: None)
            times += [(forward.seconds, walked.seconds)] if index else []
            progress(index, rounds, "rounds")
    return WalkCost(export.seconds, tuple(forward for forward, _ in times), tuple(walked for _, walked in times))
