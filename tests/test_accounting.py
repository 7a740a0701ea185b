"""What is told before a run of what it will take: against the walk's own tensors, and against the memory of a real process."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from statprune import streaming
from statprune.configuration import empty_model
from statprune.methods.statistics import Statistic
from statprune.methods.workspace import HIGH_POINTS, workspace
from statprune.model import walk as walk_module
from statprune.model.accounting import expect
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.segments import batch_independent
from statprune.model.walk import walk
from statprune.model.weights import InPlace
from statprune.recipe import Recipe
from statprune.streaming import expected_memory
from tiny_models import gpt2, llama, t5, tokens

SCHEDULES = ["walk", "block", "one-shot"]


def expected(layers, inputs, *, schedule="walk", needs=Statistic.MOMENTS, to_prune=0, values="device"):
    parameters = dict(layers.model.named_parameters(remove_duplicate=False))
    return expect(
        layers.traced, layers.groups, inputs, parameters,
        schedule=schedule, needs=needs, workspace=lambda site: to_prune, values=values,
    )  # fmt: skip


def waiting(streams, traced):
    """Bytes of the memory that the streams' values lie in, but for the batches' own tensors and the model's."""
    outside = {node for node in traced.graph_module.graph.nodes if node.op != "call_function"}
    outside_storages, storages = set(), {}
    for stream in streams:
        for environment in stream.values:
            for node, value in environment.items():
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        storage = leaf.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
                        if node in outside:
                            outside_storages.add(storage.data_ptr())
    return sum(size for key, size in storages.items() if key not in outside_storages)


@pytest.mark.parametrize("needs", [Statistic.MOMENTS, Statistic.GRAM | Statistic.CROSS], ids=["pruned", "dense"])
@pytest.mark.parametrize("schedule", SCHEDULES[:2])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_values_that_wait_at_the_widest_cut_are_those_of_the_walk(monkeypatch, make, schedule, needs):
    model = make()
    inputs = bind_batches(model, [tokens(2, 12), tokens(2, 12), tokens(2, 10)])
    layers = find_layers(model, inputs)
    streams = []
    init = walk_module.Stream.__init__

    def watched(self, *args):
        init(self, *args)
        streams.append(self)

    monkeypatch.setattr(walk_module.Stream, "__init__", watched)
    found = {}
    for group, _ in walk(layers.traced, layers.groups, inputs, InPlace(model), schedule=schedule, needs=needs):
        found.setdefault(group.name, waiting(streams, layers.traced))
    told = expected(layers, inputs, schedule=schedule, needs=needs)
    assert batch_independent(layers.traced)  # what all batches share is counted once
    del found[layers.groups[-1].name]  # nothing waits behind the last one
    assert told.widest.values == max(found.values())
    assert found[told.widest.where] == max(found.values())


def test_a_hand_computed_run():
    """GPT-2 at float32, hidden 16: what waits is the residual stream and its norm, and behind the activation four widths."""
    model = gpt2()
    inputs = bind_batches(model, [tokens(2, 12)] * 3)
    layers = find_layers(model, inputs)
    told = expected(layers, inputs, to_prune=1_000_000)
    stream = 3 * 2 * 12 * 16 * 4
    mask = 2 * 12 * 12
    assert told.narrowest == stream
    assert told.widest.where == "transformer.h.0.mlp.c_proj"
    assert told.widest.values == stream + 4 * stream + mask
    assert told.peak.workspace == 1_000_000
    assert told.peak.where == "transformer.h.0.mlp.c_proj"
    # c_fc with its bias and c_proj; for the next segment c_proj's bias, the norm with its own, and c_attn; and the embedding,
    # which lm_head reads at the end.
    assert told.peak.weights == 4 * (16 * 64 + 64 + 64 * 16 + 16 + 2 * 16 + 16 * 48 + 48 * 16)
    assert told.peak.statistics == 8 + 2 * 8 * 64
    assert told.total == told.peak.total
    assert "wait in memory" in told.lines()[1]
    assert f"{told.widest.values / stream:.1f} times" in told.lines()[1]
    several = replace(told, base=10**10 - told.peak.total, processes=3)
    assert several.lines()[1] == "Each of 3 processes of this machine takes that: 30.0 GB in all."


@pytest.mark.parametrize(("place", "words"), [("host", "wait in host memory"), ("disk", "wait in files beside the output")])
def test_elsewhere_one_batch_is_in_memory(place, words):
    model = gpt2()
    inputs = bind_batches(model, [tokens(2, 12)] * 3)
    layers = find_layers(model, inputs)
    here, told = expected(layers, inputs), expected(layers, inputs, values=place)
    assert told.widest == here.widest
    stream = 2 * 12 * 16 * 4
    assert told.peak.values == 0
    assert here.peak.values == 3 * (stream + 4 * stream)
    assert told.peak.running == here.peak.running + stream + 4 * stream
    assert words in told.lines()[1]
    assert told.to_dict()["place"] == place


def test_what_computing_again_would_take_by_hand():
    """A block of GPT-2 of hidden 16 multiplies a token by 16 x 48, 16 x 16, 16 x 64 and 64 x 16; lm_head is the last group."""
    model = gpt2()
    inputs = bind_batches(model, [tokens(2, 12)] * 3)
    layers = find_layers(model, inputs)
    told = expected(layers, inputs)
    # What attention gives waits, behind the first, and what the activation gives, behind the third; else norms of the stream.
    assert told.recomputing == (16 * 48 + 16 * 64) / (16 * (48 + 16 + 64 + 64))
    assert told.lines()[1].endswith("would take 58 % more multiplications with weights.")
    assert expected(layers, inputs, schedule="block").recomputing == 0


def test_values_wait_in_memory_as_long_as_that_is_within_the_budget(monkeypatch):
    model = llama()
    inputs = bind_batches(model, [tokens(2, 12)] * 3)
    layers, recipe = find_layers(model, inputs), Recipe("wanda")

    def chosen(**settings):
        return streaming.choose_place(model, layers, inputs, recipe, **settings)

    assert chosen(memory=1 << 40).place == chosen(available=lambda device: None).place == "device"
    assert chosen(available=lambda device: 1 << 40).place == "device"
    told = chosen(memory=1)
    assert told.place == chosen(available=lambda device: 1).place == "disk"
    assert told.total < chosen().total
    assert chosen(memory=1, available=lambda device: 1 << 40).place == "disk"
    monkeypatch.setattr("statprune.streaming.device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0)
    assert chosen(memory=1, available=lambda device: told.widest.values).place == "host"
    assert chosen(memory=1, available=lambda device: told.widest.values - 1).place == "disk"
    assert streaming.choose_place(model, layers, inputs, Recipe("magnitude"), memory=1).place == "device"  # there are no values


def test_a_gram_counts_and_so_do_those_of_gradients():
    model = llama()
    inputs = bind_batches(model, [tokens(2, 12)])
    layers = find_layers(model, inputs)
    plain = expected(layers, inputs, schedule="one-shot")
    gram = expected(layers, inputs, schedule="one-shot", needs=Statistic.GRAM)
    curved = expected(layers, inputs, needs=Statistic.GRAM | Statistic.CURVATURE)
    assert gram.peak.statistics - plain.peak.statistics >= 4 * 16 * 16
    assert curved.peak.statistics >= 4 * sum(site.shape[0] ** 2 for group in layers.groups for site in group.sites)


def test_it_is_the_same_for_a_model_without_values_and_for_any_number_of_blocks_but_the_depth(tmp_path):
    told = []
    for depth in (2, 3, 6):
        model = llama(num_hidden_layers=depth)
        inputs = bind_batches(model, [tokens(2, 12)] * 2)
        told.append(expected(find_layers(model, inputs), inputs, to_prune=1000))
    assert told[1].total == told[2].total
    model.save_pretrained(tmp_path)
    empty = empty_model(str(tmp_path))
    inputs = bind_batches(empty, [tokens(2, 12)] * 2)
    assert expected(find_layers(empty, inputs), inputs, to_prune=1000) == told[2]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_encoder_and_a_decoder_have_one_too(schedule):
    model = t5()
    inputs = bind_batches(model, [{"input_ids": tokens(2, 12), "decoder_input_ids": tokens(2, 7)}])
    assert expected(find_layers(model, inputs), inputs, schedule=schedule).widest.values > 0


def test_what_needs_no_statistics_has_no_values():
    model = llama()
    inputs = bind_batches(model, [tokens(2, 12)])
    told = expected_memory(model, find_layers(model, inputs), inputs, Recipe("magnitude"))
    assert told.widest.values == told.peak.values == told.peak.statistics == 0
    assert len(told.lines()) == 1


def test_gradients_that_lie_in_a_file_take_no_memory(monkeypatch):
    model = llama()
    inputs = bind_batches(model, [tokens(2, 12)])
    layers = find_layers(model, inputs)
    told = expected(layers, inputs, needs=Statistic.GRAM | Statistic.CURVATURE).peak
    all_sizes = sum(4 * site.shape[0] ** 2 for group in layers.groups for site in group.sites)
    monkeypatch.setattr("statprune.model.gradients._IN_MEMORY", all_sizes - 1)
    assert told.total - expected(layers, inputs, needs=Statistic.GRAM | Statistic.CURVATURE).peak.total == all_sizes


def test_a_method_of_another_package_counts_as_the_greediest():
    known = [workspace(name, [], 64, 32, Statistic.GRAM) for name in HIGH_POINTS]
    assert workspace("somebodys", ["energy"], 64, 32, Statistic.GRAM) == max(known)
    assert workspace("somebodys", [], 64, 32, Statistic.MOMENTS) == workspace("z-pruner", [], 64, 32, Statistic.MOMENTS)


PROCESS = """
import json, sys, threading, time
from pathlib import Path
import torch
from statprune import checkpoint, streaming
from statprune.clock import resident_memory
from statprune.disk.skeleton import open_skeleton
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.progress import unsaid
from statprune.recipe import Recipe

torch.set_num_threads(1)
skeleton = open_skeleton(sys.argv[1])
inputs = bind_batches(skeleton.model, [torch.zeros(1, 256, dtype=torch.int64)] * 24)
layers = find_layers(skeleton.model, inputs)
recipe, values = Recipe(sys.argv[3], pattern="2:4"), sys.argv[4]
told = streaming.expected_memory(skeleton.model, layers, inputs, recipe, values)
peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], resident_memory("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
with checkpoint.reserve(Path(sys.argv[2]), resumes=True, say=unsaid) as place:
    streaming.prune_streamed(skeleton, layers, inputs, recipe, place, max_shard_size="1GB", values=values)
    done.set()
    watcher.join()
print(json.dumps({"told": told.to_dict(), "peak": peak[0]}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory a process has")
@pytest.mark.parametrize(
    ("method", "values"),
    [pytest.param("cvr+energy", "device", marks=pytest.mark.slow), ("sparsegpt", "device"), ("cvr+energy", "disk")],
)
def test_a_process_takes_what_it_was_told_to(tmp_path, method, values):
    """Within 15 % of what comes on top of the process."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = llama(**sizes, max_position_embeddings=256)
    model.bfloat16().save_pretrained(tmp_path / "model")
    # Freed memory goes back to the system at once, so that what is measured is what is used.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path / "model"), str(tmp_path / "out"), method, values],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    told = found["told"]["total"] - found["told"]["base"]
    assert found["peak"] - found["told"]["base"] == pytest.approx(told, rel=0.15)
