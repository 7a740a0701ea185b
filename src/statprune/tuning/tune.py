"""tune(): choose a recipe for a model, a pattern and a budget of minutes, by trying candidates out.

The calibration windows are cut in two. Candidates are pruned on one half and scored on the other, by halving (`rungs`).
What was scored on the whole held-out half is a finalist, and the winner is the best of the finalists. The baselines are always
among them, so the winner is never worse than they are on that half.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statprune.agreement import check_layers, check_start, device_of
from statprune.errors import ResultsError, TracingError
from statprune.model.inputs import ModelInputs, bind_batches
from statprune.model.layers import Layers, find_layers
from statprune.model.observe import ForwardContext
from statprune.model.sites import TracedModel
from statprune.progress import Progress, Say, silent, unsaid
from statprune.ranks import ProcessGroup, is_distributed, together
from statprune.recipe import OnIndivisible, Search
from statprune.results import alone_in
from statprune.tuning.halves import check_has_perplexity, halve
from statprune.tuning.outcome import Tuned
from statprune.tuning.search import SearchRun


def tune(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    *,
    pattern: str = "2:4",
    minutes: float = 10.0,
    output: str | Path | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    on_indivisible: OnIndivisible = "error",
    gradients: bool = True,
    traced: Layers | TracedModel | None = None,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    say: Say = unsaid,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Tuned:
    """Choose a recipe by trying candidates out on a model, which stays as it is.

    Args:
        model: a causal language model of transformers, which `torch.export` can trace.
        batches: at least two token windows [windows, length], int, or batches of them as `prune` takes. Every second window is
            held out: candidates are pruned on the first, third, ... and scored on the second, fourth, ... They should not
            overlap: `calibration_windows(..., halves=True)` draws such ones.
        pattern: as in a recipe.
        minutes: how long it may take. The baselines (`best`, `paper`, `wanda`, `sparsegpt`) are measured whatever it says; a
            longer budget tries more, and with enough of it the choice does not depend on the clock.
        output: folder for the table of what was tried and `recipe.yaml`. A run that was interrupted goes on from it, and one
            that is finished goes further with more minutes.
        targets: as in a recipe; so are the next two.
        ignore: globs on names.
        on_indivisible: `"error"` or `"skip"`.
        gradients: whether to try what takes the dense model backward once, `best` among it.
        traced: as for `prune`; so is the next.
        process_group: the ranks that search together.
        progress: called with (seconds used, seconds in all, what is being done).
        say: called with each step in words.
        forward_context: entered around model code, such as an autocast.

    Returns:
        The recipe, and everything that was measured.

    Raises:
        ModelError: not a causal language model.
        RecipeError: no minutes, or a pattern that does not exist.
        CalibrationError: fewer than two windows; or as `prune`.
        SiteError: the pattern does not fit the model; or as `prune`.
        TracingError: the model cannot be exported.
        ResultsError: the output holds something else, or trials that do not compare with these; or another run is at work
            in it.

    Warns:
        CalibrationWarning: more than a tenth of the held-out tokens stand in a window to prune on too.
    """
    with together(process_group, device_of(model), "statprune.tune"):
        search = Search(pattern, minutes, targets, ignore, on_indivisible, gradients)  # type: ignore[arg-type]
        check_has_perplexity(model)
        inputs = bind_batches(model, batches)
        check_start(model, search, inputs, process_group)
        layers = find_layers(model, inputs, traced=traced, forward_context=forward_context)
        check_layers(layers, process_group)
        return search_recipe(
            layers, inputs, search,
            output=output, process_group=process_group, progress=progress, say=say, forward_context=forward_context,
        )  # fmt: skip


def search_recipe(
    layers: Layers,
    inputs: Sequence[ModelInputs],
    search: Search,
    *,
    output: str | Path | None = None,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    say: Say = unsaid,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Tuned:
    """`tune` for a model whose layers are found and whose weights are checked already; errors as for `tune`.

    Args:
        layers: of the model, which stays as it is.
        inputs: calibration data, on the model's device.
        search: what to look for.
        output: as for `tune`; so are the others.
        process_group: the ranks that search together.
        progress: called with (seconds used, seconds in all, what is being done).
        say: called with each step in words.
        forward_context: entered around model code.
    """
    if layers.traced is None:
        raise TracingError(f"A recipe is chosen by pruning along the model's graph, and there is none: {layers.reason}")
    if output is not None and is_distributed(process_group):
        raise ResultsError("tune(output=...) on several ranks: each would write the file. Leave it out, or run on one rank.")
    alone = contextlib.nullcontext() if output is None else alone_in(output)
    with alone, torch.inference_mode(False), torch.no_grad():
        halves = halve(inputs)
        return SearchRun(layers, halves, search, output, process_group, forward_context, progress, say).run()
