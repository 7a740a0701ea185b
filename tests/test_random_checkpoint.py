"""configs/make_random_checkpoint.py: a random LLaMA of any size, written tensor by tensor."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from statprune.data.sources import token_file_windows
from statprune.loading import load_model
from tiny_models import tokens

SCRIPT = Path(__file__).parents[1] / "configs" / "make_random_checkpoint.py"
TINY = ["--shape", "tiny", "--vocabulary", "48"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_random_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def make(script, monkeypatch):
    def run(folder, *options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), *options])
        script.main()
        assert script.tokens_of(folder).exists()
        return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    return run


def test_it_loads_and_runs(make, tmp_path, capsys):
    written = make(tmp_path / "model", *TINY, "--dtype", "float32")
    model = load_model(str(tmp_path / "model"))
    drawn = token_file_windows(f"{tmp_path / 'model-tokens.safetensors'}:tokens", 128, 128)
    assert drawn.min() == 0
    assert drawn.max() == 47
    assert model(tokens(1, 5)).logits.isfinite().all()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {k: v.shape for k, v in written.items()}
    assert f"{sum(tensor.nbytes for tensor in written.values()) / 1e9:.2f} GB of weights, float32" in capsys.readouterr().out
    assert written["model.norm.weight"].eq(1).all()
    assert written["model.layers.0.mlp.up_proj.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert written["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.05)
    assert not torch.equal(written["model.layers.0.mlp.up_proj.weight"], written["model.layers.1.mlp.up_proj.weight"])


def test_values_follow_from_the_seed_whatever_the_shards(make, tmp_path):
    whole = make(tmp_path / "whole", *TINY)
    shards = make(tmp_path / "shards", *TINY, "--shard-size", "30kB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    load_model(str(tmp_path / "shards"))
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    other = make(tmp_path / "other", *TINY, "--seed", "1")
    assert not torch.equal(other["lm_head.weight"], whole["lm_head.weight"])


def test_a_tensor_larger_than_the_buffer_goes_on_drawing(make, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CHUNK", 1000)
    weight = make(tmp_path / "model", *TINY, "--dtype", "float32")["model.layers.0.mlp.up_proj.weight"].flatten()
    assert not torch.equal(weight[:1000], weight[1000:2000])
    assert weight.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "3"], "hidden 64, heads 3, kv-heads 2"),
        (["--kv-heads", "3"], "heads 4, kv-heads 3"),
        (["--layers", "0"], "layers 0: expected at least 1"),
        (["--shard-size", "0GB"], "shards of 0 bytes"),
    ],
)
def test_what_is_no_llama_is_refused(make, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        make(tmp_path / "model", *TINY, *options)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_exists_is_refused(make, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match="exists"):
        make(tmp_path / "model", *TINY)
    assert not any((tmp_path / "model").iterdir())
    (tmp_path / "other-tokens.safetensors").touch()
    with pytest.raises(SystemExit, match=r"other-tokens\.safetensors exists"):
        make(tmp_path / "other", *TINY)
    assert not (tmp_path / "other").exists()
