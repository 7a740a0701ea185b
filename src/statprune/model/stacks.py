"""Stacks: the repeated blocks of a model without a graph, found by how it calls them.

    embed ── layers.0 ── layers.1 ── ... ── layers.n ── norm ── head
             └ given: [x, mask]   reads [output of layers.0, mask]

What a block is called with is traced by the identity of tensors: an output of a block before it, what the first block was
given, or its own: what the model gives it whatever its layers compute. Then a block can be run by itself, on what pruned
blocks before it returned. Whether that is so `find_stacks` tries out.
"""

import contextlib
import enum
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Place = tuple[int, int]
"""Where a linear runs: (stack, block); (stack, -1) before that stack, where there may be no such stack any more."""


class Source(NamedTuple):
    """Where one leaf of a block's arguments comes from."""

    kind: Literal["given", "output", "own"]
    """Given to the first block; returned by a block; or given to this block, whatever the layers of the stack compute."""

    block: int
    """Which block was given it, or returned it."""

    leaf: int
    """Which leaf of its arguments, or of its output (`tree_flatten`)."""


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another, each once."""

    name: str
    """Of the `nn.ModuleList` or `nn.Sequential`."""

    blocks: tuple[str, ...]
    """Names of the modules."""

    sources: tuple[tuple[Source, ...], ...]
    """For each block, of each leaf of (args, kwargs)."""

    structures: tuple[TreeSpec, ...]
    """For each block, how its leaves make (args, kwargs)."""

    @cached_property
    def last_read(self) -> dict[Source, int]:
        """The last block that reads each value."""
        return {source: index for index, sources in enumerate(self.sources) for source in sources}

    @cached_property
    def last_own(self) -> int:
        """The last block whose call is to be seen: those behind it get nothing that those before it do not tell."""
        return max((source.block for source in self.last_read if source.kind == "own"), default=0)


@dataclass(frozen=True)
class Stacks:
    """All stacks of a model, in the order in which they run."""

    stacks: tuple[Stack, ...]

    places: Mapping[str, Place]
    """Where each linear module runs, by its name."""

    def __str__(self) -> str:
        return " and ".join(f"the {len(stack.blocks)} blocks of {stack.name or 'the model'}" for stack in self.stacks)


class Deviation(Exception):
    """A model calls its blocks otherwise than is needed to run them by themselves; says how."""


class Passage:
    """One batch on its way through a stack: what its blocks are called with, and no more than those to come will read."""

    def __init__(self, stack: Stack, values: dict[Source, Any]) -> None:
        self._stack, self._values = stack, values

    def arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a block, whose turn it is."""
        leaves = [self._values[source] for source in self._stack.sources[index]]
        args, kwargs = tree_unflatten(leaves, self._stack.structures[index])
        return args, kwargs

    def take(self, index: int, output: Any) -> None:
        """A block has returned this, and the turn is the next one's."""
        last_read = self._stack.last_read
        for number, leaf in enumerate(tree_leaves(output)):
            source = Source("output", index, number)
            if source in last_read:
                self._values[source] = leaf
        needed = [source for source in last_read if source.kind == "output" and source.block == index]
        if any(source not in self._values for source in needed):
            raise Deviation(f"{self._stack.blocks[index]} returns less than for the first batch")
        for source in [source for source in self._values if last_read[source] <= index]:
            del self._values[source]


class Follower:
    """Follows one run of a model through one stack, without keeping what the blocks return.

    Args:
        name: of the stack.
        blocks: names of its modules.
        expected: the stack, where it is known already, to see whether this run is like it.
    """

    def __init__(self, name: str, blocks: Sequence[str], expected: Stack | None = None) -> None:
        self.name, self.blocks, self._expected = name, blocks, expected
        self.num_calls, self.is_inside, self.problem = 0, False, ""
        self.sources: list[tuple[Source, ...]] = []
        self.structures: list[TreeSpec] = []
        self.values: dict[Source, Any] = {}
        self._known: dict[int, _Known] = {}
        self._read: list[tuple[Tensor, int]] = []

    def check(self, end: int | None = None) -> None:
        """Raise Deviation where the blocks have not run, once each and in order, on what is expected.

        Args:
            end: the block with whose call the run was ended; None where it went to its end.
        """
        if self.problem:
            raise Deviation(self.problem)
        if self.num_calls != (len(self.blocks) if end is None else end + 1):
            raise Deviation(f"{self.blocks[self.num_calls]} does not run")

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model calls a block with these arguments."""
        if self.problem:
            return
        if index != self.num_calls or self.is_inside:
            again = "is called more than once" if index < self.num_calls else f"runs before {self.blocks[self.num_calls]}"
            self.problem = f"{self.blocks[index]} {again}"
            return
        self.is_inside = True
        self.num_calls += 1
        leaves, structure = tree_flatten((args, kwargs))
        if self._expected is not None and structure != self._expected.structures[index]:
            self.problem = f"{self.blocks[index]} is called with other arguments than for the first batch"
            return
        self.structures.append(structure)
        found: list[Source] = []
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                self.problem = f"{self.blocks[index]} is given a {type(leaf).__name__}, which may carry a state"
                return
            possible = self._possible(index, number, leaf)
            source = possible[-1] if self._expected is None else self._expected.sources[index][number]
            if source not in possible or (source.kind == "own" and any(one.kind == "output" for one in possible)):
                self.problem = f"{self.blocks[index]} reads something else than for the first batch"
                return
            found.append(source)
            if source.kind != "output":
                self.values[source] = leaf
        if index == 0:
            self._know(leaves, "given", 0)
        self.sources.append(tuple(found))
        self._read = [(leaf, _version(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]

    def leave(self, index: int, output: Any) -> None:
        """The block has returned this to the model."""
        self.is_inside = False
        if any(_version(leaf) != version for leaf, version in self._read):
            self.problem = self.problem or f"{self.blocks[index]} writes to its inputs in place"
        self._read = []
        if not self.problem:
            self._know(tree_leaves(output), "output", index)

    def _possible(self, index: int, number: int, leaf: Any) -> list[Source]:
        """Where a leaf may come from, the best last."""
        if index == 0:
            return [Source("given", 0, number)]
        possible = [Source("own", index, number)]
        if not isinstance(leaf, Tensor):
            # The same plain value in the same argument of the first block.
            given = self.values.get(Source("given", 0, number))
            is_same = self.structures[index] == self.structures[0] and type(given) is type(leaf) and given == leaf
            return possible + [Source("given", 0, number)] * is_same
        known = self._known.get(id(leaf))
        return possible + known.sources if known is not None and known.is_still(leaf) else possible

    def _know(self, leaves: Sequence[Any], kind: Literal["given", "output"], index: int) -> None:
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                known = self._known.get(id(leaf))
                sources = known.sources if known is not None and known.is_still(leaf) else []
                self._known[id(leaf)] = _Known(weakref.ref(leaf), _version(leaf), [*sources, Source(kind, index, number)])


@dataclass(frozen=True)
class _Known:
    """A tensor that a block was given, or that came out of one."""

    reference: weakref.ref[Tensor]
    version: int
    sources: list[Source]

    def is_still(self, leaf: Tensor) -> bool:
        """Whether it is this one, with nothing written to it since; another may have its place in memory now."""
        return self.reference() is leaf and self.version == _version(leaf)


def _version(tensor: Tensor) -> int:
    """Counts up where somebody writes to the tensor; one that was made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size,
    FunctionType, BuiltinFunctionType, type,
)  # fmt: skip
"""Arguments without a state."""


@contextlib.contextmanager
def following(
    model: nn.Module,
    followers: Sequence[Follower],
    *,
    entered: Callable[[int, int], Any] | None = None,
    left: Callable[[int, int, Any], Any] | None = None,
) -> Iterator[None]:
    """Inside, followers see the model's calls of their blocks.

    Args:
        model: that runs.
        followers: of stacks.
        entered: called with (follower, block) after the follower has seen the call; what it raises ends the run.
        left: called with (follower, block, output).
    """
    handles = []

    def add(number: int, index: int) -> None:
        module = model.get_submodule(followers[number].blocks[index])

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            followers[number].enter(index, args, kwargs)
            if entered is not None:
                entered(number, index)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            followers[number].leave(index, output)
            if left is not None:
                left(number, index, output)

        # As the caller sees it: before what hooks of others make of the arguments, and after what they make of the output.
        handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for number, follower in enumerate(followers):
        for index in range(len(follower.blocks)):
            add(number, index)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
