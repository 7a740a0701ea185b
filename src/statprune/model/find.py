"""Linear layers of an exported graph: sites, input groups, and what is left out and why.

A site is a matrix, or a stack of matrices in a product that gives each its own tokens (the experts of a mixture).

No knowledge of any model family: a site is a parameter that a node multiplies by, an input group is the node that its
sites read, and names of modules matter to people only.

    normed --+-- linear q_proj        one input group:
             +-- linear k_proj        one set of statistics
             +-- linear v_proj        for three sites
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from statprune.errors import TracingError
from statprune.model.nodes import CASTS, SAME_TOKENS, aten, attribute, is_mutable, is_number, op_name, shape_of, written_to
from statprune.model.residuals import residuals
from statprune.model.routing import grouped, routes, rows_of
from statprune.model.sites import InputGroup, Layout, LeftOut, LinearSite, Routing
from statprune.model.token_masks import TokenMasks


def find_linear_layers(model: nn.Module, graph_module: GraphModule) -> tuple[tuple[InputGroup, ...], tuple[LeftOut, ...]]:
    """Every linear layer of an exported graph, grouped by the tensor it reads, and every weight that is none.

    Raises:
        TracingError: the graph writes to a parameter; each batch would, and not once as the model does.
    """
    nodes = list(graph_module.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    reads_of: dict[int, list[_Read]] = defaultdict(list)
    constants: set[Node] = set()
    for node in nodes:
        if node.op == "get_attr" and id(parameter := attribute(graph_module, node.target)) in names_of:
            reads_of[id(parameter)].extend(_reads(node))
        elif _is_constant(node, constants):
            constants.add(node)

    written = written_to(nodes)
    for node in written:
        if node.op == "get_attr" and id(attribute(graph_module, node.target)) in names_of:
            raise TracingError(f"{type(model).__name__}.forward writes to its parameter {node.target}")
    writers = [node for node in nodes if is_mutable(node)]
    members: dict[tuple[Node, int, bool], list[tuple[Node, LinearSite]]] = defaultdict(list)
    ends_of: dict[Node, Node | None] = {}
    site_ids = set()
    for parameter_id, reads in reads_of.items():
        products = [(read.reader, product) for read in reads if (product := _product(read)) is not None]
        if not products:
            continue
        # A weight that several linears read is pruned at the first of them, with that one's statistics.
        reader, product = min(products, key=lambda product: position[product[0]])
        names = names_of[parameter_id]
        chosen = _parameter_name(reader, names)
        *stack, rows, columns = model.get_parameter(chosen).shape
        site = LinearSite(
            name=chosen.removesuffix(".weight"),
            parameter=chosen,
            layout=product.layout,
            shape=(*stack, rows, columns) if product.layout == "out_in" else (*stack, columns, rows),
            aliases=tuple(name for name in names if name != chosen),
            num_reads=len(reads),
            feeds_output=any(_feeds_output(linear, constants) for linear, _ in products),
            routes=any(routes(linear, constants) for linear, _ in products),
        )
        source = _same_tokens(product.tokens, site.shape[-1], len(shape_of(product.tokens)) if stack else None, written)
        version = sum(position[node] < position[reader] for node in writers) if source in written else 0
        members[source, version, bool(stack)].append((reader, site))
        ends_of[reader] = product.ends
        site_ids.add(parameter_id)

    masks = TokenMasks(nodes)
    groups = []
    tokens_of: dict[Node, tuple[Node, Node] | None] = {}
    for (tensor, _, is_stack), sites in sorted(members.items(), key=lambda one: min(position[reader] for reader, _ in one[1])):
        sites.sort(key=lambda member: position[member[0]])
        first = sites[0][0]
        if not is_stack:
            linears = [
                replace(site, residuals=residuals(reader, site.shape[0], first, position, written)) for reader, site in sites
            ]
            groups.append((first, InputGroup(tuple(linears), tensor, first, masks.of(tensor))))
            continue
        ends = ends_of[first]
        # Products with the same ends have the same rows: only the first reads them from the tokens.
        gathered = rows_of(tensor) if ends is None else tokens_of.setdefault(ends, rows_of(tensor))
        mask = masks.of(tensor if gathered is None else gathered[0])
        routing = Routing(ends, None if gathered is None else gathered[1])
        groups.append((first, InputGroup(tuple(site for _, site in sites), tensor, first, mask, routing)))
    groups.sort(key=lambda group: position[group[0]])
    left_out = tuple(
        LeftOut(name.removesuffix(".weight"), tuple(parameter.shape), _why_no_site(parameter, reads_of[id(parameter)]))
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in site_ids
    )
    return tuple(group for _, group in groups), left_out


def products(graph_module: GraphModule, sites: Sequence[LinearSite]) -> dict[Node, LinearSite]:
    """The nodes that multiply tokens by one of these weights, each with its site; a weight may have several."""
    site_of = {name: site for site in sites for name in (site.parameter, *site.aliases)}
    weights = [node for node in graph_module.graph.nodes if node.op == "get_attr" and node.target in site_of]
    return {read.reader: site_of[str(node.target)] for node in weights for read in _reads(node) if _product(read) is not None}


_LINEARS: dict[Any, tuple[int, int]] = {
    aten.linear.default: (0, 1), aten.mm.default: (0, 1), aten.matmul.default: (0, 1), aten.addmm.default: (1, 2),
}  # fmt: skip
"""Ops that multiply tokens by a weight, and where the tokens and the weight stand among the arguments."""

_SIDE_BY_SIDE = {aten.stack.default, aten.cat.default}

_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default}


class _Product(NamedTuple):
    """What a node multiplies by a weight, and how."""

    tokens: Node
    layout: Layout
    ends: Node | None = None
    """Of a stack, where each matrix's rows end."""


class _Read(NamedTuple):
    """A node that reads a parameter, perhaps through transposes and casts of it."""

    reader: Node
    weight: Node
    is_transposed: bool


def _reads(node: Node, is_transposed: bool = False) -> Iterator[_Read]:
    for user in node.users:
        if user.target in _TRANSPOSES and _is_swap(user):
            yield from _reads(user, not is_transposed)
        elif user.target in CASTS:
            yield from _reads(user, is_transposed)
        elif user.users or user.op == "output" or is_mutable(user):  # an assertion on its dtype reads nothing
            yield _Read(user, node, is_transposed)


def _product(read: _Read) -> _Product | None:
    """What the reader multiplies by this weight, and how the parameter lies; None where it does not."""
    reader = read.reader
    if len(shape_of(read.weight)) == 3:
        found = grouped(reader, read.weight)
        return None if found is None else _Product(found.tokens, "out_in" if read.is_transposed else "in_out", found.ends)
    if reader.target not in _LINEARS or len(shape_of(read.weight)) != 2:
        return None
    tokens_at, weight_at = _LINEARS[reader.target]
    tokens, is_out_in = reader.args[tokens_at], reader.target is aten.linear.default
    if reader.args[weight_at] is not read.weight:
        if reader.args[tokens_at] is not read.weight:
            return None
        tokens, is_out_in = _transposed(reader.args[weight_at]), True  # weight @ tokens^T
    if not isinstance(tokens, Node):
        return None
    return _Product(tokens, "out_in" if is_out_in != read.is_transposed else "in_out")


def _transposed(node: Any) -> Node | None:
    """What the node is the transpose of, last two dimensions swapped."""
    source = node.args[0] if isinstance(node, Node) and _is_swap(node) else None
    return source if isinstance(source, Node) else None


def _is_swap(node: Node) -> bool:
    """Whether it swaps the last two dimensions, and no others."""
    ndim = len(shape_of(node))
    if node.target is aten.transpose.int:
        return {dim % ndim for dim in node.args[1:]} == {ndim - 2, ndim - 1}  # type: ignore[operator]
    if node.target is aten.permute.default:
        order = [dim % ndim for dim in node.args[1]]  # type: ignore[operator,union-attr]
        return order == [*range(ndim - 2), ndim - 1, ndim - 2]
    return node.target is aten.mT.default or (node.target in (aten.t.default, aten.numpy_T.default) and ndim == 2)


def _same_tokens(tensor: Node, in_features: int, ndim: int | None, written: set[Node]) -> Node:
    """The earliest node with the same tokens and the same channels; of a stack's tokens, in as many dimensions."""
    while tensor.target in SAME_TOKENS:
        source = tensor.args[0]
        assert isinstance(source, Node)
        # What was copied before somebody wrote to the source is no longer what the source holds.
        if shape_of(source)[-1:] != (in_features,) or source in written:
            break
        if ndim is not None and len(shape_of(source)) != ndim:
            break
        tensor = source
    return tensor


def _parameter_name(reader: Node, names: Sequence[str]) -> str:
    """Of a tied parameter's names, the one that belongs to the module that this linear came from."""
    modules = [path for path, _ in reader.meta.get("nn_module_stack", {}).values()]
    owned = [name for name in names if modules and name.rpartition(".")[0] == modules[-1]]
    return (owned or list(names))[0]


def _feeds_output(linear: Node, constants: set[Node]) -> bool:
    """Whether the result reaches the output through operations on nothing else: slices, casts, a soft cap, a tanh.

    Or laid beside the results of other linears, as a model does that has an output layer for each codebook of a sound.
    """
    derived, frontier = {linear}, [linear]
    while frontier:
        for user in frontier.pop().users:
            if user.op == "output":
                return True
            others = [source for source in user.all_input_nodes if source not in derived and source not in constants]
            if user not in derived and all(user.target in _SIDE_BY_SIDE and _is_of_one(other, constants) for other in others):
                derived.add(user)
                frontier.append(user)
    return False


def _is_of_one(node: Node, constants: set[Node]) -> bool:
    """Whether it is the result of one linear, or of operations on nothing else."""
    while node.target not in _LINEARS:
        sources = [source for source in node.all_input_nodes if source not in constants]
        if len(sources) != 1:
            return False
        node = sources[0]
    return True


def _is_constant(node: Node, constants: set[Node]) -> bool:
    """A number (a size, a scale) or a tensor made of buffers: neither a parameter nor a value of the batch."""
    if node.op == "get_attr":
        return True
    return is_number(node) or (node.op == "call_function" and all(source in constants for source in node.all_input_nodes))


def _why_no_site(parameter: Tensor, reads: Sequence[_Read]) -> str:
    if not reads:
        return "not read in this forward pass"
    regions = [read.reader for read in reads if isinstance(read.reader.target, torch._ops.HigherOrderOperator)]
    if regions:
        return f"read inside a region of its own ({regions[0].target}), which is not looked into"
    ops = sorted({op_name(read.reader) for read in reads})
    if "embedding" in ops:
        return "embedding"
    return f"read by {', '.join(ops)}, not by a linear layer"
