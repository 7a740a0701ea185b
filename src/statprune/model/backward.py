"""The backward pass block by block: `gradients.output_grams` of a model of which one block's weights are in memory.

    forward    ──embed──┤ block 0 ┤ block 1 ┤ ... ┤        what enters each block is kept, for all batches
    backward            ┤ block 0 ┤ block 1 ┤ ... ┤ norm ── lm_head ── loss
                        └─ each block runs again from what entered it, now with gradients; the gradient
                           of what enters it is handed on to the block before

Every op is that of the graph, in the order of one backward pass: a value's gradients are added up in the order in which
autograd adds them, those from later blocks first. So each Gram is that of `output_grams` bit for bit, but for

- last bits where a model runs other kernels than its graph: transformers' grouped-query attention without padding repeats no
  keys, and its graph, which has a mask, does. On a CPU, Grams differ by 4e-7 of their largest entry in float32, by 9e-3 (random
  LLaMAs) to 3e-2 (SmolLM2-135M) in bfloat16, which has 8 bits; with keys repeated in both they are the same;
- the order of adding batches, where two blocks read the same weight.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from statprune.errors import CalibrationError, TracingError, first_line
from statprune.model.cuts import cut_into_blocks, entering
from statprune.model.find import products
from statprune.model.forward import run_steps, with_weights
from statprune.model.gradients import (
    TOKENS,
    Curvature,
    Grams,
    Loss,
    first_batches,
    loss_of_logits,
    ordinary,
    refuse_unless_causal,
    refuse_unless_scalar,
)
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import predictions_of
from statprune.model.layers import Layers
from statprune.model.nodes import written_to
from statprune.model.observe import ForwardContext
from statprune.model.segments import Segment, refuse_written_buffers
from statprune.model.sites import LinearSite, TracedModel
from statprune.model.steps import Common
from statprune.model.storage import compute_device, is_dispatched, is_sharded
from statprune.model.streams import Environment, Executor
from statprune.model.weights import Original, Weights
from statprune.model.whole import skeleton
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup

_NO_STREAM = "Prune it without --stream, or with a method without gradients."


def output_grams_streamed(
    layers: Layers,
    sites: Sequence[LinearSite],
    batches: Sequence[ModelInputs],
    weights: Weights,
    *,
    loss: Loss | None = None,
    tokens: int = TOKENS,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Curvature:
    """`output_grams`, forward and backward block by block.

    In memory are one block's weights and its activations for one batch, and for all chosen batches what enters each block: for
    each token and block one vector of the residual stream.

    Args:
        layers: of a causal language model, with a graph; its parameters may be without values.
        sites: of the model.
        batches: on the model's device; the graph holds for their shapes.
        weights: every parameter and buffer of the graph, read as they were before the run (`original`). Every rank prepares the
            same ones in the same order.
        loss: none but the default: another one sees a whole model.
        tokens: as `output_grams`.
        process_group: as `output_grams`.
        progress: called after each batch in each block.
        forward_context: entered around model code.

    Raises:
        CalibrationError: a loss of the caller's; no causal language model; a batch that cannot be run.
        TracingError: there is no graph, or it does something that cannot be taken apart: it writes in place to what two blocks
            read or to a buffer, or the model turns gradients off in a part of it, which its graph does not tell.
        SiteError, NonFiniteError: as `output_grams`.
    """
    if loss is not None:
        raise CalibrationError(
            "loss-aware: a `loss` of your own is given the whole model, and streamed there is one block at a time: expected "
            "none, for the next-token loss. " + _NO_STREAM
        )
    chosen = first_batches(batches, tokens)
    refuse_unless_causal(layers.model, chosen[0])
    if layers.traced is None:
        raise TracingError(f"loss-aware, streamed: there is no graph of the model. {layers.reason}")
    # Hooks that gather or move weights run without gradients, and are no part of the model.
    lies_elsewhere = is_sharded(layers.model) or is_dispatched(layers.model)
    plain = skeleton(layers.model, compute_device(layers.model)) if lies_elsewhere else layers.model
    refuse_regions_without_gradients(plain, chosen[0])
    device = next(tensor.device for tensor in chosen[0].tensors())
    with torch.inference_mode(False), torch.no_grad():
        inputs = [ModelInputs(*tree_map(ordinary, (batch.args, batch.kwargs))) for batch in chosen]
        grams = Grams(sites, device)
        _Backward(layers.traced, sites, inputs, weights, grams).run(progress, forward_context)
    return grams.total(chosen, process_group)


class _Backward:
    """One forward pass and one backward pass over all batches."""

    def __init__(
        self,
        traced: TracedModel,
        sites: Sequence[LinearSite],
        batches: Sequence[ModelInputs],
        weights: Weights,
        grams: Grams,
    ) -> None:
        self.batches, self.weights, self.grams = batches, Original(weights), grams
        self.logits = _logits_node(traced)
        self.segments = cut_into_blocks(traced, [self.logits])
        self.executor, self.common = Executor(traced, self.weights), Common(traced)
        self.products = products(traced.graph_module, sites)
        self.carrying = _behind(traced, self.products)
        has_gradients = [any(step in self.carrying for step in segment.steps) for segment in self.segments]
        self.first = has_gradients.index(True) if any(has_gradients) else len(self.segments) - 1
        """The first segment with one of the sites; before it no gradient is asked for."""
        self.entering = entering(self.segments, self.common.nodes)
        refuse_written_buffers(traced, "the streamed backward pass runs every block twice", "a method without gradients")
        self._refuse_what_cannot_be_handed_on(traced)
        self.kept: list[Environment] = [self.executor.bind(batch) for batch in batches]
        """Of each batch, what some later segment has to begin with."""
        self.gradients: list[dict[Node, Tensor]] = [{} for _ in batches]
        """Of each batch, the gradient of what enters a segment that has run backward, by the node that made it."""

    def run(self, progress: Progress, forward_context: ForwardContext) -> None:
        last = len(self.segments) - 1
        order = [*self.segments[:last], *reversed(self.segments[self.first :])]
        for done, segment in enumerate(with_weights(order, self.weights)):
            for number, batch in enumerate(self.batches):
                if done < last:
                    with forward_context():
                        self._forward(segment, number, batch)
                else:
                    self._backward(2 * last - done, number, batch, forward_context)
                progress(done * len(self.batches) + number + 1, len(order) * len(self.batches), "gradients")
            if done >= last:
                self._forget(2 * last - done)

    def _forward(self, segment: Segment, number: int, batch: ModelInputs) -> None:
        values = self.kept[number]
        kept = {node for nodes in self.entering[self.first :] for node in nodes}
        for index, _ in run_steps(segment, _name(number), batch, self.executor, self.common, values):
            for dead in set(segment.dies_after.get(index, ())) - kept:
                values.pop(dead, None)

    @torch.enable_grad()
    def _backward(self, place: int, number: int, batch: ModelInputs, forward_context: ForwardContext) -> None:
        """Run a segment again from what entered it, and leave the gradients of that."""
        segment, gradients = self.segments[place], self.gradients[number]
        entered: dict[Node, Tensor] = {}
        values = self._begin(place, number, entered)
        with forward_context():
            for index, node in run_steps(segment, _name(number), batch, self.executor, self.common, values):
                if node in self.products:
                    self.grams.watch(self.products[node], values[node])
                for dead in segment.dies_after.get(index, ()):
                    values.pop(dead, None)
            roots: list[Tensor] = []
            seeds: list[Tensor | None] = []
            if self.logits in values:
                total = loss_of_logits(values[self.logits], batch)
                refuse_unless_scalar(total, number)
                roots.append(total)
                seeds.append(None)
        for node in [node for node in gradients if node in values]:  # made here, or handed on to later segments too
            gradient = gradients.pop(node)
            if values[node].requires_grad:  # not behind a detach
                roots.append(values[node])
                seeds.append(gradient)
        values.clear()
        if roots:
            try:
                torch.autograd.backward(roots, seeds)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                raise CalibrationError(f"loss-aware: the gradients of calibration batch {number}: {first_line(e)}.") from e
        gradients.update(entered)

    def _begin(self, place: int, number: int, entered: dict[Node, Tensor]) -> Environment:
        """A batch's values to run a segment with; in the backward pass `entered` gets their gradients."""
        values: Environment = {**self.common.of(self.batches[number])}
        same: dict[int, Tensor] = {}  # a cast that has nothing to do gives the very tensor, and its gradients are one sum
        for node in self.entering[place]:
            value = self.kept[number][node]
            if node in self.carrying and isinstance(value, Tensor) and value.is_floating_point():
                if id(value) not in same:
                    # A hook on a view of the leaf: what becomes the leaf's own `grad` may get another layout in memory, and
                    # with it other last bits in the products behind.
                    leaf = value.detach().requires_grad_()
                    same[id(value)] = alias = leaf.view_as(leaf)
                    alias.register_hook(lambda gradient, node=node: entered.__setitem__(node, gradient))
                value = same[id(value)]
            values[node] = value
        return values

    def _forget(self, place: int) -> None:
        """Drop what no segment before this one begins with."""
        still_read = {node for nodes in self.entering[self.first : place] for node in nodes}
        for values in self.kept:
            for node in self.entering[place]:
                if node not in still_read:
                    values.pop(node, None)

    def _refuse_what_cannot_be_handed_on(self, traced: TracedModel) -> None:
        written = written_to(list(traced.graph_module.graph.nodes))
        for node in dict.fromkeys(node for nodes in self.entering[self.first :] for node in nodes):
            if node in written:
                raise TracingError(
                    f"loss-aware, streamed: the model writes in place to a value ({node}) that several blocks read, and would "
                    f"do so twice. {_NO_STREAM}"
                )
            if node in self.carrying and not isinstance(node.meta.get("val"), Tensor):
                raise TracingError(
                    f"loss-aware, streamed: {node} hands several tensors from one block to the next: expected one. {_NO_STREAM}"
                )


def _name(number: int) -> str:
    return f"loss-aware: calibration batch {number}"


def _logits_node(traced: TracedModel) -> Node:
    """The node of the tensor that the model predicts with."""
    graph = traced.graph_module.graph
    leaves = [leaf.meta.get("val") if isinstance(leaf, Node) else leaf for leaf in tree_leaves(graph.output_node().args[0])]
    logits = predictions_of(tree_unflatten(leaves, graph._codegen.pytree_info.out_spec))  # type: ignore[attr-defined]
    for node in graph.output_node().all_input_nodes:
        if node.meta.get("val") is logits:
            return node
    raise TracingError("loss-aware, streamed: the graph's outputs hold no logits. " + _NO_STREAM)


def _behind(traced: TracedModel, nodes: dict[Node, LinearSite]) -> set[Node]:
    """These and what is computed from them, as far as it may carry a gradient."""
    found: set[Node] = set()
    for node in traced.graph_module.graph.nodes:
        is_behind = node in nodes or any(read in found for read in node.all_input_nodes)
        if node.op == "call_function" and is_behind and any(map(_is_floating, tree_leaves(node.meta.get("val")))):
            found.add(node)
    return found


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def refuse_regions_without_gradients(model: nn.Module, inputs: ModelInputs) -> None:
    """Refuse a model that turns gradients off (`torch.no_grad`) around something of its activations: its graph has lost that.

    The model runs once on fake tensors, which costs no arithmetic.

    Raises:
        TracingError: it does, or it cannot run so.
    """
    modes = (parameter.fake_mode for parameter in model.parameters() if isinstance(parameter, FakeTensor))
    mode: FakeTensorMode = next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)
    fake = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, (inputs.args, inputs.kwargs))
    looking = _Looking()
    try:
        with torch.inference_mode(False), torch.enable_grad(), mode, _asking(model), looking:
            model(*fake[0], **fake[1])
    except RuntimeError as e:
        raise TracingError(
            f"loss-aware, streamed: {type(model).__name__} on fake tensors: {first_line(e)}. {_NO_STREAM}"
        ) from e
    if looking.found is not None:
        raise TracingError(
            f"loss-aware, streamed: {type(model).__name__} computes without gradients in a part of it ({looking.found}), and "
            f"its graph does not tell where. {_NO_STREAM}"
        )


class _Looking(TorchFunctionMode):
    """Finds the first function that is given what has a gradient while gradients are off."""

    found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.found is None and not torch.is_grad_enabled() and any(map(_is_floating, tree_leaves(result))):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
            if given and func is not torch.Tensor.detach:
                self.found = getattr(func, "__name__", str(func))
        return result


@contextlib.contextmanager
def _asking(model: nn.Module) -> Iterator[None]:
    """Inside, every floating parameter asks for a gradient."""
    silent_ones = [one for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    for parameter in silent_ones:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in silent_ones:
            parameter.requires_grad_(False)
