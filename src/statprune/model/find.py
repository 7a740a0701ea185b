"""Linear layers of an exported graph: sites, input groups, and what is left out and why.

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
from statprune.model.nodes import CASTS, SAME_TOKENS, aten, attribute, is_mutable, is_number, shape_of, written_to
from statprune.model.residuals import residuals
from statprune.model.sites import InputGroup, Layout, LeftOut, LinearSite
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
    members: dict[tuple[Node, int], list[tuple[Node, LinearSite]]] = defaultdict(list)
    site_ids = set()
    for parameter_id, reads in reads_of.items():
        products = [(read.reader, product) for read in reads if (product := _product(read)) is not None]
        if not products:
            continue
        # A weight that several linears read is pruned at the first of them, with that one's statistics.
        reader, (tensor, layout) = min(products, key=lambda product: position[product[0]])
        names = names_of[parameter_id]
        chosen = _parameter_name(reader, names)
        rows, columns = model.get_parameter(chosen).shape
        site = LinearSite(
            name=chosen.removesuffix(".weight"),
            parameter=chosen,
            layout=layout,
            shape=(rows, columns) if layout == "out_in" else (columns, rows),
            aliases=tuple(name for name in names if name != chosen),
            num_reads=len(reads),
            feeds_output=any(_feeds_output(linear, constants) for linear, _ in products),
        )
        source = _same_tokens(tensor, site.shape[1], written)
        version = sum(position[node] < position[reader] for node in writers) if source in written else 0
        members[source, version].append((reader, site))
        site_ids.add(parameter_id)

    masks = TokenMasks(nodes)
    groups = []
    for (tensor, _), sites in members.items():
        sites.sort(key=lambda member: position[member[0]])
        first = sites[0][0]
        added = [replace(site, residuals=residuals(reader, site.shape[0], first, position, written)) for reader, site in sites]
        groups.append((first, InputGroup(tuple(added), tensor, first, masks.of(tensor))))
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


class _Read(NamedTuple):
    """A node that reads a parameter, perhaps through transposes and casts of it."""

    reader: Node
    weight: Node
    is_transposed: bool


def _reads(node: Node, is_transposed: bool = False) -> Iterator[_Read]:
    for user in node.users:
        if user.target in _TRANSPOSES:
            yield from _reads(user, not is_transposed)
        elif user.target in CASTS:
            yield from _reads(user, is_transposed)
        elif user.users or user.op == "output" or is_mutable(user):  # an assertion on its dtype reads nothing
            yield _Read(user, node, is_transposed)


def _product(read: _Read) -> tuple[Node, Layout] | None:
    """The tokens that the reader multiplies by this 2-D weight, and how the parameter lies; None where there are none."""
    reader = read.reader
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
    return tokens, "out_in" if is_out_in != read.is_transposed else "in_out"


def _transposed(node: Any) -> Node | None:
    """What the node is the transpose of, last two dimensions swapped."""
    if not isinstance(node, Node):
        return None
    is_swap = node.target in (aten.t.default, aten.mT.default)
    if node.target is aten.transpose.int:
        ndim = len(shape_of(node))
        is_swap = {dim % ndim for dim in node.args[1:]} == {ndim - 2, ndim - 1}  # type: ignore[operator]
    source = node.args[0] if is_swap else None
    return source if isinstance(source, Node) else None


def _same_tokens(tensor: Node, in_features: int, written: set[Node]) -> Node:
    """The earliest node with the same tokens and the same channels."""
    while tensor.target in SAME_TOKENS:
        source = tensor.args[0]
        assert isinstance(source, Node)
        # What was copied before somebody wrote to the source is no longer what the source holds.
        if shape_of(source)[-1:] != (in_features,) or source in written:
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
    ops = sorted({_op_name(read.reader) for read in reads})
    if "embedding" in ops:
        return "embedding"
    if parameter.ndim == 3 and any("mm" in op for op in ops):
        return f"a stack of {parameter.shape[0]} expert matrices, each with tokens of its own: not supported yet"
    return f"read by {', '.join(ops)}, not by a linear layer"


def _op_name(node: Node) -> str:
    """`linear` for `aten.linear.default`, `grouped_mm` for `transformers.grouped_mm.default`."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema else str(getattr(node.target, "__name__", node.target))
