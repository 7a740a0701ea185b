"""Residual streams, read off the graph: what a linear layer's result is added to.

    h ──┬── norm ── ... ── linear ──(bias, dropout, cast, view)── add ── h'       the layer's residual is h
        └──────────────────────────────────────────────────────────┘

No names: an addition of two tensors of one shape, and nothing on the way that changes a number but a bias. Additions in a row
count together (`mlp + attention + h`, as parallel blocks have it), as far as their operands are there before the cut.
"""

from collections.abc import Mapping, Set

from torch.fx import Node

from statprune.model.nodes import SAME_TOKENS, aten, is_mutable, shape_of

_ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}


def residuals(linear: Node, width: int, cut: Node, position: Mapping[Node, int], written: Set[Node]) -> tuple[Node, ...]:
    """The tensors that a linear's result is added to, as far as they are there at a cut.

    Args:
        linear: the node that multiplies by the weight.
        width: out-features of the weight.
        cut: the first reader of the linear's input; just before it, statistics are taken.
        position: of each node in the graph.
        written: nodes whose values are written to in place.

    Returns:
        Nodes of [..., out], with the tokens of the result in their order; h is their sum. Empty where there are none.
    """

    def behind(total: Node) -> list[Node]:
        for user in total.users:
            if not _has_width(user, width):
                continue
            if user.target in SAME_TOKENS and user.args[0] is total:
                found = behind(user)
            elif (other := _added(user, total)) is not None and not _follows(other, linear, position):
                found = [*at_cut(other, user), *behind(user)]
            else:
                continue
            if found:
                return found
        return []

    def at_cut(other: Node, addition: Node) -> list[Node]:
        while position[other] >= position[cut] and other.target in SAME_TOKENS and _has_width(other.args[0], width):
            other = other.args[0]  # type: ignore[assignment]
        if position[other] >= position[cut] or _is_bias(other):
            return []
        between = (node for node, place in position.items() if position[cut] <= place < position[addition])
        if other in written and any(is_mutable(node) for node in between):
            return []  # by the addition it may hold something else
        return [other]

    is_scaled = bool(linear.kwargs)  # addmm has factors of its own
    return tuple(behind(linear)) if _has_width(linear, width) and not is_scaled else ()


def _has_width(node: object, width: int) -> bool:
    return isinstance(node, Node) and shape_of(node)[-1:] == (width,)


def _added(addition: Node, total: Node) -> Node | None:
    """What a node adds to a value that is one of its operands: of the same shape, or a bias; None where it does not."""
    if addition.target not in _ADDITIONS or addition.kwargs.get("alpha", 1) != 1:
        return None
    left, right = addition.args[:2]
    other = right if left is total else left
    if not isinstance(other, Node) or other is total:
        return None
    # As texts: whether two sizes that vary are one is not asked of the solver.
    is_same = [str(size) for size in shape_of(other)] == [str(size) for size in shape_of(addition)]
    return other if is_same or _is_bias(other) else None


def _is_bias(node: Node) -> bool:
    return node.op == "get_attr" and len(shape_of(node)) == 1


def _follows(node: Node, source: Node, position: Mapping[Node, int]) -> bool:
    """Whether a node's value depends on another's."""
    frontier, seen = [node], {node}
    while frontier:
        current = frontier.pop()
        if current is source:
            return True
        fresh = {read for read in current.all_input_nodes if position[read] >= position[source]} - seen
        seen |= fresh
        frontier.extend(fresh)
    return False
