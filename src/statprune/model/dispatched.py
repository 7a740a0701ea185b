"""Dispatched: weights that accelerate has spread over devices, or keeps in host memory (`device_map`, `cpu_offload`).

The walk computes on one device, the one that accelerate would begin on. A weight that lies elsewhere is copied there for the
segments that read it, and a pruned one is written where it lies. So the device holds one segment, however large the model is.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from statprune.methods.pruner import PrunedWeight
from statprune.model.sites import LinearSite
from statprune.model.storage import compute_device, in_host_memory
from statprune.model.weights import named_tensors


class Dispatched:
    """A dispatched model's own weights: read on one device, written where they lie."""

    is_in_place = True

    def __init__(self, model: nn.Module) -> None:
        self.device = compute_device(model)
        self._tensors = {**named_tensors(model), **in_host_memory(model)}
        self._here: dict[str, Tensor] = {}
        # A graph may write to a buffer, and read what it wrote: a copy for each reader would not do.
        buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
        self._here.update({name: self._tensors[name].to(self.device) for name in buffers})
        self._buffers = set(buffers)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def prepare(self, names: Sequence[str], following: Sequence[str] = ()) -> None:
        """Copy these to the device, where they are not there."""
        for name in names:
            if name not in self._here and self._tensors[name].device != self.device:
                self._here[name] = self._tensors[name].detach().to(self.device)

    def get(self, name: str) -> Tensor:
        """On the device."""
        found = self._here.get(name, self._tensors[name])
        return found if found.device == self.device else found.detach().to(self.device)

    def original(self, name: str) -> Tensor:
        """As it is now: whoever needs it after it is put keeps a copy."""
        return self.get(name)

    @torch.no_grad()
    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Write it where the weight lies."""
        self._tensors[site.parameter].copy_(site.view(pruned.weight))
        self._replace(site, site.view(pruned.weight))
        torch.clear_autocast_cache()

    def release(self, names: Iterable[str]) -> None:
        """Let the copies go."""
        for name in names:
            if name not in self._buffers:
                self._here.pop(name, None)

    def _replace(self, site: LinearSite, stored: Tensor) -> None:
        names = {site.parameter, *site.aliases} & self._here.keys()
        self._here.update(dict.fromkeys(names, stored))


class DispatchedTwin(Dispatched):
    """A dispatched model's weights with pruned ones in the place of some; the model stays as it is."""

    is_in_place = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.pruned: dict[str, Tensor] = {}
        """By the site's name of the parameter, as it is stored, on the device that it lies on."""

    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Keep it aside."""
        stored = site.view(pruned.weight).contiguous()
        self._replace(site, stored)
        kept = self.pruned[site.parameter] = stored.to(self._tensors[site.parameter].device)
        self._tensors.update(dict.fromkeys((site.parameter, *site.aliases), kept))
