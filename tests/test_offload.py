"""Values that wait elsewhere: what comes back, whatever shares memory with what; and runs that give the same bits."""

import contextlib
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import statprune
from statprune.commands.cli import main
from statprune.disk.scratch import ToFiles, offloaded
from statprune.errors import CheckpointError
from statprune.methods.statistics import Statistic
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.model.offload import ToHost
from statprune.model.walk import walk
from statprune.model.weights import InPlace
from statprune.recipe import Recipe
from test_block_schedule import AddsInPlace, AddsThroughAView, KeepsTwoViews, TwoViews, WritesBetweenItsLayers
from test_streaming import Stopped, in_files, stop_after, stream, text_of
from tiny_models import gpt2, llama, t5, tokens

PLACES = ["host", "disk"]


@pytest.fixture(scope="module")
def traced():
    """A graph of which a value is there for each name below: its nodes, and it."""
    model = llama()
    return find_layers(model, bind_batches(model, [tokens(2, 12)])).traced


def own_nodes(traced, count):
    """Nodes whose values are a batch's own."""
    staying = ToHost(traced)._staying
    return [node for node in traced.graph_module.graph.nodes if node.op == "call_function" and node not in staying][:count]


@pytest.fixture(params=PLACES)
def offload(request, traced, tmp_path):
    with offloaded(request.param, traced, tmp_path) as found:
        yield found


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_tensors_come_back_as_they_were(traced, offload):
    torch.manual_seed(0)
    values = [
        torch.randn(3, 5),
        torch.randn(4, 6).t(),
        torch.randn(7)[2:5],
        torch.randn(3, 1).expand(3, 4),
        torch.randn(5).bfloat16(),
        torch.arange(6).reshape(2, 3),
        torch.tensor([True, False]),
        torch.empty(0, 4),
        torch.tensor(1.5),
        torch.randn(4, dtype=torch.complex64),
    ]
    nodes = own_nodes(traced, len(values) + 2)
    given = dict(zip(nodes, [*values, 7, (values[0], 2.5)], strict=True))
    for _ in range(2):  # what has come back goes away again
        (kept,) = offload.away(3, [dict(given)])
        (found,) = offload.back(3, [kept])
        for node, value in zip(nodes[:-2], values, strict=True):
            assert torch.equal(found[node], value)
            assert (found[node].dtype, found[node].stride()) == (value.dtype, value.stride())
            assert found[node].storage_offset() == value.storage_offset()
            assert not value.numel() or address(found[node]) != address(value)
        assert found[nodes[-2]] == 7
        assert torch.equal(found[nodes[-1]][0], values[0])
        assert found[nodes[-1]][1] == 2.5
        given = found


def test_what_shared_memory_shares_it_again_in_all_streams(traced, offload):
    whole = torch.arange(12.0)
    one, other, alone = own_nodes(traced, 3)
    pruned, dense = {one: whole[:4], other: whole[2:8].view(2, 3)}, {one: whole[:4], alone: whole.clone()}
    (pruned, dense) = offload.back(0, offload.away(0, [pruned, dense]))
    pruned[one].fill_(9)
    assert pruned[other].tolist() == [[9, 9, 4], [5, 6, 7]]
    assert dense[one].tolist() == [9] * 4
    assert dense[alone].tolist() == list(range(12))


def test_what_batches_have_in_common_stays_where_it_is(traced, offload):
    node = next(iter(offload._staying - {node for node in offload._staying if node.op != "call_function"}))
    own = own_nodes(traced, 1)[0]
    shared = torch.arange(4.0)
    given = {node: shared, own: shared[1:]}  # an op that had nothing to do has handed it on
    (found,) = offload.back(0, offload.away(0, [given]))
    assert found[node] is shared
    assert address(found[own]) == address(shared)


def test_views_whose_bits_are_not_those_in_memory_stay(traced, offload):
    node = own_nodes(traced, 1)[0]
    value = torch.tensor([1 + 2j]).conj()
    (found,) = offload.back(0, offload.away(0, [{node: value}]))
    assert found[node] is value


def test_values_wait_until_their_batch_is_away_again(traced, offload):
    """A rehearsal brings them back, and again."""
    node, other = own_nodes(traced, 2)
    (kept,) = offload.away(0, [{node: torch.ones(2), other: torch.zeros(3)}])
    offload.away(1, [{node: torch.full((2,), 5.0)}])
    offload.back(0, [kept])[0][node].fill_(7)
    kept.pop(other)
    (found,) = offload.back(0, [kept])
    assert found[node].tolist() == [1, 1]
    assert found.keys() == {node}


def test_files_are_as_long_as_what_lies_there(traced, tmp_path):
    with offloaded("disk", traced, tmp_path) as offload:
        node = own_nodes(traced, 1)[0]
        for count in (10, 3):
            offload.away(4, [{node: torch.zeros(count)}])
            assert {path.name: path.stat().st_size for path in offload.folder.iterdir()} == {"4": 4 * count}
    assert list(tmp_path.iterdir()) == []


def walked(model, batches, offload=None, **settings):
    """Each group's statistics, whose weights are halved behind it."""
    inputs = bind_batches(model, batches)
    layers = find_layers(model, inputs)
    with offload(layers.traced) if offload is not None else contextlib.nullcontext() as found:
        extra = {} if found is None else {"offload": found}
        result = []
        for group, moments in walk(layers.traced, layers.groups, inputs, InPlace(model), **settings, **extra):
            result.append((group.name, [total.clone() for total in moments.totals()]))
            with torch.no_grad():
                for site in group.sites:
                    model.get_parameter(site.parameter).mul_(0.5)
    return result


class OfOneBlock(nn.Sequential):
    def __init__(self, block):
        super().__init__(block(), block(), block(), nn.Linear(8, 3))


MODELS = {
    "llama": (llama, lambda: [tokens(2, 12), tokens(2, 12), tokens(2, 10)]),
    "gpt2": (gpt2, lambda: [tokens(2, 12), tokens(1, 12)]),
    "t5": (t5, lambda: [{"input_ids": tokens(2, 12), "decoder_input_ids": tokens(2, 7)}] * 2),
    **{
        block.__name__: (lambda block=block: OfOneBlock(block), lambda: [torch.randn(6, 8), torch.randn(4, 8)])
        for block in (AddsInPlace, AddsThroughAView, WritesBetweenItsLayers)
    },
    KeepsTwoViews.__name__: (TwoViews, lambda: [torch.randn(6, 8), torch.randn(4, 8)]),
}


@pytest.mark.parametrize("needs", [Statistic.GRAM, Statistic.GRAM | Statistic.CROSS], ids=["pruned", "dense"])
@pytest.mark.parametrize("schedule", ["walk", "block", "one-shot"])
@pytest.mark.parametrize("name", MODELS)
def test_a_walk_is_to_the_bit_the_same(tmp_path, name, schedule, needs):
    make, batches = MODELS[name]
    torch.manual_seed(1)
    model, data = make().eval(), batches()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = walked(model, data, schedule=schedule, needs=needs)
    for place in PLACES:
        model.load_state_dict(state)
        found = walked(
            model, data, lambda traced, place=place: offloaded(place, traced, tmp_path), schedule=schedule, needs=needs
        )
        assert [name for name, _ in found] == [name for name, _ in expected]
        for (_, ours), (_, theirs) in zip(found, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models") / "llama"
    llama(tie_word_embeddings=False).bfloat16().save_pretrained(made, max_shard_size="12KB")
    return made


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [tokens(2, 12) for _ in range(3)]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("sparsegpt", pattern="2:4"),
        Recipe("cvr+energy", pattern="2:4", schedule="one-shot"),
        Recipe("optimal-brain+least-squares", pattern="50%", schedule="block", target="dense"),
        Recipe("wanda", pattern="50%", allocation="owl"),
        Recipe("best", pattern="2:4"),
    ],
    ids=text_of,
)
def test_a_run_is_to_the_bit_the_same(tmp_path, folder, batches, recipe):
    expected = stream(folder, batches, recipe, tmp_path / "device")
    wanted = in_files(tmp_path / "device")
    for place in PLACES:
        assert stream(folder, batches, recipe, tmp_path / place, values=place).sites == expected.sites
        found = in_files(tmp_path / place)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    statprune.verify(tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "disk", "host"]


def test_while_it_runs_the_values_are_in_files_and_after_a_failure_they_are_gone(tmp_path, folder, batches):
    seen = []

    def progress(done, total, what):
        (partial,) = tmp_path.iterdir()
        seen.append({path.name for path in (partial / "values-0").iterdir()})
        stop_after(9)(done, total, what)

    with pytest.raises(Stopped):
        stream(folder, batches, Recipe("wanda"), tmp_path / "out", progress=progress, values="disk")
    assert seen[0] == {"0", "1", "2"}
    (partial,) = tmp_path.iterdir()
    assert sorted(path.name for path in partial.iterdir()) == ["journal.jsonl", "lock", "new"]


@pytest.mark.parametrize("place", ["device", "disk"])
def test_what_a_killed_run_has_left_is_removed_and_not_read(tmp_path, folder, batches, place):
    expected = stream(folder, batches, Recipe("wanda"), tmp_path / "whole")
    with pytest.raises(Stopped):
        stream(folder, batches, Recipe("wanda"), tmp_path / "out", progress=stop_after(4))
    (partial,) = set(tmp_path.iterdir()) - {tmp_path / "whole"}
    (partial / "values-0").mkdir()
    (partial / "values-0" / "0").write_bytes(bytes(100_000))
    found = []

    def progress(done, total, what):
        found.append([path.stat().st_size for path in partial.glob("values-0/0")])

    report = stream(folder, batches, Recipe("wanda"), tmp_path / "out", values=place, progress=progress)
    assert report.sites == expected.sites
    assert all(sizes == [] if place == "device" else max(sizes) < 100_000 for sizes in found)


def test_a_disk_that_fills_up_says_what_it_was_for_and_how_to_go_on(tmp_path, folder, batches, monkeypatch):
    truncate, calls = os.ftruncate, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 10:
            raise OSError(28, "No space left on device")
        return truncate(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", full)
        message = r"values of the batches.*values-0: No space left on device. Make room, .* \(--memory\)"
        with pytest.raises(CheckpointError, match=message):
            stream(folder, batches, Recipe("wanda"), tmp_path / "out", values="disk")
    (partial,) = tmp_path.iterdir()
    assert not list(partial.glob("values-*"))
    stream(folder, batches, Recipe("wanda"), tmp_path / "out", values="disk")
    statprune.verify(tmp_path / "out")


def test_a_file_that_somebody_shortens_is_refused(traced, tmp_path):
    node = own_nodes(traced, 1)[0]
    offload = ToFiles(traced, tmp_path / "values-0")
    kept = offload.away(0, [{node: torch.ones(5)}])
    os.truncate(tmp_path / "values-0" / "0", 7)
    with pytest.raises(CheckpointError, match="ends too early"):
        offload.back(0, kept)


def test_a_folder_that_cannot_be_made_is_refused(traced, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        ToFiles(traced, tmp_path / "file" / "values-0")


def test_no_room_for_values_is_said_before_the_run(tmp_path, folder, batches, monkeypatch):
    monkeypatch.setattr("statprune.output.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    message = r"needs [\d,]+ bytes, 0.006 MB of it for the values of the batches while it runs"
    with pytest.raises(CheckpointError, match=message):
        stream(folder, batches, Recipe("wanda"), tmp_path / "out", values="disk")
    assert list(tmp_path.iterdir()) == []
    stream(folder, batches, Recipe("wanda"), tmp_path / "out")


def test_the_command_says_where_values_wait_and_does_so(tmp_path, folder, batches, capsys, monkeypatch):
    save_file({"tokens": torch.cat(batches)}, tmp_path / "tokens.safetensors")
    options = [str(folder), "--stream", "--calibration", f"{tmp_path / 'tokens.safetensors'}:tokens", "--samples", "6"]
    options += ["--seqlen", "12", "--batch-size", "2"]
    made = []
    own = ToFiles.__init__
    monkeypatch.setattr(ToFiles, "__init__", lambda self, *arguments: made.append(1) or own(self, *arguments))
    for memory, words in [("1TB", "values of the batches wait in memory"), ("1MB", "wait in files beside the output: at most")]:
        output = tmp_path / memory
        assert main(["prune", *options, "--memory", memory, "--output", str(output)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert words in said
        assert ("That is more than --memory 1MB." in said) == (memory == "1MB")
        assert made == ([1] if memory == "1MB" else [])
    found, wanted = in_files(tmp_path / "1MB"), in_files(tmp_path / "1TB")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert main(["prune", *options, "--memory", "1MB", "--output", str(tmp_path / "dry"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["place"] == "disk"
