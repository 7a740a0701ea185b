"""`PruneLinears`, the `torch.fx` pass: a graph whose linear nodes read pruned weights, while the original stays as it was."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from statprune.errors import SiteError
from statprune.model.weights import named_tensors


class PruneLinears(PassBase):
    """A pass that returns a graph module reading pruned weights; everything else is shared with the original.

    Args:
        weights: by the name of the parameter (or buffer), as it is stored (`PruningPlan.weights`, `Twin.pruned`).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def requires(self, graph_module: GraphModule) -> None:
        """Refuse a graph that does not read a weight of the plan.

        Raises:
            SiteError: names the weight.
        """
        read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
        for name in self.weights:
            if not read.intersection(_names_of(graph_module, name)):
                raise SiteError(f"PruneLinears: the graph does not read {name}. Was it traced from another model?")

    def call(self, graph_module: GraphModule) -> PassResult:
        """The twin; the graph module that came in is not changed."""
        graph = Graph()
        graph.output(graph.graph_copy(graph_module.graph, {}))
        graph._codegen = graph_module.graph._codegen
        # A new GraphModule has containers of its own that refer to the same parameters, so replacing one there does
        # not reach the original.
        twin = GraphModule(graph_module, graph)
        held = named_tensors(twin)
        for name, weight in self.weights.items():
            for tied in held.keys() & _names_of(graph_module, name):
                container, _, attribute = tied.rpartition(".")
                is_parameter = isinstance(held[tied], nn.Parameter)
                landed = nn.Parameter(weight, requires_grad=False) if is_parameter else weight
                setattr(twin.get_submodule(container), attribute, landed)
        return PassResult(twin, modified=bool(self.weights))


def _names_of(module: nn.Module, name: str) -> set[str]:
    """All names of the parameter or buffer that has this name."""
    tensors = named_tensors(module)
    return {other for other, tensor in tensors.items() if tensor is tensors.get(name)}
