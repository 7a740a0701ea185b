"""Stacks: the repeated blocks of a model without a graph, found by how it calls them.

    embed ── layers.0 ── layers.1 ── ... ── layers.n ── norm ── head
             └ given: [x, mask]   reads [output of layers.0, mask]

What a block is called with is traced by the identity of tensors: an output of a block before it, what the first block was
given, or its own: what the model gives it whatever its layers compute. Then a block can be run by itself, on what pruned
blocks before it returned. Whether that is so is tried out on two batches, with every linear of the stack disturbed: the
blocks by themselves must return what they return inside of the model. No name of a model or of a block is known here.
"""

import contextlib
import enum
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from statprune.errors import CalibrationError, first_line
from statprune.model.hooks import linear_modules, run_model
from statprune.model.inputs import ModelInputs
from statprune.model.observe import ForwardContext

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


@torch.no_grad()
def find_stacks(
    model: nn.Module, inputs: Sequence[ModelInputs], *, forward_context: ForwardContext = contextlib.nullcontext
) -> Stacks | str:
    """The model's stacks, or why its blocks cannot be run by themselves.

    Runs the model on the first and the last batch, a few times.

    Raises:
        CalibrationError: the model cannot run a batch.
    """
    try:
        return _Search(model, inputs, forward_context).run()
    except Deviation as e:
        return str(e)


def _candidates(model: nn.Module, skip: set[str]) -> dict[str, list[str]]:
    """The outermost lists of modules of which some are of one class and all hold linear layers, with the names of these."""
    holding = {name[:end] for name in linear_modules(model) for end in _ends(name)}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or name in skip:
            continue
        if any(name.startswith(f"{outer}.") or not outer for outer in found):
            continue
        blocks = [f"{name}.{key}".removeprefix(".") for key, _ in module.named_children()]
        classes = {type(child) for child in module.children()}
        if len(blocks) == len(module) > len(classes) and all(block in holding for block in blocks):
            found[name] = blocks
    return found


def _ends(name: str) -> list[int]:
    """Where a name and those of the modules around it end."""
    return [*(index for index, letter in enumerate(name) if letter == "."), len(name)]


@dataclass
class _Run:
    """What one batch has shown."""

    followers: list[Follower]
    order: list[Place] = field(default_factory=list)
    places: dict[str, set[Place]] = field(default_factory=dict)
    outputs: dict[Place, list[tuple[float, float, float]]] = field(default_factory=dict)


class _Search:
    def __init__(self, model: nn.Module, inputs: Sequence[ModelInputs], forward_context: ForwardContext) -> None:
        self._model, self._context = model, forward_context
        # Two, for a state that one batch leaves to the next would not be noticed in one.
        self._probes = dict(enumerate(inputs)) if len(inputs) < 2 else {0: inputs[0], len(inputs) - 1: inputs[-1]}
        self._linears = linear_modules(model)

    def run(self) -> Stacks:
        found = self._chains()
        if not found:
            raise Deviation("it has no list of like blocks that read each other's outputs")
        self._check_calls(found)
        first_call = [found.order.index((number, 0)) for number in range(len(found.followers))]
        stacks = [
            Stack(one.name, tuple(one.blocks), tuple(one.sources), tuple(one.structures))
            for _, one in sorted(zip(first_call, found.followers, strict=True), key=lambda pair: pair[0])
        ]
        runs = [self._watch(number, stacks) for number in self._probes]
        places: dict[str, set[Place]] = {}
        for run in runs:
            self._check_calls(run)
            order = [stack for stack, _ in run.order]
            if order != sorted(order):
                names = " and ".join(stack.name for stack in stacks)
                raise Deviation(f"{names} do not run one after the other")
            for name, seen in run.places.items():
                places.setdefault(name, set()).update(seen)
        for name, seen in places.items():
            if len(seen) > 1:
                raise Deviation(f"{name} runs in several places, in blocks or between them")
        own = {name: next(iter(seen)) for name, seen in places.items()}
        for number in range(len(stacks)):
            self._try(number, stacks, runs, [name for name, (stack, block) in own.items() if stack == number and block >= 0])
        return Stacks(tuple(stacks), own)

    def _chains(self) -> _Run | None:
        """One batch's run through the lists whose modules read what the ones before them return."""
        skip: set[str] = set()
        while candidates := _candidates(self._model, skip):
            run = self._watch(0, candidates)
            beside = {one.name for one in run.followers if not one.problem and _is_parallel(one)}
            if not beside:
                return run
            skip |= beside
        return None

    def _watch(self, number: int, stacks: Mapping[str, list[str]] | Sequence[Stack]) -> _Run:
        """Run a batch through the model, and follow it through stacks, of which the sources may be known."""
        if isinstance(stacks, Mapping):
            run = _Run([Follower(name, blocks) for name, blocks in stacks.items()])
        else:
            run = _Run([Follower(stack.name, stack.blocks, stack) for stack in stacks])
        name_of = {module: name for name, module in self._linears.items()}

        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            inside = next((place for place in reversed(run.order) if run.followers[place[0]].is_inside), None)
            begun = sum(bool(one.num_calls) for one in run.followers)
            run.places.setdefault(name_of[module], set()).add(inside or (begun, -1))

        def left(stack: int, block: int, output: Any) -> None:
            run.outputs[stack, block] = _summary(output)

        handles = [module.register_forward_pre_hook(see) for module in name_of]
        try:
            entered = lambda *place: run.order.append(place)  # noqa: E731
            with self._context(), following(self._model, run.followers, entered=entered, left=left):
                run_model(self._model, self._probes[number], number)
        finally:
            for handle in handles:
                handle.remove()
        return run

    def _check_calls(self, run: _Run) -> None:
        """Raise where a block did not run once, in order, on what can be given to it again."""
        for one in run.followers:
            one.check()

    def _try(self, number: int, stacks: Sequence[Stack], runs: Sequence[_Run], linears: Sequence[str]) -> None:
        """Raise where the blocks by themselves do not return what they return in the model."""
        stack = stacks[number]
        with self._disturbed(linears):
            expected = []
            for index, run in zip(self._probes, runs, strict=True):
                try:
                    again = self._watch(index, stacks[number : number + 1])
                except CalibrationError as e:
                    raise Deviation(f"with other weights in {stack.name}, {first_line(e)}") from e
                self._check_calls(again)
                for source, value in run.followers[number].values.items():
                    if not _is_equal(value, again.followers[0].values[source]):
                        what = "the first block is given" if source.kind == "given" else f"{stack.blocks[source.block]} reads"
                        raise Deviation(f"what {what} is computed from blocks before it, outside of them")
                expected.append(again.outputs)
            passages = [Passage(stack, dict(run.followers[number].values)) for run in runs]
            for index, name in enumerate(stack.blocks):
                block = self._model.get_submodule(name)
                for is_rehearsal in (True, False):  # each runs twice, and the batches take turns, as when it is pruned
                    for passage, outputs in zip(passages, expected, strict=True):
                        args, kwargs = passage.arguments(index)
                        try:
                            with self._context():
                                output = block(*args, **kwargs)
                        except Exception as e:
                            raise Deviation(f"{name} cannot be run by itself: {first_line(e)}") from e
                        if not _is_close(_summary(output), outputs[0, index]):
                            raise Deviation(
                                f"{name} returns something else when it is run by itself, or again: it writes to its inputs, "
                                "keeps a state, or draws random numbers"
                            )
                        if not is_rehearsal:
                            passage.take(index, output)

    @contextlib.contextmanager
    def _disturbed(self, linears: Sequence[str]) -> Iterator[None]:
        """Inside, these linears return something else, as if they were pruned."""

        def disturb(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            return output * torch.linspace(0.875, 1.125, output.shape[-1], device=output.device).to(output.dtype)

        handles = [self._linears[name].register_forward_hook(disturb) for name in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_parallel(follower: Follower) -> bool:
    """Whether all blocks that ran read the same, and none what another one returned: experts, heads."""
    return all(source.kind == "given" for sources in follower.sources for source in sources)


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    return type(one) is type(other) and bool(one == other)


def _summary(output: Any) -> list[tuple[float, float, float]]:
    """Of each floating-point tensor: its sum, the sum of its absolute values, and how far the first may be off."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    sums = [(float(one.sum(dtype=torch.float64)), float(one.abs().sum(dtype=torch.float64)), one.dtype) for one in tensors]
    # The same operations give the same bits, but for sums that a GPU adds up in any order.
    return [(total, size, max(1e-5, torch.finfo(dtype).eps / 8)) for total, size, dtype in sums]


def _is_close(one: list[tuple[float, float, float]], other: list[tuple[float, float, float]]) -> bool:
    if len(one) != len(other):
        return False
    return all(
        # Written so that NaN and infinity, which are refused elsewhere, pass.
        not (abs(total - total_2) > tolerance * size or abs(size - size_2) > tolerance * size)
        for (total, size, tolerance), (total_2, size_2, _) in zip(one, other, strict=True)
    )
