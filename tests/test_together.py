"""What happens to one rank happens to all: within seconds, with the message of the one, and never with another result."""

import contextlib
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import statprune
from statprune import ranks
from statprune.errors import CalibrationError, NonFiniteError, RanksError, RecipeError, TracingError
from tiny_models import changed, classifier, llama, snapshot

SECONDS = 20
"""At most, until every rank has come to an end; one that waits for another gives up after 30 s."""


def _together(work):
    return ranks.together(None, torch.device("cpu"), work)


def _batches(rank, kind="tokens"):
    generator = torch.Generator().manual_seed(rank)
    if kind == "tokens":
        return [torch.randint(3, 48, (2, 6), generator=generator) for _ in range(2)]
    return [torch.randn(6, 8, generator=generator) for _ in range(2)]


def _nan(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    return model


def _loader(rank):
    yield _batches(rank)[0]
    raise OSError("the disk is gone")


class Overflows(nn.Module):
    """Finite on the first batch."""

    def __init__(self):
        super().__init__()
        self.body = classifier()

    def forward(self, values):
        return self.body(values.double().exp().float())


def _stops_at(count):
    def progress(done, total, what):
        if done >= count:
            raise OSError(f"nobody listens to {done} of {total}")

    return progress


def _fails_in_the_forward(count):
    """A context that raises when it is entered for the so many-th time."""
    entered = itertools.count(1)

    def context():
        if next(entered) == count:
            raise OSError("no memory")
        return torch.no_grad()

    return context


def _call(case, rank):
    """What this rank calls: the second one in a way that fails."""
    fails = rank == 1
    batches, how, settings, model = _batches(rank), "cvr+energy", {}, llama()
    call = statprune.prune
    match case:
        case "token":
            batches = [*batches, torch.full((2, 6), 99)] if fails else batches
        case "weight":
            model = _nan(model) if fails else model
        case "loader":
            batches = _loader(rank) if fails else batches
        case "no batch":
            batches = [] if fails else batches
        case "recipe":
            how = "cvr+enrgy" if fails else how
        case "forward":
            settings["forward_context"] = _fails_in_the_forward(3 if fails else 0)
        case "overflow":
            model, batches = Overflows(), _batches(rank, "values")
            batches = [batches[0], batches[1] * 1000] if fails else batches
        case "middle":
            settings["progress"] = _stops_at(4 if fails else 99)
        case "last":
            settings["progress"] = _stops_at(14 if fails else 99)
        case "plan":
            call, settings["progress"] = statprune.plan, _stops_at(14 if fails else 99)
        case "sensitivity":
            how = statprune.Recipe("wanda", pattern="50%", allocation="sensitivity")
            settings["progress"] = _stops_at(3 if fails else 99)
        case "tune":
            call, how = statprune.tune, None
            settings |= {"minutes": 0.01, "forward_context": _fails_in_the_forward(5 if fails else 0)}
    return model, lambda: call(model, batches, *([how] if how else []), **settings)


def _one_fails(rank, cases):
    found = []
    statprune.plan(llama(), _batches(rank), "wanda")  # exports, which takes longer than all that is measured here
    for case in cases:
        model, call = _call(case, rank)
        before, started = snapshot(model), time.monotonic()
        try:
            outcome = call()
        except Exception as e:
            outcome = e
        found.append((outcome, changed(model, before), time.monotonic() - started))
    return found


NOTHING = "Nothing was changed."
CASES = {
    "token": (CalibrationError, "token ids from 99 to 99", NOTHING),
    "weight": (NonFiniteError, "NaN or infinity in the parameter model.layers.1.mlp.up_proj.weight", NOTHING),
    "loader": (OSError, "the disk is gone", NOTHING),
    "no batch": (CalibrationError, "There are no calibration batches", NOTHING),
    "recipe": (RecipeError, "'enrgy'", NOTHING),
    "forward": (OSError, "no memory", NOTHING),
    # The sums are of all ranks, so all of them see it themselves.
    "overflow": (NonFiniteError, "NaN or infinity in the input of body.", "Pruned already: 0"),
    "middle": (OSError, "nobody listens to 4 of 14", "Pruned already: 4 weights before it. Reload the model."),
    "last": (OSError, "nobody listens to 14 of 14", "Pruned already: 14 weights before it. Reload the model."),
    "plan": (OSError, "nobody listens to 14 of 14", NOTHING),
    "sensitivity": (OSError, "nobody listens to 3 of 14", NOTHING),
    "tune": (OSError, "no memory", ""),
}


def test_the_failure_of_one_rank_is_an_error_on_all_with_its_message(two_ranks):
    first, second = two_ranks(_one_fails, list(CASES))
    for (case, (kind, message, consequence)), told, own in zip(CASES.items(), first, second, strict=True):
        error, different, seconds = told
        call = {"plan": "statprune.plan", "tune": "statprune.tune"}.get(case, "statprune.prune")
        assert type(own[0]) is kind, (case, own[0])
        assert message in str(own[0]), case
        if case == "overflow":
            assert type(error) is kind, case
            continue
        assert type(error) is RanksError, (case, error)
        assert str(error).startswith(f"{call}: rank 1 failed: {kind.__name__}: "), (case, str(error))
        assert message in str(error), case
        assert str(error).endswith(consequence), (case, str(error))
        assert str(error).count(NOTHING) <= 1, (case, str(error))
        assert bool(different) == ("Pruned already" in consequence), case
        assert max(seconds, own[2]) < SECONDS, case


def _one_bit(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.view(torch.int32)[3, 4] ^= 1
    return model


def _unlike(case, rank):
    """What this rank calls: the second one something else than the first."""
    other = rank == 1
    model, batches, how = llama(), _batches(rank), "cvr+energy"
    match case:
        case "bit":
            model = _one_bit(model) if other else model
        case "layers":
            model = llama(num_hidden_layers=1) if other else model
        case "dtype":
            model = model.bfloat16() if other else model
        case "recipe":
            how = statprune.Recipe("wanda" if other else how)
        case "search":
            how = "auto:minutes=1" if other else how
        case "inputs":
            batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in batches] if other else batches
        case "graph" if other:
            return model, lambda: _without_a_graph(model, batches)
    return model, lambda: statprune.prune(model, batches, how)


def _without_a_graph(model, batches):
    def fail(*_):
        raise TracingError("not today")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("statprune.model.layers.trace", fail)
        return statprune.prune(model, batches, "cvr+energy")


def _unlike_each_other(rank, cases):
    found = []
    for case in cases:
        model, call = _unlike(case, rank)
        before = snapshot(model)
        try:
            outcome = call()
        except Exception as e:
            outcome = e
        found.append((outcome, changed(model, before)))
    return found


DIFFERENT = {
    "bit": ("the weights of the ranks differ: model.layers.1.mlp.up_proj.weight with the checksum ", "the same checkpoint on"),
    "layers": ("the parameters of the ranks differ: model.layers.1.", "model.norm.weight [16] float32 on rank 1. Load the "),
    "dtype": ("the parameters of the ranks differ: model.embed_tokens.weight [48, 16] float32 on rank 0, ", "] bfloat16 on "),
    "recipe": ('the recipes of the ranks differ: method "cvr+energy" on rank 0, method "wanda" on rank 1. ', "the same one on"),
    "search": ('the recipes of the ranks differ: kind "Recipe" on rank 0, kind "Search" on rank 1. ', "the same one on"),
    "inputs": (
        "the batches of the ranks differ: nothing more on rank 0, input['attention_mask'] int64 of 2 dimensions",
        "same",
    ),
    "graph": ("the ways to run the model of the ranks differ: along the graph on rank 0, by module hooks ", "of the same kind"),
}


def test_ranks_that_would_not_do_the_same_are_told_what_differs_before_anything_is_changed(two_ranks):
    first, second = two_ranks(_unlike_each_other, list(DIFFERENT))
    for (case, parts), (error, different), (same, also_different) in zip(DIFFERENT.items(), first, second, strict=True):
        assert type(error) is type(same) is RanksError, (case, error, same)
        assert str(error) == str(same)
        assert str(error).startswith(f"statprune.prune: {parts[0]}"), (case, str(error))
        assert parts[1] in str(error), (case, str(error))
        assert str(error).endswith(" Nothing was changed."), case
        assert different | also_different == set(), case


def _at_different_places(rank):
    messages = []
    with contextlib.suppress(RanksError), _together("a test"):
        ranks.sum_over_ranks([torch.ones(2)], what="what all have")
        for size in (2 + rank, 2):
            try:
                ranks.sum_over_ranks([torch.ones(size)], what="what some have")
            except RanksError as e:
                messages.append(str(e))
    with _together("another test"):
        ranks.sum_over_ranks([total := torch.ones(2)])
    return messages, total.tolist()


def test_ranks_that_take_different_ways_find_out_and_can_begin_anew(two_ranks):
    (messages, total), second = two_ranks(_at_different_places)
    assert messages == [
        "a test: the ranks do not do the same: rank 0 is at what some have of (2,) torch.float32, rank 1 at what some have of "
        "(3,) torch.float32. Expected the same calls, with the same model and settings, on every rank.",
        "a test: the ranks parted after an error, and cannot go on with what some have of (2,) torch.float32.",
    ]
    assert second == (messages, total)
    assert total == [2, 2]


def _nested(rank):
    messages = []
    for fails in ([0, 1], [1], []):
        try:
            with _together("outer"), _together("inner"):
                if rank in fails:
                    raise ValueError(f"of rank {rank}")
                ranks.all_well(None, "the middle")
        except (ValueError, RanksError) as e:
            messages.append(str(e))
    return messages, ranks.share(5, 1 if rank else 7, torch.device("cpu")), ranks.share(3, 9, torch.device("cpu"))


def test_the_outermost_tells_once_every_rank_keeps_its_own_error_and_shares_are_dealt_in_turns(two_ranks):
    (first, *shares), (second, *others) = two_ranks(_nested)
    assert first == ["of rank 0", "inner: rank 1 failed: ValueError: of rank 1."]
    assert second == ["of rank 1", "of rank 1"]
    assert (shares, others) == ([4, 2], [1, 1])


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


def test_one_process_looks_through_its_weights_once_and_sums_nothing(monkeypatch):
    looked = []
    monkeypatch.setattr("statprune.agreement.check_weights", looked.append)
    monkeypatch.setattr("statprune.agreement.check_and_sum_weights", lambda model: pytest.fail("summed"))
    statprune.plan(model := classifier(), _batches(0, "values"), "cvr+energy", pattern="50%")
    assert looked == [model]
