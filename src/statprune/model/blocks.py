"""Schedule "block" without a graph: blocks run by themselves over all batches, one after another (`stacks` finds them).

    batch 0   ──embed──┤ layers.0 (observed), prune, layers.0 again ┤ layers.1 (observed), prune, ... ┤ ... ┤
    batch 1   ──embed──┤ layers.0 (observed), prune, layers.0 again ┤ layers.1 (observed), prune, ... ┤ ... ┤

What stands before the first block, between two stacks and behind the last block is run by the model itself: so a second
stack sees the pruned first one, and a head the pruned blocks, at the price of another forward pass each. In memory is what
one block of each batch is called with, never a copy of a weight.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from statprune.errors import CalibrationError
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.hooks import hooked, padding_mask
from statprune.model.inputs import ModelInputs
from statprune.model.observe import ForwardContext, Observations, complete, fit_mask
from statprune.model.sites import InputGroup
from statprune.model.stacks import Deviation, Follower, Passage, Place, Stacks, following
from statprune.model.weights import InPlace, Weights
from statprune.ranks import ProcessGroup


@torch.no_grad()
def observe_blocks(
    model: nn.Module,
    stacks: Stacks,
    groups: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    *,
    weights: Weights | None = None,
    needs: Statistic = Statistic.MOMENTS,
    finished: Container[str] = (),
    process_group: ProcessGroup = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Observations:
    """Run all batches block by block, and yield every group with its statistics where its block is still dense.

    Args:
        model: without a graph.
        stacks: its blocks.
        groups: to observe; sites of one group that run in several blocks come with their own block.
        batches: on the model's device.
        weights: what the model computes with; by default its own. What is put there between two groups counts for later blocks.
        needs: what to collect.
        finished: parameters that are pruned already; where all of a block's are, it is not observed, and statistics are None.
        process_group: of the ranks whose sums are added up.
        forward_context: entered around model code.

    Raises:
        NonFiniteError: a group's input holds NaN or infinity; names the first such layer.
        CalibrationError: padding in the batches of an encoder-decoder; the model cannot run a batch, or calls its blocks
            otherwise than for the first one. In the dense model that is seen before the first group comes.
    """
    run = _Run(model, stacks, batches, weights or InPlace(model), forward_context)
    parts = _parts(groups, stacks)

    def observed(place: Place, through: Callable[[_Observer], None]) -> Observations:
        here = parts[place]
        if all(site.parameter in finished for group in here for site in group.sites):
            yield from ((group, None) for group in here)
            return
        observer = _Observer(model, here, needs)
        through(observer)
        for group in here:  # all, before a weight changes
            complete(group, observer.moments[group.name], process_group)
        for group in here:
            yield group, observer.moments.pop(group.name)

    run.check()
    for number, stack in enumerate(stacks.stacks):
        yield from observed((number, -1), partial(run.up_to, number))
        last = max((block for block in range(len(stack.blocks)) if parts[number, block]), default=-1)
        passages = run.capture(number) if last >= 0 else []
        for block in range(last + 1):
            yield from observed((number, block), partial(run.rehearse, number, block, passages))
            if block < last:
                run.advance(number, block, passages)
        passages.clear()
    yield from observed((len(stacks.stacks), -1), run.to_the_end)


def _parts(groups: Sequence[InputGroup], stacks: Stacks) -> dict[Place, list[InputGroup]]:
    """The groups of each place, with those of their sites that run there."""
    parts: dict[Place, list[InputGroup]] = defaultdict(list)
    for group in groups:
        sites = defaultdict(list)
        for site in group.sites:
            sites[stacks.places[site.parameter.rpartition(".")[0]]].append(site)
        for place, here in sites.items():
            parts[place].append(replace(group, sites=tuple(here)))
    return parts


class _Observer:
    """Adds up the statistics of groups while the model, or a block of it, runs."""

    def __init__(self, model: nn.Module, groups: Sequence[InputGroup], needs: Statistic) -> None:
        self._leaders = {model.get_submodule(group.sites[0].parameter.rpartition(".")[0]): group for group in groups}
        device = next(model.parameters()).device
        self.moments = {group.name: InputMoments.zeros(group.in_features, needs, device=device) for group in groups}

    @contextlib.contextmanager
    def of(self, batch: ModelInputs, number: int) -> Iterator[None]:
        """Inside, what runs is of this batch."""
        mask = padding_mask(batch, number)

        def add(module: nn.Module, tensor: Tensor, _: Tensor) -> None:
            self.moments[self._leaders[module].name].add(tensor, fit_mask(mask, tensor))

        with hooked(self._leaders, add):
            yield


@contextlib.contextmanager
def _telling(number: int) -> Iterator[None]:
    """Inside, a deviation is an error that names the batch."""
    try:
        yield
    except Deviation as e:
        raise CalibrationError(f"Calibration batch {number} cannot go block by block: {e}. Use schedule 'one-shot'.") from e


class _Stop(BaseException):
    """Ends a run of the model at a block; no `except Exception` of the model's sees it."""


class _Run:
    """All batches on their way through the model and its blocks, with the weights as they are."""

    def __init__(
        self,
        model: nn.Module,
        stacks: Stacks,
        batches: Sequence[ModelInputs],
        weights: Weights,
        forward_context: ForwardContext,
    ) -> None:
        self._model, self._stacks, self._batches = model, stacks.stacks, batches
        self._weights, self._context = weights, forward_context

    def check(self) -> None:
        """See that every batch goes through the blocks as the first one did."""
        everything = range(len(self._stacks))
        for number in range(len(self._batches)):
            self._go(number, everything)

    def up_to(self, stack: int, observer: _Observer) -> None:
        """Run the model up to a stack."""
        for number in range(len(self._batches)):
            self._go(number, [stack], until=(stack, 0), observer=observer)

    def capture(self, stack: int) -> list[Passage]:
        """Every batch before a stack's first block."""
        until = (stack, self._stacks[stack].last_own)
        found = [self._go(number, [stack], until=until) for number in range(len(self._batches))]
        return [Passage(self._stacks[stack], follower.values) for (follower,) in found]

    def rehearse(self, stack: int, block: int, passages: Sequence[Passage], observer: _Observer) -> None:
        """Run a block for its statistics only: its results are thrown away."""
        for number, passage in enumerate(passages):
            with observer.of(self._batches[number], number):
                self._block(stack, block, passage, number)

    def advance(self, stack: int, block: int, passages: Sequence[Passage]) -> None:
        """Run a block for those behind it."""
        for number, passage in enumerate(passages):
            output = self._block(stack, block, passage, number)
            with _telling(number):
                passage.take(block, output)

    def to_the_end(self, observer: _Observer) -> None:
        """Run the whole model."""
        for number in range(len(self._batches)):
            self._go(number, [], observer=observer)

    def _go(
        self, number: int, stacks: Sequence[int], *, until: Place | None = None, observer: _Observer | None = None
    ) -> list[Follower]:
        """Run a batch through the model, until it calls a block, and follow it through these stacks."""
        followers = [Follower(self._stacks[stack].name, self._stacks[stack].blocks, self._stacks[stack]) for stack in stacks]
        batch = self._batches[number]

        def entered(index: int, block: int) -> None:
            if (stacks[index], block) == until:
                raise _Stop

        with (
            contextlib.suppress(_Stop),
            following(self._model, followers, entered=entered),
            observer.of(batch, number) if observer is not None else contextlib.nullcontext(),
        ):
            self._call(self._model, "", type(self._model).__name__, number, batch.args, batch.kwargs)
        with _telling(number):
            for follower in followers:
                follower.check(until[1] if until is not None else None)
        return followers

    def _block(self, stack: int, block: int, passage: Passage, number: int) -> Any:
        name = self._stacks[stack].blocks[block]
        return self._call(self._model.get_submodule(name), f"{name}.", name, number, *passage.arguments(block))

    def _call(
        self, module: nn.Module, prefix: str, name: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        aside = {
            own: pruned
            for own, parameter in module.named_parameters(remove_duplicate=False)
            if (pruned := self._weights.get(prefix + own)) is not parameter
        }
        try:
            with self._context():
                return functional_call(module, aside, args, kwargs) if aside else module(*args, **kwargs)
        except Exception as e:
            raise CalibrationError(f"{name} cannot run calibration batch {number}: {e}.") from e
