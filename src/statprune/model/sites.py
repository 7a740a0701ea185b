"""What is pruned: linear weights, the groups of them that share their inputs, and the graph that they were found in."""

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.fx import GraphModule, Node

Layout = Literal["out_in", "in_out"]


@dataclass(frozen=True)
class LinearSite:
    """One linear weight that can be pruned."""

    name: str
    """What people call it: the parameter's qualified name without a trailing `.weight`."""

    parameter: str
    """The parameter's fully qualified name in the model."""

    layout: Layout
    """How the parameter is stored: `nn.Linear` is [out, in], `transformers.Conv1D` is [in, out]; a stack of either alike."""

    shape: tuple[int, ...]
    """(out, in), or (experts, out, in) of a stack of matrices, each of which has tokens of its own."""

    aliases: tuple[str, ...] = ()
    """Other names of the same parameter (tied weights)."""

    num_reads: int = 1
    """How many nodes read the parameter."""

    feeds_output: bool = False
    """Whether its result is an output of the model, up to operations on that result alone (the lm_head)."""

    residuals: tuple[Node, ...] = field(default=(), repr=False, compare=False)
    """What its result is added to and nothing else is done with (a residual stream), where the graph has that before the
    first reader of the layer's input. Empty where a norm or a product stands between, and where there is no graph."""

    routes: bool = False
    """Whether its result chooses which experts a token goes to."""

    def view(self, parameter: Tensor) -> Tensor:
        """The parameter seen as [..., out, in]: a view, so that writing to it writes to the parameter."""
        return parameter.mT if self.layout == "in_out" else parameter

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        return self.shape[-2], self.shape[-1]

    @property
    def num_matrices(self) -> int:
        """1, or how many experts a stack has."""
        return math.prod(self.shape[:-2])

    @property
    def num_weights(self) -> int:
        """Of all matrices."""
        return math.prod(self.shape)

    @property
    def default_exclusion(self) -> str | None:
        """Why this site stays dense unless it is asked for by name; None where it does not."""
        reasons = [
            "feeds the output" if self.feeds_output else "",
            f"tied to {', '.join(self.aliases)}" if self.aliases else "",
            f"read in {self.num_reads} places" if self.num_reads > 1 and not self.aliases else "",
            "routes tokens to experts" if self.routes else "",
        ]
        return ", ".join(reason for reason in reasons if reason) or None


@dataclass(frozen=True)
class Routing:
    """How tokens reach the matrices of a stack.

    With `ends` the input is [rows, in], the rows of matrix after matrix; without, it is [experts, rows, in].
    """

    ends: Node | None
    """[experts], integers: the row behind each matrix's last one."""

    rows: Node | None = None
    """[rows], integers: the position of each row's token in its batch, where the graph shows it."""


@dataclass(frozen=True)
class InputGroup:
    """Sites that read the same tensor, and so share one set of statistics."""

    sites: tuple[LinearSite, ...]
    input_node: Node | None = None
    """The tensor's node; None where there is no graph (module hooks)."""

    first_reader: Node | None = None
    """The first linear that reads it, in execution order."""

    token_mask: str | None = None
    """Name of the model input that marks this tensor's padding with 0."""

    routing: Routing | None = None
    """How its tokens reach the matrices of a stack; None where every token reaches one matrix."""

    @property
    def reads(self) -> list[Node]:
        """The nodes whose values make its statistics."""
        routing = [] if self.routing is None else [self.routing.ends, self.routing.rows]
        return [node for node in (self.input_node, *routing) if node is not None]

    @property
    def name(self) -> str:
        """The first site's name."""
        return self.sites[0].name

    @property
    def in_features(self) -> int:
        """How many channels the tensor has."""
        return self.sites[0].shape[-1]


@dataclass(frozen=True)
class LeftOut:
    """A weight with two or more dimensions that stays dense, and why."""

    name: str
    """As a site's name: without a trailing `.weight`."""

    shape: tuple[int, ...]
    """Of the parameter as it is stored; (..., out, in) where it is a site that the recipe leaves out."""

    reason: str


@dataclass(frozen=True)
class TracedModel:
    """The graph of one forward pass, and the linear layers in it."""

    graph_module: GraphModule
    """As `torch.export` gives it. The walk executes its nodes, and takes every parameter and buffer from `Weights` by name: so
    the graph of one instance of a model serves all instances."""

    groups: tuple[InputGroup, ...]
    """In execution order of their first reader."""

    left_out: tuple[LeftOut, ...]
    """Weights that are no linear layer's."""

    architecture: str = ""
    """What makes the graph (see `kinds.architecture`)."""
