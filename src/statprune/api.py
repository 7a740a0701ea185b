"""What everyone calls: prune and plan, by a recipe or by a search for one."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from statprune.agreement import check_layers, check_start, device_of, refuse_what_runs_whole
from statprune.clock import peak_memory, timed
from statprune.disk.journal import Journal, fingerprint
from statprune.disk.pieces import KeptInPlace
from statprune.engine import run
from statprune.errors import CheckpointError, RanksError, RecipeError, TracingError, adding
from statprune.how import How, read_how
from statprune.model.gradients import Loss
from statprune.model.inputs import ModelInputs, bind_batches
from statprune.model.kinds import architecture
from statprune.model.landing import aside, in_place, pruned_aside
from statprune.model.layers import Layers, find_layers
from statprune.model.observe import ForwardContext
from statprune.model.sites import TracedModel
from statprune.model.storage import is_dispatched, is_sharded
from statprune.model.weights import Weights, check_and_sum_weights, write_
from statprune.output import seen_by_all
from statprune.progress import Progress, Say, silent, unsaid
from statprune.ranks import ProcessGroup, place, together
from statprune.recipe import Recipe, Search
from statprune.report import PruningReport


@dataclass
class PruningPlan:
    """Pruned weights that have not landed: the model they belong to is unchanged."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name, as the parameter is stored: ready for `torch.func.functional_call`."""

    report: PruningReport = field(default_factory=lambda: PruningReport({}, ""))
    layers: Layers | None = None
    """The model's linear layers; None in a plan of nothing."""

    @property
    def traced(self) -> TracedModel | None:
        """The model's graph, which saves the next `prune` or `plan` the export; None where it could not be exported."""
        return self.layers.traced if self.layers is not None else None

    def graph_module(self) -> GraphModule:
        """The model's graph, reading the pruned weights. It takes the inputs by name.

        Raises:
            TracingError: the model could not be exported.
        """
        if self.layers is None:
            raise TracingError("There is no graph in a plan of nothing: expected one that statprune.plan gave.")
        return self.layers.graph_module(self.weights)

    def apply_(self, model: nn.Module) -> PruningReport:
        """Write the pruned weights into a model, in place: what `prune` would have done.

        Args:
            model: the one that was planned for, or another instance of it with the same weights.

        Returns:
            The report.

        Raises:
            SiteError: a weight that the model does not have, or has in another shape; nothing is changed.
        """
        write_(model, self.weights)
        return self.report


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    how: How | None = None,
    *,
    pattern: str | None = None,
    traced: Layers | TracedModel | None = None,
    loss: Loss | None = None,
    journal: str | Path | None = None,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    say: Say = unsaid,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> PruningReport:
    """Prune a model in place.

    Args:
        model: any `nn.Module`; it is calibrated in eval mode and keeps the modes, the device and the dtype it has.
        batches: calibration data: an iterable of token tensors [batch, length], dicts of tensors (an `attention_mask` marks
            padding with 0; names that `forward` does not have are left out), rows of `datasets`, or tuples, of which the
            arguments that `forward` requires are taken, so `(x, y)` gives x. Shapes may differ from batch to batch. A tensor
            [windows, length] is cut into batches.
        how: a `Recipe`, a method's short name (`"best"`, `"wanda"`), a mapping of a recipe's keys, or a `Search` (`"auto"`),
            which chooses a recipe by trying candidates on these batches, one half to prune on and the other to score on; it is
            then carried out with all of them. None: `"default"` at 2:4, the best that needs no gradients and costs no more than
            SparseGPT; `"paper"` is the paper's method.
        pattern: in the place of that of `how`.
        traced: the graph from an earlier plan for this model, or for another instance of it (`PruningPlan.traced`), which saves
            the export; batches must have the shapes it was traced with.
        loss: `(model, inputs, index)` to the summed loss of a calibration batch, a scalar, for methods that are loss-aware on
            models that are no causal language models, whose loss is known.
        journal: a folder to keep each pruned weight in, so that the same call on the same dense model goes on where one was
            that ended early; remove it afterwards. It takes as much disk as the pruned weights. Not for a search. Of several
            ranks, as many as before, the first keeps it, on a disk that all of them see.
        process_group: in a `torch.distributed` run, the ranks that prune together, each with batches of its own; None for all.
        progress: called after each input group.
        say: called with each step of a search in words.
        forward_context: entered around model code, such as an autocast.

    Returns:
        What was done, for each weight.

    Raises:
        StatpruneError: bad data, weights, names or widths; before anything is changed. One case cannot be seen so early:
            activations that are finite on the first batch and not on a later one. The message says so.
    """

    def landing(model: nn.Module, process_group: ProcessGroup) -> Weights:
        return in_place(model, process_group) if journal is None else _kept(journal, model, process_group)

    return _carry_out(
        "statprune.prune", landing, model, batches, how, pattern, traced, loss, process_group, progress, say, forward_context,
        journal,
    ).report  # fmt: skip


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    how: How | None = None,
    *,
    pattern: str | None = None,
    traced: Layers | TracedModel | None = None,
    loss: Loss | None = None,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    say: Say = unsaid,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> PruningPlan:
    """What `prune` would do, with the model unchanged; costs a second copy of the pruned weights.

    The arguments and errors are those of `prune`.
    """
    return _carry_out(
        "statprune.plan", aside, model, batches, how, pattern, traced, loss, process_group, progress, say, forward_context
    )


def _carry_out(
    call: str,
    landing: Callable[[nn.Module, ProcessGroup], Weights],
    model: nn.Module,
    batches: Iterable[Any],
    how: How | None,
    pattern: str | None,
    traced: Layers | TracedModel | None,
    loss: Loss | None,
    process_group: ProcessGroup,
    progress: Progress,
    say: Say,
    forward_context: ForwardContext,
    journal: str | Path | None = None,
) -> PruningPlan:
    device = device_of(model)
    with together(process_group, device, call):
        with adding(lambda: "Nothing was changed.", RanksError):
            chosen = read_how(how, pattern=pattern)
            if journal is not None:
                _check_journal(journal, model, chosen)
            refuse_what_runs_whole(model, chosen, has_own_loss=loss is not None)
            if isinstance(chosen, Search):
                # Perplexity imports torchmetrics, which takes seconds and which recipes do not need.
                from statprune.tuning.halves import check_has_perplexity

                check_has_perplexity(model)
            inputs = bind_batches(model, batches)
            check_start(model, chosen, inputs, process_group)
            seconds: dict[str, float] = {}
            memory: dict[str, int] = {}
            with timed(seconds, "trace", memory, device):
                layers = find_layers(model, inputs, traced=traced, forward_context=forward_context)
            check_layers(layers, process_group)
            if layers.reason is not None:
                warnings.warn(layers.reason, stacklevel=3)
            recipe, record = _recipe(chosen, layers, inputs, process_group, progress, say, forward_context)
            tuned_peak = peak_memory(device)
            weights = landing(model, process_group)
            ledger = _journal(journal, weights, model, recipe, inputs, process_group) if journal is not None else None
        report = run(
            layers, inputs, recipe, weights,
            loss=loss, ledger=ledger, process_group=process_group, progress=progress, forward_context=forward_context,
        )  # fmt: skip
        if record is not None:
            seconds = {"tune": record["seconds"], **seconds}
            memory |= {"tune": tuned_peak} if tuned_peak is not None else {}
        report.seconds, report.chosen_by = {**seconds, **report.seconds}, record
        report.memory = {**memory, **report.memory}
        return PruningPlan(pruned_aside(weights), report, layers)


def _recipe(
    how: Recipe | Search,
    layers: Layers,
    inputs: list[ModelInputs],
    process_group: ProcessGroup,
    progress: Progress,
    say: Say,
    forward_context: ForwardContext,
) -> tuple[Recipe, dict[str, Any] | None]:
    """A recipe to carry out, and the record of the search that chose it."""
    if isinstance(how, Recipe):
        return how, None
    from statprune.tuning.tune import search_recipe

    tuned = search_recipe(
        layers, inputs, how, process_group=process_group, progress=progress, say=say, forward_context=forward_context
    )
    return tuned.recipe, {"search": how.to_dict(), **tuned.record()}


def _check_journal(folder: str | Path, model: nn.Module, how: Recipe | Search) -> None:
    call = f"statprune.prune(journal={str(folder)!r})"
    if is_dispatched(model):
        raise RecipeError(
            f"{call}: a journal is of a model that is whole in memory, and this one is where accelerate has put it."
        )
    if is_sharded(model):
        raise RecipeError(f"{call}: a journal is of a model that is whole on every rank, and this one is sharded.")
    if isinstance(how, Search):
        raise RecipeError(f"{call}: a journal is of a recipe, not of a search, which may choose another one the next time.")


def _kept(folder: str | Path, model: nn.Module, process_group: ProcessGroup) -> KeptInPlace:
    """The model's weights, and those in a journal's folder, which the first rank makes."""
    is_first, pieces = place(process_group)[0] == 0, Path(folder) / "pruned"
    if is_first:
        try:
            pieces.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CheckpointError(f"The journal's folder {folder} cannot be made: {e.strerror}.") from e
    return KeptInPlace(model, seen_by_all(pieces, process_group), writes=is_first)


def _journal(
    folder: str | Path,
    weights: Weights,
    model: nn.Module,
    recipe: Recipe,
    inputs: Sequence[ModelInputs],
    process_group: ProcessGroup,
) -> Journal:
    """The journal in a folder, for the same run to go on with."""
    assert isinstance(weights, KeptInPlace), "a journal has files to name"
    content = {"architecture": architecture(model), "weights": check_and_sum_weights(model)}
    identity = fingerprint(recipe.to_dict(), content, inputs, process_group)
    return Journal(Path(folder) / "journal.jsonl", identity, weights, process_group)
