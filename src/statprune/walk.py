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
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from statprune.batches import ModelInputs
from statprune.errors import CalibrationError, NonFiniteError
from statprune.graph import attribute, is_mutable, written_to
from statprune.sites import InputGroup, TracedModel
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
        CalibrationError: a batch looks up something that a table of the model does not have.
    """
    segments = plan_segments(traced, groups, one_shot=one_shot)
    executor = _Executor(traced, replaced if replaced is not None else {})
    values: list[dict[Node, Any]] = [executor.bind(batch) for batch in batches]
    shareable = _batch_independent(traced)
    shared: dict[Any, dict[Node, Any]] = defaultdict(dict)
    for segment in segments:
        moments = {group.name: _no_moments(group, batches) for group in segment.groups}
        with forward_context():
            for number, (batch, environment) in enumerate(zip(batches, values, strict=True)):
                common = shared[tuple(tensor.shape for tensor in batch.tensors())]
                for index, step in enumerate(segment.steps):
                    try:
                        if isinstance(step, InputGroup):
                            inputs = executor.load(step.input_node, environment)
                            moments[step.name].add(inputs, fit_mask(batch.kwargs.get(step.token_mask or ""), inputs))
                        elif step in shareable:
                            if step not in common:
                                common[step] = executor.run(step, environment)
                            environment[step] = common[step]
                        else:
                            environment[step] = executor.run(step, environment)
                    except IndexError as e:
                        raise CalibrationError(_out_of_range(number, step, e)) from e
                    for dead in segment.dies_after.get(index, ()):
                        environment.pop(dead, None)
        for common in shared.values():
            for dead_values in segment.dies_after.values():
                for dead in dead_values:
                    common.pop(dead, None)
        totals = [complete(group, moments.pop(group.name)) for group in segment.groups]  # all, before a weight changes
        for group, total in zip(segment.groups, totals, strict=True):
            on_group(group, total)


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
    needed = _needed(traced, groups) - _made_of_weights(traced)
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


def _made_of_weights(traced: TracedModel) -> set[Node]:
    """Transposes, casts and the like of prunable weights.

    They may stand in the graph before the cut at which their weight is pruned, so they are made when they are read.
    """
    prunable = _prunable_names(traced)
    made: set[Node] = set()
    for node in traced.graph_module.graph.nodes:
        if node.op == "get_attr" and node.target in prunable:
            made.add(node)
        elif node.op == "call_function" and not is_mutable(node):
            sources = node.all_input_nodes
            if any(read in made for read in sources) and all(read in made or read.op == "get_attr" for read in sources):
                made.add(node)
    return made


def _prunable_names(traced: TracedModel) -> dict[str, str]:
    """Every name of every site's parameter, and the name that the site has for it."""
    sites = [site for group in traced.groups for site in group.sites]
    return {name: site.parameter for site in sites for name in (site.parameter, *site.aliases)}


def _batch_independent(traced: TracedModel) -> set[Node]:
    """Nodes that read the shapes of a batch and never its values: positions, causal masks, rotary tables.

    They are computed once for all batches of a shape. A causal mask for each of 128 batches of 2048 tokens would take
    half a gigabyte.
    """
    nodes = list(traced.graph_module.graph.nodes)
    prunable = _prunable_names(traced)
    written = written_to(nodes)  # what one batch writes to, the next must not read
    independent: set[Node] = set()
    for node in nodes:
        if node in written:
            continue
        if node.op == "get_attr":
            is_independent = node.target not in prunable
        elif node.op == "call_function":
            is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            is_region = isinstance(node.target, torch._ops.HigherOrderOperator)
            is_independent = _is_size(node) or (
                not is_random and not is_region and all(read in independent for read in node.all_input_nodes)
            )
        else:
            is_independent = False
        if is_independent:
            independent.add(node)
    return independent


def _is_size(node: Node) -> bool:
    """A size that follows from the sizes of the inputs; that of what `nonzero` gives does not."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) and str(node.target).startswith("aten.sym_") and not free_unbacked_symbols(value)


class _Executor:
    """Runs one node with the values of one batch."""

    def __init__(self, traced: TracedModel, replaced: dict[str, Tensor]) -> None:
        nodes = list(traced.graph_module.graph.nodes)
        self.graph_module = traced.graph_module
        self.replaced = replaced
        self.names = _prunable_names(traced)
        self.made_of_weights = _made_of_weights(traced)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.placeholders = [node for node in placeholders if isinstance(node.meta.get("val"), Tensor)]
        self.written = written_to(nodes)

    def bind(self, batch: ModelInputs) -> dict[Node, Any]:
        """The batch's tensors under their nodes; a copy where the model writes to its input."""
        return {
            node: tensor.clone() if node in self.written else tensor
            for node, tensor in zip(self.placeholders, batch.tensors(), strict=True)
        }

    def run(self, node: Node, environment: dict[Node, Any]) -> Any:
        """The node's value."""

        def load(read: Node) -> Any:
            return self.load(read, environment)

        assert node.op == "call_function", f"an exported graph has no {node.op}"
        return node.target(*map_arg(node.args, load), **map_arg(node.kwargs, load))  # type: ignore[operator]

    def load(self, read: Node | None, environment: dict[Node, Any]) -> Any:
        """A value that was computed, or a parameter or buffer as it is now."""
        assert read is not None, "a group of a traced graph has a node"
        if read.op == "get_attr":
            name = self.names.get(str(read.target), str(read.target))
            return self.replaced[name] if name in self.replaced else attribute(self.graph_module, read.target)
        return self.run(read, environment) if read in self.made_of_weights else environment[read]


def _no_moments(group: InputGroup, batches: Sequence[ModelInputs]) -> InputMoments:
    device = next((tensor.device for tensor in batches[0].tensors()), torch.device("cpu"))
    return InputMoments.zeros(group.in_features, device=device)


def fit_mask(mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """The padding mask [batch, length] in the order of a linear's inputs; None where these are no such tokens (pooled ones)."""
    if mask is None:
        return None
    positions, expected = ([size for size in shape if size != 1] for shape in (inputs.shape[:-1], mask.shape))
    if positions == expected or positions == [mask.numel()]:
        return mask
    return mask.t() if positions == expected[::-1] else None  # [length, batch], as in XLNet


def _out_of_range(batch: int, step: "Node | InputGroup", error: IndexError) -> str:
    modules = list(step.meta.get("nn_module_stack", {}).values()) if isinstance(step, Node) else []
    return (
        f"Calibration batch {batch}: {error} (at {modules[-1][0] if modules else step}). Are there token ids beyond the "
        "vocabulary, or sequences longer than the model's context?"
    )
