"""Finding the stacks of a model without a graph, and trying out whether their blocks can be run by themselves.

On two batches, with every linear of a stack disturbed: the blocks by themselves must return what they return inside of the
model. No name of a model or of a block is known here.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statprune.errors import CalibrationError, first_line
from statprune.model.hooks import linear_modules, run_model
from statprune.model.inputs import ModelInputs
from statprune.model.observe import ForwardContext
from statprune.model.stacks import Deviation, Follower, Passage, Place, Stack, Stacks, following


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
