"""The walk: execute the graph segment by segment over all calibration batches, and prune at every cut.

    batch 0   ──embed──norm─┤ q k v ... attention ┤ o ... norm ┤ gate up ...
    batch 1   ──embed──norm─┤ q k v ... attention ┤ o ... norm ┤ gate up ...
                            cut                   cut          cut
                            prune q k v           prune o      prune gate, up

At a cut the statistics of the next input group are complete for the whole calibration set, and they already come from
the pruned layers before it. Every node runs once per batch: sequential calibration for the price of one forward pass.
Between cuts only the values that a later node reads are kept, so what the walk holds does not grow with the depth.

The one-shot schedule is the same loop with a single segment: every group is observed on the dense model.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from statprune.batches import ModelInputs
from statprune.errors import NonFiniteError
from statprune.sites import InputGroup, TracedModel, attribute, is_mutable
from statprune.statistics import InputMoments

OnGroup = Callable[[InputGroup, InputMoments], None]
"""Called once for each input group, in execution order, with its complete statistics."""

ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Entered around every stretch of model code: Lightning's precision plugin, or nothing."""


@dataclass
class Segment:
    """A stretch of the graph that every batch runs through before the next stretch begins."""

    steps: list["Node | InputGroup"] = field(default_factory=list)
    """A node is executed; a group's tensor is added to the group's statistics."""

    dies_after: dict[int, list[Node]] = field(default_factory=dict)
    """The values that nothing reads after a step, by the step's index."""

    @property
    def groups(self) -> list[InputGroup]:
        """The groups whose statistics are complete when every batch has run through."""
        return [step for step in self.steps if isinstance(step, InputGroup)]


@torch.no_grad()
def walk(
    traced: TracedModel,
    groups: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    on_group: OnGroup,
    *,
    one_shot: bool = False,
    replaced: dict[str, Tensor] | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> None:
    """Run all batches through the graph once, and hand every group its statistics.

    Args:
        traced: the graph; it must have been traced with inputs of these names.
        groups: the groups to observe, in execution order; nodes that none of them needs never run.
        batches: on the model's device.
        on_group: prunes the group's weights. What it writes to the model, or puts into `replaced`, is what the rest of the
            graph computes with.
        one_shot: observe every group on the dense model, and only then call `on_group` for each.
        replaced: weights by parameter name that the graph reads in place of the model's own; read at every use.
        forward_context: entered around model code.

    Raises:
        NonFiniteError: a group's input holds NaN or infinity; names the first such layer.
    """
    segments = plan_segments(traced, groups, one_shot=one_shot)
    executor = _Executor(traced, replaced if replaced is not None else {})
    values: list[dict[Node, Any]] = [executor.bind(batch) for batch in batches]
    shareable = _batch_independent(traced)
    shared: dict[Any, dict[Node, Any]] = defaultdict(dict)
    for segment in segments:
        moments = {group.name: _no_moments(group, batches) for group in segment.groups}
        with forward_context():
            for batch, environment in zip(batches, values, strict=True):
                common = shared[tuple(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in batch.leaves())]
                for index, step in enumerate(segment.steps):
                    if isinstance(step, InputGroup):
                        moments[step.name].add(environment[step.input_node], _token_mask(step, batch, environment))  # type: ignore[index]
                    elif step in shareable:
                        if step not in common:
                            common[step] = executor.run(step, environment)
                        environment[step] = common[step]
                    else:
                        environment[step] = executor.run(step, environment)
                    for dead in segment.dies_after.get(index, ()):
                        environment.pop(dead, None)
        for common in shared.values():
            for dead_values in segment.dies_after.values():
                for dead in dead_values:
                    common.pop(dead, None)
        for group in segment.groups:
            on_group(group, complete(group, moments.pop(group.name)))


def complete(group: InputGroup, moments: InputMoments) -> InputMoments:
    """A group's statistics over all ranks, checked.

    Raises:
        NonFiniteError: NaN or infinity entered the group.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for total in (moments.num_tokens, moments.sum, moments.sum_sq):
            torch.distributed.all_reduce(total)
    if not moments.is_finite():
        raise NonFiniteError(
            f"NaN or infinity in the input of {group.name}, the first layer where it shows. Look at what comes just before "
            "it; in float16, try bfloat16 or float32."
        )
    return moments


def plan_segments(traced: TracedModel, groups: Sequence[InputGroup], *, one_shot: bool = False) -> list[Segment]:
    """Cut the graph just before each group's first reader; only nodes that some group's input needs are in it."""
    observed_at: dict[Node, list[InputGroup]] = defaultdict(list)
    for group in groups:
        observed_at[group.first_reader].append(group)  # type: ignore[index]
    needed = _needed(traced, groups)
    segments = [Segment()]
    for node in traced.graph_module.graph.nodes:
        for group in observed_at[node]:
            segments[-1].steps.append(group)
            if not one_shot:
                segments.append(Segment())
        if node in needed and node.op not in ("placeholder", "get_attr", "output"):
            segments[-1].steps.append(node)
    last_read: dict[Node, tuple[Segment, int]] = {}
    for segment in segments:
        for index, step in enumerate(segment.steps):
            for read in [step.input_node] if isinstance(step, InputGroup) else [*step.all_input_nodes, step]:
                last_read[read] = (segment, index)  # type: ignore[index]
    for node, (segment, index) in last_read.items():
        segment.dies_after.setdefault(index, []).append(node)
    return [segment for segment in segments if segment.groups]


def _needed(traced: TracedModel, groups: Sequence[InputGroup]) -> set[Node]:
    """The groups' inputs, whatever writes to a tensor in place, and everything that these read."""
    nodes = traced.graph_module.graph.nodes
    frontier = [group.input_node for group in groups if group.input_node] + [node for node in nodes if is_mutable(node)]
    needed: set[Node] = set()
    while frontier:
        node = frontier.pop()
        if node not in needed:
            needed.add(node)
            frontier.extend(node.all_input_nodes)
    return needed


def _batch_independent(traced: TracedModel) -> set[Node]:
    """Nodes that read the shapes of a batch and never its values: positions, causal masks, rotary tables.

    They are computed once for all batches of a shape. A causal mask for each of 128 batches of 2048 tokens would take
    half a gigabyte.
    """
    nodes = list(traced.graph_module.graph.nodes)
    if any(is_mutable(node) for node in nodes):
        return set()  # a shared value could be written to by one batch and read by the next
    prunable = {site.parameter for group in traced.groups for site in group.sites}
    independent: set[Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            is_independent = node.target not in prunable
        elif node.op == "call_function":
            is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            is_shape = not isinstance(node.meta.get("val"), Tensor) and "sym_size" in str(node.target)
            is_independent = is_shape or (not is_random and all(read in independent for read in node.all_input_nodes))
        else:
            is_independent = False
        if is_independent:
            independent.add(node)
    return independent


class _Executor:
    """Runs one node with the values of one batch."""

    def __init__(self, traced: TracedModel, replaced: dict[str, Tensor]) -> None:
        self.graph_module = traced.graph_module
        self.placeholders = [node for node in traced.graph_module.graph.nodes if node.op == "placeholder"]
        self.replaced = replaced

    def bind(self, batch: ModelInputs) -> dict[Node, Any]:
        return dict(zip(self.placeholders, batch.leaves(), strict=True))

    def run(self, node: Node, environment: dict[Node, Any]) -> Any:
        def load(read: Node) -> Any:
            if read.op != "get_attr":
                return environment[read]
            if str(read.target) in self.replaced:
                return self.replaced[str(read.target)]
            return attribute(self.graph_module, read.target)

        assert node.op == "call_function", f"an exported graph has no {node.op}"
        return node.target(*map_arg(node.args, load), **map_arg(node.kwargs, load))  # type: ignore[operator]


def _no_moments(group: InputGroup, batches: Sequence[ModelInputs]) -> InputMoments:
    device = next((leaf.device for leaf in batches[0].leaves() if isinstance(leaf, Tensor)), torch.device("cpu"))
    return InputMoments.zeros(group.in_features, device=device)


def _token_mask(group: InputGroup, batch: ModelInputs, environment: dict[Node, Any]) -> Tensor | None:
    """The batch's padding mask, where the tensor has one position for each of its elements (a pooled one has not)."""
    mask = batch.kwargs.get(group.token_mask or "")
    inputs = environment[group.input_node]  # type: ignore[index]
    return mask if mask is not None and mask.numel() * group.in_features == inputs.numel() else None
