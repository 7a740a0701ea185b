"""Compare methods: prune a twin for each cell of methods x patterns, and measure its perplexity on held-out windows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from statprune.api import plan
from statprune.errors import NonFiniteError
from statprune.experiments.cost import measured
from statprune.how import Method, labelled
from statprune.markdown import table
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.schedule import Schedule
from statprune.perplexity import evaluate
from statprune.progress import Progress, silent

METHODS = ("magnitude", "wanda", "sparsegpt", "paper", "default")
PATTERNS = ("50%", "4:8", "2:4")


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    method: str
    pattern: str
    perplexity: float
    seconds: float
    """For calibrating and pruning; the export, which all cells share, is not among them."""
    recipe: dict[str, Any]
    error: str | None = None
    """Why the perplexity is NaN, where it is: the model is spoilt by this method."""


def compare(
    model: nn.Module,
    calibration: Tensor,
    evaluation: Tensor,
    *,
    methods: Sequence[Method] = METHODS,
    patterns: Sequence[str] = PATTERNS,
    schedule: Schedule = "walk",
    batch_size: int = 1,
    progress: Progress = silent,
) -> list[Cell]:
    """Measure every method with every pattern; the dense model is the first cell, and is left as it was.

    Args:
        model: a causal language model.
        calibration: token windows [windows, length].
        evaluation: other token windows [windows, length].
        methods: what to compare.
        patterns: at which sparsities.
        schedule: `"walk"`, `"block"` or `"one-shot"`, for all that have none of their own, as presets have.
        batch_size: windows in one forward pass.
        progress: called after each cell, with its perplexity.

    Raises:
        StatpruneError: as `prune`; recipes are checked before anything runs.
    """
    ways = [labelled(method, pattern=pattern, schedule=schedule) for pattern in patterns for method in methods]
    cells = [Cell("dense", "", evaluate(model, evaluation, batch_size=batch_size), 0.0, {})]
    device, batches = next(model.parameters()).device, calibration.split(batch_size)
    layers = find_layers(model, bind_batches(model, batches))
    for index, (label, how) in enumerate(ways):
        with measured(device) as cost:
            twin = plan(model, batches, how, traced=layers)
        perplexity, error = math.nan, None
        try:
            perplexity = evaluate(model, evaluation, batch_size=batch_size, weights=twin.weights)
        except NonFiniteError as e:  # of this cell; those after it may do
            error = str(e)
        cells.append(Cell(label, how.pattern, perplexity, cost.seconds, twin.report.recipe, error))
        progress(index + 1, len(ways), f"{label} {how.pattern}: {perplexity:.3f}")
    return cells


def markdown_table(cells: Iterable[Cell]) -> str:
    """Methods down, patterns across, the best of each pattern in bold; the dense perplexity above."""
    dense, *others = list(cells)
    patterns = list(dict.fromkeys(cell.pattern for cell in others))
    methods = list(dict.fromkeys(cell.method for cell in others))
    values = {(cell.method, cell.pattern): cell.perplexity for cell in others}
    finite = [cell for cell in others if cell.error is None]
    best = {
        pattern: min((cell.perplexity for cell in finite if cell.pattern == pattern), default=math.nan) for pattern in patterns
    }

    def text(method: str, pattern: str) -> str:
        value = values[method, pattern]
        return f"**{value:.2f}**" if value == best[pattern] else f"{value:.2f}"

    heads = [f"perplexity (dense {dense.perplexity:.2f})", *patterns]
    return table(heads, ([method, *(text(method, pattern) for pattern in patterns)] for method in methods), num_left=len(heads))
