"""Several processes with one model each: sums over ranks, and the first rank's word.

Every function takes the process group of the ranks that take part, None for all of them, and does nothing where there is one
process. All ranks of the group have to call.
"""

import datetime
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from statprune.errors import RanksError

ProcessGroup = Any
"""A `torch.distributed.ProcessGroup`, or None for all ranks."""

PATIENCE = datetime.timedelta(minutes=5)
"""How long ranks wait for each other before work begins; some may still be reading their data."""


def is_distributed(process_group: ProcessGroup = None) -> bool:
    """Whether several processes take part."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size(process_group) > 1


def meet(process_group: ProcessGroup, device: torch.device, work: str) -> None:
    """Wait until every rank of the group has come here, so that none waits for ever in the middle of the work.

    Args:
        process_group: the ranks that take part.
        device: of the model.
        work: what is about to begin, for the message.

    Raises:
        RanksError: a rank does not come.
    """
    if not is_distributed(process_group):
        return
    present = torch.ones((), device=device)
    try:
        waiting = distributed.all_reduce(present, group=process_group, async_op=True)
        waiting.wait(PATIENCE)
    except RuntimeError as e:
        size = distributed.get_world_size(process_group)
        raise RanksError(
            f"{work}: rank {distributed.get_rank(process_group)} waited {PATIENCE.total_seconds():.0f} s for the others of "
            f"{size}, and not all of them came. Expected every rank to call it, each with its own batches; to work on some "
            "ranks only, give process_group=torch.distributed.new_group([their ranks]). Nothing was changed."
        ) from e


def sum_over_ranks(tensors: Iterable[Tensor], process_group: ProcessGroup = None) -> None:
    """Replace each tensor by its sum over the ranks, in place."""
    if is_distributed(process_group):
        for tensor in tensors:
            distributed.all_reduce(tensor, group=process_group)


def from_first_rank(value: float, device: torch.device, process_group: ProcessGroup = None) -> float:
    """The first rank's value, on every rank."""
    if not is_distributed(process_group):
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.broadcast(shared, group=process_group, group_src=0)
    return float(shared)
