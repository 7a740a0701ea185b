"""Segments: where a schedule cuts the graph, what runs in between, and what each value is kept for."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from statprune.errors import TracingError
from statprune.model.nodes import is_mutable, written_to
from statprune.model.schedule import Schedule, blocks
from statprune.model.sites import InputGroup, TracedModel


@dataclass
class Segment:
    """A stretch of the graph that every batch runs through before the next stretch begins."""

    steps: list["Node | InputGroup"] = field(default_factory=list)
    """A node is executed; a group's tensor is added to the group's statistics."""

    dies_after: dict[int, list[Node]] = field(default_factory=dict)
    """The values that nothing reads after a step, by the step's index."""

    is_rehearsal: bool = False
    """Whether the values made here are thrown away, because these steps run again with pruned weights."""

    prunes: list[tuple[InputGroup, InputGroup]] = field(default_factory=list)
    """(the group that was observed, its sites to prune now), when every batch has run through."""

    releases: list[Node] = field(default_factory=list)
    """Values from before a rehearsal that nothing reads after it."""

    weights: list[str] = field(default_factory=list)
    """Parameters and buffers, by the graph's names, that its steps and its pruning read."""

    last_weights: list[str] = field(default_factory=list)
    """Parameters and buffers, by the graph's names, that nothing reads after this segment and its pruning."""

    @property
    def groups(self) -> list[InputGroup]:
        """The groups whose statistics are complete when every batch has run through."""
        return [step for step in self.steps if isinstance(step, InputGroup)]


def plan_segments(
    traced: TracedModel, groups: Sequence[InputGroup], *, schedule: Schedule = "walk", has_dense: bool = False
) -> list[Segment]:
    """Cut the graph where the schedule prunes, just before a group's first reader; only nodes that a group's input needs run.

    With `has_dense` a second stream will run, and groups read their sites' residual streams as well.

    Raises:
        TracingError: as `walk`.
    """
    read = [node for group in groups for node in _reads(group, has_dense=has_dense)]
    needed = needed_for(traced, read) - made_of_weights(traced)
    observed_at: dict[Node, list[InputGroup]] = defaultdict(list)
    for group in groups:
        observed_at[group.first_reader].append(group)  # type: ignore[index]
    steps: list[Node | InputGroup] = []
    for node in traced.graph_module.graph.nodes:
        steps += observed_at[node]
        if node in needed and node.op not in ("placeholder", "get_attr", "output"):
            steps.append(node)
    origin = {group.first_reader: group for group in groups}
    stages: dict[Schedule, list[list[tuple[InputGroup, InputGroup]]]] = {
        "walk": [[(group, group)] for group in groups],
        "block": [[(origin[part.first_reader], part) for part in members] for members in blocks(groups)],
        "one-shot": [[(group, group) for group in groups]],
    }
    segments, cut = [], 0
    seen: set[int] = set()
    for pairs in stages[schedule]:
        stage = [group for group, _ in pairs if id(group) not in seen]
        seen |= {id(group) for group in stage}
        if not stage:
            segments.append(Segment(prunes=pairs))
            continue
        first, last = ([step is group for step in steps].index(True) for group in (stage[0], stage[-1]))
        observed = {id(group) for group in stage}
        if schedule == "block" and first < last:
            segments.append(Segment([step for step in steps[cut:first] if isinstance(step, Node)]))
            segments.append(Segment(steps[first : last + 1], is_rehearsal=True, prunes=pairs))
            cut = first
        else:
            observing = [step for step in steps[cut : last + 1] if isinstance(step, Node) or id(step) in observed]
            segments.append(Segment(observing, prunes=pairs))
            cut = last + 1
    mark_last_reads(segments, has_dense=has_dense)
    mark_weights(segments, made_of_weights(traced), has_dense=has_dense)
    if any(segment.is_rehearsal for segment in segments):
        refuse_written_buffers(traced, "schedule 'block' runs every block twice", "schedule 'walk'")
    if has_dense:
        refuse_written_buffers(traced, "the dense target runs the model twice", "target 'pruned'")
    return segments


def _reads(step: "Node | InputGroup", *, has_dense: bool) -> list[Node]:
    """What a step reads; a group its input, and with a dense stream what its sites' results are added to."""
    if isinstance(step, Node):
        return step.all_input_nodes
    assert step.input_node is not None, "a group of a traced graph has a node"
    return [*step.reads, *(node for site in step.sites for node in site.residuals if has_dense)]


def mark_last_reads(segments: Sequence[Segment], *, has_dense: bool = False) -> None:
    """Fill in what each segment drops, and after which of its steps."""
    last_read: dict[Node, tuple[Segment, int]] = {}
    for segment in segments:
        in_here: dict[Node, tuple[Segment, int]] = {}
        for index, step in enumerate(segment.steps):
            for read in _reads(step, has_dense=has_dense):
                in_here[read] = (segment, index)
            if isinstance(step, Node):
                in_here[step] = (segment, index)
        last_read |= in_here
        if segment.is_rehearsal:  # works on copies, so what it does not read again it may drop
            for node, (_, index) in in_here.items():
                segment.dies_after.setdefault(index, []).append(node)
    for node, (segment, index) in last_read.items():
        if segment.is_rehearsal:
            segment.releases.append(node)
        else:
            segment.dies_after.setdefault(index, []).append(node)


def mark_weights(segments: Sequence[Segment], made: set[Node], *, has_dense: bool = False) -> None:
    """Fill in which weights each segment reads, and which nothing reads after it; `made` is `made_of_weights`."""
    last: dict[str, Segment] = {}
    for segment in segments:
        names = [name for step in segment.steps for name in weights_read(_reads(step, has_dense=has_dense), made)]
        names += [name for _, part in segment.prunes for site in part.sites for name in (site.parameter, *site.aliases)]
        segment.weights = list(dict.fromkeys(names))
        last.update(dict.fromkeys(segment.weights, segment))
    for name, segment in last.items():
        segment.last_weights.append(name)


def weights_read(nodes: Iterable[Node], made: set[Node]) -> Iterator[str]:
    """The parameters and buffers among what a step reads, by the graph's names, and those that it is made of."""
    for node in nodes:
        if node.op == "get_attr":
            yield str(node.target)
        elif node in made:
            yield from weights_read(node.all_input_nodes, made)


def refuse_written_buffers(traced: TracedModel, why: str, instead: str) -> None:
    """Raise TracingError where a model writes to a buffer, which would happen twice."""
    for node in written_to(list(traced.graph_module.graph.nodes)):
        if node.op == "get_attr":
            raise TracingError(f"{why}, and this model writes to its buffer {node.target} when it runs: use {instead}.")


def needed_for(traced: TracedModel, nodes: Sequence[Node]) -> set[Node]:
    """These, whatever writes to a tensor in place, and everything that these read."""
    frontier = [*nodes, *(node for node in traced.graph_module.graph.nodes if is_mutable(node))]
    needed: set[Node] = set()
    while frontier:
        node = frontier.pop()
        if node not in needed:
            needed.add(node)
            frontier.extend(node.all_input_nodes)
    return needed


def made_of_weights(traced: TracedModel) -> set[Node]:
    """Transposes, casts and the like of prunable weights.

    They may stand in the graph before the cut at which their weight is pruned, so they are made when they are read.
    """
    prunable = prunable_names(traced)
    made: set[Node] = set()
    for node in traced.graph_module.graph.nodes:
        if node.op == "get_attr" and node.target in prunable:
            made.add(node)
        elif node.op == "call_function" and not is_mutable(node):
            sources = node.all_input_nodes
            if any(read in made for read in sources) and all(read in made or read.op == "get_attr" for read in sources):
                made.add(node)
    return made


def prunable_names(traced: TracedModel) -> dict[str, str]:
    """Every name of every site's parameter, and the name that the site has for it."""
    sites = [site for group in traced.groups for site in group.sites]
    return {name: site.parameter for site in sites for name in (site.parameter, *site.aliases)}


def batch_independent(traced: TracedModel) -> set[Node]:
    """Nodes that read the shapes of a batch and never its values: positions, causal masks, rotary tables.

    They are computed once for all batches of a shape. A causal mask for each of 128 batches of 2048 tokens would take
    half a gigabyte.
    """
    nodes = list(traced.graph_module.graph.nodes)
    prunable = prunable_names(traced)
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
