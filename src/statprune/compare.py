"""Compare methods: prune a twin for each cell of methods x patterns, and measure its perplexity on held-out windows."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from statprune.compress import plan
from statprune.errors import RecipeError
from statprune.perplexity import evaluate
from statprune.recipe import Recipe

METHODS = ("magnitude", "wanda", "cvr", "magnitude+energy", "wanda+energy", "cvr+energy")
PATTERNS = ("50%", "4:8", "2:4")

Method = str | Mapping[str, Any]
"""A short name such as `"cvr+energy"`, or a mapping with `criterion`, `compensation` and perhaps a `label`."""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    method: str
    pattern: str
    perplexity: float
    seconds: float
    """For calibrating and pruning, tracing included."""
    recipe: dict[str, Any]


def compare(
    model: nn.Module,
    calibration: Tensor,
    evaluation: Tensor,
    *,
    methods: Sequence[Method] = METHODS,
    patterns: Sequence[str] = PATTERNS,
    schedule: str = "walk",
    batch_size: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Cell]:
    """Measure every method with every pattern; the dense model is the first cell, and is left as it was.

    Args:
        model: a causal language model.
        calibration: token windows [windows, length].
        evaluation: other token windows [windows, length].
        methods: what to compare.
        patterns: at which sparsities.
        schedule: `"walk"` or `"one-shot"`, for all.
        batch_size: windows in one forward pass.
        progress: called with (cells done, cells in all, what was measured).

    Raises:
        StatpruneError: as `prune`; recipes are checked before anything runs.
    """
    recipes = [
        (*_labelled(method, pattern=str(pattern), schedule=schedule), str(pattern))
        for pattern in patterns
        for method in methods
    ]
    cells = [Cell("dense", "", evaluate(model, evaluation, batch_size=batch_size), 0.0, {})]
    for index, (label, recipe, pattern) in enumerate(recipes):
        started = time.perf_counter()
        twin = plan(model, calibration.split(batch_size), recipe)
        seconds = time.perf_counter() - started

        def pruned_logits(tokens: Tensor, weights: dict[str, Tensor] = twin.weights) -> Tensor:
            logits: Tensor = functional_call(model, weights, (tokens,)).logits
            return logits

        perplexity = evaluate(model, evaluation, batch_size=batch_size, forward=pruned_logits)
        cells.append(Cell(label, pattern, perplexity, seconds, recipe.to_dict()))
        if progress is not None:
            progress(index + 1, len(recipes), f"{label} {pattern}: {perplexity:.3f}")
    return cells


def markdown_table(cells: Iterable[Cell]) -> str:
    """Methods down, patterns across, the best of each pattern in bold; the dense perplexity above."""
    dense, *others = list(cells)
    patterns = list(dict.fromkeys(cell.pattern for cell in others))
    methods = list(dict.fromkeys(cell.method for cell in others))
    values = {(cell.method, cell.pattern): cell.perplexity for cell in others}
    best = {pattern: min(cell.perplexity for cell in others if cell.pattern == pattern) for pattern in patterns}

    def text(method: str, pattern: str) -> str:
        value = values[method, pattern]
        return f"**{value:.2f}**" if value == best[pattern] else f"{value:.2f}"

    return "\n".join(
        [
            f"| perplexity (dense {dense.perplexity:.2f}) | " + " | ".join(patterns) + " |",
            "|---|" + "---|" * len(patterns),
            *(f"| {method} | " + " | ".join(text(method, pattern) for pattern in patterns) + " |" for method in methods),
        ]
    )


def _labelled(method: Method, **others: Any) -> tuple[str, Recipe]:
    if isinstance(method, str):
        return method, Recipe.parse(method, **others)
    settings = {key: value for key, value in method.items() if key != "label"}
    if not set(settings) <= {"criterion", "compensation"}:
        raise RecipeError(f"The method {dict(method)} has other keys than label, criterion and compensation.")
    recipe = Recipe(**settings, **others)
    return str(method.get("label", recipe.method)), recipe
