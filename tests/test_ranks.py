"""Which ranks work together: all of them, or those of a process group; one that does not come is no reason to wait for ever."""

import contextlib
import copy
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

import statprune
from statprune import ranks
from statprune.errors import CalibrationError, NonFiniteError, RanksError, SiteError
from statprune.model.weights import check_and_sum_weights
from statprune.recipe import Recipe
from tiny_models import VOCABULARY, changed, classifier, llama, snapshot, tokens

BATCHES = [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def _pruned(**settings):
    model = classifier()
    report = statprune.prune(model, settings.pop("batches", BATCHES), "cvr+energy", pattern="50%", **settings)
    return snapshot(model), report.num_tokens


def test_a_single_process_is_not_distributed():
    total = torch.ones(3)
    ranks.sum_over_ranks([total])
    with ranks.together(None, torch.device("cpu"), "prune"):
        ranks.all_well(None, "here")
        ranks.agree(None, [ranks.Common("recipes", ["wanda"], "")])
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


def _fails(work, model):
    """What `work` raises as (class, message), what it changed in the model, and the seconds that it took."""
    before, started = snapshot(model), time.monotonic()
    try:
        work()
    except Exception as e:
        return (type(e), str(e)), changed(model, before), time.monotonic() - started
    return None, changed(model, before), time.monotonic() - started


def _loader_that_fails():
    yield BATCHES[0]
    raise OSError("the disk is gone")


@contextlib.contextmanager
def _failing_prune_of(site, error):
    """The engine cannot prune this site."""
    from statprune import engine

    prune = engine._prune

    def fail(pruner, one, weight, moments):
        if one.parameter == site:
            raise error
        return prune(pruner, one, weight, moments)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(engine, "_prune", fail)
        yield


def _failures_of_prune(rank):
    """What each rank sees where rank 1 does something else; all in one group, which stays of use after each."""
    other = rank == 1

    def prune(model, batches=BATCHES, how="cvr+energy"):
        return _fails(lambda: statprune.prune(model, batches, how, pattern="50%"), model)

    seen = {}
    seen["no batch"] = prune(classifier(), [] if other else BATCHES)
    seen["loader"] = prune(classifier(), _loader_that_fails() if other else BATCHES)
    wide = [torch.randn(6, 9)]
    seen["shape"] = prune(classifier(), wide if other else BATCHES)
    model = classifier()
    if other:
        model[2].weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model)
    (error, _, seconds), same = prune(model), torch.equal(model[0].weight, before[0].weight)
    seen["NaN weight"] = error, set() if same else {"0.weight"}, seconds
    model = classifier()
    if other:
        model[2].weight.data[0, 0] += 1e-3
    seen["weights"] = prune(model)
    seen["recipes"] = prune(classifier(), how="wanda" if other else "cvr+energy")
    seen["dtypes"] = prune(classifier(), [BATCHES[0].double() if other else BATCHES[0]])
    with _failing_prune_of("2.weight", SiteError("2: broken")) if other else contextlib.nullcontext():
        seen["middle"] = prune(classifier(), how=Recipe("cvr+energy", schedule="block"))
    with _failing_prune_of("2.weight", KeyError("not ours")) if other else contextlib.nullcontext():
        seen["raw"] = prune(classifier())
    seen["well"] = prune(classifier())
    return seen


def test_what_fails_on_one_rank_is_an_error_on_all_within_seconds(two_ranks):
    first, second = two_ranks(_failures_of_prune)
    assert first.pop("well")[:2] == second.pop("well")[:2] == (None, {"0.weight", "2.weight"})
    for case, (kind, text) in {
        "no batch": (CalibrationError, "There are no calibration batches"),
        "loader": (OSError, "the disk is gone"),
        "shape": (CalibrationError, "mat1 and mat2"),
        "NaN weight": (NonFiniteError, "NaN or infinity in the parameter 2.weight"),
        "middle": (SiteError, "2: broken Pruned already: 1 weight before it. Reload the model."),
        "raw": (KeyError, "not ours"),
    }.items():
        (here, message), _, _ = second[case]
        assert issubclass(here, kind), case
        assert text in message, case
        (there, message), _, _ = first[case]
        assert there is RanksError, case
        assert f"statprune.prune: rank 1 failed: {here.__name__}: " in message, case
        assert text in message, case
    for case, text in {
        "weights": "the weights of the ranks differ: 2.weight [8, 12] float32 ",
        "recipes": "the recipes of the ranks differ: ",
        "dtypes": "the batches of the ranks differ: ",
    }.items():
        assert first[case][0] == second[case][0], case
        assert first[case][0][0] is RanksError, case
        assert text in first[case][0][1], case
        assert "Nothing was changed." in first[case][0][1], case
    assert "wanda" in first["recipes"][0][1]
    assert "float32 of 2 dimensions on rank 0" in first["dtypes"][0][1]
    assert "float64 of 2 dimensions on rank 1" in first["dtypes"][0][1]
    for case, (error, different, seconds) in [*first.items(), *second.items()]:
        assert seconds < 20, case  # the collective itself would wait for 30
        if case in ("middle", "raw"):
            assert different, case
        else:
            assert different == set(), case
            assert error[0] is not RanksError or error[1].endswith("Nothing was changed."), case


def _failures_of_tune(rank):
    other = rank == 1

    def tune(model, batches=None, **settings):
        torch.manual_seed(1)
        windows = tokens(4, 12).split(1)
        return _fails(lambda: statprune.tune(model, windows if batches is None else batches, **settings), model)

    seen = {}
    seen["token"] = tune(llama(num_hidden_layers=1), torch.full((4, 12), VOCABULARY) if other else None)
    seen["single"] = tune(llama(num_hidden_layers=1), [tokens(1, 12)] if other else None)
    seen["search"] = tune(llama(num_hidden_layers=1), minutes=2 if other else 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if other:  # in the middle of the search
            monkeypatch.setattr("statprune.tuning.search.Scorer.upto", lambda self, batches: 1 / 0)
        seen["score"] = tune(llama(num_hidden_layers=1))
    return seen


def test_what_fails_on_one_rank_of_a_search_is_an_error_on_all(two_ranks):
    first, second = two_ranks(_failures_of_tune)
    for case, text in {"token": "", "single": "a single window", "score": "division by zero"}.items():
        (kind, message), _, _ = second[case]
        assert kind is not RanksError
        assert text in message
        assert first[case][0][0] is RanksError, case
        assert f"statprune.tune: rank 1 failed: {kind.__name__}: " in first[case][0][1]
        assert text in first[case][0][1]
    assert first["search"][0] == second["search"][0]
    assert "the recipes of the ranks differ: minutes 1" in first["search"][0][1]
    for case, (_, different, seconds) in [*first.items(), *second.items()]:
        assert different == set(), case
        assert seconds < 20, case


def _add_up_twice(group, name, length):
    try:
        ranks.sum_over_ranks([torch.ones(length)], group, name)
    finally:  # whoever goes on after an error hears of it, and does not hang
        with pytest.raises(RanksError, match="work: the ranks parted after an error"):
            ranks.all_well(group, "more")


def _asked_for_different_work(rank):
    group = distributed.new_group([0, 1])
    name, length = ("apples", 2) if rank == 1 else ("pears", 3)
    with pytest.raises(RanksError) as caught, ranks.together(group, torch.device("cpu"), "work"):
        _add_up_twice(group, name, length)
    return str(caught.value)


def test_ranks_that_do_not_do_the_same_are_told_what_each_does(two_ranks):
    message, same = two_ranks(_asked_for_different_work)
    assert message == same
    assert "work: the ranks do not do the same: rank 0 is at pears of (3,)" in message
    assert "rank 1 at apples of (2,)" in message


DIES = """
import os, sys, torch
from torch import distributed
from statprune import ranks
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
with ranks.together(None, torch.device("cpu"), "work"):
    ranks.all_well(None, "the first step")
    if rank == 1:
        os._exit(7)
    ranks.all_well(None, "the second step")
"""


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_of_the_others_at_once(tmp_path):
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(statprune.__file__).parents[1])},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = processes[0].communicate(timeout=120)[1].strip().splitlines()[-1]
    processes[1].communicate(timeout=120)
    assert "RanksError: work: rank 0 lost another one of 2 at the second step: " in told
    assert "If a process has ended, its own output says why." in told
    assert time.monotonic() - started < 120


def test_lines_of_weights_differ_where_any_bit_does():
    def lines(*weights):
        model = torch.nn.Module()
        for number, weight in enumerate(weights):
            model.register_parameter(f"p{number}", torch.nn.Parameter(weight, requires_grad=False))
        return check_and_sum_weights(model)

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.randn(7, 13, generator=generator).to(dtype)
        [known] = lines(weight)
        assert known.startswith(f"p0 [7, 13] {str(dtype).removeprefix('torch.')} ")
        assert lines(weight.clone()) == lines(weight.t().contiguous().t()) == [known]
        last_sign, one_row = weight.clone(), weight.clone()
        last_sign[6, 12].neg_()
        one_row[0] = weight[1]
        for other in (last_sign, one_row, weight.flip(0), -weight):
            assert lines(other) != [known]
        assert lines(weight.view(13, 7)) != [known]
    zero = torch.zeros(1)
    assert lines(zero) != lines(-zero)
    assert [line.split()[0] for line in lines(zero, torch.zeros(()), torch.zeros(0), torch.zeros(3, dtype=torch.int8))] == [
        "p0", "p1", "p2", "p3",
    ]  # fmt: skip
    with pytest.raises(NonFiniteError, match="NaN or infinity in the parameter p1"):
        lines(zero, torch.tensor([1.0, torch.inf]))
    large = torch.randn(3 * (1 << 19) + 5, generator=generator)  # more than is read at a time
    changed_late = large.clone()
    changed_late[-1] += 1
    swapped = torch.cat([large[1 << 19 : 2 << 19], large[: 1 << 19], large[2 << 19 :]])
    assert len({*lines(large), *lines(changed_late), *lines(swapped)}) == 3


def test_one_process_looks_through_its_weights_once_and_sums_nothing(monkeypatch):
    looked = []
    monkeypatch.setattr("statprune.agreement.check_weights", looked.append)
    monkeypatch.setattr("statprune.agreement.check_and_sum_weights", lambda model: pytest.fail("summed"))
    statprune.plan(model := classifier(), BATCHES, "cvr+energy", pattern="50%")
    assert looked == [model]
