"""The walk: execute the graph segment by segment over all calibration batches, and stop at every cut.

    batch 0   ──embed──norm─┤ q k v ... attention ┤ o ... norm ┤ gate up ...
    batch 1   ──embed──norm─┤ q k v ... attention ┤ o ... norm ┤ gate up ...
                            cut                   cut          cut
                            prune q k v           prune o      prune gate, up

At a cut the statistics of the next input group are complete for the whole calibration set, and they already come from
the pruned layers before it: the walk hands them out, and goes on with what was pruned meanwhile. Every node runs once per
batch: sequential calibration for the price of one forward pass. Between cuts only the values that a later node reads are kept,
so what the walk holds does not grow with the depth.

The one-shot schedule is the same loop with a single segment: every group is observed on the dense model. The block schedule
is the published protocol of Wanda and SparseGPT: a block runs once dense, with all its groups observed and its values thrown
away (a rehearsal), is pruned, and runs again for the blocks behind it. `segments` draws all three.
"""

import contextlib
import copy
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from statprune.errors import CalibrationError, first_line
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.nodes import attribute, written_to
from statprune.model.observe import ForwardContext, Observations, complete, fit_mask
from statprune.model.schedule import Schedule
from statprune.model.segments import batch_independent, made_of_weights, plan_segments
from statprune.model.sites import InputGroup, TracedModel
from statprune.model.weights import Weights
from statprune.ranks import ProcessGroup


@torch.no_grad()
def walk(
    traced: TracedModel,
    groups: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    weights: Weights,
    *,
    schedule: Schedule = "walk",
    needs: Statistic = Statistic.MOMENTS,
    process_group: ProcessGroup = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Observations:
    """Run all batches through the graph, and yield every group with its statistics where they are complete.

    Args:
        traced: the graph; it must have been traced with inputs of these names.
        groups: the groups to observe, in execution order; nodes that none of them needs never run.
        batches: on the model's device.
        weights: every parameter and buffer of the graph. What is put there between two groups is what the rest computes with.
        schedule: which pruned weights a group's statistics have seen; `Recipe.schedule` tells.
        needs: what to collect.
        process_group: of the ranks whose sums are added up.
        forward_context: entered around model code.

    Yields:
        (group, moments), in execution order; with schedule "block", a group's sites of another block come with that block.

    Raises:
        NonFiniteError: a group's input holds NaN or infinity; names the first such layer.
        CalibrationError: a batch looks up something that a table of the model does not have.
        TracingError: schedule "block", and the model writes to a buffer in a block, which would happen twice.
    """
    segments = plan_segments(traced, groups, schedule=schedule)
    executor = _Executor(traced, weights)
    values: list[dict[Node, Any]] = [executor.bind(batch) for batch in batches]
    device = next((tensor.device for tensor in batches[0].tensors()), torch.device("cpu"))
    shareable = batch_independent(traced)
    shared: dict[Any, dict[Node, Any]] = defaultdict(dict)
    moments: dict[str, InputMoments] = {}
    still_needed = Counter(group.name for segment in segments for group, _ in segment.prunes)
    for segment in segments:
        moments |= {group.name: InputMoments.zeros(group.in_features, needs, device=device) for group in segment.groups}
        with forward_context():
            for number, (batch, environment) in enumerate(zip(batches, values, strict=True)):
                common = shared[tuple(tensor.shape for tensor in batch.tensors())]
                current = executor.rehearsed(environment) if segment.is_rehearsal else environment
                for index, step in enumerate(segment.steps):
                    try:
                        if isinstance(step, InputGroup):
                            inputs = executor.load(step.input_node, current)
                            moments[step.name].add(inputs, fit_mask(batch.kwargs.get(step.token_mask or ""), inputs))
                        elif step in shareable:
                            if step not in common:
                                common[step] = executor.run(step, current)
                            current[step] = common[step]
                        else:
                            current[step] = executor.run(step, current)
                    except IndexError as e:
                        raise CalibrationError(_out_of_range(number, step, e)) from e
                    except torch.OutOfMemoryError:
                        raise
                    except RuntimeError as e:
                        raise CalibrationError(_cannot_run(number, step, e)) from e
                    for dead in segment.dies_after.get(index, ()):
                        current.pop(dead, None)
                for dead in segment.releases:
                    environment.pop(dead, None)
        gone = segment.releases if segment.is_rehearsal else itertools.chain.from_iterable(segment.dies_after.values())
        for dead, common in itertools.product(gone, shared.values()):
            common.pop(dead, None)
        for group in segment.groups:  # all, before a weight changes
            complete(group, moments[group.name], process_group)
        for group, part in segment.prunes:
            yield part, moments[group.name]
            still_needed[group.name] -= 1
            if not still_needed[group.name]:
                del moments[group.name]
        weights.release(name for name in segment.last_weights if name in weights)


class _Executor:
    """Runs one node with the values of one batch."""

    def __init__(self, traced: TracedModel, weights: Weights) -> None:
        nodes = list(traced.graph_module.graph.nodes)
        self.graph_module = traced.graph_module
        self.weights = weights
        self.made_of_weights = made_of_weights(traced)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.placeholders = [node for node in placeholders if isinstance(node.meta.get("val"), Tensor)]
        self.written = written_to(nodes)

    def bind(self, batch: ModelInputs) -> dict[Node, Any]:
        """The batch's tensors under their nodes; a copy where the model writes to its input."""
        return {
            node: tensor.clone() if node in self.written else tensor
            for node, tensor in zip(self.placeholders, batch.tensors(), strict=True)
        }

    def rehearsed(self, environment: dict[Node, Any]) -> dict[Node, Any]:
        """A copy of a batch's values to run a block with and throw away; only what is written to in place is cloned."""
        written = [node for node in environment if node in self.written]
        # All at once: deepcopy keeps two views of one memory together.
        clones = copy.deepcopy([environment[node] for node in written])
        return {**environment, **dict(zip(written, clones, strict=True))}

    def run(self, node: Node, environment: dict[Node, Any]) -> Any:
        """The node's value."""

        def load(read: Node) -> Any:
            return self.load(read, environment)

        assert node.op == "call_function", f"an exported graph has no {node.op}"
        return node.target(*map_arg(node.args, load), **map_arg(node.kwargs, load))  # type: ignore[operator]

    def load(self, read: Node | None, environment: dict[Node, Any]) -> Any:
        """A value that was computed, a parameter or buffer as it is now, or a constant of the graph."""
        assert read is not None, "a group of a traced graph has a node"
        if read.op == "get_attr":
            name = str(read.target)
            return self.weights.get(name) if name in self.weights else attribute(self.graph_module, name)
        return self.run(read, environment) if read in self.made_of_weights else environment[read]


def _out_of_range(batch: int, step: "Node | InputGroup", error: IndexError) -> str:
    return (
        f"Calibration batch {batch}: {error} (at {_place(step)}). Are there token ids beyond the "
        "vocabulary, or sequences longer than the model's context?"
    )


def _cannot_run(batch: int, step: "Node | InputGroup", error: RuntimeError) -> str:
    return (
        f"Calibration batch {batch}: {first_line(error)} (at {_place(step)}). Expected inputs of the dtype and the shape that "
        "the model computes with."
    )


def _place(step: "Node | InputGroup") -> object:
    modules = list(step.meta.get("nn_module_stack", {}).values()) if isinstance(step, Node) else []
    return modules[-1][0] if modules else step
