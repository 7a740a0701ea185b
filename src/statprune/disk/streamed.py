"""Streamed: weights that are read from the files of a model, and written into those of its output.

    prepare(segment, next)     the segment's weights are in memory; a thread reads the next one's meanwhile
    put(site)                  into the output's file, at once
    release(names)             out of memory

In memory are the weights of two segments, whatever the size of the model.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from statprune.clock import give_back_memory
from statprune.disk.ranges import check_finite, read
from statprune.disk.shards import Shards
from statprune.disk.skeleton import Skeleton
from statprune.methods.pruner import PrunedWeight
from statprune.model.sites import LinearSite


class Streamed:
    """A model's weights on disk; a `Weights`, and the store of a `Journal`.

    Args:
        skeleton: of the model.
        shards: of the output.
        device: to compute on.
        writes: whether what is put goes into the output. Of several ranks the first writes it; the others read it from there,
            once the first has told them that it is written.
    """

    is_in_place = False

    def __init__(self, skeleton: Skeleton, shards: Shards | None, device: torch.device, *, writes: bool = True) -> None:
        self._skeleton, self._shards, self._device, self._writes = skeleton, shards, device, writes
        self._buffers: dict[str, Tensor] = dict(skeleton.model.named_buffers(remove_duplicate=False))
        self._resident: dict[str, Tensor] = {}
        self._coming: dict[str, Future[Tensor]] = {}
        self._landed: set[str] = set()
        """Parameters that are read from the output."""
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="statprune-reader")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __contains__(self, name: str) -> bool:
        return name in self._skeleton.canonical or name in self._buffers

    def get(self, name: str) -> Tensor:
        """As it is now; read where it is not in memory."""
        if (buffer := self._buffers.get(name)) is not None:
            return buffer
        own = self._skeleton.canonical[name]
        return self._resident[own] if own in self._resident else self._read(own, is_landed=own in self._landed)

    def original(self, name: str) -> Tensor:
        """As it is in the model's files."""
        own = self._skeleton.canonical.get(name)
        if own is None or own not in self._landed:
            return self.get(name)
        return self._read(own, is_landed=False)

    def prepare(self, names: Sequence[str], following: Sequence[str] = ()) -> None:
        """Have these in memory, and begin to read those of the next segment."""
        for own in self._own(names):
            if own not in self._resident:
                coming = self._coming.pop(own, None)
                self._resident[own] = self._arrived(coming) if coming else self._read(own, is_landed=own in self._landed)
        for own in self._own(following):
            if own not in self._resident and own not in self._coming:
                self._coming[own] = self._reader.submit(self._read, own, is_landed=own in self._landed)

    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Have it instead of the dense one from now on, in memory and in the output."""
        assert self._shards is not None, "weights that are only read"
        own = self._skeleton.canonical[site.parameter]
        stored = site.view(pruned.weight).contiguous()
        if self._writes:
            self._shards.write(self._skeleton.stored_as[own], stored)
        self._landed.add(own)
        self._resident[own] = stored

    def release(self, names: Iterable[str]) -> None:
        """Let go of their memory."""
        gone = self._own(names)
        for own in gone:
            self._resident.pop(own, None)
            self._coming.pop(own, None)
        if gone:
            give_back_memory()  # else what is free between what is used grows with every block

    def digest(self, parameter: str) -> str:
        """Of what was put there, as it lies in the output."""
        assert self._shards is not None, "weights that are only read"
        return self._shards.digests[self._skeleton.stored_as[parameter]]

    def holds(self, parameter: str, digest: str) -> bool:
        """Whether the output has a weight of this digest in its place."""
        assert self._shards is not None, "weights that are only read"
        return self._shards.is_whole(self._skeleton.stored_as[parameter], digest)

    def land(self, site: LinearSite) -> None:
        """Read it from the output from now on."""
        own = self._skeleton.canonical[site.parameter]
        self._landed.add(own)
        if self._resident.pop(own, None) is not None:
            self._resident[own] = self._read(own, is_landed=True)

    def close(self) -> None:
        """Stop reading ahead."""
        self._coming.clear()
        self._resident.clear()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _own(self, names: Iterable[str]) -> list[str]:
        """The parameters among these names, each once."""
        return list(dict.fromkeys(self._skeleton.canonical[name] for name in names if name in self._skeleton.canonical))

    def _read(self, own: str, *, is_landed: bool) -> Tensor:
        """From the output or from the model's files, in the dtype and on the device to compute with."""
        pinned = self._copies is not None
        if is_landed:
            assert self._shards is not None, "nothing lands without an output"
            tensor = self._shards.read(self._skeleton.stored_as[own], pinned=pinned)
        else:
            tensor = read(self._skeleton.places[own], pinned=pinned)
        check_finite(tensor, own)
        dtype = self._skeleton.model.get_parameter(own).dtype
        if self._copies is None:
            return tensor.to(dtype)
        # The reader's copies run beside the computation; whoever takes them waits for them (`_arrived`).
        with torch.cuda.stream(self._copies):
            moved = tensor.to(self._device, non_blocking=True).to(dtype)
        self._copies.synchronize()
        return moved

    def _arrived(self, coming: "Future[Tensor]") -> Tensor:
        tensor = coming.result()
        if self._copies is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))  # made on another one
        return tensor
