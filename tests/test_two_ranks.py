"""The pair of processes that tests of several ranks run in."""

import os
import time
import warnings

import pytest
import torch
from torch import distributed

from two_ranks import RankDied


def _sum(rank, mine):
    total = torch.tensor(mine[rank])
    distributed.all_reduce(total)
    return rank, os.getpid(), total


def _fails_on(rank, who):
    if rank in who:
        raise ValueError(f"not on {rank}")
    return torch.rand(())


def _raises_what_cannot_be_sent(rank):
    raise UnicodeDecodeError("utf-8", b"x", 0, 1, str(rank)) if rank else type("Local", (Exception,), {})("here")


def _warns(rank):
    warnings.warn("once", stacklevel=1)


def _dies(rank):
    if rank == 1:
        os._exit(7)


def _sleeps(rank):
    time.sleep(0 if rank == 0 else 60)


def test_both_ranks_share_a_group_and_stay_the_same_processes(two_ranks):
    first, again = two_ranks(_sum, [1, 2]), two_ranks(_sum, [3, 4])
    assert [rank for rank, _, _ in first] == [0, 1]
    assert [total.item() for _, _, total in [*first, *again]] == [3, 3, 7, 7]
    assert [process for _, process, _ in first] == [process for _, process, _ in again]
    assert len({os.getpid(), *(process for _, process, _ in first)}) == 3


def test_an_exception_of_either_rank_is_raised_here_and_says_where(two_ranks):
    with pytest.raises(ValueError, match="not on 1") as caught:
        two_ranks(_fails_on, [1])
    assert "in _fails_on" in caught.value.__notes__[0]
    first, second = two_ranks.outcomes(_fails_on, [0])
    assert (str(first), second) == ("not on 0", torch.manual_seed(0) and torch.rand(()))
    with pytest.raises(RuntimeError, match="Local"):
        two_ranks(_raises_what_cannot_be_sent)
    with pytest.raises(UserWarning, match="once"):
        two_ranks(_warns)


@pytest.mark.slow
def test_a_rank_that_dies_or_hangs_is_replaced(two_ranks):
    (_, before, _), _ = two_ranks(_sum, [1, 2])
    with pytest.raises(RankDied, match="rank 1 ended with 7"):
        two_ranks(_dies)
    (_, after, total), _ = two_ranks(_sum, [1, 2])
    assert total == 3
    assert after != before
    with pytest.raises(RankDied, match="rank 1 has not come to an end"):
        two_ranks(_sleeps, timeout=0.5)
