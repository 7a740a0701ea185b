"""The dense model, as an allocation sees it: statistics, weights, and what works on it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import is_causal
from statprune.model.layers import Layers
from statprune.model.observe import ForwardContext
from statprune.model.sites import LinearSite
from statprune.model.weights import Weights
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup, share, sum_over_ranks
from statprune.selection import Selection

PROBE_LENGTH = 128
"""Tokens of a sequence that are looked at, at most, where a forward pass is made for each layer."""


@dataclass(frozen=True)
class DenseModel:
    """A model that is not pruned yet; the arguments of `allocate`."""

    layers: Layers
    selection: Selection
    inputs: Sequence[ModelInputs]
    weights: Weights
    process_group: ProcessGroup = None
    progress: Progress = silent
    forward_context: ForwardContext = contextlib.nullcontext

    @property
    def sites(self) -> list[LinearSite]:
        """The layers that share the budget, in execution order."""
        return self.selection.sites

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.layers.model.parameters()).device

    def weight(self, site: LinearSite) -> Tensor:
        """[out, in], its weight."""
        return site.view(self.weights.get(site.parameter).detach())

    def observe(
        self, needs: Statistic, inputs: Sequence[ModelInputs] | None = None
    ) -> Iterator[tuple[LinearSite, InputMoments]]:
        """Each layer with the statistics of its inputs. Nothing is pruned on the way, so that all are the dense model's.

        Args:
            needs: what to collect.
            inputs: other batches than all, one at least on each rank.
        """
        for group, moments in self.layers.observe(
            self.selection.groups,
            self.inputs if inputs is None else inputs,
            needs=needs,
            weights=self.weights,
            process_group=self.process_group,
            forward_context=self.forward_context,
        ):
            assert isinstance(moments, InputMoments), "stacks are refused before (`selection.unfit_for_experts`)"
            for site in group.sites:
                yield site, moments

    def first(self, count: int) -> Sequence[ModelInputs]:
        """The first batches, so many on all ranks together, which lay them down in turns."""
        return self.inputs[: share(count, len(self.inputs), self.device, self.process_group)]

    def sequences(self, count: int) -> list[ModelInputs]:
        """The beginning of one sequence of each of so many batches, as `first`; whole batches of what is no language model."""
        batches = self.first(count)
        return [_one_sequence(batch) for batch in batches] if is_causal(self.layers.model) else list(batches)

    def one_in(self, number: int) -> Sequence[ModelInputs]:
        """The first of so many parts of the batches of all ranks, one batch on each rank at least."""
        counts = torch.tensor([len(self.inputs), 1], device=self.device)
        sum_over_ranks([counts], self.process_group, "the numbers of batches and ranks")
        batches, ranks = counts.tolist()
        return self.first(max(-(-batches // number), ranks))


def _one_sequence(batch: ModelInputs) -> ModelInputs:
    """The beginning of the sequence with the least padding, where all tensors are [rows, length]; else the batch."""
    shapes = {tensor.shape for tensor in batch.tensors()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        return batch
    mask = batch.kwargs.get("attention_mask", torch.ones(next(iter(shapes))))
    row = int((mask != 0).sum(1).argmax())
    first = int((mask[row] != 0).int().argmax())  # what is before it is padding

    def part(leaf: Any) -> Any:
        return leaf[row : row + 1, first : first + PROBE_LENGTH] if isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_map(part, (batch.args, batch.kwargs))
    return replace(batch, args=args, kwargs=kwargs)
