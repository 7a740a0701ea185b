"""What is opened is the whole model that its folder promises, or it is refused by name; and no code of the folder runs."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import statprune
from statprune import completeness
from statprune.commands.cli import main
from statprune.configuration import load_config, model_class
from statprune.errors import ModelError, SiteError
from statprune.loading import load_causal, load_model, load_tokenizer
from statprune.training.modules import CausalLM
from tiny_models import TRANSFORMER, classifier, gpt2, llama, t5

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, tiny_model_folder):
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def change(folder, **tensors):
    """Put tensors into the weights' file by name, or take one out with None."""
    stored = load_file(folder / "model.safetensors")
    stored = {name: tensor for name, tensor in {**stored, **tensors}.items() if tensor is not None}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **settings):
    """Change config.json; None takes a setting out."""
    stated = {**json.loads((folder / "config.json").read_text()), **settings}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


def shard(folder):
    """The same weights in several files, with an index."""
    model = LlamaForCausalLM.from_pretrained(folder)
    os.remove(folder / "model.safetensors")
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder / "model.safetensors.index.json"


def reindex(path, **entries):
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **entries}}))


def equal(one, other):
    own = other.state_dict()
    return one.state_dict().keys() == own.keys() and all(
        torch.equal(value, own[name]) for name, value in one.state_dict().items()
    )


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, " ".join(printed.err.split())


SPOILED = {
    "missing": (lambda f: change(f, **{UP: None}), rf"missing in the files: 1 tensor of LlamaForCausalLM, {UP}\. Only random"),
    "another layer missing": (
        lambda f: configure(f, num_hidden_layers=2),
        r"missing in the files: 9 tensors of LlamaForCausalLM, model\.layers\.1\.\S+, \S+, \S+ and 6 more",
    ),
    "a layer too many": (
        lambda f: change(f, **{UP.replace("0", "1"): torch.zeros(32, 16)}),
        r"in the files, but in no part of LlamaForCausalLM: 1 tensor, model\.layers\.1\.mlp\.up_proj\.weight\.",
    ),
    "scales": (lambda f: change(f, **{f"{UP}_scale": torch.ones(32)}), rf"no part of LlamaForCausalLM: 1 tensor, {UP}_scale"),
    "a bias": (lambda f: change(f, **{UP.replace("weight", "bias"): torch.ones(32)}), r"up_proj\.bias\. Is this the config"),
    "a shape": (
        lambda f: change(f, **{UP: torch.zeros(16, 32)}),
        rf"the shapes that a LlamaForCausalLM with this config.json has: {UP} is \[16, 32\] and should be \[32, 16\]",
    ),
    "3 heads": (lambda f: configure(f, num_attention_heads=3), r"no configuration of .*16\) is not a multiple of .*\(3\)"),
    "a huge vocabulary": (lambda f: configure(f, vocab_size=10**15), r"embed_tokens\.weight is \[300, 16\] and should be"),
    "int32": (lambda f: change(f, **{UP: torch.ones(32, 16).int()}), rf"{UP} in model\.safetensors is I32, which is not"),
    "int8": (lambda f: change(f, **{UP: torch.ones(32, 16).char()}), rf"{UP} in model\.safetensors is I8, .*quantized"),
    "float8": (
        lambda f: change(f, **{UP: torch.ones(32, 16).to(torch.float8_e4m3fn)}),
        rf"{UP} in model\.safetensors is F8_E4M3, .*quantized",
    ),
    "another architecture": (
        lambda f: configure(f, architectures=["GPT2LMHeadModel"]),
        r"architectures \[GPT2LMHeadModel\] in config\.json is a class for another model_type than llama, for gpt2",
    ),
    "no model class": (lambda f: configure(f, architectures=["Trainer"]), r"\[Trainer\] in config\.json: this is no model cl"),
    "a function": (lambda f: configure(f, architectures=["pipeline"]), r"\[pipeline\] in config\.json: this is no model class"),
    "an Auto class": (lambda f: configure(f, architectures=["AutoTokenizer"]), "this is no model class of transformers"),
    "the root of all": (lambda f: configure(f, architectures=["PreTrainedModel"]), "a class for another model_type than lla"),
    "half a class": (lambda f: configure(f, architectures=["LlamaPreTrainedModel"]), "cannot be loaded: 'LlamaPre"),
    "architectures of numbers": (lambda f: configure(f, architectures=[5]), r"\[5\] in config\.json: expected a list of names"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), r"holds an adapter beside the model \(adapter"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON: Expecting property name"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds a list: expected a JSON object"),
    "deep JSON": (lambda f: (f / "config.json").write_text('{"a":' * 200_000), r"config\.json is not JSON: .*recursion"),
    "no type": (lambda f: configure(f, model_type=None), r'config\.json has no "model_type"'),
    "a type that does not exist": (lambda f: configure(f, model_type="lama"), "which is none of transformers.* Did you mean"),
    "its own type": (
        lambda f: configure(f, model_type="my-own", auto_map={"AutoConfig": "own.Config"}),
        r'the model_type "my-own", which is none of transformers\. It brings code of its own \(auto_map\), which is never run',
    ),
    "a text for a size": (lambda f: configure(f, hidden_size="16"), r"is no configuration of a llama model: .*int, got str"),
    "a dtype that does not exist": (lambda f: configure(f, dtype="float99"), r"config\.json has dtype 'float99': expected on"),
    "a float8 dtype": (lambda f: configure(f, dtype="float8_e4m3fn"), r"has dtype 'float8_e4m3fn': expected one of float32, "),
    "an activation that does not exist": (
        lambda f: configure(f, hidden_act="evil"),
        r"No LlamaForCausalLM can be built with the config\.json of .*evil",
    ),
    "no key heads": (lambda f: configure(f, num_key_value_heads=0), r"with the config\.json of .*: ZeroDivisionError"),
    "attention from the hub": (
        lambda f: configure(f, attn_implementation="evil/kernel"),
        r"asks for code from the hub, which is never run: attn_implementation 'evil/kernel'",
    ),
    "attention of a part": (
        lambda f: configure(f, text_config={"_attn_implementation": "evil/kernel"}),
        r"never run: text_config\._attn_implementation 'evil/kernel'",
    ),
    "quantized in part": (lambda f: configure(f, text_config={"quantization_config": {"bits": 4}}), "is quantized: prune"),
    "other weights": (
        lambda f: configure(f, transformers_weights="../other.safetensors"),
        r"transformers_weights in \S+config\.json is '\.\./other\.safetensors': expected a file's name, in the",
    ),
    "weights that are not there": (
        lambda f: configure(f, transformers_weights="more.safetensors"),
        r"has no more\.safetensors, which config\.json names as its weights",
    ),
    "weights by another name": (
        lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
        r"has no model\.safetensors and no model\.safetensors\.index\.json, which transformers reads, only weights\.saf",
    ),
    "parts of ranks": (
        lambda f: (f / "model.safetensors").rename(f / "shard-00000-model-00000-of-00001.safetensors"),
        "holds a distributed checkpoint",
    ),
    "damaged": (lambda f: os.truncate(f / "model.safetensors", 5000), r"model\.safetensors cannot be loaded, the file is da"),
}  # fmt: skip
"""What was done to a model's folder, and what must be said of it."""


class TestWhole:
    @pytest.mark.parametrize("what", SPOILED)
    def test_what_is_not_whole_is_refused_by_name(self, capsys, folder, what):
        spoil, said = SPOILED[what]
        spoil(folder)
        with pytest.raises(ModelError, match=said):
            load_model(str(folder))
        printed = capsys.readouterr()
        assert "LOAD REPORT" not in printed.out + printed.err

    @pytest.mark.parametrize("what", ["missing", "scales"])
    @pytest.mark.parametrize("command", ["prune", "evaluate", "compare", "tune", "benchmark", "experiment"])
    def test_every_command_refuses_it_in_one_line_and_writes_no_model(self, capsys, tmp_path, folder, what, command):
        SPOILED[what][0](folder)
        text = tmp_path / "text.txt"
        text.write_text("to be or not to be\n" * 40)
        output, data = tmp_path / "out", ["--calibration", text, "--samples", 2, "--seqlen", 8]
        words = {
            "prune": [folder, "--output", output, *data],
            "evaluate": [folder, "--text", text],
            "compare": [folder, "--text", text, *data],
            "tune": [folder, "--output", output, *data],
            "benchmark": [folder],
            "experiment": ["perplexity", "--output", output, "--model", folder, "--calibration", text, "--text", text],
        }[command]
        status, out, err = run(capsys, command, *words)
        assert status == 1
        assert UP in err
        assert "LOAD REPORT" not in out + err
        assert command == "experiment" or not output.exists()
        assert not list(tmp_path.glob("**/out/*.safetensors"))

    def test_the_lightning_module_opens_it_the_same_way(self, folder):
        change(folder, **{UP: None})
        with pytest.raises(ModelError, match="missing in the files"):
            CausalLM(str(folder))

    def test_transformers_says_all_else_that_it_has_to_say_and_its_logger_is_left_as_it_was(self, monkeypatch, caplog):
        logger = logging.getLogger("transformers.modeling_utils")
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", False)
        monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
        with completeness.without_report():
            logger.warning("LlamaForCausalLM LOAD REPORT from: x")
            logger.warning("something else")
        assert [record.getMessage() for record in caplog.records] == ["something else"]
        logger.warning("LlamaForCausalLM LOAD REPORT from: x")
        assert len(caplog.records) == 2


class TestNoFaults:
    """What transformers knows to be the same model is opened, and is the same model."""

    def saved(self, model, folder):
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: llama(tie_word_embeddings=True), id="tied"),
            pytest.param(gpt2, id="gpt2"),
            pytest.param(t5, id="encoder-decoder"),
        ],
    )
    def test_architectures(self, tmp_path, make):
        model = make()
        assert equal(load_model(str(self.saved(model, tmp_path / "model"))), model)

    def test_a_tied_output_that_is_missing_in_an_untied_model(self, tmp_path):
        folder = self.saved(llama(tie_word_embeddings=True), tmp_path / "model")
        configure(folder, tie_word_embeddings=False)
        with pytest.raises(ModelError, match=r"missing in the files: 1 tensor of LlamaForCausalLM, lm_head\.weight"):
            load_model(str(folder))

    def test_experts_are_stored_one_by_one_and_each_must_be_there(self, tmp_path):
        sizes = {**TRANSFORMER, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
        model = MixtralForCausalLM(MixtralConfig(**sizes))
        folder = self.saved(model, tmp_path / "model")
        expert = "model.layers.1.block_sparse_moe.experts.1.w1.weight"
        assert expert in load_file(folder / "model.safetensors")
        assert equal(load_model(str(folder)), model)
        change(folder, **{expert: None})
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be made of what the files"):
            load_model(str(folder))

    def test_shards(self, folder):
        whole = load_model(str(folder))
        shard(folder)
        assert equal(load_model(str(folder)), whole)

    def test_links_as_in_the_cache_of_the_hub(self, tmp_path, folder):
        whole = load_model(str(folder))
        shard(folder)
        (tmp_path / "blobs").mkdir()
        for file in folder.glob("*.safetensors"):
            file.rename(tmp_path / "blobs" / file.name)
            file.symlink_to(tmp_path / "blobs" / file.name)
        assert equal(load_model(str(folder)), whole)

    def test_buffers_of_old_checkpoints(self, tmp_path):
        model = gpt2()
        folder = self.saved(model, tmp_path / "gpt2")
        change(folder, **{"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8)})
        assert equal(load_model(str(folder)), model)
        model = llama()
        folder = self.saved(model, tmp_path / "llama")
        change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
        assert equal(load_model(str(folder)), model)

    def test_the_base_model_without_its_prefix(self, tmp_path):
        model = gpt2()
        folder = self.saved(model, tmp_path / "model")
        stored = load_file(folder / "model.safetensors")
        stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        save_file(stored | {"h.1.attn.bias": torch.ones(1, 1, 32, 32).bool()}, folder / "model.safetensors", {"format": "pt"})
        assert equal(load_model(str(folder)), model)

    def test_heads_for_other_tasks_are_left_out_and_named(self, tmp_path):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 48}
        folder = self.saved(BertForPreTraining(BertConfig(**sizes)), tmp_path / "model")
        configure(folder, architectures=["BertForMaskedLM"])
        with pytest.warns(UserWarning, match=r"4 tensors that BertForMaskedLM has no use for .*bert\.pooler\.dense\.bias, "):
            load_model(str(folder))

    def test_weights_that_transformers_leaves_out_itself_are_named(self, folder, monkeypatch):
        monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
        change(folder, **{"mtp.proj.weight": torch.ones(4, 4)})
        with pytest.warns(UserWarning, match=r"1 tensor that LlamaForCausalLM has no use for .* saved: mtp\.proj\.weight\."):
            load_model(str(folder))

    @pytest.mark.parametrize("names", [None, [], ["LlamaForPoetry"]])
    def test_without_a_known_class_it_is_a_causal_language_model(self, folder, names):
        whole = load_model(str(folder))
        configure(folder, architectures=names)
        assert equal(load_model(str(folder)), whole)

    def test_flash_attention_is_not_fetched_for_a_configuration_that_names_it(self, folder):
        configure(folder, _attn_implementation="flash_attention_2")
        assert load_config(str(folder))._attn_implementation is None
        assert load_model(str(folder)).config._attn_implementation == "sdpa"

    def test_the_text_model_alone_of_a_configuration_of_more(self):
        from transformers import Gemma3Config, Gemma3ForCausalLM

        config = Gemma3Config(architectures=["Gemma3ForCausalLM"])
        assert model_class(config) == (Gemma3ForCausalLM, config.get_text_config())


class TestIndex:
    @pytest.mark.parametrize(
        ("file", "said"),
        [
            (
                "../other/model.safetensors",
                r"is '\.\./other/model\.safetensors': expected a file's name, in the model's own folder",
            ),
            ("/etc/model.safetensors", "is '/etc/model.safetensors': expected a file's name"),
            ("..\\model.safetensors", "expected a file's name"),
            ("..", r"in \.\.: expected a \*\.safetensors file"),
            ("", "expected a file's name"),
            ("pytorch_model.bin", r"in pytorch_model\.bin: expected a \*\.safetensors file; others can run code when read"),
            ("gone.safetensors", r"names gone\.safetensors, which is not there"),
        ],
    )
    def test_a_place_that_is_none_of_the_folder(self, tmp_path, folder, file, said):
        index = shard(folder)
        shutil.copytree(folder, tmp_path / "other")
        reindex(index, **{UP: file})
        with pytest.raises(ModelError, match=said):
            load_model(str(folder))

    def test_a_tensor_that_is_in_another_file_or_in_none(self, folder):
        index = shard(folder)
        places = json.loads(index.read_text())["weight_map"]
        reindex(index, **{UP: next(file for file in places.values() if file != places[UP])})
        with pytest.raises(ModelError, match=rf"promises {UP} in model-\S+, where it is not"):
            load_model(str(folder))
        reindex(index, **{UP: places[UP], "more.weight": places[UP]})
        with pytest.raises(ModelError, match=r"promises more\.weight in model-\S+, where it is not"):
            load_model(str(folder))

    def test_a_tensor_in_two_files(self, folder):
        index = shard(folder)
        places = json.loads(index.read_text())["weight_map"]
        other = next(file for file in places.values() if file != places[UP])
        save_file({**load_file(folder / other), UP: torch.zeros(32, 16)}, folder / other, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"{UP} is both in model-\S+ and in model-\S+: expected in one file"):
            load_model(str(folder))

    @pytest.mark.parametrize(
        ("index", "said"),
        [
            ({"metadata": {}}, 'has no "weight_map"'),
            ({"metadata": {}, "weight_map": {}}, 'has no "weight_map"'),
            ({"metadata": {}, "weight_map": {"a": 1}}, 'has no "weight_map"'),
            ({"weight_map": {"a": "a.safetensors"}}, 'has no "metadata"'),
            ([], "holds a list: expected a JSON object"),
        ],
    )
    def test_no_index(self, capsys, folder, index, said):
        shard(folder).write_text(json.dumps(index))
        status, _, err = run(capsys, "prune", folder, "--output", folder.parent / "out")
        assert (status, said in err) == (1, True)


OWN_CODE = """
open({trace!r}, "w").write("it ran")
from transformers import CLIPConfig as X, PreTrainedModel as Y
"""


class TestCode:
    @pytest.fixture
    def clip(self, tmp_path, tiny_tokenizer):
        """A model of a known type that transformers has no causal language model for, with code of its own."""
        folder = tmp_path / "clip"
        tiny_tokenizer.save_pretrained(folder)
        auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_x.X")
        stated = {"model_type": "clip", "architectures": ["X"], "auto_map": auto}
        (folder / "config.json").write_text(json.dumps(stated))
        (folder / "modeling_x.py").write_text(OWN_CODE.format(trace=str(tmp_path / "trace")))
        save_file({"weight": torch.zeros(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def test_no_code_runs_or_is_asked_about_whatever_is_piped_in(self, tmp_path, clip):
        (tmp_path / "text.txt").write_text("to be or not to be\n" * 40)
        command = [sys.executable, "-m", "statprune", "evaluate", clip, "--text", tmp_path / "text.txt", "--seqlen", "8"]
        done = subprocess.run(command, input="y\ny\ny\n", capture_output=True, text=True, check=False)
        assert not (tmp_path / "trace").exists()
        assert "[y/N]" not in done.stdout + done.stderr
        assert done.returncode == 1
        assert "transformers knows no such class, and no causal language model of the type clip" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("command", [["inspect"], ["prune", "--output", "out"], ["prune", "--dry-run", "--output", "out"]])
    def test_nor_by_other_commands(self, capsys, monkeypatch, tmp_path, clip, command):
        monkeypatch.chdir(tmp_path)
        status, _, err = run(capsys, command[0], clip, *command[1:])
        assert (status, "is never run" in err) == (1, True)
        assert not (tmp_path / "trace").exists()

    def test_code_of_a_tokenizer(self, tmp_path, folder):
        (folder / "own.py").write_text(OWN_CODE.format(trace=str(tmp_path / "trace")))
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        stated |= {"auto_map": {"AutoTokenizer": ["own.X", "own.X"]}, "tokenizer_class": "X"}
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
        with pytest.raises(ModelError, match=r"The tokenizer in \S+ cannot be loaded: .*custom code"):
            load_tokenizer(str(folder))
        assert not (tmp_path / "trace").exists()


class TestAdapters:
    def test_beside_a_model_is_refused_by_every_command(self, capsys, folder):
        (folder / "adapter_config.json").write_text("{}")
        for words in (["inspect", folder], ["evaluate", folder, "--text", "x"], ["prune", folder, "--output", folder / "out"]):
            status, _, err = run(capsys, *words)
            assert status == 1
            assert "holds an adapter beside the model (adapter_config.json)" in err
            assert "'statprune merge MODEL ADAPTER'" in err

    def test_alone_is_no_model(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"is an adapter \(adapter_config\.json\), not a model: name the model"):
            load_model(str(tmp_path))


class TestTokenizers:
    @pytest.fixture
    def bare(self, folder):
        """A model without a tokenizer, and a token file."""
        for file in folder.glob("tokenizer*"):
            file.unlink()
        save_file({"tokens": torch.randint(300, (4, 16))}, folder.parent / "tokens.safetensors")
        return folder

    def test_none_is_needed_where_no_text_is(self, capsys, bare):
        output, windows = bare.parent / "out", bare.parent / "tokens.safetensors"
        tokens, sizes = ["--calibration", windows], ["--samples", 4, "--seqlen", 16]
        assert run(capsys, "prune", bare, "--output", output, "--calibration", "generated", *sizes)[0] == 0
        assert run(capsys, "prune", bare, "--output", output.with_name("out-2"), *tokens, *sizes)[0] == 0
        assert not list(output.glob("tokenizer*"))
        assert run(capsys, "evaluate", output, "--text", windows, "--seqlen", 16)[0] == 0
        status, out, _ = run(capsys, "evaluate", output, "--text", windows, "--seqlen", 16, "--json")
        assert "tokenizer" not in json.loads(out)
        assert run(capsys, "tune", bare, "--output", output.with_name("tuned"), *tokens, *sizes, "--minutes", 0.001)[0] == 0
        assert status == 0

    def test_a_text_needs_one(self, capsys, bare):
        (bare.parent / "text.txt").write_text("to be or not to be\n" * 40)
        status, _, err = run(capsys, "prune", bare, "--output", bare.parent / "out", "--calibration", bare.parent / "text.txt")
        assert status == 1
        assert f"No tokenizer in {bare}: expected tokenizer.json" in err
        assert "--calibration generated" in err

    def test_a_broken_one_is_refused_before_work_begins(self, capsys, folder):
        (folder / "tokenizer.json").write_text("{")
        (folder.parent / "text.txt").write_text("to be or not to be\n" * 40)
        words = [folder, "--output", folder.parent / "out", "--calibration", folder.parent / "text.txt"]
        status, out, err = run(capsys, "prune", *words)
        assert (status, "The tokenizer in" in err) == (1, True)
        assert "stays dense" not in out
        assert not (folder.parent / "out").exists()


class TestHub:
    """A cache as huggingface_hub keeps it; nothing is downloaded."""

    FIRST, SECOND = "1" * 40, "2" * 40

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch, tiny_model_folder):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
        root = tmp_path / "hub" / "models--me--tiny"
        for commit in (self.FIRST, self.SECOND):
            shutil.copytree(tiny_model_folder, root / "snapshots" / commit)
        change(root / "snapshots" / self.SECOND, **{UP: torch.zeros(32, 16)})
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(self.FIRST)
        (root / "refs" / "v2").write_text(self.SECOND)
        return root

    def test_a_revision_chooses_the_files(self):
        first, second = statprune.load("me/tiny"), statprune.load("me/tiny", revision="v2")
        assert first.get_parameter(UP).any()
        assert not second.get_parameter(UP).any()
        assert (first.config._commit_hash, second.config._commit_hash) == (self.FIRST, self.SECOND)
        assert second.name_or_path == "me/tiny"
        assert len(load_tokenizer("me/tiny", "v2")) == len(load_tokenizer("me/tiny", self.FIRST))

    def test_the_record_says_which_commit_it_was(self, capsys, tmp_path):
        words = ["--output", tmp_path / "out", "--samples", 2, "--seqlen", 8, "--revision", "v2", "--ignore", "*.up_proj"]
        assert run(capsys, "prune", "me/tiny", *words)[0] == 0
        protocol = json.loads((tmp_path / "out" / "pruning.json").read_text())["protocol"]
        assert (protocol["model"], protocol["revision"]) == ("me/tiny", self.SECOND)
        assert not load_model(str(tmp_path / "out")).get_parameter(UP).any()
        assert str(tmp_path / "hub") not in (tmp_path / "out" / "config.json").read_text()
        assert run(capsys, "inspect", "me/tiny", "--revision", "v2")[0] == 0
        assert run(capsys, "prune", "me/tiny", *words, "--dry-run")[0] == 1  # the output exists

    def test_its_files_are_checked_like_those_of_a_folder(self, cache):
        snapshot = cache / "snapshots" / self.SECOND
        reindex(shard(snapshot), **{UP: "../1/model.safetensors"})
        with pytest.raises(ModelError, match="expected a file's name, in the model's own folder"):
            load_model("me/tiny", revision="v2")
        (cache / "snapshots" / self.FIRST / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match="holds an adapter beside the model"):
            load_model("me/tiny")

    def test_a_revision_that_does_not_exist(self, capsys, folder):
        with pytest.raises(ModelError, match=r"No model at 'me/tiny' \(revision v3\), neither a folder nor a name on the hub"):
            load_model("me/tiny", revision="v3")
        with pytest.raises(ModelError, match="No model at 'me/tinny', neither"):
            load_model("me/tinny")
        status, _, err = run(capsys, "inspect", folder, "--revision", "v2")
        assert (status, f"--revision v2: {folder} is a folder, and only models of the hub have revisions" in err) == (1, True)

    @pytest.mark.parametrize("path", ["x" * 300, "a\0b", "https://x/y", "./gone", "a/b/c"])
    def test_what_is_no_name(self, path):
        with pytest.raises(ModelError, match="No model at"):
            load_config(path)


class TestQuantized:
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_a_linear_layer_of_few_bits(self, dtype):
        model = classifier()
        model[2].weight = nn.Parameter(torch.zeros(8, 12).to(dtype), requires_grad=False)
        with pytest.raises(SiteError, match=r"The parameter 2\.weight is quantized \(torch\.\w+\): prune the model"):
            statprune.prune(model, [torch.randn(2, 8)])

    def test_a_tensor_that_only_looks_like_a_weight(self):
        from torch.testing._internal.two_tensor import TwoTensor

        model = classifier()
        weight = model[2].weight.detach()
        model[2].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
        with pytest.raises(SiteError, match=r"The parameter 2\.weight is quantized \(TwoTensor\)"):
            statprune.prune(model, [torch.randn(2, 8)])

    def test_whole_numbers_beside_the_layers_are_no_matter(self):
        model = classifier()
        model.register_parameter("table", nn.Parameter(torch.arange(4), requires_grad=False))
        assert statprune.prune(model, [torch.randn(2, 8)]).sites


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="is a T5ForConditionalGeneration, not a causal language model"):
        load_causal(str(tmp_path / "t5"), "auto", "cpu")
