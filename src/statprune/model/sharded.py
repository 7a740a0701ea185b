"""Sharded: weights of which each rank holds a part, as FSDP2 makes them (`torch.distributed.fsdp.fully_shard`).

    prepare    gathers what a segment reads; every rank calls it at the same place
    put        writes this rank's part into the model, or with ShardedTwin keeps it aside
    release    lets what was gathered go

So a rank's memory holds its part of the model and one segment whole. Every rank prunes every weight, from the same sums and the
same weight, and comes to the same result.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from statprune.methods.pruner import PrunedWeight
from statprune.model.sites import LinearSite
from statprune.model.storage import is_sharded, local, reshard_, shard_of
from statprune.model.weights import named_tensors, write_
from statprune.model.whole import whole_twin
from statprune.ranks import ProcessGroup, collective


class Sharded:
    """A sharded model's own weights: read whole, written in parts into the model."""

    is_in_place = True

    def __init__(self, model: nn.Module, process_group: ProcessGroup = None) -> None:
        reshard_(model)
        self._tensors = named_tensors(model)
        self._gathered: dict[str, Tensor] = {}
        self._process_group = process_group

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def prepare(self, names: Sequence[str], following: Sequence[str] = ()) -> None:
        """Gather these, on all ranks."""
        missing = [name for name in names if isinstance(self._tensors[name], DTensor) and name not in self._gathered]
        if not missing:
            return
        with collective(self._process_group, f"the gathering of {', '.join(missing)}"):
            for name in missing:
                self._gathered[name] = _whole(self._tensors[name])

    def get(self, name: str) -> Tensor:
        """Whole: gathered before, or now, which every rank has to do."""
        if name in self._gathered or not isinstance(self._tensors[name], DTensor):
            return self._gathered.get(name, self._tensors[name])
        with collective(self._process_group, f"the gathering of {name}"):
            return _whole(self._tensors[name])

    def original(self, name: str) -> Tensor:
        """As it is now: whoever needs it after it is put keeps a copy."""
        return self.get(name)

    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Write this rank's part into the model."""
        write_part_(self._tensors[site.parameter], self._stored(site, pruned))

    def release(self, names: Iterable[str]) -> None:
        """Let what was gathered go."""
        for name in names:
            self._gathered.pop(name, None)

    def _stored(self, site: LinearSite, pruned: PrunedWeight) -> Tensor:
        """The pruned weight as the parameter is stored, whole; what is gathered is that from now on."""
        stored = site.view(pruned.weight).contiguous()
        names = {site.parameter, *site.aliases} & self._gathered.keys()
        self._gathered.update(dict.fromkeys(names, stored))
        return stored


class ShardedTwin(Sharded):
    """A sharded model's weights with pruned ones in the place of some; the model stays as it is."""

    is_in_place = False

    def __init__(self, model: nn.Module, process_group: ProcessGroup = None) -> None:
        super().__init__(model, process_group)
        self.pruned: dict[str, Tensor] = {}
        """By the site's name of the parameter: this rank's part, a DTensor like the parameter (`swapped`, `write_`)."""

    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Keep this rank's part aside."""
        stored, parameter = self._stored(site, pruned), self._tensors[site.parameter]
        kept = shard_of(stored, parameter) if isinstance(parameter, DTensor) else stored
        self.pruned[site.parameter] = kept
        self._tensors.update(dict.fromkeys((site.parameter, *site.aliases), kept))


@torch.no_grad()
def write_part_(parameter: Tensor, whole: Tensor) -> None:
    """Write this rank's part of a whole weight, in place."""
    local(parameter).copy_(local(shard_of(whole, parameter)) if isinstance(parameter, DTensor) else whole)
    torch.clear_autocast_cache()


@contextlib.contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a sharded model runs with these weights (`ShardedTwin.pruned`); afterwards its own are there again, bit for bit.

    Where `torch.func.functional_call` would do for whole weights: FSDP2 gathers the parameters' own memory.
    """
    reshard_(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: parameters[name].detach().clone() for name in weights}
    write_(model, weights)
    try:
        yield
    finally:
        reshard_(model)
        write_(model, before)


def gathered(model: nn.Module, *, is_wanted: bool) -> nn.Module | None:
    """A twin of a sharded model with whole weights in host memory, to be saved. Every rank has to call it.

    Args:
        model: stays as it is; one that is not sharded is returned itself.
        is_wanted: whether this rank gets it; the others only take part, and get None.
    """
    if not is_sharded(model):
        return model
    reshard_(model)
    wholes: dict[str, Tensor] = {}
    with collective(None, "the gathering of the weights"):
        for name, parameter in model.named_parameters():  # one at a time on the device
            whole = _whole(parameter) if isinstance(parameter, DTensor) else parameter.detach()
            if is_wanted:
                wholes[name] = whole.cpu()
    return whole_twin(model, lambda name, _: wholes[name], lambda _, buffer: buffer.cpu()) if is_wanted else None


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    detached: Any = tensor.detach()
    whole: Tensor = detached.full_tensor()
    return whole
