"""prune() and plan() as everyone calls them: where the recipe is `auto` it is chosen first, then as in `compress`."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

import statprune.engine as compress
from statprune.engine import Progress, PruningPlan
from statprune.model.sites import TracedModel
from statprune.model.walk import ForwardContext
from statprune.recipe import Recipe
from statprune.report import PruningReport


@dataclass(frozen=True)
class Choice:
    """A recipe with a method, and where it comes from."""

    recipe: Recipe

    record: dict[str, Any] | None = None
    """Of the `auto` that chose it; None where it was given."""

    def sign(self, report: PruningReport) -> PruningReport:
        """Say so in the report."""
        report.chosen_by = self.record
        if self.record is not None:
            report.seconds = {"tune": self.record["seconds"], **report.seconds}
        return report


def choose(
    model: nn.Module,
    batches: list[Any],
    recipe: Recipe,
    *,
    forward_context: ForwardContext = contextlib.nullcontext,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """The recipe itself; where it is `auto`, the one that `tune` chooses on these batches.

    Args:
        model: stays as it is.
        batches: calibration data, as for `prune`; a generator would be used up.
        recipe: any.
        forward_context: entered around model code.
        progress: called with (seconds used, seconds in all, what is being done) where something is tried.
        say: called with each step in words.

    Raises:
        StatpruneError: as `tune`.
    """
    if not recipe.is_auto:
        return Choice(recipe)
    # Perplexity imports torchmetrics, which takes seconds and which other recipes do not need.
    from statprune.tuning.tune import tune_recipe

    tuned = tune_recipe(model, batches, recipe, forward_context=forward_context, progress=progress, say=say)
    return Choice(tuned.recipe, {"recipe": recipe.to_dict(), **tuned.record()})


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    progress: Progress | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> PruningReport:
    """Prune a model in place.

    Args:
        model: any `nn.Module`; it is calibrated in eval mode and keeps the modes, the device and the dtype it has.
        batches: calibration data: token tensors [batch, length], dicts of tensors (an `attention_mask` marks padding with 0),
            or tuples of the arguments of `forward`. Shapes may differ from batch to batch.
        recipe: how; the default is the paper's method at 2:4. `auto` chooses a method by trying candidates on these batches,
            one half to prune on and the other to score on, and then prunes with all of them.
        progress: called after each input group.
        forward_context: entered around model code, such as an autocast.

    Returns:
        What was done, for each weight.

    Raises:
        StatpruneError: bad data, weights, names or widths; before anything is changed. One case cannot be seen so early:
            activations that are finite on the first batch and not on a later one. The message says so.
    """
    batches, choice = _chosen(model, batches, recipe, forward_context)
    report = compress.prune(model, batches, choice.recipe, progress=progress, forward_context=forward_context)
    return choice.sign(report)


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    traced: TracedModel | None = None,
    progress: Progress | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> PruningPlan:
    """What `prune` would do, with the model unchanged; costs a second copy of the pruned weights.

    Args:
        model: as for `prune`; so are the other arguments and the errors.
        batches: calibration data.
        recipe: how.
        traced: the graph from an earlier plan for this model (`PruningPlan.traced`), which saves the export; batches must have
            the shapes it was traced with.
        progress: called after each input group.
        forward_context: entered around model code.

    Raises:
        TracingError: `traced` does not hold for the shape of a batch.
    """
    batches, choice = _chosen(model, batches, recipe, forward_context)
    twin = compress.plan(model, batches, choice.recipe, traced=traced, progress=progress, forward_context=forward_context)
    choice.sign(twin.report)
    return twin


def _chosen(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe | None, forward_context: ForwardContext
) -> tuple[Iterable[Any], Choice]:
    """The batches, which are gone through twice where something is to be chosen, and the choice."""
    recipe = recipe or Recipe()
    if not recipe.is_auto:
        return batches, Choice(recipe)
    kept = list(batches)
    return kept, choose(model, kept, recipe, forward_context=forward_context)
