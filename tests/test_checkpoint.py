import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import statprune
from statprune import Recipe
from statprune.checkpoint import RECORD, save, verify
from statprune.errors import CheckpointError, ModelError
from statprune.loading import load_model, load_tokenizer

BATCHES = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory, tiny_model_folder):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES, Recipe(pattern="2:4"))
    return save(model, report, tmp_path_factory.mktemp("out") / "sparse", tokenizer=load_tokenizer(tiny_model_folder))


@pytest.fixture
def copy(sparse_folder, tmp_path):
    return shutil.copytree(sparse_folder, tmp_path / "copy")


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


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


def revive_one(tensors):
    zero = (tensors[UP] == 0).nonzero()[0]
    tensors[UP][tuple(zero)] = 0.5


def move_a_zero(tensors):
    """The count of zeros stays; a group of four has three weights now."""
    rows = tensors[UP].view(32, 4, 4)
    row = rows[0]
    first, second = (row[0] == 0).nonzero()[0], (row[1] != 0).nonzero()[0]
    row[0][first], row[1][second] = row[1][second].clone(), 0.0


def scale(tensors):
    tensors[UP] *= 1.001


def rename(tensors):
    tensors["other"] = tensors.pop(UP)


def reshape(tensors):
    tensors[UP] = tensors[UP].view(16, 32)


def touch_another(tensors):
    tensors["model.norm.weight"] += 1


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        (revive_one, "number of zeros"),
        (move_a_zero, "pattern promised 2:4"),
        (scale, "energy promised"),
        (rename, "promised in model.safetensors"),
        (reshape, "shape"),
        (touch_another, "SHA-256"),
    ],
)
def test_every_broken_promise_is_found_and_named(copy, change, promise):
    edit_weights(copy, change)
    with pytest.raises(CheckpointError, match=promise):
        verify(copy)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("not json", "no readable pruning.json"),
        ('{"format": 99}', "not of format 1"),
        ('{"format": 1}', "damaged"),
        ("[]", "not of format 1"),
    ],
)
def test_a_damaged_record_is_an_error_that_says_so(copy, record, message):
    (copy / RECORD).write_text(record)
    with pytest.raises(CheckpointError, match=message):
        verify(copy)


def test_a_lie_about_the_total_is_found(copy):
    record = json.loads((copy / RECORD).read_text())
    (copy / RECORD).write_text(json.dumps({**record, "sparsity": 0.6}))
    with pytest.raises(CheckpointError, match=r"all weights together: sparsity promised 0\.6, found 0\.5"):
        verify(copy)


@pytest.mark.parametrize("pattern", [{"name": "mine"}, {"name": "nm", "keep": 9, "of": 4}, {"name": "nm", "of": 4}, "2:4"])
def test_a_pattern_that_cannot_be_is_damage(copy, pattern):
    record = json.loads((copy / RECORD).read_text())
    record["recipe"]["pattern"] = pattern
    (copy / RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="damaged"):
        verify(copy)


def test_a_missing_file_is_found(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"promised in model\.safetensors"):
        verify(copy)


def test_nothing_is_overwritten(tmp_path, tiny_model_folder):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        save(model, report, tmp_path / "out")


def test_a_failed_save_leaves_nothing(tmp_path, tiny_model_folder):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES)
    with torch.no_grad():
        model.get_parameter(UP).fill_(1.0)  # no longer what the report says
    with pytest.raises(CheckpointError, match="number of zeros"):
        save(model, report, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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
