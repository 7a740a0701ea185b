"""What the walk costs: the same batches through the plain model and through the walk, in turns on one machine."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from statprune.errors import TracingError
from statprune.experiments.cost import measured
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.undisturbed import undisturbed
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


def measure_walk(model: nn.Module, batches: Sequence[Tensor], *, rounds: int = 5, progress: Progress = silent) -> WalkCost:
    """Time the walk against a plain forward pass, after one round that does not count.

    Args:
        model: a causal language model.
        batches: token tensors.
        rounds: how many to count; a round times both, one after the other.
        progress: called after each round.

    Raises:
        TracingError: the model cannot be exported.
    """
    inputs = bind_batches(model, batches)
    device = next(model.parameters()).device
    with measured(device) as export:
        layers = find_layers(model, inputs)
    if layers.traced is None:
        raise TracingError(f"The walk goes along the model's graph, and there is none: {layers.reason}")
    groups = select(layers.groups, layers.left_out, Recipe("magnitude", "0%")).groups
    times: list[tuple[float, float]] = []
    with undisturbed(model):
        for index in range(rounds + 1):
            with measured(device) as forward:
                for batch in inputs:
                    model(*batch.args, **batch.kwargs)
            with measured(device) as walked:
                for _ in layers.observe(groups, inputs):
                    pass
            times += [(forward.seconds, walked.seconds)] if index else []
            progress(index, rounds, "rounds")
    return WalkCost(export.seconds, tuple(forward for forward, _ in times), tuple(walked for _, walked in times))
