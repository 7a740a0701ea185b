"""Compare methods: prune a twin for each cell of methods x patterns, and measure on held-out windows what it predicts."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from statprune.api import plan
from statprune.divergence import evaluate_beside
from statprune.errors import NonFiniteError
from statprune.experiments.cost import measured
from statprune.experiments.grid import Entry, Row, grid, three_digits, two_decimals
from statprune.how import Method, labelled
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
    divergence: float | None = None
    """Of the next-token distributions from the dense model's, in nats per token; None for the dense model and with an error."""


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
        perplexity, divergence, error = math.nan, None, None
        try:
            found = evaluate_beside(model, evaluation, batch_size=batch_size, weights=twin.weights)
            perplexity, divergence = found.perplexity, found.divergence
        except NonFiniteError as e:  # of this cell; those after it may do
            error = str(e)
        cells.append(Cell(label, how.pattern, perplexity, cost.seconds, twin.report.recipe, error, divergence))
        progress(index + 1, len(ways), f"{label} {how.pattern}: {perplexity:.3f}")
    return cells


def markdown_table(cells: Iterable[Cell]) -> str:
    """Perplexities, then divergences from the dense model: methods down, patterns across, the best of each pattern in bold."""
    dense, *others = list(cells)
    grids = [_grid(f"perplexity (dense {dense.perplexity:.2f})", others, lambda cell: cell.perplexity, two_decimals)]
    if any(cell.divergence is not None for cell in others):
        grids.append(_grid("KL from dense [nats per token]", others, lambda cell: cell.divergence, three_digits))
    return "\n\n".join(grids)


def _grid(head: str, cells: Sequence[Cell], value: Callable[[Cell], float | None], show: Callable[[float], str]) -> str:
    entries: dict[tuple[Row, str], Entry] = {}
    for cell in cells:
        found = value(cell)
        text = "nan" if found is None or not math.isfinite(found) else show(found)
        entries[(cell.method,), cell.pattern] = Entry(text, competes=None if text == "nan" else float(text))
    return grid([head], list(dict.fromkeys(cell.pattern for cell in cells)), entries)
