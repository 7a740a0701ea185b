"""Several ranks prune a model that is larger than memory, and go on where they were ended: one output, one journal."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

import statprune
from statprune import checkpoint, streaming
from statprune.disk.pieces import KeptInPlace
from statprune.disk.ranges import read
from statprune.disk.skeleton import open_skeleton
from statprune.disk.streamed import Streamed
from statprune.errors import CheckpointError, ModelError, NonFiniteError, RanksError, StatpruneError
from statprune.loading import load_model
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.progress import silent, unsaid
from statprune.recipe import Recipe
from statprune.verification import verify
from test_streaming import Stopped, in_files, stop_after, stream, text_of
from tiny_models import llama

RECIPES = [
    Recipe("wanda", pattern="50%", allocation="owl"),  # pruned by every rank, and not shared
    Recipe("sparsegpt", pattern="4:8", schedule="block"),  # by rows
    Recipe("optimal-brain+least-squares", pattern="50%", target="dense"),
    Recipe("cvr+energy", pattern="2:4", schedule="one-shot"),
    Recipe("best", pattern="2:4"),  # with gradients
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama(tie_word_embeddings=False, num_key_value_heads=2).bfloat16().save_pretrained(folder, max_shard_size="12KB")
    return folder


def batches_of(rank):
    """What a rank calibrates on; the second one's are fewer."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 48, (2, 12), generator=generator) for _ in range(5)][rank::2]


def stream_shared(rank, folder, batches, recipe, output, progress=silent, values="device"):
    """The report of a streamed run of both ranks, of which the first saves."""
    skeleton = open_skeleton(str(folder))
    inputs = bind_batches(skeleton.model, batches)
    layers = find_layers(skeleton.model, inputs)
    with contextlib.ExitStack() as held:
        place = held.enter_context(checkpoint.reserve(output, resumes=True, say=unsaid)) if rank == 0 else None
        report, stored_in = streaming.prune_streamed(
            skeleton, layers, inputs, recipe, place, max_shard_size="9KB", progress=progress, values=values
        )
        if place is not None:
            checkpoint.finish(skeleton.model, report, place, stored_in, source=folder)
    return report


def same_files(one, other):
    found, wanted = in_files(one), in_files(other)
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def _both_ways(rank, folder, output):
    found = []
    for recipe in RECIPES:
        own = output / text_of(recipe)
        report = stream_shared(rank, folder, batches_of(rank), recipe, own / "streamed")
        model = load_model(str(folder))
        expected = statprune.prune(model, batches_of(rank), recipe)
        if rank == 0:
            checkpoint.save(model, expected, own / "memory", source=folder, max_shard_size="9KB")
        found.append((report.sites, expected.sites, report.num_tokens, expected.num_tokens))
    return found


def test_two_ranks_stream_to_the_bit_what_two_have_in_memory(two_ranks, folder, tmp_path):
    first, second = two_ranks(_both_ways, folder, tmp_path)
    for recipe, (sites, wanted, num_tokens, count), there in zip(RECIPES, first, second, strict=True):
        assert sites == wanted == there[0]
        assert num_tokens == count == there[2]
        assert same_files(tmp_path / text_of(recipe) / "streamed", tmp_path / text_of(recipe) / "memory")
        verify(tmp_path / text_of(recipe) / "streamed")


def _with_values_in_files(rank, folder, output):
    seen = set()

    def progress(done, total, what):
        seen.update(path.name for path in output.glob(".out.*.partial/values-*"))

    return [
        stream_shared(rank, folder, batches_of(rank), RECIPES[2], output / "memory").sites,
        stream_shared(rank, folder, batches_of(rank), RECIPES[2], output / "out", progress, "disk").sites,
        seen,
    ]


def test_each_rank_has_values_of_its_own_in_files(two_ranks, folder, tmp_path):
    for wanted, sites, seen in two_ranks(_with_values_in_files, folder, tmp_path):
        assert sites == wanted
        assert seen == {"values-0", "values-1"}
    assert same_files(tmp_path / "out", tmp_path / "memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "out"]


GONE_ON_WITH = [RECIPES[1], RECIPES[2], RECIPES[4]]


def _stopped_and_gone_on_with(rank, folder, output):
    """(sites of a whole run, those of one that goes on, the weights that the second part pruned), streamed and in memory."""
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = []
        for kind in (Streamed, KeptInPlace):
            put = kind.put
            monkeypatch.setattr(kind, "put", lambda self, site, new, put=put: (seen.append(site.name), put(self, site, new)))
        for recipe in GONE_ON_WITH:
            own = output / text_of(recipe)
            whole = stream_shared(rank, folder, batches_of(rank), recipe, own / "whole")
            with pytest.raises(Stopped):
                stream_shared(rank, folder, batches_of(rank), recipe, own / "out", stop_after(9))
            seen.clear()
            found.append((whole.sites, stream_shared(rank, folder, batches_of(rank), recipe, own / "out").sites, list(seen)))
            models = [load_model(str(folder)) for _ in range(2)]
            with pytest.raises(Stopped):
                statprune.prune(models[0], batches_of(rank), recipe, journal=own / "journal", progress=stop_after(9))
            seen.clear()
            report = statprune.prune(models[1], batches_of(rank), recipe, journal=own / "journal")
            found.append((whole.sites, report.sites, list(seen)))
            if rank == 0:
                checkpoint.save(models[1], report, own / "memory", source=folder, max_shard_size="9KB")
    return found


def test_two_ranks_go_on_where_two_stopped(two_ranks, folder, tmp_path):
    first, second = two_ranks(_stopped_and_gone_on_with, folder, tmp_path)
    for (whole, again, pruned), (_, there, also) in zip(first, second, strict=True):
        assert whole == again == there
        assert pruned == also
        assert 0 < len(pruned) < len(whole)
    for recipe in GONE_ON_WITH:
        own = tmp_path / text_of(recipe)
        assert same_files(own / "out", own / "whole")
        assert same_files(own / "memory", own / "whole")


def _stopped(rank, folder, output, journal):
    with pytest.raises(Stopped):
        stream_shared(rank, folder, batches_of(rank), Recipe("wanda"), output, stop_after(4))
    with pytest.raises(Stopped):
        statprune.prune(load_model(str(folder)), batches_of(rank), "wanda", journal=journal, progress=stop_after(4))


def test_another_number_of_processes_is_refused(two_ranks, folder, tmp_path):
    two_ranks(_stopped, folder, tmp_path / "out", tmp_path / "journal")
    with pytest.raises(CheckpointError, match=r"its number of processes was 2, and is 1 now.*--restart"):
        stream(folder, batches_of(0), Recipe("wanda"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="its number of processes was 2, and is 1 now"):
        statprune.prune(load_model(str(folder)), batches_of(0), "wanda", journal=tmp_path / "journal")


def _fails(rank, folders, output, kind):
    """What a run says that fails on one rank."""
    folder, other, broken = folders

    def fails_after(count, function, error):
        calls = []

        def fails(*arguments, **settings):
            calls.append(arguments)
            if len(calls) > count:
                raise error
            return function(*arguments, **settings)

        return fails

    with pytest.MonkeyPatch.context() as monkeypatch:
        if kind == "full" and rank == 0:
            monkeypatch.setattr(os, "pwrite", fails_after(6, os.pwrite, OSError(28, "No space left on device")))
        if kind == "unreadable" and rank == 1:
            monkeypatch.setattr("statprune.disk.streamed.read", fails_after(9, read, ModelError("The disk is gone.")))
        if kind == "elsewhere" and rank == 1:
            monkeypatch.setattr(Path, "is_dir", lambda _: False)
        path = {"nan": broken, "another": other if rank else folder}.get(kind, folder)
        try:
            stream_shared(rank, path, batches_of(rank), Recipe("wanda"), output / kind)
        except StatpruneError as e:
            return type(e), str(e)
    return None


def test_what_fails_on_one_rank_is_told_to_both(two_ranks, folder, tmp_path):
    model = load_model(str(folder))
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    model.save_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    expected = {
        "full": (CheckpointError, RanksError, "could not be written: No space left on device. Make room."),
        "unreadable": (RanksError, ModelError, "The disk is gone."),
        "nan": (NonFiniteError, NonFiniteError, "NaN or infinity in the parameter model.layers.1.mlp.up_proj.weight"),
        "another": (RanksError, RanksError, "the weights of the ranks differ: model.norm.weight with the beginning and end"),
        "elsewhere": (
            CheckpointError,
            CheckpointError,
            "is not seen by 1 rank ([1]). Expected a folder on a disk that",
        ),
    }
    folders = folder, tmp_path / "other", tmp_path / "nan"
    (tmp_path / "out").mkdir()
    for kind, (here, there, message) in expected.items():
        first, second = two_ranks(_fails, folders, tmp_path / "out", kind)
        assert (first[0], second[0]) == (here, there), (kind, first, second)
        assert message in first[1], kind
        assert message in second[1], kind
    left = {path.name.split(".")[1] for path in (tmp_path / "out").iterdir()}
    assert left == {"full", "unreadable", "nan"}  # where something was finished
