"""Which ranks work together: all of them, or those of a process group; one that does not come is no reason to wait for ever."""

import datetime
import time

import pytest
import torch
from torch import distributed

import statprune
from statprune import ranks
from statprune.errors import RanksError
from tiny_models import changed, classifier, snapshot

BATCHES = [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def _pruned(**settings):
    model = classifier()
    report = statprune.prune(model, settings.pop("batches", BATCHES), "cvr+energy", pattern="50%", **settings)
    return snapshot(model), report.num_tokens


def test_a_single_process_is_not_distributed():
    total = torch.ones(3)
    ranks.sum_over_ranks([total])
    with ranks.together(None, torch.device("cpu"), "prune"):
        ranks.agree(None, [ranks.Common("recipes", ["a"], "")])
        ranks.all_well(None, "a test")
    assert not ranks.is_distributed()
    assert total.tolist() == [1, 1, 1]
    assert ranks.from_first_rank(2.5, torch.device("cpu")) == 2.5


def _with_and_without_the_other(rank):
    both = _pruned(batches=BATCHES[rank::2])
    groups = [distributed.new_group([number]) for number in (0, 1)]  # both ranks make both groups, as torch wants it
    alone = _pruned(batches=BATCHES[rank::2], process_group=groups[rank])
    only_here = _pruned(process_group=groups[0]) if rank == 0 else None
    return both, alone, only_here


def test_the_ranks_of_a_group_work_together_and_no_others(two_ranks):
    (first, first_alone, first_only), (second, second_alone, _) = two_ranks(_with_and_without_the_other)
    every, half = 6 * len(BATCHES), 3 * len(BATCHES)
    assert (first[1], second[1], first_alone[1], second_alone[1], first_only[1]) == (every, every, half, half, every)
    for name, weight in _pruned()[0].items():
        assert torch.equal(first[0][name], second[0][name]), name
        torch.testing.assert_close(first[0][name], weight)
        assert torch.equal(first_only[0][name], weight), name
    assert not torch.equal(first_alone[0]["0.weight"], second_alone[0]["0.weight"])


def _prune_on_the_first_rank_only(rank):
    group = distributed.new_group([0, 1])  # one of their own: what does not come together is of no use any more
    if rank == 1:
        time.sleep(3)
        return None
    model = classifier()
    before = snapshot(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ranks, "PATIENCE", datetime.timedelta(seconds=1))
        with pytest.raises(RanksError) as caught:
            statprune.prune(model, BATCHES, process_group=group)
    return str(caught.value), changed(model, before)


def test_a_rank_that_works_alone_is_told_so_and_does_not_hang(two_ranks):
    (message, different), _ = two_ranks(_prune_on_the_first_rank_only)
    assert "statprune.prune: rank 0 waited 1 s for the others of 2, and not all of them came" in message
    assert "process_group=torch.distributed.new_group(" in message
    assert different == set()
