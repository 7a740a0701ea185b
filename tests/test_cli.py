import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from statprune.checkpoint import verify
from statprune.commands.cli import COMMANDS, main
from statprune.loading import load_model
from statprune.perplexity import evaluate

TEXT = "to be or not to be, that is the question\n" * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, " ".join(printed.out.split()), " ".join(printed.err.split())


def prune(capsys, model, output, *options):
    return run(capsys, "prune", model, "--output", output, "--seqlen", 16, "--samples", 4, *options)


def test_prune_says_what_it_will_do_prunes_saves_and_the_result_verifies(capsys, tmp_path, tiny_model_folder, text):
    status, out, _ = prune(capsys, tiny_model_folder, tmp_path / "out", "--pattern", "2:4", "--calibration", text)
    assert status == 0
    for said in ("cvr+energy at 2:4", "model.layers.*.mlp.up_proj", "lm_head", "feeds the output", "zeros are stored"):
        assert said in out, said
    for step in ("export to a graph", "walk: the calibration set", "save and verify"):
        assert step in out, step
    assert run(capsys, "verify", tmp_path / "out")[:1] == (0,)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["protocol"]["seqlen"] == 16


def test_prune_needs_no_data_at_all(capsys, tmp_path, tiny_model_folder):
    assert prune(capsys, tiny_model_folder, tmp_path / "out")[0] == 0
    assert verify(tmp_path / "out")["protocol"]["calibration"] == ["generated"]


def test_every_option_can_come_from_yaml_and_a_recipe_from_its_own_file(capsys, tmp_path, tiny_model_folder, text):
    (tmp_path / "recipe.yaml").write_text("criterion: {name: cvr, alpha: 0.25}\npattern: '1:4'\nignore: ['*.down_proj']\n")
    (tmp_path / "options.yaml").write_text(f"recipe: {tmp_path}/recipe.yaml\ncalibration: [{text}]\nbatch_size: 2\n")
    status, _, err = prune(capsys, tiny_model_folder, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert status == 0, err
    record = verify(tmp_path / "out")
    assert record["recipe"]["criterion"]["alpha"] == 0.25
    assert record["protocol"]["batch_size"] == 2
    assert record["sparsity"] == 0.75
    assert "ignored by the recipe" in {one["reason"] for one in record["left_out"]}


def test_parts_can_be_mappings_on_the_command_line(capsys, tmp_path, tiny_model_folder, text):
    options = ["--criterion", '{"name": "cvr", "alpha": 0}', "--pattern", '{"name": "unstructured", "sparsity": 0.25}']
    assert prune(capsys, tiny_model_folder, tmp_path / "out", "--calibration", text, *options)[0] == 0
    assert verify(tmp_path / "out")["recipe"]["criterion"]["alpha"] == 0
    assert verify(tmp_path / "out")["sparsity"] == 0.25


def test_the_sparsity_is_shared_out_on_the_command_line(capsys, tmp_path, tiny_model_folder, text):
    output = tmp_path / "out"
    options = ["--pattern", "50%", "--allocation", "owl:spread=0.1", "--calibration", text, "--samples", "2", "--seqlen", "16"]
    assert main(["prune", tiny_model_folder, "--output", str(output), *options]) == 0
    record = json.loads((output / "pruning.json").read_text())
    assert record["recipe"]["allocation"] == {"name": "owl", "threshold": 5.0, "spread": 0.1, "sparsity": None}
    assert {site["sparsity"] for site in record["sites"]} == {0.5}  # of one block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seqlen", "65"], "--seqlen 65 is longer than the model's context: expected at most 64"),
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--pattern", "2:3"], "does not divide its width of 16"),
        (["--pattern", "5:4"], "expected 0 < keep <= of"),
        (["--pattern", "120%"], "fraction in [0, 1)"),
        (["--criterion", "wandaa"], "Did you mean 'wanda'?"),
        (["--targets", "*.mpl.*"], "matches no weight of this model"),
        (["--calibration", "missing.txt"], "missing.txt cannot be read"),
        (["--recipe", "missing.yaml"], "missing.yaml cannot be read"),
        (["--recipe", "x.yaml", "--pattern", "2:4"], "were both given"),
        (["--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_bad_options_are_explained_and_nothing_is_written(capsys, tmp_path, tiny_model_folder, options, message):
    status, _, err = prune(capsys, tiny_model_folder, tmp_path / "out", *options)
    assert status == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_before_the_model_is_loaded(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    status, _, err = prune(capsys, "no-such-model", tmp_path / "out")
    assert status == 1
    assert "out exists" in err


def test_a_tokenizer_of_another_model_is_refused(capsys, tmp_path, tiny_model_folder, text):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    status, _, err = prune(capsys, folder, tmp_path / "out", "--calibration", text)
    assert status == 1
    assert "this tokenizer belongs to another model" in err
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_named_and_nothing_is_written(capsys, tmp_path, tiny_model_folder, text):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, _, err = prune(capsys, folder, tmp_path / "out", "--calibration", text)
    assert status == 1
    assert "NaN or infinity in the parameter model.layers.0.mlp.up_proj.weight" in err
    assert not (tmp_path / "out").exists()


def test_evaluate_prints_the_perplexity_and_the_protocol(capsys, tiny_model_folder, text):
    status, out, _ = run(capsys, "evaluate", tiny_model_folder, "--text", text, "--seqlen", 16, "--json")
    result = json.loads(out)
    assert status == 0
    from statprune.data import evaluation_windows

    model = load_model(tiny_model_folder)
    from statprune.loading import load_tokenizer

    windows = evaluation_windows([text], tokenizer=load_tokenizer(tiny_model_folder), model=model, seqlen=16)
    assert result["perplexity"] == pytest.approx(evaluate(model, windows))
    assert (result["windows"], result["seqlen"], result["dtype"]) == (len(windows), 16, "float32")
    assert "perplexity" in run(capsys, "evaluate", tiny_model_folder, "--text", text, "--seqlen", 16)[1]


def test_inspect_needs_a_configuration_and_no_weights(capsys, tmp_path, tiny_model_folder):
    shutil.copy(f"{tiny_model_folder}/config.json", tmp_path)
    status, out, _ = run(capsys, "inspect", tmp_path, "--json")
    data = json.loads(out)
    assert status == 0
    assert [len(group) for group in data["groups"]] == [3, 1, 2, 1]
    assert {one["reason"] for one in data["left_out"]} == {"embedding", "feeds the output"}
    assert "7 linear layers in 4 input groups" in run(capsys, "inspect", tmp_path)[1]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("t5", {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 64}),
        ("vit", {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "image_size": 8, "patch_size": 4}),
        ("whisper", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                     "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64,
                     "max_source_positions": 8, "num_mel_bins": 4, "pad_token_id": 0, "decoder_start_token_id": 1,
                     "bos_token_id": 0, "eos_token_id": 0}),
    ],
)  # fmt: skip
def test_inspect_knows_no_families(capsys, tmp_path, model_type, settings):
    from transformers import CONFIG_MAPPING

    classes = {"t5": "T5ForConditionalGeneration", "vit": "ViTModel", "whisper": "WhisperForConditionalGeneration"}
    CONFIG_MAPPING[model_type](architectures=[classes[model_type]], **settings).save_pretrained(tmp_path)
    status, out, err = run(capsys, "inspect", tmp_path, "--json")
    assert status == 0, err
    assert len(json.loads(out)["groups"]) >= 3


def test_verify_fails_with_the_first_broken_promise(capsys, tmp_path, tiny_model_folder, text):
    prune(capsys, tiny_model_folder, tmp_path / "out", "--calibration", text)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    status, _, err = run(capsys, "verify", tmp_path / "out")
    assert status == 1
    assert "model.layers.0.mlp.up_proj: number of zeros promised 256, found 0" in err


def test_compare_prints_a_markdown_table_and_leaves_the_model_alone(capsys, tiny_model_folder, text):
    options = ["--seqlen", 16, "--samples", 4, "--calibration", text, "--text", text]
    methods = ["--methods", "wanda", "cvr+energy", '{"label": "CVR 0", "criterion": {"name": "cvr", "alpha": 0}}']
    before = load_file(f"{tiny_model_folder}/model.safetensors")
    assert main([str(a) for a in ["compare", tiny_model_folder, *options, *methods, "--patterns", "50%", "2:4"]]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("| perplexity (dense ")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["wanda", "cvr+energy", "CVR 0"]
    assert sum(line.count("**") for line in lines) == 4
    after = load_file(f"{tiny_model_folder}/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_benchmark_measures_both_and_gives_their_ratio(capsys, tiny_model_folder):
    options = ["--seqlen", 16, "--samples", 2, "--rounds", 2, "--json"]
    status, out, _ = run(capsys, "benchmark", tiny_model_folder, *options)
    cost = json.loads(out)
    assert status == 0
    assert len(cost["walk"]) == len(cost["forward"]) == 2
    assert cost["ratio"] > 0


def test_quickstart_leaves_models_that_the_other_commands_take(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("statprune.experiments.quickstart.MAX_CHARACTERS", 30_000)
    monkeypatch.setattr("statprune.experiments.quickstart.METHODS", ("wanda", "cvr+energy"))
    monkeypatch.setattr("statprune.experiments.quickstart.PATTERNS", ("2:4",))
    output = tmp_path / "quick"
    assert main(["quickstart", "--output", str(output), "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:] == ["wanda", "cvr+energy"]
    assert main(["verify", str(output / "sparse")]) == 0
    assert main(["evaluate", str(output / "sparse"), "--text", str(output / "texts" / "held-out.txt"), "--seqlen", "128"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_has_a_help(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "None" not in capsys.readouterr().out


def test_a_wrong_option_is_a_usage_error_of_a_real_process():
    done = subprocess.run([sys.executable, "-m", "statprune", "prune", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "output" in done.stderr
