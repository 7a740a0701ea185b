import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import statprune
from statprune import Recipe
from statprune.checkpoint import RECORD, rescue, reserve, save, verify
from statprune.contents import PAGES
from statprune.errors import CheckpointError, ModelError
from statprune.loading import load_model, load_tokenizer
from tiny_models import classifier, llama

BATCHES = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory, tiny_model_folder):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES, Recipe(pattern="2:4"))
    return save(model, report, tmp_path_factory.mktemp("out") / "sparse", tokenizer=load_tokenizer(tiny_model_folder))


def test_transformers_loads_it_with_no_code_of_ours(sparse_folder, tiny_model_folder):
    loaded, info = AutoModelForCausalLM.from_pretrained(sparse_folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert ((weight.view(32, 4, 4) != 0).sum(-1) == 2).all()
    assert AutoTokenizer.from_pretrained(sparse_folder).get_vocab() == load_tokenizer(tiny_model_folder).get_vocab()
    config = json.loads((sparse_folder / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config", "compression_config"} & set(config)


def test_the_record_says_what_was_done(sparse_folder):
    told = []
    record = verify(sparse_folder, progress=lambda *step: told.append(step))
    assert told == [(index + 1, len(record["sites"]), site["name"]) for index, site in enumerate(record["sites"])]
    assert record["recipe"] == Recipe(pattern="2:4").to_dict()
    assert record["sparsity"] == 0.5
    assert {site["num_zeros"] for site in record["sites"]} == {128, 64, 256}
    assert record["versions"]["torch"] == torch.__version__
    assert {one["reason"] for one in record["left_out"]} == {"embedding", "feeds the output"}


def test_conv1d_weights_are_verified_the_right_way_round(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    save(model, statprune.prune(model, BATCHES, Recipe(pattern="1:4")), tmp_path / "out")
    record = verify(tmp_path / "out")
    assert {site["stored"] for site in record["sites"]} == {"in_out"}
    assert record["sparsity"] == 0.75


def test_half_precision_keeps_its_dtype_and_its_zeros(tmp_path, tiny_model_folder):
    model = load_model(tiny_model_folder, dtype=torch.bfloat16)
    save(model, statprune.prune(model, BATCHES, Recipe(pattern="50%")), tmp_path / "out")
    verify(tmp_path / "out")
    assert load_model(str(tmp_path / "out")).dtype == torch.bfloat16


UP = "model.layers.0.mlp.up_proj.weight"


def test_nothing_is_overwritten(tmp_path, tiny_model_folder):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        save(model, report, tmp_path / "out")


@pytest.fixture
def pruned(tiny_model_folder):
    """(the pruned model, its report)."""
    model = load_model(tiny_model_folder)
    return model, statprune.prune(model, BATCHES)


def rescued(folder, model, message):
    """What was rescued: all weights; and `verify` refuses it with the reason."""
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(value.nan_to_num(), state[name].nan_to_num()) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=f"what could be rescued of one: .*{message}"):
        verify(folder)
    assert json.loads((folder / RECORD).read_text())["recipe"] == Recipe().to_dict()


def test_a_promise_that_is_not_kept_is_no_output_and_the_weights_lie_beside(tmp_path, pruned):
    model, report = pruned
    with torch.no_grad():
        model.get_parameter(UP).fill_(1.0)  # no longer what the report says
    with pytest.raises(CheckpointError, match=r"out could not be saved: .*number of zeros.* weights are in .*out\.rescued"):
        save(model, report, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.rescued"]
    rescued(tmp_path / "out.rescued", model, "number of zeros")


@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_nan_after_a_training_is_named_and_the_result_kept(tmp_path, pruned, value, what):
    model, report = pruned
    with torch.no_grad():
        model.get_parameter(UP)[0, 0] = value
        model.model.norm.weight[1] = value
    with pytest.raises(CheckpointError, match=f"{what} in {UP} and in 1 other: .* weights are in "):
        save(model, report, tmp_path / "out")
    rescued(tmp_path / "out.rescued", model, f"{what} in {UP}")


def test_a_buffer_may_be_infinite_but_not_nan(tmp_path):
    model = classifier()
    report = statprune.prune(model, [torch.randn(4, 8)])
    model.register_buffer("mask", torch.tensor([-math.inf, 0.0]))
    save(model, report, tmp_path / "out")
    model.mask[0] = math.nan
    with pytest.raises(CheckpointError, match="NaN in mask: "):
        save(model, report, tmp_path / "other")


def fill_the_disk(monkeypatch, *places):
    """No weights can be written below these folders."""
    whole = safetensors.torch.save_file

    def fails(tensors, filename, metadata=None):
        if any(str(place) in str(filename) for place in places):
            with open(filename, "wb") as file:
                file.write(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        whole(tensors, filename, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)


def test_a_disk_that_fills_up_costs_nothing_but_the_place(tmp_path, pruned, monkeypatch):
    model, report = pruned
    for name in ("disk", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    fill_the_disk(monkeypatch, tmp_path / "disk")
    with pytest.raises(
        CheckpointError, match=r"No space left on device.* weights are in .*/tmp/out\.rescued-.*nothing is lost"
    ):
        save(model, report, tmp_path / "disk" / "out")
    assert list((tmp_path / "disk").iterdir()) == []
    (folder,) = (tmp_path / "tmp").iterdir()
    rescued(folder, model, "No space left")


def test_where_nothing_can_be_written_the_message_says_so(tmp_path, pruned, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fill_the_disk(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match="nowhere else either; the model object still holds them"):
        save(*pruned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_save_pretrained_that_fails_is_no_reason_to_lose_the_weights(tmp_path, pruned, monkeypatch):
    def fails(*_, **__):
        raise KeyError("of transformers")

    monkeypatch.setattr(type(pruned[0]), "save_pretrained", fails)
    with pytest.raises(CheckpointError, match=r"KeyError: 'of transformers'\. The weights are in "):
        save(*pruned, tmp_path / "out")
    rescued(tmp_path / "out.rescued", pruned[0], "of transformers")


def test_a_tokenizer_that_fails_is_no_reason_to_lose_the_weights(tmp_path, pruned):
    with pytest.raises(CheckpointError, match=r"AttributeError: 'int' object .* weights are in "):
        save(*pruned, tmp_path / "out", tokenizer=3)
    rescued(tmp_path / "out.rescued", pruned[0], "AttributeError")


def test_what_takes_the_name_meanwhile_stays_and_what_was_saved_as_well(tmp_path, pruned):
    place = reserve(tmp_path / "out", model=pruned[0])
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"exists.* whole and verified, in .*out\.rescued: rename it"):
        save(*pruned, place)
    verify(tmp_path / "out.rescued")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.rescued"]


def test_a_place_is_for_one_output_and_stands_a_cleaning_up(tmp_path, pruned):
    place = reserve(tmp_path / "out", model=pruned[0])
    shutil.rmtree(place.folder.parent)
    save(*pruned, place)
    verify(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"was given back already: reserve it again\. The weights are in "):
        save(*pruned, place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.rescued"]


def test_what_pruning_itself_fails_on_can_be_rescued(tmp_path, pruned):
    with reserve(tmp_path / "out") as place:
        folder = rescue(pruned[0], place, "the calibration data has ended")
    assert folder == tmp_path / "out.rescued"
    with pytest.raises(CheckpointError, match="rescued of one: the calibration data"):
        verify(folder)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.view = nn.Parameter(self.middle.bias.detach()[:2])  # of a part of another memory

    def forward(self, x):
        return self.second(self.middle(self.first(x)).relu())


@pytest.mark.parametrize("size", [None, "300B", 300])
def test_any_module_is_saved_with_its_ties(tmp_path, size):
    model, batches = Tied(), [torch.randn(4, 8)]
    report = statprune.prune(model, batches, Recipe(pattern="2:4"))
    if size == "300B":
        with pytest.raises(CheckpointError, match=r"max_shard_size='300B': expected a size above 0 .*such as '5GB'"):
            save(model, report, tmp_path / "out", max_shard_size=size)
        assert list(tmp_path.iterdir()) == []
        return
    record = verify(save(model, report, tmp_path / "out", max_shard_size=size))
    assert record["base"] == {"class": "Tied", "library": "pytorch"}
    assert "library_name: pytorch" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").exists() == (size is None)
    other = Tied()
    if size is None:
        safetensors.torch.load_model(other, tmp_path / "out" / "model.safetensors")
    else:
        huggingface_hub.load_torch_model(other, tmp_path / "out", strict=False)
    assert torch.equal(other(batches[0]), model(batches[0]))
    assert torch.equal(other.view, model.view)


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, lambda model: nn.DataParallel(
        torch.compile(model, backend="eager"))]
)  # fmt: skip
def test_what_is_wrapped_is_saved_as_what_is_inside(tmp_path, wrap):
    model = llama()
    report = statprune.prune(model, [torch.randint(3, 48, (2, 8))])
    outside = replace(report, sites=[replace(one, parameter=f"{prefix(wrap(model))}{one.parameter}") for one in report.sites])
    for name, one in (("inner", report), ("outer", outside)):
        record = verify(save(wrap(model), one, tmp_path / name))
        assert [site["parameter"] for site in record["sites"]] == [site.parameter for site in report.sites]
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


def prefix(model):
    return next(iter(model.state_dict())).removesuffix("model.embed_tokens.weight")


def test_a_model_that_is_compiled_in_part_loads_without_being_compiled(tmp_path):
    model = llama()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    report = statprune.prune(model, [torch.randint(3, 48, (2, 8))])
    record = verify(save(model, report, tmp_path / "out"))
    assert not [site for site in record["sites"] if "_orig_mod" in site["name"] + site["parameter"] + site["tensor"]]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_a_large_model_is_written_in_shards_that_transformers_finds(tmp_path, pruned):
    folder = save(*pruned, tmp_path / "out", max_shard_size="4KB")
    record = verify(folder)
    assert len({site["file"] for site in record["sites"]}) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.get_parameter(UP), pruned[0].get_parameter(UP))


@pytest.mark.parametrize("size", ["many", "-1GB", "0GB", 0, "nanGB", "infGB", "5"])
def test_a_size_that_is_none_is_refused_at_once(tmp_path, pruned, size):
    with pytest.raises(CheckpointError, match="expected a size above 0"):
        save(*pruned, tmp_path / "out", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_an_output_of_ours_is_replaced_when_the_new_one_is_verified(tmp_path, pruned):
    model, report = pruned
    save(model, report, tmp_path / "out", protocol={"seed": 1})
    save(model, report, tmp_path / "out", protocol={"seed": 2}, overwrite=True)
    assert verify(tmp_path / "out")["protocol"] == {"seed": 2}
    with torch.no_grad():
        model.get_parameter(UP).fill_(1.0)
    with pytest.raises(CheckpointError, match="number of zeros"):
        save(model, report, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out")["protocol"] == {"seed": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.rescued"]


def test_what_is_not_ours_is_not_replaced(tmp_path, pruned, tiny_model_folder):
    def refused(message, source=None):
        before = sorted(path.name for path in (tmp_path / "out").iterdir())
        with pytest.raises(CheckpointError, match=message):
            save(*pruned, tmp_path / "out", overwrite=True, source=source)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before

    shutil.copytree(tiny_model_folder, tmp_path / "out")
    refused(r"has no pruning\.json of format 2, so it is not overwritten")
    (tmp_path / "out" / RECORD).write_text('{"format": 1, "recipe": {}, "files": {}}')
    refused(r"has no pruning\.json of format 2")
    shutil.rmtree(tmp_path / "out")
    save(*pruned, tmp_path / "out")
    refused("is the model itself, or holds it", source=tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(r"holds notes\.txt, which statprune did not write")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(CheckpointError, match="is no folder of its own"):
            save(*pruned, tmp_path / name, overwrite=True)


def test_what_lies_beside_the_model_goes_with_it(tmp_path, pruned, tiny_model_folder):
    source = shutil.copytree(tiny_model_folder, tmp_path / "model")
    goes = {
        "LICENSE", "LICENSE.md", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja", "preprocessor_config.json",
        "processor_config.json", "spiece.model", "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    stays = {
        "modeling_x.py", "pytorch_model.bin", "tokenizer.py", "tokenizer.bin", "adapter_config.json", "notice.safetensors",
        "README.md", ".license", "training_args.bin", "notes.md", "vocab.pkl",
    }  # fmt: skip
    (source / "additional_chat_templates").mkdir()
    for name in goes | stays:
        (source / name).write_text(f"the model's {name}")
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE-linked").symlink_to(tmp_path / "secret")
    folder = save(*pruned, tmp_path / "out", source=source)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert goes <= found
    assert not found & {*stays - {"README.md"}, "LICENSE-linked"}
    assert (folder / "LICENSE").read_text() == "the model's LICENSE"
    assert "the model's" not in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == load_tokenizer(tiny_model_folder).get_vocab()
    assert verify(folder)["files"].keys() == found - {RECORD}
    again = save(*pruned, tmp_path / "with", source=source, tokenizer=load_tokenizer(tiny_model_folder))
    assert not (again / "spiece.model").exists()


def test_a_model_of_the_hub_has_its_companions_in_the_cache(tmp_path, pruned, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for name in ("config.json", "LICENSE"):
        (snapshot.parents[1] / "blobs" / name).write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    record = verify(save(*pruned, tmp_path / "out", source="some/model"))
    assert "LICENSE" in record["files"]
    assert record["base"]["name"] == "some/model"
    assert "LICENSE" not in verify(save(*pruned, tmp_path / "other", source="some/other"))["files"]


def test_pages_are_made_from_the_record_and_have_a_digest(tmp_path, pruned, monkeypatch):
    monkeypatch.setitem(
        PAGES, "report.html", lambda record, _: f"<p>{len(record['sites'])} weights of {record['base']['class']}"
    )
    folder = save(*pruned, tmp_path / "out")
    assert (folder / "report.html").read_text() == "<p>7 weights of LlamaForCausalLM"
    (folder / "report.html").write_text("<p>8 weights")
    with pytest.raises(CheckpointError, match=r"report\.html: SHA-256"):
        verify(folder)


def test_a_protocol_may_hold_anything(tmp_path, pruned):
    protocol = {"source": tmp_path, "device": torch.device("cpu"), "loss": math.nan}
    model, report = pruned
    report = dataclasses.replace(report, perplexity={"dense": math.inf, "pruned": 2.0})
    record = verify(save(model, report, tmp_path / "out", protocol=protocol))
    assert record["protocol"] == {"source": str(tmp_path), "device": "cpu", "loss": None}
    assert record["perplexity"] == {"dense": None, "pruned": 2.0}


def test_saving_shows_no_bar_and_leaves_those_of_transformers_on(tmp_path, pruned, capfd):
    from transformers.utils import logging

    save(*pruned, tmp_path / "out")
    assert logging.is_progress_bar_enabled()
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    out, err = capfd.readouterr()
    assert "Writing model shards" not in out + err


KILLED_WHILE_SAVING = """
import os, sys, torch, statprune
from statprune import checkpoint, loading
model = loading.load_model(sys.argv[1])
report = statprune.prune(model, [torch.zeros(1, 8, dtype=torch.int64)])
checkpoint.verify = lambda folder: os._exit(9)
checkpoint.save(model, report, sys.argv[2])
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_nothing_that_looks_finished(tmp_path, tiny_model_folder):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, tiny_model_folder, tmp_path / "out"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert left.name.endswith(".partial")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"not a model folder: expected config\.json"):
        load_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin: a pickle can run code"):
        load_model(str(folder))


def test_a_configuration_without_weights_is_refused(tmp_path, tiny_model_folder):
    shutil.copy(f"{tiny_model_folder}/config.json", tmp_path)
    with pytest.raises(ModelError, match="a configuration without weights"):
        load_model(str(tmp_path))


def test_a_truncated_file_is_refused(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(folder))


def test_a_quantized_model_is_refused(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="quantized"):
        load_model(str(folder))


def test_a_model_without_tokenizer_is_refused(tmp_path, tiny_model_folder):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{tiny_model_folder}/{name}", tmp_path)
    with pytest.raises(ModelError, match="No tokenizer"):
        load_tokenizer(str(tmp_path))
