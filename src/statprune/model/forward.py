"""A forward pass of the whole graph, block by block over all batches, with the weights of one block in memory.

    batch 0   ──embed──┤ block 0 ┤ block 1 ┤ ... ┤ norm ── lm_head ── yielded
    batch 1   ──embed──┤ block 0 ┤ block 1 ┤ ... ┤ norm ── lm_head ── yielded

Every weight is read once, from `Weights`. Between two blocks the residual stream of all batches is held; what the model
gives is there for one batch at a time.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg
from torch.utils._pytree import tree_unflatten

from statprune.model.cuts import bytes_of, cut_into_blocks, entering
from statprune.model.inputs import ModelInputs
from statprune.model.observe import ForwardContext
from statprune.model.segments import Segment
from statprune.model.sites import TracedModel
from statprune.model.steps import Common, told
from statprune.model.streams import Environment, Executor
from statprune.model.weights import Segmented


@torch.no_grad()
def forward(
    traced: TracedModel,
    batches: Sequence[ModelInputs],
    weights: Segmented,
    *,
    forward_context: ForwardContext = contextlib.nullcontext,
    name: str = "Calibration batch",
) -> Iterator[tuple[int, Any]]:
    """Run all batches through the whole graph.

    Args:
        traced: the graph, which holds for the shapes of all batches; its parameters may be without values.
        batches: on the device that `weights` are on.
        weights: every parameter and buffer of the graph; a block's are prepared before its first batch and released behind
            its last, but for those that the next block reads too.
        forward_context: entered around model code.
        name: what errors call a batch, before its number.

    Yields:
        (the batch's number, what the model returns for it), in order; nothing here keeps a batch's outputs.

    Raises:
        CalibrationError: a batch that the model cannot run; names it, and where in the model.
        TracingError: the graph computes nothing of its inputs.
    """
    segments = cut_into_blocks(traced)
    executor, common = Executor(traced, weights), Common(traced)
    values = [executor.bind(batch) for batch in batches]
    for segment in with_weights(segments, weights):
        for number, batch in enumerate(batches):
            with forward_context():
                for index, _ in run_steps(segment, f"{name} {number}", batch, executor, common, values[number]):
                    for dead in segment.dies_after.get(index, ()):
                        values[number].pop(dead, None)
            if segment is segments[-1]:
                output = model_output(executor, values[number])
                values[number].clear()
                yield number, output
                del output  # before the next batch makes its own
        common.drop(itertools.chain.from_iterable(segment.dies_after.values()))


def with_weights(segments: Sequence[Segment], weights: Segmented) -> Iterator[Segment]:
    """Each segment while its weights are there; those that the next one reads too are not read twice."""
    reads = [[name for name in segment.weights if name in weights] for segment in segments]
    for segment, names, following in zip(segments, reads, [*reads[1:], []], strict=True):
        weights.prepare(names, following)
        try:
            yield segment
        except GeneratorExit:  # whoever runs the segments has stopped, or failed
            weights.release(names)
            raise
        weights.release([name for name in names if name not in following])


def run_steps(
    segment: Segment, name: str, batch: ModelInputs, executor: Executor, common: Common, values: Environment
) -> Iterator[tuple[int, Node]]:
    """Run a segment for one batch, whose values are added to `values`; `name` is what errors call the batch.

    Yields:
        (index, node) behind each step, when the node's value is there.

    Raises:
        CalibrationError: as `forward`.
    """
    known = common.of(batch)
    for index, step in enumerate(segment.steps):
        assert isinstance(step, Node), "no group is observed here"
        with told(name, step):
            common.take(step, known, [executor], [values])
        yield index, step


def model_output(executor: Executor, values: Environment) -> Any:
    """What the model returns, made of the values of its output nodes."""
    graph = executor.graph_module.graph
    outputs: Any = map_arg(graph.output_node().args[0], lambda node: executor.load(node, values))
    structure = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    return tree_unflatten(outputs, structure)


def bytes_between_blocks(traced: TracedModel) -> int:
    """The most that is held of one batch of the traced sizes between two blocks, in bytes; its inputs not counted."""
    segments = cut_into_blocks(traced)
    reads = entering(segments, Common(traced).nodes)
    made = {step: index for index, segment in enumerate(segments) for step in segment.steps}
    last = {read: index for index, nodes in enumerate(reads) for read in nodes}
    return max(
        (
            sum(bytes_of(node) for node, end in last.items() if node in made and made[node] < cut <= end)  # type: ignore[index]
            for cut in range(1, len(segments))
        ),
        default=0,
    )
