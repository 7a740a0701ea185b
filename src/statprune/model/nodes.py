"""Questions about the nodes of an exported graph."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

CASTS = {
    aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default,
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
}  # fmt: skip
"""Ops that hand on the same numbers in the same shape."""

SAME_TOKENS = CASTS | {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.dropout.default}
"""Ops that hand on the same tokens with the same channels, where the last dimension stays: a linear behind them reads what
stands before them."""


def attribute(graph_module: GraphModule, target: Any) -> Any:
    """What a `get_attr` node reads."""
    value: Any = graph_module
    for part in str(target).split("."):
        value = getattr(value, part)
    return value


def is_mutable(node: Node) -> bool:
    """Whether the node writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def written_to(nodes: Sequence[Node]) -> set[Node]:
    """The nodes whose values some node writes to in place, be it through a view."""
    owner: dict[Node, Node] = {}
    for node in nodes:
        source = _same_memory(node)
        owner[node] = node if source is None else owner[source]
    written = {
        owner[value]
        for node in nodes
        if is_mutable(node)
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False)  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node)
    }
    return {node for node in nodes if owner[node] in written}


def _same_memory(node: Node) -> Node | None:
    """The argument whose memory the result may share."""
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(result.alias_info is not None for result in schema.returns)
    # Their schemas promise a fresh tensor, and they hand back what came in where there is nothing to do.
    is_view = is_view or node.target in (aten.dropout.default, aten.type_as.default, operator.getitem)
    return next(iter(node.all_input_nodes), None) if is_view else None


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of a node's value; empty where that is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def op_name(node: Node) -> str:
    """`linear` for `aten.linear.default`, `grouped_mm` for `transformers.grouped_mm.default`."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema else str(getattr(node.target, "__name__", node.target))


def storages_of(node: Node) -> dict[int, Any]:
    """The memory that a node's value lies in: its size in bytes, by what tells one from the other in the graph."""
    tensors = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def is_number(node: Node) -> bool:
    """Whether the value is a size or another number, and no tensor."""
    return node.op == "call_function" and not isinstance(node.meta.get("val"), Tensor | tuple | list)
