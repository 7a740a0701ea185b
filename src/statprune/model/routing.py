"""How tokens reach the matrices of a stack (experts), read off the graph, with no names of models.

tokens ── index(rows) ── grouped product with stack, ends ── ... ── grouped product with the next stack, ends
router ── softmax ── topk ── sort ── ends, rows
"""

from typing import Any, NamedTuple

from torch.fx import Node

from statprune.model.nodes import CASTS, aten, is_number, op_name, shape_of

_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
"""Products of rows, sorted by matrix, and a stack of matrices: torch's, and what transformers has where torch has none."""

_BATCHED: dict[Any, int] = {aten.bmm.default: 0, aten.matmul.default: 0, aten.baddbmm.default: 1}
"""Products of as many rows for each matrix, and where the rows stand among the arguments; the stack is the next."""

_CHOICES = {"topk", "argmax", "sort", "argsort"}


class Grouped(NamedTuple):
    """A product of a stack of matrices, each with rows of its own."""

    tokens: Node
    """[rows, in], or [experts, rows, in] without `ends`."""
    ends: Node | None


def grouped(reader: Node, weight: Node) -> Grouped | None:
    """What the reader multiplies by this stack [experts, in, out]; None where it does something else with it."""
    if op_name(reader) in _GROUPED:
        tokens, stack = reader.args[:2]
        ends = reader.args[2] if len(reader.args) > 2 else reader.kwargs.get("offs", reader.kwargs.get("offsets"))
        is_known = isinstance(tokens, Node) and stack is weight and isinstance(ends, Node) and len(shape_of(tokens)) == 2
        return Grouped(tokens, ends) if is_known else None  # type: ignore[arg-type]
    at = _BATCHED.get(reader.target)
    if at is None or len(reader.args) < at + 2 or reader.args[at + 1] is not weight:
        return None
    tokens = reader.args[at]
    return Grouped(tokens, None) if isinstance(tokens, Node) and len(shape_of(tokens)) == 3 else None


def rows_of(tensor: Node) -> tuple[Node, Node] | None:
    """(tokens, rows): what a stack's input is gathered from, and the position of each row's token; None where not shown."""
    while tensor.target in CASTS:
        source = tensor.args[0]
        assert isinstance(source, Node)
        tensor = source
    if tensor.target is aten.index.Tensor:
        tokens, indices = tensor.args[:2]
        rows = indices[0] if isinstance(indices, list | tuple) and len(indices) == 1 else None
    elif tensor.target is aten.index_select.default and tensor.args[1] == 0:
        tokens, rows = tensor.args[0], tensor.args[2]
    else:
        return None
    is_known = isinstance(tokens, Node) and isinstance(rows, Node) and len(shape_of(tokens)) == 2 and len(shape_of(rows)) == 1
    return (tokens, rows) if is_known else None  # type: ignore[return-value]


def routes(linear: Node, constants: set[Node]) -> bool:
    """Whether a linear's result alone, with weights and constants, decides which entries of it are the largest."""
    derived, frontier = {linear}, [linear]
    while frontier:
        for user in frontier.pop().users:
            if op_name(user) in _CHOICES:
                return True
            if (
                user not in derived
                and not is_number(user)
                and all(source in derived or source in constants for source in user.all_input_nodes)
            ):
                derived.add(user)
                frontier.append(user)
    return False
