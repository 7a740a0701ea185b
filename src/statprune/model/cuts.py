"""Cuts between blocks: where a whole forward pass is cut so that one block's weights are in memory, and few values cross.

    tokens ─ embed ┤ norm ─ q k v ─ ... ─ down ─ + ┤ norm ─ q k v ─ ... ─ down ─ + ┤ norm ─ lm_head
                   └ the residual stream alone     └ here too                      └

The cuts of a schedule (`segments`) stand where statistics are complete; these stand where least crosses, so that a normed
copy of the residual stream is made again rather than kept.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from statprune.errors import TracingError
from statprune.model.nodes import attribute, written_to
from statprune.model.schedule import block_of
from statprune.model.segments import (
    Segment,
    batch_independent,
    made_of_weights,
    mark_last_reads,
    mark_weights,
    needed_for,
    weights_read,
)
from statprune.model.sites import TracedModel


def cut_into_blocks(traced: TracedModel, outputs: Sequence[Node] | None = None) -> list[Segment]:
    """The graph up to its outputs: a segment for each block (`schedule.block_of`), one for each weight outside of any.

    A segment drops what nothing reads after it; the outputs nobody drops.

    Args:
        traced: the graph.
        outputs: the nodes whose values are wanted; by default all outputs of the model.

    Raises:
        TracingError: no output depends on the model's inputs.
    """
    outputs, made = outputs_of(traced) if outputs is None else outputs, made_of_weights(traced)
    needed = needed_for(traced, outputs) - made
    steps = [node for node in traced.graph_module.graph.nodes if node in needed and node.op == "call_function"]
    if not set(outputs) & set(steps):
        raise TracingError("The graph computes no output of the model: there is nothing to run.")
    segments, begin = [], 0
    for end in [*_cuts(traced, steps, made, outputs), len(steps)]:
        segments.append(Segment(list(steps[begin:end])))
        begin = end
    mark_last_reads(segments)
    kept = set(outputs)
    for segment in segments:
        segment.dies_after = {
            index: [node for node in dying if node not in kept] for index, dying in segment.dies_after.items()
        }
    mark_weights(segments, made)
    return segments


def outputs_of(traced: TracedModel) -> list[Node]:
    """The nodes that are the model's outputs, in order; a model may have constants among its outputs too."""
    return list(traced.graph_module.graph.output_node().all_input_nodes)


def entering(segments: Sequence[Segment], shared: set[Node]) -> list[list[Node]]:
    """For each segment, the values that its steps read and that were computed in one before it, or are inputs of the model.

    Args:
        segments: of one graph, in order.
        shared: nodes that are no batch's own (`batch_independent`).
    """
    found = []
    for segment in segments:
        own = set(segment.steps)
        reads = dict.fromkeys(read for step in segment.steps if isinstance(step, Node) for read in step.all_input_nodes)
        found.append([read for read in reads if read not in own and read not in shared and _is_value(read)])
    return found


def _is_value(node: Node) -> bool:
    return node.op in ("placeholder", "call_function")


def _cuts(traced: TracedModel, steps: Sequence[Node], made: set[Node], outputs: Sequence[Node]) -> list[int]:
    """Where a segment begins, but for the first: between the last weight of one block and the first weight of the next."""
    anchors: list[tuple[int, str]] = []
    for index, step in enumerate(steps):
        for name in weights_read(step.all_input_nodes, made):
            weight = attribute(traced.graph_module, name)
            if isinstance(weight, nn.Parameter) and weight.ndim > 1:  # norms and biases are small, and go with what is around
                anchors.append((index, block_of(name)))
    crossing = _bytes_before(traced, steps, outputs)
    return [
        min(range(last + 1, first + 1), key=crossing.__getitem__)
        for (last, before), (first, behind) in itertools.pairwise(anchors)
        if before != behind and last < first
    ]


def _bytes_before(traced: TracedModel, steps: Sequence[Node], outputs: Sequence[Node]) -> list[tuple[int, int]]:
    """For each step, the bytes of one batch's values that are there just before it and are read by it or later.

    Before all of them come those of values that something writes to in place: a block that runs twice would do so twice.
    """
    shared, written = batch_independent(traced), written_to(list(traced.graph_module.graph.nodes))
    made_at = {step: index for index, step in enumerate(steps)}
    last_read = {read: index for index, step in enumerate(steps) for read in step.all_input_nodes}
    last_read |= dict.fromkeys(outputs, len(steps))
    crossing = [
        (made_at[node] + 1, last + 1, node) for node, last in last_read.items() if node in made_at and node not in shared
    ]

    def totals(spans: Iterable[tuple[int, int, Node]]) -> list[int]:
        change = [0] * (len(steps) + 2)
        for begin, end, node in spans:
            change[begin] += bytes_of(node)
            change[end] -= bytes_of(node)
        return list(itertools.accumulate(change))

    return list(zip(totals(span for span in crossing if span[2] in written), totals(crossing), strict=True))


def bytes_of(node: Node) -> int:
    """Of a node's tensor, or of its tuple of them, for the sizes that were traced with; 0 where a size depends on values."""
    tensors = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return sum(math.prod(map(_number, tensor.shape)) * tensor.element_size() for tensor in tensors)


def _number(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint  # a symbol's is what was traced with
    return hint if isinstance(hint, int) else 0
