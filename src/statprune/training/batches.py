"""Batches to calibrate on, out of a loader that a training may be reading, on one rank or dealt out over several."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader, DistributedSampler

from statprune.errors import CalibrationError
from statprune.model.batches import several


def draw(source: Any, limit: int, *, rank: int = 0, num_ranks: int = 1, is_dealt_out: bool | None = None) -> list[Any]:
    """This rank's share of the first `limit` batches.

    Args:
        source: several batches, such as a DataLoader.
        limit: how many, at most, on all ranks together.
        rank: this one.
        num_ranks: how many there are. Rank r takes the batches r, r + num_ranks, ..., so that each counts once.
        is_dealt_out: whether each rank's `source` has batches of its own already; None: where its sampler is a
            `DistributedSampler`.

    Raises:
        CalibrationError: there is no batch for some rank.
    """
    if is_dealt_out is None:
        is_dealt_out = has_distributed_sampler(source)
    with _generators_kept(source):
        return _draw(fresh_iterator(source), limit, rank, num_ranks, is_dealt_out)


def _draw(batches: Iterator[Any], limit: int, rank: int, num_ranks: int, is_dealt_out: bool) -> list[Any]:
    if is_dealt_out:
        mine = list(itertools.islice(batches, len(range(rank, limit, num_ranks))))
        if num_ranks > 1 and not mine:
            raise CalibrationError(
                f"Rank {rank} of {num_ranks} has no calibration batch: each rank needs at least one. Give more data, smaller "
                "batches, or a higher limit of batches."
            )
        return mine
    mine, count = [], 0
    for batch in itertools.islice(batches, limit):
        if count % num_ranks == rank:
            mine.append(batch)
        count += 1
    if 0 < count < num_ranks:
        raise CalibrationError(
            f"The calibration data has {count} of the {num_ranks} batches that {num_ranks} ranks need at least, one each. Give "
            "more data, smaller batches, or a higher limit of batches."
        )
    return mine


def has_distributed_sampler(loader: Any) -> bool:
    """Whether a loader gives each rank samples of its own."""
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def fresh_iterator(loader: Any) -> Iterator[Any]:
    """An iterator of its own: a loader that keeps its workers has but one, which the training is reading."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    return iter(several(loader))


@contextlib.contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """A loader with random generators of its own shuffles afterwards as if nothing had been drawn from it."""
    parts = [loader]
    for name in ("batch_sampler", "batch_sampler", "sampler"):  # accelerate puts a batch sampler around another one
        parts += [part for part in (getattr(parts[-1], name, None),) if part is not None]
    parts.append(getattr(loader, "sampler", None))
    generators = {id(one): one for one in (getattr(part, "generator", None) for part in parts) if isinstance(one, Generator)}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
