"""Streams: the values of all batches, as far as the model has run, with the weights as they are or with the dense ones.

    pruned   ──embed──norm─┤ q k v ... attention ┤ o ... norm ┤ gate up ...
    dense                  └ q k v ... attention ┤ o ... norm ┤ gate up ...

At a cut a group's input is there as it is behind pruned layers, and as it is in the dense model. Until the first weight is
pruned the two are one.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from statprune.methods.experts import ExpertMoments
from statprune.methods.precision import full_precision
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.nodes import attribute, shape_of, written_to
from statprune.model.observe import Moments, fit_mask, fit_routed_mask
from statprune.model.segments import made_of_weights
from statprune.model.sites import InputGroup, LinearSite, TracedModel
from statprune.model.weights import Readable

Environment = dict[Node, Any]
"""One batch's values that a later node reads."""


class Executor:
    """Runs one node with the values of one batch."""

    def __init__(self, traced: TracedModel, weights: Readable) -> None:
        nodes = list(traced.graph_module.graph.nodes)
        self.graph_module = traced.graph_module
        self.weights = weights
        self.made_of_weights = made_of_weights(traced)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.placeholders = [node for node in placeholders if isinstance(node.meta.get("val"), Tensor)]
        self.written = written_to(nodes)

    def bind(self, batch: ModelInputs) -> Environment:
        """The batch's tensors under their nodes; a copy where the model writes to its input."""
        return {
            node: tensor.clone() if node in self.written else tensor
            for node, tensor in zip(self.placeholders, batch.tensors(), strict=True)
        }

    def copy_of(self, environment: Environment) -> Environment:
        """A batch's values to go on with in two ways; only what is written to in place is cloned."""
        written = [node for node in environment if node in self.written]
        # All at once: deepcopy keeps two views of one memory together.
        clones = copy.deepcopy([environment[node] for node in written])
        return {**environment, **dict(zip(written, clones, strict=True))}

    def run(self, node: Node, environment: Environment) -> Any:
        """The node's value."""

        def load(read: Node) -> Any:
            return self.load(read, environment)

        assert node.op == "call_function", f"an exported graph has no {node.op}"
        return node.target(*map_arg(node.args, load), **map_arg(node.kwargs, load))  # type: ignore[operator]

    def load(self, read: Node | None, environment: Environment) -> Any:
        """A value that was computed, a parameter or buffer as it is now, or a constant of the graph."""
        assert read is not None, "a group of a traced graph has a node"
        if read.op == "get_attr":
            name = str(read.target)
            return self.weights.get(name) if name in self.weights else attribute(self.graph_module, name)
        return self.run(read, environment) if read in self.made_of_weights else environment[read]


class Stream:
    """The values of all batches, computed with one set of weights."""

    def __init__(self, executor: Executor, values: list[Environment]) -> None:
        self.executor = executor
        self.values = values


def no_tokens(group: InputGroup, needs: Statistic, device: torch.device, *, has_dense: bool) -> Moments:
    """What a group's statistics begin with, for one stream or two."""
    if group.routing is not None:
        return ExpertMoments(group.sites[0].num_matrices, group.in_features, needs, device=device)
    # Tokens that a model chooses by their values, such as those of an expert, are others in the dense stream.
    is_paired = has_dense and not any(free_unbacked_symbols(size) for size in _shape(group))
    return InputMoments.zeros(
        group.in_features,
        needs,
        device=device,
        has_cross=is_paired and not all(site.residuals for site in group.sites),
        targets={site.parameter: site.shape[0] for site in group.sites if site.residuals and is_paired},
    )


def observe(
    group: InputGroup,
    batch: ModelInputs,
    streams: Sequence[Stream],
    values: Sequence[Environment],
    moments: Moments,
) -> None:
    """Add a batch's tokens to a group's statistics.

    Args:
        group: its input and its sites' residuals are there.
        batch: with the padding masks.
        streams: pruned, and perhaps dense.
        values: the batch's in each stream.
        moments: from `no_tokens`.
    """
    inputs, *others = (
        stream.executor.load(group.input_node, environment) for stream, environment in zip(streams, values, strict=True)
    )
    if isinstance(moments, ExpertMoments):
        _observe_routed(group, inputs, batch, streams[0], values[0], moments)
        return
    keep_token = fit_mask(batch.kwargs.get(group.token_mask or ""), inputs)
    moments.add(inputs, keep_token)
    if moments.cross is None and not moments.targets:
        return
    (dense,), (pruned_stream, dense_stream), (pruned_values, dense_values) = others, streams, values

    def target(site: LinearSite) -> Tensor:
        weight_OI = site.view(dense_stream.executor.weights.get(site.parameter))
        with full_precision(dense.device.type):
            target_TO: Tensor = dense.reshape(-1, dense.shape[-1]).float() @ weight_OI.float().t()
        for node in site.residuals:
            ahead = dense_stream.executor.load(node, dense_values).float()
            target_TO += (ahead - pruned_stream.executor.load(node, pruned_values)).view_as(target_TO)
        return target_TO

    targets = {site.parameter: target(site) for site in group.sites if site.parameter in moments.targets}
    moments.add_dense(inputs, dense, targets, keep_token)


def _observe_routed(
    group: InputGroup, inputs: Tensor, batch: ModelInputs, stream: Stream, values: Environment, moments: ExpertMoments
) -> None:
    """Each matrix's tokens, of the stream with pruned weights: those of the dense one may have gone to other experts."""
    assert group.routing is not None, "a stack's tokens are routed"
    rows = None if group.routing.rows is None else stream.executor.load(group.routing.rows, values)
    keep_row = fit_routed_mask(batch.kwargs.get(group.token_mask or ""), inputs, rows, group.name)
    if group.routing.ends is None:
        moments.add_batched(inputs, keep_row)
    else:
        # How many rows each expert has decides what is multiplied, so that the host has to know.
        moments.add(inputs, stream.executor.load(group.routing.ends, values).tolist(), keep_row)


def _shape(group: InputGroup) -> tuple[Any, ...]:
    assert group.input_node is not None, "a group of a traced graph has a node"
    return shape_of(group.input_node)
