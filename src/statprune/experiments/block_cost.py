"""What pruning one block costs on this machine: nanoseconds for each weight, beside a copy of them and other people's code."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.errors import ExperimentError
from statprune.experiments.cost import measured
from statprune.experiments.peers import load_sparsegpt, measure_sparsegpt
from statprune.experiments.runtime import first_block, measure_block, weights_of
from statprune.how import labelled
from statprune.methods.statistics import Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.layers import Layers
from statprune.progress import Progress, silent
from statprune.recipe import Recipe

METHODS = ("wanda", "paper", "sparsegpt", "default")
PATTERNS = ("50%", "2:4")
THEIRS = "SparseGPT's own code"


@dataclass(frozen=True)
class BlockCost:
    """Of one method."""

    label: str
    pattern: str
    statistics: float
    """Nanoseconds for each weight of the block; they grow with the tokens."""
    pruning: float
    """Nanoseconds for each weight."""
    peak_memory: int | None
    """Bytes: the statistics, and the tensors of pruning at the highest point, beyond the model; None for others' code."""


@dataclass(frozen=True)
class BlockCosts:
    """Of several methods, on the same block."""

    num_weights: int
    num_tokens: int
    copy: float
    """Nanoseconds for each weight to copy the block's weights: the floor."""
    rows: tuple[BlockCost, ...]

    def beside_theirs(self, row: BlockCost) -> float | None:
        """Its statistics and pruning over those of SparseGPT's own code with the same pattern."""
        theirs = next((one for one in self.rows if (one.label, one.pattern) == (THEIRS, row.pattern)), None)
        return None if theirs is None else (row.statistics + row.pruning) / (theirs.statistics + theirs.pruning)

    def to_dict(self) -> dict[str, Any]:
        """As data."""
        return {
            "weights": self.num_weights, "tokens": self.num_tokens, "copy": self.copy,
            "rows": [{**vars(row), "beside_theirs": self.beside_theirs(row)} for row in self.rows],
        }  # fmt: skip


def measure_blocks(
    layers: Layers,
    inputs: Sequence[ModelInputs],
    *,
    methods: Sequence[Mapping[str, Any] | str] = METHODS,
    patterns: Sequence[str] = PATTERNS,
    rounds: int = 3,
    sparsegpt: str | Path | None = None,
    progress: Progress = silent,
) -> BlockCosts:
    """Time the first block of a model, method after method; the model is left as it is.

    Args:
        layers: of a model whose first block consists of linear modules.
        inputs: calibration data, on the model's device.
        methods: presets, short names or mappings.
        patterns: how sparse.
        rounds: how often each time is taken; the median counts.
        sparsegpt: a checkout of SparseGPT's own code, which is run.
        progress: called after each measurement.

    Raises:
        ExperimentError: as `measure_block` and `peers`; a method is a search, or needs gradients.
        RecipeError: a method or a pattern is not known.
    """
    theirs = load_sparsegpt(sparsegpt) if sparsegpt is not None else None
    recipes: list[tuple[str, Recipe, str]] = []
    for pattern, method in itertools.product(patterns, methods):
        label, how = labelled(method, pattern=pattern)
        if not isinstance(how, Recipe) or Statistic.CURVATURE in how.needs:
            raise ExperimentError(
                f"{label} takes more than one block: expected a method that is no search and needs no gradients."
            )
        recipes.append((label, how, pattern))
    usual = Recipe("magnitude", patterns[0])
    weights = [weight for group in first_block(layers, usual) for _, weight in weights_of(layers.model, group)]
    num_weights, device = sum(map(Tensor.numel, weights)), weights[0].device
    total = len(recipes) + (len(patterns) if theirs is not None else 0)
    rows: list[BlockCost] = []

    def add(label: str, pattern: str, seconds: Mapping[str, float], peak: int | None) -> None:
        collected, pruned = (seconds[part] * 1e9 / num_weights for part in ("statistics", "pruning"))
        rows.append(BlockCost(label, pattern, collected, pruned, peak))
        progress(len(rows), total, f"{label} {pattern}")

    for label, recipe, pattern in recipes:
        add(label, pattern, *measure_block(layers, inputs, recipe, rounds=rounds))
    for pattern in patterns if theirs is not None else ():
        add(THEIRS, pattern, measure_sparsegpt(theirs, layers, inputs, Recipe("magnitude", pattern), rounds=rounds), None)
    tokens = sum(batch.tensors()[0].numel() for batch in inputs)
    return BlockCosts(num_weights, tokens, _copying(weights, device) * 1e9 / num_weights, tuple(rows))


def _copying(weights: Sequence[Tensor], device: torch.device) -> float:
    """Seconds to copy these into memory that is there already, the least of several."""
    copies = [torch.empty_like(weight) for weight in weights]
    seconds = []
    for _ in range(10):
        with measured(device) as cost:
            for copy, weight in zip(copies, weights, strict=True):
                copy.copy_(weight)
        seconds.append(cost.seconds)
    return min(seconds)
