import sys
from pathlib import Path

import pytest
import torch

import statprune
from statprune import clock
from statprune.clock import peak_memory, resident_memory, timed
from tiny_models import classifier

MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of resident memory")


def test_seconds_add_up_also_where_it_ends_in_an_error():
    seconds = {"a": 5.0}
    with timed(seconds, "a"), timed(seconds, "b"):
        pass
    assert seconds["a"] >= 5
    before = seconds["b"]
    with pytest.raises(ValueError), timed(seconds, "b"):
        raise ValueError
    assert seconds["b"] > before


@linux
def test_memory_is_the_highest_point_by_the_end_of_a_step():
    memory: dict[str, int] = {}
    with timed({}, "small", memory):
        pass
    resident = resident_memory("VmRSS")
    with timed({}, "large", memory):
        held = torch.ones(memory["small"] - resident + 64 * MIB, dtype=torch.uint8)
    del held
    with timed({}, "after", memory):
        pass
    assert memory["large"] >= memory["small"] + 60 * MIB
    assert memory["after"] >= memory["large"] - MIB  # nothing is reset: it may be somebody else's measurement


def test_where_the_system_tells_nothing_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(clock, "Path", lambda _: Path("/nowhere"))
    memory: dict[str, int] = {}
    with timed({}, "step", memory):
        pass
    assert memory == {}
    assert peak_memory(torch.device("cpu")) is None


@linux
@pytest.mark.parametrize("how", ["wanda", "magnitude"])
def test_a_report_has_the_memory_of_the_steps_that_it_has_the_seconds_of(how):
    report = statprune.prune(classifier(), [torch.randn(4, 8)], how, pattern="2:4")
    assert report.memory.keys() == report.seconds.keys()
    assert all(10 * MIB < peak < 2**40 for peak in report.memory.values())
