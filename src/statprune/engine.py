"""prune(): trace, check, walk, land. Everything that can be refused is refused before a weight changes."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from statprune.allocation import Allocation, allocate
from statprune.errors import NonFiniteError, SiteError, StatpruneError, TracingError
from statprune.methods.pruner import PrunedWeight, energy_sq
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.hooks import find_linear_modules, observe_modules
from statprune.model.inputs import ModelInputs, bind_batches, dynamic_dims, example_batch
from statprune.model.sites import InputGroup, LinearSite, TracedModel
from statprune.model.trace import check_traced, eval_mode, trace, without_cache
from statprune.model.transform import PruneLinears, apply_
from statprune.model.walk import ForwardContext, walk
from statprune.recipe import Recipe, Schedule
from statprune.report import PruningReport, SiteReport
from statprune.selection import Selection, select

Progress = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, name of the last one)."""


@dataclass
class PruningPlan:
    """Pruned weights that have not landed: the model they belong to is unchanged."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name, as the parameter is stored: ready for `torch.func.functional_call`."""

    report: PruningReport = field(default_factory=lambda: PruningReport({}, ""))
    traced: TracedModel | None = None
    """The model's graph; None where it could not be exported."""

    def graph_module(self) -> GraphModule:
        """The model's graph, reading the pruned weights. It takes the inputs by name.

        Raises:
            TracingError: the model could not be exported.
        """
        if self.traced is None:
            raise TracingError(f"There is no graph: {self.report.fallback_reason}. Use torch.func.functional_call.")
        result = PruneLinears(self.weights)(self.traced.graph_module)
        assert result is not None
        twin: GraphModule = result.graph_module
        return twin


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    progress: Progress | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> PruningReport:
    """Prune a model in place, by a recipe that names its method; else as `auto.prune`, which is what users call."""
    landing = _Commit(model)
    return _run(model, batches, recipe or Recipe(), landing, progress, forward_context).report


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    traced: TracedModel | None = None,
    progress: Progress | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> PruningPlan:
    """What `prune` would do, with the model unchanged, by a recipe that names its method; else as `auto.plan`."""
    return _run(model, batches, recipe or Recipe(), _Twin(), progress, forward_context, traced)


class _Commit:
    """Pruned weights go into the model as they come; memory never holds a second model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.replaced: dict[str, Tensor] = {}

    def __call__(self, site: LinearSite, pruned: PrunedWeight) -> None:
        apply_(self.model, site, pruned)


class _Twin:
    """Pruned weights are kept aside, and the walk reads them in place of the model's."""

    def __init__(self) -> None:
        self.replaced: dict[str, Tensor] = {}

    def __call__(self, site: LinearSite, pruned: PrunedWeight) -> None:
        # Outside of the view: functional_call wants the parameter's own layout, in memory too.
        self.replaced[site.parameter] = site.view(pruned.weight).contiguous()


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    landing: "_Commit | _Twin",
    progress: Progress | None,
    forward_context: ForwardContext,
    traced: TracedModel | None = None,
) -> PruningPlan:
    report = PruningReport(recipe.to_dict(), recipe.schedule)
    inputs = bind_batches(model, batches)
    check_weights(model)
    with undisturbed(model):
        if traced is None:
            traced, selection = _look(model, inputs, recipe, report, forward_context)
        else:
            check_traced(model, traced, inputs)
            selection = select(traced.groups, traced.left_out, recipe)
        with _timed(report, "allocate"):
            allocation = allocate(model, traced, selection, inputs, recipe, progress=progress, forward_context=forward_context)
        selection = allocation.selection
        prune_group = _GroupPruner(model, recipe, allocation, landing, report, progress)
        _calibrate(model, traced, selection, inputs, prune_group, recipe.schedule, forward_context)
    report.left_out = list(selection.left_out)
    report.num_batches = len(inputs)
    return PruningPlan(landing.replaced, report, traced)


def check_weights(model: nn.Module) -> None:
    """Refuse, naming it, a parameter that cannot be read or written, or that holds NaN or infinity.

    Raises:
        SiteError: it is on the meta device, or was made in inference mode.
        NonFiniteError: NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SiteError(f"The parameter {name} is on the meta device and has no values. Load the weights first.")
        if parameter.is_inference():
            raise SiteError(
                f"The parameter {name} was made in torch.inference_mode, where torch lets nobody write to it from outside. "
                "Build or load the model outside of it."
            )
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise NonFiniteError(
                f"NaN or infinity in the parameter {name}. Was the checkpoint saved whole? Nothing was changed."
            )


def _look(
    model: nn.Module,
    inputs: list[ModelInputs],
    recipe: Recipe,
    report: PruningReport,
    forward_context: ForwardContext,
) -> tuple[TracedModel | None, Selection]:
    """The model's linear layers and what the recipe makes of them: by its graph, or by module hooks where it has none."""
    with _timed(report, "trace"):
        try:
            traced = trace(model, example_batch(inputs), dynamic_dims(inputs), inputs)
        except TracingError as e:
            found = find_linear_modules(model, inputs[0], forward_context=forward_context)
            hint = " Batches of one shape may do." if any(dynamic_dims(inputs)) else ""
            warnings.warn(f"{e}. Falling back to module hooks with one-shot statistics.{hint}", stacklevel=5)
            report.fallback_reason = str(e)
            report.schedule = "one-shot (module hooks)"
            return None, select(*found, recipe)
    return traced, select(traced.groups, traced.left_out, recipe)


def _calibrate(
    model: nn.Module,
    traced: TracedModel | None,
    selection: Selection,
    inputs: list[ModelInputs],
    prune_group: "_GroupPruner",
    schedule: Schedule,
    forward_context: ForwardContext,
) -> None:
    """Collect what the pruner needs, at the price of one forward pass, and prune group by group."""
    report, groups = prune_group.report, selection.groups
    if prune_group.pruner.needs is Statistic.NONE:
        report.schedule = "no statistics"
        for group in groups:
            prune_group(group, None)
        return
    started = time.perf_counter()
    try:
        if traced is None:
            needs = prune_group.pruner.needs
            observe_modules(model, groups, inputs, prune_group, needs=needs, forward_context=forward_context)
        else:
            if (
                isinstance(prune_group.landing, _Commit) and schedule != "one-shot"
            ):  # else no weight changes before the last batch
                with _timed(report, "check"):
                    walk(traced, groups, inputs[:1], lambda *_: None, forward_context=forward_context)
            started = time.perf_counter()
            walk(
                traced, groups, inputs, prune_group,
                schedule=schedule, needs=prune_group.pruner.needs,
                replaced=prune_group.landing.replaced, forward_context=forward_context,
            )  # fmt: skip
    except StatpruneError as e:
        num_pruned = len(report.sites) if isinstance(prune_group.landing, _Commit) else 0
        consequence = (
            f"{num_pruned} weights before it are pruned already: reload the model." if num_pruned else "Nothing was changed."
        )
        raise type(e)(f"{e} {consequence}") from e
    report.seconds["walk"] = time.perf_counter() - started - report.seconds["prune"]


class _GroupPruner:
    """Prunes and lands the weights of one group after the other, and writes the report."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        allocation: Allocation,
        landing: "_Commit | _Twin",
        report: PruningReport,
        progress: Progress | None,
    ) -> None:
        self.model, self.allocation, self.landing, self.report = model, allocation, landing, report
        self.pruner, self.progress = recipe.pruner(), progress
        self.own_pruners = {name: recipe.pruner(pattern) for name, pattern in allocation.patterns.items()}
        report.seconds["prune"] = 0.0

    def __call__(self, group: InputGroup, moments: InputMoments | None) -> None:
        with _timed(self.report, "prune"):
            for site in group.sites:
                weight = site.view(self.model.get_parameter(site.parameter).detach())
                try:
                    pruned = self.own_pruners.get(site.parameter, self.pruner)(weight, moments)
                except ValueError as e:
                    raise SiteError(f"{site.name}: {e}") from e
                self.report.sites.append(replace(_site_report(site, weight, pruned), pattern=self.allocation.record(site)))
                self.landing(site, pruned)
        if moments is not None and not self.report.num_tokens:
            self.report.num_tokens = int(moments.num_tokens)
        if self.progress is not None:
            self.progress(len(self.report.sites), len(self.allocation.selection.sites), group.sites[-1].name)


def _site_report(site: LinearSite, weight: Tensor, pruned: PrunedWeight) -> SiteReport:
    return SiteReport(
        name=site.name,
        parameter=site.parameter,
        shape=site.shape,
        stored=site.layout,
        num_pruned=pruned.keep.numel() - int(pruned.keep.sum()),
        num_zeros=int((pruned.weight == 0).sum()),
        energy_before=energy_sq(weight),
        energy_after=energy_sq(pruned.weight),
    )


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model can be traced and calibrated; afterwards its modes, buffers and cache settings are what they were."""
    # Lightning validates in inference mode; parameters and statistics that outlive it must be ordinary tensors.
    with torch.inference_mode(False), torch.no_grad(), eval_mode(model), without_cache(model), _buffers_kept(model):
        yield


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """A forward pass may write to buffers (a counter, a cache); calibration leaves them as they were."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy in before:
            module._buffers[name] = buffer
            if not torch.equal(buffer, copy):
                buffer.copy_(copy)


@contextlib.contextmanager
def _timed(report: PruningReport, name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[name] = report.seconds.get(name, 0.0) + time.perf_counter() - started
