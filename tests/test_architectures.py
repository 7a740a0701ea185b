"""configs/architectures.py: every architecture of transformers, small and random, and what comes of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import statprune
from statprune.report import PruningReport, SiteReport
from tiny_models import classifier, llama

SCRIPT = Path(__file__).parents[1] / "configs" / "architectures.py"
TWO_OF_FOUR = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 4.0]])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "value", "small"),
    [
        ("hidden_size", 4096, 64),
        ("num_hidden_layers", 32, 2),
        ("decoder_layers", 12, 2),
        ("num_attention_heads", 32, 4),
        ("num_key_value_heads", 8, 2),
        ("head_dim", 128, 16),
        ("intermediate_size", 11008, 256),
        ("moe_intermediate_size", 1408, 32),
        ("num_local_experts", 8, 4),
        ("n_routed_experts", 256, 4),
        ("num_experts_per_tok", 8, 2),
        ("vocab_size", 32000, 128),
        ("type_vocab_size", 2, 2),
        ("max_position_embeddings", 4096, 4096),
        ("conv_kernel", 4, 4),
        ("hidden_size", 32, 32),
        ("num_hidden_layers", 0, 0),
        ("sliding_window", -1, -1),
    ],
)
def test_a_number_is_made_small_by_its_name(script, name, value, small):
    assert script.small_number(name, value) == small


def test_a_configuration_is_made_small_with_those_inside_it(script):
    small = script.shrink(
        {
            "model_type": "outer",
            "id2label": {0: "LABEL_0"},
            "image_token_id": 128256,
            "pad_token_id": None,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "text_config": {
                "model_type": "inner",
                "hidden_size": 4096,
                "num_hidden_layers": 6,
                "layer_types": ["sliding", "sliding", "sliding", "full", "sliding", "full"],
                "rotary_emb_base": [500.0, 1.0, 2.0, 3.0, 2.0, 1.0],
                "image_token_id": 128256,
                "video_token_id": 128257,
                "eos_token_id": [128001, 128008],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]},
            },
        }
    )
    inner = small.pop("text_config")
    assert small == {
        "model_type": "outer", "image_token_id": small["image_token_id"], "pad_token_id": 0, "tie_word_embeddings": False,
        "hidden_act": "silu", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    assert inner["image_token_id"] == small["image_token_id"] != inner["video_token_id"]
    assert inner["eos_token_id"] == [2]
    assert inner["layer_types"][0] == "sliding"
    assert inner["layer_types"].count("full") == 1
    assert len(inner["layer_types"]) == len(inner["rotary_emb_base"]) == inner["num_hidden_layers"]
    assert inner["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def test_extra_settings_of_a_type_of_model_win(script):
    config = {"model_type": "inner", "hidden_size": 4096}
    assert script.shrink(config, {"inner": {"hidden_size": 96}})["hidden_size"] == 96
    assert script.shrink(config, {"other": {"hidden_size": 96}})["hidden_size"] == 64


def test_heads_of_keys_are_as_many_as_of_queries_where_they_were(script):
    assert script.shrink({"num_attention_heads": 32, "num_key_value_heads": 32})["num_key_value_heads"] == 4
    assert script.shrink({"num_attention_heads": 32, "num_key_value_heads": 8})["num_key_value_heads"] == 2
    latent = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "qk_head_dim": 192, "head_dim": 64}
    assert script.shrink(latent) == {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32, "head_dim": 16}


def test_one_layer_of_each_kind_is_kept(script):
    kinds = ["linear"] * 3 + ["full"] + ["linear"] * 4
    experts = ["dense", "sparse"] + ["sparse"] * 6
    assert script.kept_layers({"num_hidden_layers": 8, "layer_types": kinds, "mlp_layer_types": experts}) == [0, 1, 3]
    assert script.kept_layers({"num_hidden_layers": 8, "layer_types": ["full"] * 8}) == [0, 1]
    assert script.kept_layers({"num_hidden_layers": 8}) == []
    assert script.kept_layers({"depths": [2, 2, 6, 2], "num_layers": 4, "num_heads": [3, 6, 12, 24]}) == []


def test_the_outcome_is_read_from_the_report(script):
    assert script.outcome_of("walk", None) == "graph"
    assert script.outcome_of("block (module hooks)", "cannot be traced") == "blocks"
    assert script.outcome_of("one-shot (module hooks)", "cannot be traced") == "one-shot"
    assert script.failed("LlamaForCausalLM", "pruned", "took more than 60 s")["outcome"] == "not pruned"
    died = script.failed("LlamaForCausalLM", "run", "took more than 60 s")
    assert (died["class"], died["outcome"]) == ("LlamaForCausalLM", "not built")
    assert died["reason"] == "took more than 60 s while it was run"


def test_a_reason_is_the_first_line_that_says_something(script):
    assert script.reason_of(ValueError("no such layer\nand more")) == "ValueError: no such layer"
    assert script.reason_of(ValueError("this is wrong:\n  a width of 3")) == "ValueError: this is wrong: a width of 3"
    assert script.reason_of(AssertionError()) == "AssertionError"
    assert len(script.reason_of(ValueError("x" * 1000))) == 300


def test_zeros_are_looked_at_in_each_row(script):
    assert script.has_asked_zeros(TWO_OF_FOUR, "2:4")
    assert script.has_asked_zeros(TWO_OF_FOUR, "50%")
    assert script.has_asked_zeros(torch.zeros(2, 4), "2:4")
    assert not script.has_asked_zeros(TWO_OF_FOUR + torch.eye(2, 4).roll(1, 1), "2:4")
    assert not script.has_asked_zeros(torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]), "2:4")
    assert script.has_asked_zeros(TWO_OF_FOUR.repeat(3, 1, 1), "2:4")


def test_what_a_report_does_not_keep_is_found(script):
    model = classifier()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = statprune.prune(model, [torch.randn(8, 8)], statprune.Recipe("magnitude", "2:4"))
    assert script.violations(model, before, report, "2:4") == []
    report.left_out.clear()
    assert script.violations(model, before, report, "2:4") == ["4.weight is neither pruned nor named"]
    forgotten = PruningReport({}, "walk", sites=report.sites[1:])
    assert "0.weight was changed and is not named as pruned" in script.violations(model, before, forgotten, "2:4")
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[2].weight[model[2].weight != 0] = float("nan")
        model[4].bias.add_(1)
    assert set(script.violations(model, before, report, "2:4")) == {
        "0 has other zeros than 2:4", "2 is not finite", "4.bias was changed and is not named as pruned",
        "4.weight is neither pruned nor named",
    }  # fmt: skip


def test_a_weight_stored_the_other_way_round_is_looked_at_along_its_inputs(script):
    model = nn.Module()
    model.weight = nn.Parameter(TWO_OF_FOUR.t().contiguous())
    site = SiteReport("weight", "weight", (2, 4), "in_out", 4, 4, 1.0, 1.0)
    report = PruningReport({}, "walk", sites=[site])
    assert script.violations(model, {}, report, "2:4") == []


def test_inputs_are_made_of_what_forward_takes(script):
    model = llama(vocab_size=128)
    batches = script.fitting(model)
    assert [list(batch) for batch in batches] == [["input_ids", "attention_mask"]] * script.BATCHES
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert batches[0]["input_ids"].unique().equal(batches[1]["input_ids"].unique())

    class Refuses(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=False)
        main_input_name = "input_ids"

        def forward(self, input_ids):
            raise RuntimeError("never")

    with pytest.raises(script.NotBuiltError, match=r"^its own forward pass: RuntimeError: never$"):
        script.fitting(Refuses())


def test_tables_count_and_name(script):
    records = [
        {"class": "AForCausalLM", "outcome": "graph", "reason": None, "left_out": {"embedding": 1, "tied": 2}},
        {"class": "BForCausalLM", "outcome": "one-shot", "reason": "a | b\nc", "left_out": {"embedding": 2}},
        {"class": "AForImageClassification", "outcome": "not built", "reason": "ImportError: needs timm"},
    ]
    table = script.table(records)
    assert "| causal | 1 | 0 | 1 | 0 | 0 | 0 | 2 | 2 |" in table
    assert "| image | 0 | 0 | 0 | 0 | 1 | 0 | 1 | 1 |" in table
    assert "| image | 0 | 0 | 0 | 0 | 1 | 0 | 1 | 41 |" in script.table(records, {"image": 41})
    assert "| embedding | 3 | 2 |" in table
    assert "| BForCausalLM | one-shot | a \\| b c |" in table
    assert "| AForImageClassification | not built | ImportError: needs timm |" in table
    assert "AForCausalLM |" not in table
    assert "conditional" not in table


def test_reasons_are_counted_without_names(script):
    reasons = ["feeds the output, tied to a.weight", "embedding", "feeds the output, tied to b.weight"]
    assert script.count_reasons(reasons) == {"feeds the output, tied": 2, "embedding": 1}


def test_records_are_read_back(script, tmp_path):
    assert script.read_records(tmp_path) == []
    records = [{"class": "BForCausalLM", "outcome": "graph", "reason": None, "seconds": 1.0}]
    script.write_records(tmp_path, records, "python configs/architectures.py")
    assert script.read_records(tmp_path) == records
    assert "python configs/architectures.py" in (tmp_path / "README.md").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "README.md"}


def test_a_record_says_how_a_class_came_out(script, monkeypatch):
    said = []
    model = classifier()
    model.config = SimpleNamespace(model_type="small")
    monkeypatch.setattr(script, "build", lambda name: model)
    monkeypatch.setattr(script, "fitting", lambda model: [{"input": torch.randn(8, 8)}])
    record = script.try_class("SmallForImageClassification", "2:4", said.append)
    assert record.pop("seconds") >= 0
    assert record == {
        "class": "SmallForImageClassification", "model_type": "small", "outcome": "graph", "reason": None,
        "inputs": {"input": [8, 8]}, "sites": 2, "left_out": {"feeds the output": 1},
    }  # fmt: skip
    assert said == ["built", "run", "pruned"]
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    record = script.try_class("SmallForImageClassification", "2:4")
    assert record["outcome"] == "not pruned"
    assert record["reason"].startswith("NonFiniteError: ")
    monkeypatch.undo()
    record = script.try_class("NoSuchForCausalLM", "2:4")
    assert record["outcome"] == "not built"
    assert "NoSuchForCausalLM" in record["reason"]


@pytest.mark.slow
def test_each_class_has_a_process_of_its_own_and_a_run_goes_on(script, tmp_path):
    def run(*options):
        command = [
            sys.executable,
            str(SCRIPT),
            "--output",
            str(tmp_path),
            "--kind",
            "causal",
            "--only",
            "^(Llama|GPT2)(For|LM)",
        ]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout

    said = run("--seconds", "0.01")
    assert "LlamaForCausalLM: not built" in said
    (tmp_path / "results.json").unlink()
    said = run()
    assert "LlamaForCausalLM: graph" in said
    assert "GPT2LMHeadModel: graph" in said
    records = json.loads((tmp_path / "results.json").read_text())
    assert {record["class"]: record["outcome"] for record in records} == {
        "GPT2LMHeadModel": "graph",
        "LlamaForCausalLM": "graph",
    }
    assert "0 classes to try, 2 have a record already" in run()
