"""Tiny random models of many families through one path, `statprune.prune`; nothing in `src` knows their names."""

import pytest
import torch
import transformers

import statprune
from tiny_models import TRANSFORMER, VOCABULARY, changed, snapshot, tokens

DECODER = {**TRANSFORMER, "num_hidden_layers": 1, "num_key_value_heads": 1}
ENCODER = {**TRANSFORMER, "num_hidden_layers": 1}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
SPEECH_TO_TEXT = {"d_model": 16, "vocab_size": VOCABULARY, "encoder_layers": 1, "decoder_layers": 1}
SPEECH_TO_TEXT |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def text(batch, length):
    """Tokens whose last row ends in padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 2 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def text_to_text(batch, length):
    decoder = {f"decoder_{name}": value for name, value in text(batch, length - 1).items()}
    return {**text(batch, length), **decoder}


def images(batch, length):
    return {"pixel_values": torch.randn(batch, 3, 8, 8)}


def images_and_text(batch, length):
    return {**text(batch, length), **images(batch, length)}


def speech_to_text(batch, length):
    return {"input_features": torch.randn(batch, 8, 16), "decoder_input_ids": tokens(batch, length)}


FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, text),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, text),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}, text),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "head_dim": 8}, text),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8, "sliding_window": 4}, text),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER, text),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", DECODER, text),
    "opt": ("OPTForCausalLM", "OPTConfig", {**ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16}, text),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**SPECIAL, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}, text),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER, text),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**ENCODER, "ffn_hidden_size": 24}, text),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**SPECIAL, "hidden_size": 16, "n_layer": 1, "n_head": 2}, text),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}, text),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        text,
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**DECODER, "head_dim": 8, "num_local_experts": 4}, text),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**DECODER, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 24},
        text,
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 8, "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 2,
        },
        text,
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        text,
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}, text),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**DECODER, "num_local_experts": 4}, text),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**DECODER, "num_local_experts": 4}, text),
    "bert": ("BertModel", "BertConfig", ENCODER, text),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER, text),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, images),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 8},
        images_and_text,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY},
        text_to_text,
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**SPEECH_TO_TEXT, **SPECIAL, "max_position_embeddings": 32, "forced_eos_token_id": 2, "decoder_start_token_id": 2},
        text_to_text,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **SPEECH_TO_TEXT, **SPECIAL, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16,
            "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        speech_to_text,
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {**SPECIAL, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4},
        text,
    ),
}  # fmt: skip


def build(family):
    model_class, config_class, settings, make_batch = FAMILIES[family]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    # Without CUDA kernels, Mamba is a Python loop over the time steps: it has a graph for one length, of any batch size.
    lengths = (6, 6, 6) if family == "mamba" else (6, 5, 4)
    return model, [make_batch(batch, length) for batch, length in zip((3, 2, 1), lengths, strict=True)]


def assert_accounted_for(model, before, report):
    """Nothing but the sites changed, and every other matrix is named with a reason."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pruned = {site.parameter for site in report.sites}
    aliases = {name for name in parameters for site in pruned if parameters[name] is parameters[site]}
    assert changed(model, before) == aliases
    left_out = {one.name: one.reason for one in report.left_out}
    assert all(left_out.values())
    named = {id(parameters[name]) for name in pruned}
    others = {id(parameters[name if name in parameters else f"{name}.weight"]) for name in left_out}
    assert not named & others
    assert {id(parameter) for parameter in model.parameters() if parameter.ndim >= 2} == named | others


def rows_of(model, site):
    """The site's weight as [..., out, in]."""
    parameter = model.get_parameter(site.parameter)
    return parameter.mT if site.stored == "in_out" else parameter


EXPECTED_LEFT_OUT = {
    "llama": {"model.embed_tokens": "embedding", "lm_head": "feeds the output"},
    "gemma2": {"lm_head": "feeds the output, tied to model.embed_tokens.weight"},  # through a soft cap
    "gpt2": {"transformer.wpe": "embedding", "lm_head": "feeds the output, tied to transformer.wte.weight"},
    "bert": {
        "embeddings.word_embeddings": "embedding",
        "embeddings.position_embeddings": "embedding",
        "embeddings.token_type_embeddings": "embedding",
        "pooler.dense": "feeds the output",  # through a tanh
    },
    "bart": {
        "model.encoder.embed_positions": "embedding",
        "model.decoder.embed_positions": "embedding",
        # Plus a buffer, final_logits_bias.
        "lm_head": "feeds the output, tied to model.shared.weight, model.encoder.embed_tokens.weight, "
        "model.decoder.embed_tokens.weight",
    },
    "mixtral": {
        "model.embed_tokens": "embedding",
        "model.layers.0.mlp.gate": "routes tokens to experts",
        "lm_head": "feeds the output",
    },
    "mamba": {
        "backbone.layers.0.mixer.A_log": "read by exp, not by a linear layer",
        "backbone.layers.0.mixer.conv1d": "read by squeeze, not by a linear layer",
        "lm_head": "feeds the output, tied to backbone.embeddings.weight",
    },
    "vit": {
        "vit.embeddings.cls_token": "read by expand, not by a linear layer",
        "vit.embeddings.position_embeddings": "read by add, not by a linear layer",
        "vit.embeddings.patch_embeddings.projection": "read by conv2d, not by a linear layer",
        "classifier": "feeds the output",
    },
}


DIFFERENT = ("llama", "gpt2", "bert", "mixtral", "vit", "bart")
"""One of each kind: gated and grouped attention, weights stored [in, out], an encoder, experts, images, two token streams."""


@pytest.mark.parametrize(
    "family", [family if family in DIFFERENT else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_family_is_pruned_by_the_walk_over_batches_of_different_shapes(family):
    model, batches = build(family)
    before = snapshot(model)
    report = statprune.prune(model, batches, statprune.Recipe("cvr+energy", "2:4"))
    assert report.schedule == "walk"
    assert report.fallback_reason is None
    assert len(report.sites) >= 4
    for site in report.sites:
        non_zeros = rows_of(model, site).unflatten(-1, (-1, 4)).count_nonzero(-1)
        assert (non_zeros == 2).all(), site.name
        assert site.sparsity == 0.5, site.name
    assert_accounted_for(model, before, report)
    if family in EXPECTED_LEFT_OUT:
        assert {one.name: one.reason for one in report.left_out} == EXPECTED_LEFT_OUT[family]
    if "attention_mask" in batches[0] and family != "clip":  # whose first layer is the vision model's
        assert report.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_half_of_each_row_is_pruned_where_half_is_asked_for(family):
    model, batches = build(family)
    before = snapshot(model)
    report = statprune.prune(model, batches[:1], statprune.Recipe(pattern="50%", schedule="one-shot"))
    assert report.schedule == "one-shot"
    for site in report.sites:
        rows = rows_of(model, site)
        assert ((rows == 0).sum(-1) == rows.shape[-1] // 2).all(), site.name
    assert_accounted_for(model, before, report)


def test_of_a_mixture_of_experts_the_router_is_pruned_only_where_it_is_named():
    model, batches = build("mixtral")
    # Magnitude needs no forward pass: the names come from the graph alone.
    own, named = (statprune.Recipe("magnitude", targets=targets) for targets in (None, ("*.mlp.*",)))
    layers = statprune.prune(model, batches[:1], own).sites
    assert [site.name.removeprefix("model.layers.0.") for site in layers] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    ]  # fmt: skip
    layers = statprune.prune(model, batches[:1], named).sites
    assert [site.name.removeprefix("model.layers.0.mlp.") for site in layers] == [
        "gate", "experts.gate_up_proj", "experts.down_proj",
    ]  # fmt: skip


def test_a_model_whose_length_is_a_python_loop_falls_back_to_hooks_where_the_length_varies():
    model, _ = build("mamba")
    with pytest.warns(UserWarning, match=r"cannot trace MambaForCausalLM: .*constant.*Batches of one shape may do"):
        report = statprune.prune(model, [{"input_ids": tokens(2, 6)}, {"input_ids": tokens(2, 5)}])
    assert report.schedule == "one-shot (module hooks)"
    assert "MambaForCausalLM" in report.fallback_reason
