"""tune(): choose a recipe for a model, a pattern and a budget of minutes, by trying candidates out.

The calibration windows are cut in two. Candidates are pruned on one half and scored on the other, in the rungs of `halving`.
What was scored on the whole held-out half is a finalist, and the winner is the best of the finalists. The baselines are always
among them, so the winner is never worse than they are on that half.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statprune.errors import ResultsError
from statprune.grammar import Part
from statprune.model.walk import ForwardContext
from statprune.recipe import Recipe
from statprune.tuning.halves import halve
from statprune.tuning.outcome import Tuned
from statprune.tuning.search import Progress, Search


def tune(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    *,
    pattern: Part = "2:4",
    minutes: float = 10.0,
    output: str | Path | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    on_indivisible: str = "error",
    forward_context: ForwardContext = contextlib.nullcontext,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Choose a recipe by trying candidates out on a model, which stays as it is.

    Args:
        model: a causal language model of transformers, which `torch.export` can trace.
        batches: at least two token windows [windows, length], int, or batches of them as `prune` takes. Every second window is
            held out: candidates are pruned on the first, third, ... and scored on the second, fourth, ...
        pattern: as in a recipe.
        minutes: how long it may take. The baselines (`wanda`, `cvr+energy`, `sparsegpt`) are measured whatever it says; a
            longer budget tries more, and with enough of it the choice does not depend on the clock.
        output: folder for the table of what was tried and `recipe.yaml`. A run that was interrupted goes on from it, and one
            that is finished goes further with more minutes.
        targets: as in a recipe; so are the next two.
        ignore: globs on names.
        on_indivisible: `"error"` or `"skip"`.
        forward_context: entered around model code, such as an autocast.
        progress: called with (seconds used, seconds in all, what is being done).
        say: called with each step in words.

    Returns:
        The recipe, and everything that was measured.

    Raises:
        ModelError: not a causal language model.
        RecipeError: no minutes, or a pattern that does not exist.
        CalibrationError: fewer than two windows; or as `prune`.
        SiteError: the pattern does not fit the model; or as `prune`.
        TracingError: the model cannot be exported.
        ResultsError: the output holds something else, or trials that do not compare with these.
    """
    recipe = Recipe(
        {"name": "auto", "minutes": minutes}, pattern,
        targets=targets, ignore=ignore, on_indivisible=on_indivisible,  # type: ignore[arg-type]
    )  # fmt: skip
    return tune_recipe(model, batches, recipe, output=output, forward_context=forward_context, progress=progress, say=say)


def tune_recipe(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """`tune` for a recipe whose criterion is `auto`; the arguments and the errors are those of `tune`."""
    if output is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ResultsError("tune(output=...) on several ranks: each would write the file. Leave it out, or run on one rank.")
    with torch.inference_mode(False), torch.no_grad():
        halves = halve(model, batches)
        return Search(model, halves, recipe, output, forward_context, progress, say).run()
