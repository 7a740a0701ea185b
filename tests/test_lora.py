"""Adapters are merged where the base weight is not zero, and nowhere else."""

import contextlib
import copy
import functools
import json
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import statprune
from statprune import Recipe
from statprune.checkpoint import RECORD, save, verify
from statprune.errors import AdapterError, MaskError, NonFiniteError
from statprune.loading import load_model, load_tokenizer
from statprune.report import PruningReport
from statprune.training.lora import load_adapter, merge_adapters
from test_cli import run
from tiny_models import gpt2, llama

BATCHES = [torch.randint(3, 48, (2, 16), generator=torch.Generator().manual_seed(0))]
LINEARS = ["q_proj", "up_proj", "down_proj"]


def pruned(model, **settings):
    return model, statprune.prune(model, BATCHES, Recipe("magnitude", **{"pattern": "2:4", **settings}))


@functools.cache
def _pruned_llama(*targets):
    return pruned(llama(), targets=list(targets) or None)


def pruned_llama(*targets):
    """A copy of one that was pruned once for all tests."""
    model, report = _pruned_llama(*targets)
    return copy.deepcopy(model), report


def with_adapters(model, *names, **settings):
    """LoRA adapters whose updates are dense."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": LINEARS, **settings})
    peft_model = get_peft_model(model, config, adapter_name=(names or ("default",))[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    randomize(peft_model)
    return peft_model


def randomize(peft_model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_one_weight_by_hand():
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    peft_model = get_peft_model(model, LoraConfig(r=1, lora_alpha=3, target_modules=["0"]))
    layer = peft_model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        layer.lora_B["default"].weight.fill_(0.5)
    merged = merge_adapters(peft_model)
    assert merged is model
    assert type(merged[0]) is nn.Linear
    assert merged[0].weight.tolist() == [[1 + 3 * 0.5 * 1, 0, 0, 2 + 3 * 0.5 * 4]]


@pytest.mark.parametrize("by_report", [False, True])
def test_a_language_model_keeps_every_zero_and_takes_the_update_elsewhere(by_report):
    model, report = pruned_llama()
    before = weights(model)
    everywhere = with_adapters(pruned_llama()[0]).merge_and_unload()
    merged = merge_adapters(with_adapters(model), report if by_report else None)
    assert type(merged) is type(model)
    assert weights(merged).keys() == before.keys()
    for name, weight in merged.named_parameters():
        zero = before[name] == 0
        assert torch.equal(weight == 0, zero), name
        assert torch.equal(weight[~zero], everywhere.get_parameter(name)[~zero]), name
        assert torch.equal(weight, before[name]) == (name.split(".")[-2] not in LINEARS), name
    assert merged(BATCHES[0]).logits.isfinite().all()


def test_weights_that_the_report_does_not_name_are_merged_whole():
    model, report = pruned_llama("*.mlp.*")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = 0
    merged = merge_adapters(with_adapters(model), report)
    assert merged.model.layers[0].self_attn.q_proj.weight[0, 0] != 0
    assert (merged.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_several_adapters_bias_and_low_precision():
    model, _ = pruned(llama(attention_bias=True, dtype=torch.bfloat16).to(torch.bfloat16))
    peft_model = with_adapters(model, "one", "two", lora_bias=True, target_modules=["q_proj"], use_rslora=True)
    peft_model.base_model.set_adapter(["one", "two"])
    before = weights(peft_model.get_base_model())
    layer = peft_model.get_base_model().model.layers[0].self_attn.q_proj
    update = sum(layer.get_delta_weight(name).float() for name in ("one", "two"))
    merged = merge_adapters(peft_model).model.layers[0].self_attn.q_proj
    base = before["model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert merged.weight.dtype == torch.bfloat16
    assert (merged.weight[base == 0] == 0).all()
    assert torch.allclose(merged.weight.float(), (base.float() + update) * (base != 0), rtol=0.02, atol=0.02)
    assert not torch.equal(merged.bias, before["model.layers.0.self_attn.q_proj.base_layer.bias"])


def test_transposed_storage():
    model, report = pruned(gpt2())
    before = weights(model)
    merged = merge_adapters(with_adapters(model, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), report)
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"):
        assert torch.equal(merged.get_parameter(name) == 0, before[name] == 0)
        assert not torch.equal(merged.get_parameter(name), before[name])


def test_embeddings_and_saved_modules_come_along_and_pruned_ones_get_their_zeros_back():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0  # the padding token's row is not a mask
    model, report = pruned(model, targets=["*_proj"])
    before = weights(model)
    settings = {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head", "gate_proj"]}
    merged = merge_adapters(with_adapters(model, **settings))
    assert (merged.model.embed_tokens.weight[0] != 0).any()
    assert not torch.equal(merged.lm_head.weight, before["lm_head.weight"])
    for name in ("gate_proj", "q_proj"):
        full = f"model.layers.1.{'mlp' if name == 'gate_proj' else 'self_attn'}.{name}.weight"
        assert torch.equal(merged.get_parameter(full) == 0, before[full] == 0)
        assert not torch.equal(merged.get_parameter(full), before[full])
    assert {site.name for site in report.sites} >= {"model.layers.1.mlp.gate_proj"}


def merged_already(peft_model):
    peft_model.merge_adapter()


def broken(peft_model):
    with torch.no_grad():
        next(parameter for name, parameter in peft_model.named_parameters() if "lora_B" in name).fill_(torch.nan)


@pytest.mark.parametrize(
    ("settings", "spoil", "error", "message"),
    [
        (
            {"use_dora": True},
            None,
            AdapterError,
            r"0\.self_attn\.q_proj: the adapter 'default' is no plain LoRA but Dora",
        ),
        ({}, merged_already, AdapterError, r"layers\.0\.self_attn\.q_proj: an adapter is merged into it already"),
        ({}, broken, NonFiniteError, r"lora_B\.default\.weight"),
    ],
)
def test_what_cannot_be_merged_rightly_is_refused(settings, spoil, error, message):
    model, report = pruned_llama()
    peft_model = with_adapters(model, **settings)
    if spoil is not None:
        spoil(peft_model)
    with pytest.raises(error, match=message):
        merge_adapters(peft_model, report)


def test_dora_on_dense_weights_is_pefts_business():
    model, report = pruned_llama("*.mlp.*")
    merge_adapters(with_adapters(model, use_dora=True, target_modules=["q_proj"]), report)


def test_other_adapters_other_objects_and_quantized_weights_are_refused():
    with pytest.raises(AdapterError, match=r"merge_adapters\(LlamaForCausalLM\): expected a peft\.PeftModel"):
        merge_adapters(llama())
    scaling = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(AdapterError, match="of type IA3: expected LORA"):
        merge_adapters(get_peft_model(llama(), scaling))
    peft_model = with_adapters(llama())
    layer = peft_model.get_base_model().model.layers[1].mlp.up_proj
    layer.base_layer.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj is quantized"):
        merge_adapters(peft_model)


def test_zeros_that_were_lost_before_the_merge_are_noticed():
    model, report = pruned_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
    with pytest.raises(MaskError, match=r"layers\.1\.mlp\.up_proj has 0 zeros, but 192 were recorded"):
        merge_adapters(with_adapters(model), report)
    with pytest.raises(MaskError, match=r"no parameter model\.layers\.0\.self_attn\.q_proj\.weight"):
        merge_adapters(get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)), report)


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match=r"pip install 'statprune\[lora\]'"):
        merge_adapters(llama())


# The command.


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model_folder):
    """A pruned model, and an adapter that was trained on it."""
    root = tmp_path_factory.mktemp("lora")
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES, Recipe(pattern="2:4"))
    save(model, report, root / "sparse", tokenizer=load_tokenizer(tiny_model_folder), protocol={"samples": 2})
    with_adapters(load_model(str(root / "sparse"))).save_pretrained(root / "adapter")
    return root


def test_merge_writes_a_model_that_verifies(capsys, tmp_path, folders):
    status, out, err = run(capsys, "merge", folders / "sparse", folders / "adapter", "--output", tmp_path / "out")
    assert status == 0, err
    assert "3 of 7 pruned weights have changed; zeros: 50.00 % before, 50.00 % now" in out
    record, before = verify(tmp_path / "out"), verify(folders / "sparse")
    assert record["protocol"] == {"samples": 2, "merged_adapters": [str(folders / "adapter")]}
    assert record["recipe"] == before["recipe"]
    assert record["energy_ratio"] > before["energy_ratio"]
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    old, new = (load_file(folder / "model.safetensors") for folder in (folders / "sparse", tmp_path / "out"))
    expected = merge_adapters(load_adapter(load_model(str(folders / "sparse")), folders / "adapter"))
    for name, weight in new.items():
        assert torch.equal(weight == 0, old[name] == 0), name
        assert torch.equal(weight, expected.get_parameter(name)), name
    assert PruningReport.from_dict(json.loads((tmp_path / "out" / RECORD).read_text())).sparsity == 0.5
    assert run(capsys, "merge", tmp_path / "out", folders / "adapter", "--output", tmp_path / "twice")[0] == 0
    assert len(verify(tmp_path / "twice")["protocol"]["merged_adapters"]) == 2


def copied(folders, tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    for path in (folders / "adapter").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def pickle_only(adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def without_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()


def without_config(adapter):
    (adapter / "adapter_config.json").unlink()


def edited(change):
    def edit(adapter):
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors, min(tensors))
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    return edit


def truncated(adapter):
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])


def for_another_model(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query"]}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickle_only, "only adapter_model.bin: a pickle can run code"),
        (without_weights, "a configuration without weights"),
        (without_config, "is not an adapter's folder: expected adapter_config.json"),
        (edited(lambda tensors, name: tensors.pop(name)), "1 tensors are missing or unknown, such as base_model"),
        (edited(lambda tensors, name: tensors.update(lora_other=torch.ones(1))), "such as lora_other"),
        (edited(lambda tensors, name: tensors.update({name: torch.ones(2, 3)})), "size mismatch"),
        (truncated, "does not fit LlamaForCausalLM"),
        (for_another_model, "does not fit LlamaForCausalLM: Target modules"),
    ],
)
def test_a_bad_adapter_is_explained_and_nothing_is_written(capsys, tmp_path, folders, spoil, message):
    adapter = copied(folders, tmp_path)
    spoil(adapter)
    status, _, err = run(capsys, "merge", folders / "sparse", adapter, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_model_that_was_not_pruned_is_refused(capsys, tmp_path, folders, tiny_model_folder):
    status, _, err = run(capsys, "merge", tiny_model_folder, folders / "adapter", "--output", tmp_path / "out")
    assert status == 1
    assert "Only folders that statprune wrote" in err


class Branching(nn.Module):
    """What no graph can hold."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.q_proj(x) if x.sum() > -1e9 else x)


@pytest.mark.parametrize("model", [llama, Branching])
def test_the_adapters_of_a_model_are_left_out_of_a_pruning_and_that_is_said(model):
    # Three rows, which 2:4 does not divide: nobody may be kept from pruning by an adapter's shape.
    peft_model = with_adapters(model(), r=3, target_modules=["q_proj"])
    adapters = {name: tensor.clone() for name, tensor in peft_model.named_parameters() if "lora_" in name}
    batches = BATCHES if model is llama else [torch.randn(4, 16)]
    expected = pytest.warns(UserWarning, match="hooks") if model is Branching else contextlib.nullcontext()
    with expected:
        report = statprune.prune(peft_model, batches, "wanda", pattern="2:4")
    assert any(site.name.endswith("q_proj.base_layer") for site in report.sites)
    reasons = {one.name: one.reason for one in report.left_out if "lora_" in one.name}
    assert {f"{name}.weight" for name in reasons} == adapters.keys()
    assert all(reason.startswith("part of an adapter: lora_") for reason in reasons.values())
    assert all(torch.equal(peft_model.get_parameter(name), tensor) for name, tensor in adapters.items())
    merged = merge_adapters(peft_model)
    assert all(
        (merged.get_submodule("q_proj" if model is Branching else "model.layers.0.self_attn.q_proj").weight == 0).sum(-1) == 8
    )
