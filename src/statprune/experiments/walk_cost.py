"""What the walk costs: the same batches through the plain model and through the walk, in turns on one machine."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from statprune.errors import TracingError
from statprune.experiments.cost import measured
from statprune.model.inputs import ModelInputs, bind_batches
from statprune.model.layers import Layers, find_layers
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


def export(model: nn.Module, batches: Sequence[Tensor]) -> tuple[Layers, list[ModelInputs], float]:
    """A model's layers, batches as its inputs, and the seconds that the export took.

    Raises:
        TracingError: the model cannot be exported.
    """
    inputs = bind_batches(model, batches)
    with measured(next(model.parameters()).device) as cost:
        layers = find_layers(model, inputs)
    if layers.traced is None:
        raise TracingError(f"The walk goes along the model's graph, and there is none: {layers.reason}")
    return layers, inputs, cost.seconds


def measure_walk(
    layers: Layers, inputs: Sequence[ModelInputs], seconds: float, *, rounds: int = 5, progress: Progress = silent
) -> WalkCost:
    """Time the walk against a plain forward pass, after one round that does not count.

    Args:
        layers: from `export`, as well as
        inputs: the batches, and
        seconds: what that took.
        rounds: how many to count; a round times both, one after the other.
        progress: called after each round.
    """
    model, device = layers.model, next(layers.model.parameters()).device
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
    return WalkCost(seconds, tuple(forward for forward, _ in times), tuple(walked for _, walked in times))
