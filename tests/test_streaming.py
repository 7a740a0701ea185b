import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import statprune
from statprune import checkpoint, streaming
from statprune.disk.shards import Shards
from statprune.disk.skeleton import open_skeleton
from statprune.disk.streamed import Streamed
from statprune.errors import CheckpointError, NonFiniteError, RecipeError, SiteError
from statprune.loading import load_model
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.progress import unsaid
from statprune.recipe import Recipe
from tiny_models import gpt2, llama, tokens

RECIPES = [
    Recipe("wanda", pattern="2:4"),
    Recipe("cvr+energy", pattern="2:4", schedule="one-shot"),
    Recipe("sparsegpt", pattern="4:8", schedule="block"),
    Recipe("optimal-brain+least-squares", pattern="50%", target="dense"),
    Recipe("optimal-brain+least-squares", pattern="2:4", schedule="block", target="dense"),
    Recipe("magnitude", pattern="50%"),
    Recipe("wanda", pattern="50%", allocation="owl"),
    Recipe("best", pattern="2:4"),
]


def text_of(recipe):
    return f"{recipe.method}-{recipe.pattern}-{recipe.schedule}-{recipe.target}-{recipe.allocation}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints in the folders that transformers writes: in pieces, tied, transposed, in bfloat16."""
    made = {}
    models = {
        # Grouped queries without padding run another kernel in the model than in its graph, which has a mask: the gradients of
        # loss-aware methods differ in their last bits then (`model/backward.py`).
        "llama": llama(tie_word_embeddings=False, num_key_value_heads=2).bfloat16(),
        "tied": llama(tie_word_embeddings=True),
        "gpt2": gpt2(),
    }
    for name, model in models.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(made[name], max_shard_size="12KB")
    return made


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [tokens(2, 12) for _ in range(3)]


def stream(folder, batches, recipe, output, **settings):
    skeleton = open_skeleton(str(folder))
    inputs = bind_batches(skeleton.model, batches)
    layers = find_layers(skeleton.model, inputs)
    with checkpoint.reserve(output, resumes=True, say=unsaid) as place:
        report, stored_in = streaming.prune_streamed(skeleton, layers, inputs, recipe, place, max_shard_size="9KB", **settings)
        checkpoint.finish(skeleton.model, report, place, stored_in, source=folder)
    return report


def in_files(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=text_of)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_streamed_model_is_to_the_bit_what_one_in_memory_is(tmp_path, folders, batches, name, recipe):
    model = load_model(str(folders[name]))
    expected = statprune.prune(model, batches, recipe)
    report = stream(folders[name], batches, recipe, tmp_path / "out")
    assert report.sites == expected.sites
    assert report.num_tokens == expected.num_tokens
    checkpoint.save(model, expected, tmp_path / "memory", source=folders[name], max_shard_size="9KB")
    found, wanted = in_files(tmp_path / "out"), in_files(tmp_path / "memory")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "memory" / file).read_text()
    statprune.verify(tmp_path / "out")


def test_another_dtype_is_computed_with_and_written(tmp_path, folders, batches):
    skeleton = open_skeleton(str(folders["llama"]), dtype=torch.float32)
    shards = Shards(tmp_path, {name: (torch.float32, one.shape) for name, one in skeleton.kept.items()}, "1GB")
    weights = Streamed(skeleton, shards, torch.device("cpu"))
    assert weights.get("lm_head.weight").dtype is torch.float32
    expected = load_model(str(folders["llama"]), dtype=torch.float32).lm_head.weight
    assert torch.equal(weights.get("lm_head.weight"), expected)
    weights.close()


def test_a_tied_weight_is_written_once(tmp_path, folders, batches):
    stream(folders["tied"], batches, Recipe("wanda"), tmp_path / "out")
    assert "lm_head.weight" not in in_files(tmp_path / "out")
    model = load_model(str(tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_no_more_than_two_segments_are_in_memory(folders, batches, monkeypatch):
    largest = []
    prepare = Streamed.prepare

    def watched(self, names, following=()):
        prepare(self, names, following)
        largest.append(len(self._resident))

    monkeypatch.setattr(Streamed, "prepare", watched)
    skeleton = open_skeleton(str(folders["llama"]))
    inputs = bind_batches(skeleton.model, batches)
    layers = find_layers(skeleton.model, inputs)
    weights = Streamed(skeleton, None, torch.device("cpu"))
    for _ in layers.observe(layers.groups, inputs, weights=weights):
        pass
    weights.close()
    assert max(largest) <= 5 < len(skeleton.places)
    assert not weights._resident


def test_nan_in_a_file_is_refused_by_name(tmp_path, folders, batches):
    model = load_model(str(folders["llama"]))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in the parameter model.layers.1.mlp.up_proj.weight"):
        stream(tmp_path / "model", batches, Recipe("wanda"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("allocation", ["sensitivity", "curves"])
def test_an_allocation_that_runs_the_whole_model_is_refused_by_name(tmp_path, folders, batches, allocation):
    recipe = Recipe("wanda", pattern="50%", allocation=allocation)
    with pytest.raises(SiteError, match=f"allocation {allocation}.* runs the whole model"):
        stream(folders["llama"], batches, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Stopped(BaseException):
    """As a signal ends a process, but in this one."""


def stop_after(count):
    def progress(done, total, what):
        if total == 14 and done >= count:  # weights, and not the batches of gradients
            raise Stopped

    return progress


@pytest.mark.parametrize("recipe", RECIPES, ids=text_of)
@pytest.mark.parametrize("count", [9])
def test_a_run_goes_on_where_another_one_stopped(tmp_path, folders, batches, recipe, count):
    expected = stream(folders["llama"], batches, recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        stream(folders["llama"], batches, recipe, tmp_path / "out", progress=stop_after(count))
    assert not (tmp_path / "out").exists()
    seen = []
    put = Streamed.put
    try:
        Streamed.put = lambda self, site, pruned: (seen.append(site.parameter), put(self, site, pruned))[1]
        report = stream(folders["llama"], batches, recipe, tmp_path / "out")
    finally:
        Streamed.put = put
    assert report.sites == expected.sites
    assert report.num_tokens == expected.num_tokens
    assert 0 < len(seen) < len(report.sites)
    found, wanted = in_files(tmp_path / "out"), in_files(tmp_path / "whole")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.fixture
def stopped(tmp_path, folders, batches):
    """The hidden folder of a run that was ended when 4 weights were finished."""
    with pytest.raises(Stopped):
        stream(folders["llama"], batches, Recipe("wanda"), tmp_path / "out", progress=stop_after(4))
    (partial,) = tmp_path.iterdir()
    return partial


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": Recipe("wanda", pattern="4:8")}, "its recipe was"),
        ({"batches": [torch.full((2, 12), 5)] * 3}, "its tokens was"),
        ({"settings": {"other": 1}}, "its other was None, and is 1 now"),
    ],
)
def test_another_run_is_not_gone_on_with(tmp_path, folders, batches, stopped, change, named):
    change = {"recipe": Recipe("wanda"), "batches": batches, "settings": {}, **change}
    with pytest.raises(CheckpointError, match=f"{named}.*--restart"):
        stream(folders["llama"], change["batches"], change["recipe"], tmp_path / "out", settings=change["settings"])
    assert stopped.exists()
    stream(folders["llama"], batches, Recipe("wanda"), tmp_path / "out")


def torn(partial):
    """A crash while the last line was written."""
    journal = partial / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 20)


def no_line_at_all(partial):
    journal = partial / "journal.jsonl"
    journal.write_bytes(bytes(journal.stat().st_size))


def zeros_in_a_weight(partial):
    """The data were not on the disk yet when the power failed."""
    for file in (partial / "new").glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little") + 8
        with file.open("r+b") as opened:
            opened.seek(length)
            opened.write(bytes(file.stat().st_size - length))


def a_file_of_zeros(partial):
    file = sorted((partial / "new").glob("*.safetensors"))[0]
    file.write_bytes(bytes(file.stat().st_size))


def a_file_too_short(partial):
    file = sorted((partial / "new").glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size // 2)


def no_files(partial):
    for file in (partial / "new").iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [torn, no_line_at_all, zeros_in_a_weight, a_file_of_zeros, a_file_too_short, no_files])
def test_what_a_crash_has_damaged_is_done_again(tmp_path, folders, batches, stopped, damage):
    damage(stopped)
    expected = stream(folders["llama"], batches, Recipe("wanda"), tmp_path / "whole")
    report = stream(folders["llama"], batches, Recipe("wanda"), tmp_path / "out")
    assert report.sites == expected.sites
    found, wanted = in_files(tmp_path / "out"), in_files(tmp_path / "whole")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_disk_that_is_full_says_so_before_anything_is_pruned(tmp_path, folders, batches, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Make room"):
        stream(folders["llama"], batches, Recipe("wanda"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_later_loses_nothing(tmp_path, folders, batches, monkeypatch):
    write, calls = os.pwrite, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
            stream(folders["llama"], batches, Recipe("wanda"), tmp_path / "out")
    (partial,) = tmp_path.iterdir()
    assert (partial / "journal.jsonl").read_text().count('"finished"') == 3  # q k v, o, gate up
    stream(folders["llama"], batches, Recipe("wanda"), tmp_path / "out")
    statprune.verify(tmp_path / "out")


def test_shards_are_what_safetensors_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64])}
    shards = Shards(tmp_path, {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}, 100)
    shards.create()
    for name in ("t2", "t0", "t1"):
        shards.write(name, tensors[name])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    found = in_files(tmp_path)
    assert all(torch.equal(found[name], one) for name, one in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(shards.read(name), one) for name, one in load_file(tmp_path / "theirs.safetensors").items())


@pytest.mark.parametrize("recipe", RECIPES, ids=text_of)
def test_a_run_in_memory_goes_on_where_another_one_stopped(tmp_path, folders, batches, recipe):
    models = [load_model(str(folders["llama"])) for _ in range(3)]
    expected = statprune.prune(models[0], batches, recipe)
    with pytest.raises(Stopped):
        statprune.prune(models[1], batches, recipe, journal=tmp_path, progress=stop_after(9))
    kept = len(list((tmp_path / "pruned").iterdir()))
    assert 9 <= kept < len(expected.sites)
    report = statprune.prune(models[2], batches, recipe, journal=tmp_path)
    assert report.sites == expected.sites
    assert all(torch.equal(one, other) for one, other in zip(models[0].parameters(), models[2].parameters(), strict=True))


def test_a_journal_is_of_a_dense_model(tmp_path, folders, batches):
    model = load_model(str(folders["llama"]))
    with pytest.raises(Stopped):
        statprune.prune(model, batches, "wanda", journal=tmp_path, progress=stop_after(4))
    with pytest.raises(CheckpointError, match="its model was"):  # which is pruned in part by now
        statprune.prune(model, batches, "wanda", journal=tmp_path)


def test_a_search_has_no_journal(tmp_path, folders, batches):
    with pytest.raises(RecipeError, match="a journal is of a recipe, not of a search"):
        statprune.prune(load_model(str(folders["llama"])), batches, "auto", journal=tmp_path)


@pytest.mark.parametrize(
    ("where", "named"), [("is_sharded", "this one is sharded"), ("is_dispatched", "accelerate has put it")]
)
def test_a_journal_is_of_a_model_that_is_whole(tmp_path, folders, batches, monkeypatch, where, named):
    monkeypatch.setattr(f"statprune.api.{where}", lambda _: True)
    with pytest.raises(RecipeError, match=named):
        statprune.prune(load_model(str(folders["llama"])), batches, "wanda", journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
