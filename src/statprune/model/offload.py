"""Where the values of all batches wait while the walk stops at a cut: on the device, in host memory or elsewhere.

    back     a batch's values are on the device, for the next segment to run
    away     they wait elsewhere until it is the batch's turn again; on the device is one batch at a time

Whole storages are moved, each once, whatever views and streams share it. What comes back has the strides and the alignment
that it had, and shares memory with what it did: it is computed with to the bit as if it had stayed. What batches have in common
and what is no batch's own (positions, masks, weights, the batches themselves) stays.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves, tree_map

from statprune.model.nodes import storages_of
from statprune.model.segments import batch_independent, made_of_weights
from statprune.model.sites import TracedModel
from statprune.model.streams import Environment

Place = Literal["device", "host", "disk"]
"""On the device that computes, in a GPU's host memory, in files."""


class Offload(Protocol):
    """Moves the values of batches, as far as the model has run, away and back."""

    def away(self, number: int, environments: Sequence[Environment]) -> Sequence[Environment]:
        """Have a batch's values wait.

        Args:
            number: of the batch.
            environments: its values in each stream; they are not to be read afterwards.

        Returns:
            What to keep of each stream. A node may be taken out of it.
        """

    def back(self, number: int, environments: Sequence[Environment]) -> Sequence[Environment]:
        """A batch's values to compute with, of what `away` gave, which can be brought back again."""


class OnDevice:
    """Values stay where they are."""

    def away(self, number: int, environments: Sequence[Environment]) -> Sequence[Environment]:
        """The very same."""
        return environments

    def back(self, number: int, environments: Sequence[Environment]) -> Sequence[Environment]:
        """The very same."""
        return environments


ON_DEVICE = OnDevice()


@dataclass(frozen=True)
class Lying:
    """A tensor whose storage is elsewhere."""

    storage: int
    """Among its batch's."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Elsewhere(ABC):
    """Values that wait as bytes, storage by storage.

    Args:
        traced: the graph.
    """

    def __init__(self, traced: TracedModel) -> None:
        shared = batch_independent(traced)
        keys = outside(traced) | {key for node in shared for key in storages_of(node)}
        self._staying = shared | {
            node for node in traced.graph_module.graph.nodes if not keys.isdisjoint(storages_of(node).keys())
        }

    @abstractmethod
    def store(self, number: int, storages: Sequence[Tensor]) -> None:
        """Keep a batch's storages, each as bytes [size] on the device, in the place of those that it had."""

    @abstractmethod
    def fetch(self, number: int, storage: int, device: torch.device) -> Tensor:
        """The bytes of one of them again, in memory of its own on the device."""

    def away(self, number: int, environments: Sequence[Environment]) -> Sequence[Environment]:
        """As `Offload`; these are empty afterwards."""
        staying = {
            leaf.untyped_storage().data_ptr()  # ops hand back what came in where there is nothing to do
            for environment in environments
            for node in environment.keys() & self._staying
            for leaf in tree_leaves(environment[node])
            if isinstance(leaf, Tensor)
        }
        indices: dict[int, int] = {}
        storages: list[Tensor] = []

        def move(leaf: Any) -> Any:
            if not _is_plain(leaf):
                return leaf
            storage = leaf.untyped_storage()
            if (key := storage.data_ptr()) in staying:
                return leaf
            if key not in indices:
                indices[key] = len(storages)
                storages.append(_as_bytes(storage))
            return Lying(indices[key], leaf.device, leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.storage_offset())

        kept = [
            {node: value if node in self._staying else tree_map(move, value) for node, value in environment.items()}
            for environment in environments
        ]
        for environment in environments:
            environment.clear()
        self.store(number, storages)
        return kept

    def back(self, number: int, environments: Sequence[Environment]) -> Sequence[Environment]:
        """As `Offload`."""
        fetched: dict[int, UntypedStorage] = {}

        def bring(leaf: Any) -> Any:
            if not isinstance(leaf, Lying):
                return leaf
            if leaf.storage not in fetched:
                fetched[leaf.storage] = self.fetch(number, leaf.storage, leaf.device).untyped_storage()
            blank = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            return blank.set_(fetched[leaf.storage], leaf.offset, leaf.shape, leaf.stride)

        return [{node: tree_map(bring, value) for node, value in environment.items()} for environment in environments]


class ToHost(Elsewhere):
    """Values of a GPU that wait in main memory; pinned, so that copies run in the order of the work, which waits for none."""

    def __init__(self, traced: TracedModel) -> None:
        super().__init__(traced)
        self._held: dict[int, list[Tensor]] = {}

    def store(self, number: int, storages: Sequence[Tensor]) -> None:
        """As `Elsewhere`."""
        self._held[number] = [
            torch.empty(one.shape, dtype=one.dtype, pin_memory=one.is_cuda).copy_(one, non_blocking=True) for one in storages
        ]

    def fetch(self, number: int, storage: int, device: torch.device) -> Tensor:
        """As `Elsewhere`."""
        held = self._held[number][storage]
        return torch.empty(held.shape, dtype=held.dtype, device=device).copy_(held, non_blocking=True)


def outside(traced: TracedModel) -> set[int]:
    """What `storages_of` calls the memory that is there without any batch's running: of weights, buffers, the batches."""
    made = made_of_weights(traced)
    nodes = traced.graph_module.graph.nodes
    return {key for node in nodes if node.op in ("placeholder", "get_attr") or node in made for key in storages_of(node)}


def _is_plain(leaf: Any) -> bool:
    """Whether a value is a tensor that its storage, its shape and its strides say all of."""
    return type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_conj() and not leaf.is_neg()


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
