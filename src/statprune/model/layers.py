"""A model's linear layers: found by its graph, or by module hooks where it has none. That is decided here, and nowhere else."""

import contextlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.fx import GraphModule

from statprune.errors import TracingError
from statprune.methods.statistics import Statistic
from statprune.model.blocks import observe_blocks
from statprune.model.find_stacks import find_stacks
from statprune.model.hooks import find_linear_modules, observe_modules
from statprune.model.inputs import ModelInputs, dynamic_dims, example_batch
from statprune.model.kinds import adapter_parameters, has_values
from statprune.model.nodes import attribute
from statprune.model.observe import ForwardContext, Observations
from statprune.model.offload import ON_DEVICE, Offload
from statprune.model.schedule import BLOCK_BY_HOOKS, ONE_SHOT_BY_HOOKS, Schedule
from statprune.model.sites import InputGroup, LeftOut, TracedModel
from statprune.model.stacks import Stacks
from statprune.model.storage import compute_device, is_dispatched, is_sharded
from statprune.model.trace import check_traced, trace
from statprune.model.transform import PruneLinears
from statprune.model.undisturbed import undisturbed
from statprune.model.walk import walk
from statprune.model.weights import InPlace, Weights, named_tensors
from statprune.model.whole import skeleton
from statprune.ranks import ProcessGroup


@dataclass(frozen=True)
class Layers:
    """The linear layers of one model, and how their inputs are observed."""

    model: nn.Module

    groups: tuple[InputGroup, ...]
    """In execution order."""

    left_out: tuple[LeftOut, ...]
    """Every other weight with two or more dimensions, and why."""

    traced: TracedModel | None = None
    """The graph; None where the model cannot be exported, and module hooks observe it."""

    reason: str | None = None
    """Why there is no graph."""

    offload: Offload = ON_DEVICE
    """Where the values of batches wait between two groups, along a graph."""

    stacks: Stacks | None = None
    """The blocks of a model without a graph, where they can be run by themselves."""

    def schedule(self, wanted: Schedule, needs: Statistic) -> str:
        """What a report calls the schedule that `observe` follows where this one is wanted."""
        if not needs:
            return "no statistics"
        if self.traced is not None:
            return wanted
        return ONE_SHOT_BY_HOOKS if self._stacks_for(wanted) is None else BLOCK_BY_HOOKS

    def _stacks_for(self, schedule: Schedule) -> Stacks | None:
        """The blocks to go by without a graph; None where the dense model is observed at once."""
        return None if schedule == "one-shot" else self.stacks

    def observe(
        self,
        groups: Sequence[InputGroup],
        inputs: Sequence[ModelInputs],
        *,
        schedule: Schedule = "walk",
        needs: Statistic = Statistic.MOMENTS,
        weights: Weights | None = None,
        finished: Container[str] = (),
        process_group: ProcessGroup = None,
        forward_context: ForwardContext = contextlib.nullcontext,
    ) -> Observations:
        """Yield each group, in execution order, with the statistics of its inputs over all batches and ranks.

        Args:
            groups: of this model, perhaps with some of their sites only.
            inputs: calibration data, on the model's device (`bind_batches`).
            schedule: which pruned weights the statistics have seen (see `walk`). Without a graph "walk" is "block", and both
                are "one-shot" where the model's blocks cannot be run by themselves.
            needs: what to collect; with `Statistic.NONE` nothing is run, and the statistics are None. `Statistic.CROSS` runs
                the dense model beside the pruned one, where there is a graph and the schedule prunes on the way.
            weights: what is computed with; by default the model's own. What is put there between two groups counts.
            finished: parameters that are pruned already (see `walk`); in one-shot without a graph all are observed again.
            process_group: of the ranks whose sums are added up.
            forward_context: entered around model code.

        Raises:
            NonFiniteError: a group's input holds NaN or infinity; names the first such layer.
            CalibrationError: the model cannot run a batch, or calls its blocks otherwise than for the first one.
            TracingError: schedule "block" or `Statistic.CROSS`, and a model that writes to its buffers.
        """
        if not needs:
            yield from ((group, None) for group in groups)
        elif self.traced is None and (stacks := self._stacks_for(schedule)) is not None:
            yield from observe_blocks(
                self.model, stacks, groups, inputs,
                weights=weights, needs=needs, finished=finished, process_group=process_group, forward_context=forward_context,
            )  # fmt: skip
        elif self.traced is None:
            yield from observe_modules(
                self.model, groups, inputs, needs=needs, process_group=process_group, forward_context=forward_context
            )
        else:
            yield from walk(
                self.traced, groups, inputs, weights or InPlace(self.model),
                schedule=schedule, needs=needs, finished=finished, process_group=process_group, forward_context=forward_context,
                offload=self.offload,
            )  # fmt: skip

    def graph_module(self, pruned: Mapping[str, Tensor]) -> GraphModule:
        """The model's graph, reading these weights in the place of the model's own; it takes the inputs by name.

        Raises:
            TracingError: the model could not be exported.
        """
        if self.traced is None:
            raise TracingError(f"There is no graph: {self.reason}. Use torch.func.functional_call.")
        # The graph may have been traced from another instance of the model.
        graph_module, own = self.traced.graph_module, named_tensors(self.model)
        read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"} & own.keys()
        read -= pruned.keys()
        own = {name: own[name] for name in read if own[name] is not attribute(graph_module, name)}
        # Pruned ones last: under its other names a tied weight is among the model's own as well.
        result = PruneLinears({**own, **pruned})(graph_module)
        assert result is not None
        twin: GraphModule = result.graph_module
        return twin


def find_layers(
    model: nn.Module,
    inputs: Sequence[ModelInputs],
    *,
    traced: Layers | TracedModel | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Layers:
    """Find a model's linear layers: by its graph, or where it cannot be exported by running a batch or two with module hooks.

    The parameters of adapters (peft) are left out.

    Args:
        model: any module; it is left as it was.
        inputs: what the layers will be observed with; the graph holds for all of their shapes.
        traced: what was found for this model before, or for another instance of it, which saves the export.
        forward_context: entered around model code, where it is run.

    Raises:
        TracingError: `traced` is of another architecture, or does not hold for the inputs; or the weights are sharded, or
            where accelerate has put them, and the model cannot be exported.
        CalibrationError: the model cannot be exported, nor run a batch.
    """
    if isinstance(traced, Layers):
        if traced.traced is None and traced.model is model:
            return traced
        traced = traced.traced
    with undisturbed(model):
        # Neither hooks that gather or move weights, nor the parts of them that are here, belong into a graph.
        whole = skeleton(model, compute_device(model)) if is_sharded(model) or is_dispatched(model) else model
        if traced is not None:
            check_traced(whole, traced, inputs)
            return _without_adapters(Layers(model, traced.groups, traced.left_out, traced))
        try:
            found = trace(whole, example_batch(inputs), dynamic_dims(inputs), inputs)
        except TracingError as e:
            if whole is not model:
                kind = "sharded" if is_sharded(model) else "spread or offloaded by accelerate"
                raise TracingError(
                    f"{e}, and without a graph its weights, which are {kind}, cannot be pruned. Load or keep them whole on one "
                    "device."
                ) from e
            groups, left_out = find_linear_modules(model, inputs[0], forward_context=forward_context)
            stacks, way = _way_by_hooks(model, inputs, forward_context)
            hint = " Batches of one shape may do." if any(dynamic_dims(inputs)) else ""
            reason = f"{e}. Falling back to module hooks{way}.{hint}"
            return _without_adapters(Layers(model, tuple(groups), tuple(left_out), None, reason, stacks=stacks))
        return _without_adapters(Layers(model, found.groups, found.left_out, found))


def _way_by_hooks(
    model: nn.Module, inputs: Sequence[ModelInputs], forward_context: ForwardContext
) -> tuple[Stacks | None, str]:
    """The blocks of a model without a graph, where it can go by them, and what is said of it."""
    if not has_values(model):
        return None, ", block by block where the blocks can be run by themselves, which shows with its weights only"
    stacks = find_stacks(model, inputs, forward_context=forward_context)
    if isinstance(stacks, str):
        return None, f" with one-shot statistics, for its blocks cannot be run by themselves: {stacks}"
    return stacks, f", where schedules walk and block go by {stacks}"


def _without_adapters(layers: Layers) -> Layers:
    adapters = adapter_parameters(layers.model)
    if not adapters:
        return layers
    sites = [site for group in layers.groups for site in group.sites if site.parameter in adapters]
    left_out = [LeftOut(site.name, site.shape, f"part of an adapter: {adapters[site.parameter]}") for site in sites]
    kept = [
        replace(group, sites=tuple(site for site in group.sites if site.parameter not in adapters)) for group in layers.groups
    ]
    return replace(layers, groups=tuple(group for group in kept if group.sites), left_out=(*layers.left_out, *left_out))
