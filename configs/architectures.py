"""Try every architecture of the installed transformers: build it small and random, prune it, and check what came out.

    python configs/architectures.py --output configs/architectures --kind causal
    python configs/architectures.py --output tried --only '^(Llama|Mixtral)For'

Each `*ForCausalLM` (and `*LMHeadModel`), `*ForConditionalGeneration`, `*ForImageClassification` and
`*ForSequenceClassification` is built from its default configuration, shrunk by the names of its fields to a few layers of
width 64, and pruned with the default recipe in a process of its own, with limits of time and memory. What comes out:

    graph         pruned along the graph of torch.export
    blocks        no graph: pruned block after block, observed with module hooks
    one-shot      no graph, no blocks: pruned with statistics of the dense model
    not pruned    refused, failed, or beyond a limit; the reason is the first line of the error
    not built     the model could not be built small, or did not run itself on what this script feeds it
    wrong         pruned, and a weight has other zeros than asked for, or is neither pruned nor named with a reason

`results.json` has a record of each class, `README.md` the tables. A run that is ended goes on where it was: classes that have
a record are skipped. Random models of one size predict nothing; this says which architectures the code can take, no more. A
model whose images or sounds this script cannot make up is fed with text alone, and the weights that text does not reach count
as left out ("not read in this forward pass").
"""

import argparse
import collections
import contextlib
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

KINDS = {
    "causal": ("ForCausalLM", "LMHeadModel"),
    "conditional": ("ForConditionalGeneration",),
    "image": ("ForImageClassification",),
    "sequence": ("ForSequenceClassification",),
}
"""What a class's name ends in."""

OUTCOMES = ("graph", "blocks", "one-shot", "not pruned", "not built", "wrong")

Record = dict[str, Any]

# Sizes of the small models. Widths are multiples of 4, so that 2:4 fits; heads times the width of a head is the hidden size.
HIDDEN, INSIDE, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, VOCABULARY = 64, 256, 4, 2, 16, 4, 128
ROWS, LENGTH, BATCHES = 2, 16, 2
IMAGE, PATCH, FRAMES, SAMPLES = 64, 16, 32, 4000
"""Side of an image and of its patches, if they are larger; frames of a spectrogram, samples of a sound wave."""

LIMITS: tuple[tuple[int, str], ...] = (
    # Layers, and how often they are of another kind.
    (2, r"(decoder_)?sparse_step|moe_layer_(freq|frequency|interval)|(expert|attn)_layer_period"),
    (1, r"(expert|attn)_layer_offset|first_k_dense_replace|moe_layer_start_index|.*nextn_predict_layers"),
    (1, r"num_kv_shared_layers|num_mem_blocks|num_hash_layers|max_window_layers"),
    (2, r".*(num|n)_(hidden_|encoder_|decoder_|block_)?layers?|.*(en|de)coder_layers|.*num_layers(_per_stack)?"),
    (2, r"depth|.*_depth|num_global_layers|.*num_blocks|num_self_attends_per_block|.*sinkhorn_iters"),
    # Heads and their widths.
    (KV_HEADS, r".*(num_(key_value|kv)_heads|num_query_groups|multi_query_group_num)|linear_num_key_heads"),
    (2 * HEADS, r"(mamba_|n_mamba_|linear_)(n_heads|num_heads|heads)|n_mamba_heads"),  # their layers expand by 2
    (HEADS, r".*(heads|n_head|num_head)"),
    (HEAD_DIM, r"(?!qk_head_dim).*(head_dim|head_size|d_head|headdim|dim_head)|d_kv|kv_channels|attention_key_size"),
    (8, r"rotary_dim|.*rope_dim|d_rel"),
    # Experts.
    (1, r"topk_group"),
    (2, r"n_group|num_expert_group|.*(experts_per_tok(en)?|topk|top_k|num_selected_experts|moe_k)"),
    (EXPERTS, r"(?!.*shared).*(num|n)_(local_|routed_)?experts|zero_expert_num"),
    (32, r".*(moe|expert|shared).*(intermediate_size|ffn_hidden_size|hidden_size|dim)"),
    # Feed-forward parts, vocabularies, ranks, states, windows.
    (INSIDE, r".*(intermediate_size(_mlp)?|ffn_(hidden_)?(dim|size)|feed_forward_size|mlp_dim|hidden_dim|n_inner|inner_dim)"),
    (INSIDE, r"d_ff|dim_ff|dff|.*_mlp_size|.*dim_feedforward"),
    (VOCABULARY, r"(?!type_).*vocab(ulary)?(_size)?(_per_layer_input)?|num_embeddings|.*codebook_size"),
    (32, r".*_rank|.*lowrank.*|.*low_rank_dim"),
    (16, r".*(state_size|d_state|ssm_state)|state_dim|num_landmarks|num_hash"),
    (8, r"sliding_window(_size)?|attention_chunk_size|.*local_radius|attention_window(_size)?|global_block_size|num_groups"),
    # Images and sounds.
    (FRAMES, r"max_source_positions|.*chunk_length|max_target_positions"),
    (IMAGE, r".*image_size|.*crop_size|input_size"),
    (PATCH, r"patch_size"),
    (4, r"mm_tokens_per_image"),
    # All other widths.
    (HIDDEN, r".*(hidden_size(_global|_per_layer_input)?|embd|d_model|dim_model|embedding_size|emb_size|bottleneck_size)"),
    (HIDDEN, r".*(_width|size_per_head)"),
    (HIDDEN, r".*(_dim|dim_out|d_latents|out_channels?|hidden_channels|classifier_proj_size|out_features|upsample_groups)"),
)
"""The largest that a whole number of a configuration may be, by the name of its field; the first that fits counts."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

TABLE: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {"16": 4}},
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 10},
    "chameleon": {"vocabulary_map": {"<image>": 10}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 32},
    "donut-swin": {"embed_dim": 16, "window_size": 2},
    "efficientnet": {"hidden_dim": 2560},
    "emu3": {"vocabulary_map": {"<image>": 10}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 128},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hgnet_v2": {"hidden_sizes": [256, 512, 1024, 2048]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "instructblip": {"image_token_index": 10},
    "instructblipvideo": {"video_token_index": 10},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 8},
    "nystromformer": {"segment_means_seq_len": 16, "num_landmarks": 4},
    "perceiver": {"d_latents": 64, "num_self_attends_per_block": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32]},
    "shieldgemma2": {"yes_token_index": 20, "no_token_index": 21},
    "swin": {"embed_dim": 16, "window_size": 2},
    "swinv2": {"embed_dim": 16},
    "textnet": {"stem_out_channels": 16},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
        "attention_head_dim": 32, "hybrid_layer_ids": [1, 3],
    },
}  # fmt: skip
"""By type of model: fields that are set after the limits, for what no name can tell."""

EQUAL = (
    ("encoder_num_key_value_heads", "encoder_num_attention_heads"),
    ("decoder_num_key_value_heads", "decoder_num_attention_heads"),
    ("num_key_value_heads", "num_attention_heads"),
    ("num_kv_heads", "num_attention_heads"),
    ("head_dim", "qk_head_dim"),
    ("swa_head_dim", "qk_head_dim"),
)
"""Fields that stay equal where they are: keys and values that come from one low rank have as many heads as the queries."""

WITHOUT = {"id2label", "label2id", "out_indices", "out_features", "stage_names", "transformers_version", "architectures"}
"""Fields that a configuration makes of the others, or that say nothing of its shape."""


# What a small model is


def shrink(config: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A configuration of the same kind, as plain data, with small sizes; its sub-configurations too.

    Args:
        config: as `to_dict` gives it.
        table: extra settings by type of model.
    """
    return _shrink(config, TABLE if table is None else table, {})


def _shrink(config: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]], token_ids: dict[str, int]) -> dict[str, Any]:
    layers = kept_layers(config)
    count = _count_of_layers(config)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in WITHOUT or (name == "num_layers" and "depths" in config):
            continue
        if value is None:
            value = UNSET.get(name)
        if name == "per_layer_config" and value:
            kept = layers or range(2)
            small[name] = {kept.index(int(at)): _shrink(own, table, token_ids) for at, own in value.items() if int(at) in kept}
        elif isinstance(value, Mapping):
            is_config = "model_type" in value
            small[name] = _shrink(value, table, token_ids) if is_config else _small_mapping(value)
            rope = small[name].get("rope_parameters")
            if name == "text_config" and "vision_config" in config and isinstance(rope, dict) and "rope_type" in rope:
                rope.setdefault("mrope_section", [2, 3, 3])  # else some take that of their full size
        elif isinstance(value, list | tuple):
            small[name] = _small_list(name, list(value), count, layers)
        elif isinstance(value, int | float) and not isinstance(value, bool) and re.fullmatch(r".*_token_(id|index)", name):
            small[name] = value if value < 0 else token_ids.setdefault(name, _next_token_id(name, token_ids))
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = len(layers) if layers and _is_count_of_layers(name, value) else small_number(name, value)
        else:
            small[name] = value
    for name, other in EQUAL:
        if name in small and config[name] is not None and config[name] == config.get(other):
            small[name] = small[other]
    parts = ("qk_nope_head_dim", "qk_rope_head_dim")
    if all(isinstance(config.get(part), int) for part in parts):
        for name in ("head_dim", "qk_head_dim"):
            if config.get(name) == sum(config[part] for part in parts):
                small[name] = sum(small[part] for part in parts)
    return small | dict(table.get(str(config.get("model_type")), {}))


def small_number(name: str, value: int) -> int:
    """A number no larger than the limit for its name; where there is none, as it is."""
    if name == "patch_size" and value == 14:
        return PATCH  # which divides the side of the images
    return min(value, next((limit for limit, pattern in LIMITS if re.fullmatch(pattern, name)), value))


def kept_layers(config: Mapping[str, Any]) -> list[int]:
    """Which layers to keep where lists say what each layer is: the first of each kind, and two at least; else none."""
    count = _count_of_layers(config)
    lists = [value for value in config.values() if isinstance(value, list | tuple) and len(value) == count > 2]
    kinds = [value for value in lists if len({str(one) for one in value}) < min(count, 8)]
    first = {value.index(one) for value in kinds for one in value}
    spare = (index for index in range(count) if index not in first)
    while lists and len(first) < 2:
        first.add(next(spare))
    return sorted(first)


def _count_of_layers(config: Mapping[str, Any]) -> int:
    """Of one stack; 0 where there are stages, each with a depth of its own."""
    if "depths" in config:
        return 0
    return next((value for name, value in config.items() if _is_count_of_layers(name, value)), 0)


def _is_count_of_layers(name: str, value: Any) -> bool:
    return name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth") and isinstance(value, int)


def _small_list(name: str, values: list[Any], count: int, layers: Sequence[int]) -> list[Any]:
    is_numbers = bool(values) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if re.fullmatch(r"(eos|bos|pad)_token_id", name):
        return [_SPECIAL[name]]
    if count > 2 and len(values) == count:
        kept = layers or range(2)
        per_layer = [values[index] for index in kept]
        return [small_number(name.removesuffix("_per_layer"), value) for value in per_layer] if is_numbers else per_layer
    if not is_numbers:
        return values
    if re.fullmatch(r"(?!stage).*(_indexes|_indices|_layers|_layer_ids|_feature_layer)", name):
        last = (len(layers) or 2) - 1
        return list(dict.fromkeys(min(value, last) for value in values))
    if name == "depths":
        return [min(value, 2) for value in values]
    if name == "mrope_section":
        return [2, 3, 3]
    if name == "image_grid_pinpoints":
        return [[IMAGE, IMAGE]]
    if re.fullmatch(r"(num_(attention_)?heads|num_groups)", name):
        return [max(1, value // values[0]) for value in values]
    if re.fullmatch(r"(hidden_sizes|embed_dims?|dims|encoder_hidden_sizes)", name):
        factor = max(1, values[0] // 16)
        return [max(16, value // factor // 8 * 8) for value in values]
    if re.fullmatch(r"(image_size|.*crop_size)", name):
        return [min(value, IMAGE) for value in values]
    return values


def _small_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the rotary embedding: what hangs on the width of a head."""
    return {
        name: _small_mapping(value) if isinstance(value, Mapping) else [2, 3, 3] if name == "mrope_section" and value else value
        for name, value in values.items()
    }


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}


def _next_token_id(name: str, taken: Mapping[str, int]) -> int:
    """A token of its own for each name, the same one in all sub-configurations."""
    return _SPECIAL.get(name) or (0 if name == "pad_token_id" else 10 + len(taken))


UNSET = {"pad_token_id": 0, "eos_token_id": 2, "head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}
"""What a field is set to that is None: classifiers find the last token by the first two."""


class NotBuiltError(Exception):
    """The model cannot be built small, or does not run on what it is fed."""


def build(class_name: str) -> Any:
    """A small random model of a class of transformers.

    Raises:
        NotBuiltError: says why there is none.
    """
    import torch
    import transformers

    try:
        model_class = getattr(transformers, class_name)
        default = model_class.config_class
        config = default.from_dict(shrink(default().to_dict()))
        if not getattr(config, "is_encoder_decoder", False) and hasattr(config, "is_decoder") and _is_causal(class_name):
            config.is_decoder = True  # of encoders such as BERT, which are no causal models otherwise
        torch.manual_seed(0)
        model = model_class(config).float().eval()
    except Exception as e:
        raise NotBuiltError(reason_of(e)) from e
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all():  # memory that nobody has initialised
                parameter.normal_(0, 0.02)
    return model


def _is_causal(class_name: str) -> bool:
    return class_name.endswith(KINDS["causal"])


# What it is fed


def feeds(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs that may fit the model, the fullest first: a batch of each way to give images, sounds and text."""
    import torch

    config = model.config
    takes = set(inspect.signature(model.forward).parameters)
    texts = [getattr(config, name, None) for name in ("text_config", "decoder")]
    vocabulary = min(VOCABULARY, _first_number([*texts, config], ("vocab_size",), VOCABULARY))
    first_word = vocabulary // 2  # above the special tokens

    def words(length: int = LENGTH) -> dict[str, Any]:
        ids = torch.randint(first_word, vocabulary, (ROWS, length))
        if type(model).__name__.endswith(KINDS["sequence"]) and vocabulary > _SPECIAL["eos_token_id"]:
            ids[:, -1] = _SPECIAL["eos_token_id"]  # where encoder-decoders classify
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    text = words() if "input_ids" in takes or model.main_input_name == "input_ids" else {}
    text = {name: value for name, value in text.items() if name in takes or name == "input_ids"}
    decoder = {}
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        decoder = {"decoder_input_ids": words()["input_ids"]}
    if "bbox" in takes:
        text["bbox"] = torch.zeros(ROWS, LENGTH, 4, dtype=torch.long)
    if "qformer_input_ids" in takes:
        text["qformer_input_ids"] = text["input_ids"]
    vision = getattr(config, "vision_config", None) or config
    if "pixel_values" in takes:
        for image in _images(config, vision, takes):
            for placed in _placed(config, text, "image"):
                types = {}
                if "mm_token_type_ids" in takes and _token(config, "image") is not None:
                    types = {"mm_token_type_ids": (placed["input_ids"] == _token(config, "image")).long()}
                yield {**placed, **types, **image, **decoder}
            if model.main_input_name == "pixel_values" or not text:
                yield {**image, **decoder}
                yield image
    for sound in _sounds(config, takes):
        for placed in _placed(config, text, "audio"):
            yield {**placed, **sound, **decoder}
        yield {**sound, **decoder}
    if text:
        yield {**text, **decoder}
        yield {"input_ids": text["input_ids"], **decoder}
    books = _first_number([config, getattr(config, "decoder", None)], ("num_codebooks",), 0)
    if books:  # of sounds as tokens
        ids = torch.randint(_first_number([config], ("vocab_size",), VOCABULARY) // 2, (ROWS * books, LENGTH))
        if decoder:
            yield {**text, "decoder_input_ids": ids}
        yield {"input_ids": ids}
        yield {"input_ids": ids.reshape(ROWS, books, LENGTH).mT.contiguous()}


def _images(config: Any, vision: Any, takes: set[str]) -> Iterator[dict[str, Any]]:
    import torch

    side = _first_number([vision, config], ("image_size", "img_size"), IMAGE)
    channels = _first_number([vision, config], ("num_channels", "in_channels", "in_chans"), 3)
    images = torch.randn(ROWS, channels, side, side)
    if "image_grid_thw" in takes:  # patches in a row, as the processors of Qwen-VL make them
        patch, times = _first_number([vision], ("patch_size",), PATCH), _first_number([vision], ("temporal_patch_size",), 1)
        height = 4 * _first_number([vision, config], ("spatial_merge_size", "merge_size"), 1) // 2
        patches = torch.randn(ROWS * height * height, channels * times * patch * patch)
        yield {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, height]] * ROWS)}
    if "image_sizes" in takes:
        sizes = torch.tensor([[side, side]] * ROWS)
        yield {"pixel_values": images, "image_sizes": sizes}
        yield {"pixel_values": torch.stack([images] * 2, 1), "image_sizes": sizes}
    if "spatial_shapes" in takes:  # patches of images of any shape
        patch = _first_number([vision], ("patch_size",), PATCH)
        patches = torch.randn(ROWS, 16, channels * patch * patch)
        masks = {"pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long)} if "pixel_attention_mask" in takes else {}
        yield {"pixel_values": patches, "spatial_shapes": torch.tensor([[4, 4]] * ROWS), **masks}
    if "aspect_ratio_ids" in takes:  # an image in tiles
        tiles = _first_number([vision], ("max_num_tiles",), 4)
        ratios = {"aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long)}
        ratios["aspect_ratio_mask"] = torch.ones(ROWS, 1, tiles, dtype=torch.long)
        yield {"pixel_values": torch.stack([images] * tiles, 1)[:, None], **ratios}
    yield {"pixel_values": images}
    yield {"pixel_values": images[:, None]}


def _sounds(config: Any, takes: set[str]) -> Iterator[dict[str, Any]]:
    import torch

    audio = next((one for name in ("audio_config", "encoder_config") if (one := getattr(config, name, None))), config)
    if "input_features" in takes:
        bins = _first_number([audio, config], ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim"), 80)
        frames = 2 * _first_number([audio, config], ("max_source_positions",), FRAMES)
        features = torch.randn(ROWS, bins, frames)
        mask = {"attention_mask": torch.ones(ROWS, frames, dtype=torch.long)}
        masks = {
            name: torch.ones(ROWS, frames, dtype=torch.long)
            for name in takes
            if re.fullmatch(r"(input_)?features?_(attention_)?mask", name)
        }
        yield {"input_features": features, **masks}
        yield {"input_features": features.mT.contiguous(), **masks}
        yield {"input_features": features.mT.contiguous(), **mask}
    if "input_values" in takes:
        yield {"input_values": torch.randn(ROWS, SAMPLES)}
        yield {"input_values": torch.randn(ROWS, 1, SAMPLES)}


def _token(config: Any, what: str) -> int | None:
    """What stands in a text for a feature of an image or a sound."""
    names = (f"{what}_token_id", f"{what}_token_index", f"{what}_patch_id")
    return next((one for name in names if isinstance(one := getattr(config, name, None), int)), None)


def _placed(config: Any, text: Mapping[str, Any], what: str) -> Iterator[dict[str, Any]]:
    """The text with as many places for the image's features as there may be: the model takes the one that is right."""
    token = _token(config, what)
    if not text:
        return
    yield dict(text)
    if token is None:
        return
    import torch

    for count in (1, 2, 4, 5, 8, 9, 16, 17, 25, 32, 34, 50, 64, 65, 256):
        ids = torch.cat([torch.full((ROWS, count), token), text["input_ids"]], 1)
        yield {**text, "input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if "attention_mask" in text else {})}


def _first_number(configs: Sequence[Any], names: Sequence[str], default: int) -> int:
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int):
                return value
    return default


def fitting(model: Any) -> list[dict[str, Any]]:
    """Calibration batches that the model itself runs on.

    Raises:
        NotBuiltError: there are none among those that this script makes; says why the last was none.
    """
    from statprune.model.undisturbed import undisturbed

    error: Exception | None = None
    for batch in feeds(model):
        try:
            with undisturbed(model):  # without a cache, as it is pruned
                model(**batch)
        except Exception as e:
            error = error or e
            continue
        return [batch, *(_like(batch, index) for index in range(1, BATCHES))]
    said = reason_of(error) if error is not None else f"takes {model.main_input_name}, which this script does not make"
    raise NotBuiltError(f"its own forward pass: {said}")


def _like(batch: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Another batch of the same shapes: other images and sounds, and the words in another order."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    other = {}
    for name, value in batch.items():
        if value.is_floating_point():
            other[name] = torch.randn(value.shape, generator=generator)
        elif name.endswith("input_ids"):
            is_word = value >= VOCABULARY // 2
            order = torch.randperm(int(is_word.sum()), generator=generator)
            other[name] = value.masked_scatter(is_word, value[is_word][order])
        else:
            other[name] = value
    return other


# What comes out


def try_class(class_name: str, pattern: str, say: Callable[[str], None] = lambda _: None) -> Record:
    """Build, prune and check one class: its record."""
    began = time.perf_counter()
    record: Record = {"class": class_name, "model_type": None, "outcome": "not built", "reason": None}
    try:
        say("built")
        model = build(class_name)
        record["model_type"] = model.config.model_type
        say("run")
        batches = fitting(model)
        record["inputs"] = {name: list(value.shape) for name, value in batches[0].items()}
        say("pruned")
        record |= prune_and_check(model, batches, pattern)
    except NotBuiltError as e:
        record["reason"] = str(e)
    except Exception as e:
        record |= {"outcome": "not pruned", "reason": reason_of(e)}
    return {**record, "seconds": round(time.perf_counter() - began, 1)}


def prune_and_check(model: Any, batches: Sequence[Mapping[str, Any]], pattern: str) -> Record:
    """Prune a model with the default recipe, widths that the pattern does not divide left dense: what a record says of it."""
    import statprune

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recipe = statprune.Recipe(pattern=pattern, on_indivisible="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = statprune.prune(model, batches, recipe)
    wrong = violations(model, before, report, pattern)
    how = outcome_of(report.schedule, report.fallback_reason)
    return {
        "outcome": "wrong" if wrong else how,
        "reason": f"{how}: {'; '.join(wrong)}" if wrong else report.fallback_reason,
        "sites": len(report.sites),
        "left_out": count_reasons(one.reason for one in report.left_out),
    }


def outcome_of(schedule: str, fallback_reason: str | None) -> str:
    """How a model was pruned, from its report."""
    if fallback_reason is None:
        return "graph"
    return "blocks" if schedule.startswith("block") else "one-shot"


def violations(model: Any, before: Mapping[str, Any], report: Any, pattern: str) -> list[str]:
    """What a report promises and the model does not keep: zeros, weights that are as they were, reasons."""
    import torch

    found = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pruned: set[int] = set()
    for site in report.sites:
        parameter = parameters[site.parameter]
        pruned.add(id(parameter))
        rows = parameter.detach().mT if site.stored == "in_out" else parameter.detach()
        if not has_asked_zeros(rows, pattern):
            found.append(f"{site.name} has other zeros than {pattern}")
        if not rows.isfinite().all():
            found.append(f"{site.name} is not finite")
    named = {one.name for one in report.left_out if one.reason}
    for name, parameter in model.named_parameters():
        aliases = {alias for alias, other in parameters.items() if other is parameter}
        if id(parameter) in pruned:
            continue
        if not torch.equal(parameter.detach(), before[name]):
            found.append(f"{name} was changed and is not named as pruned")
        if parameter.ndim >= 2 and not {one for alias in aliases for one in (alias, alias.removesuffix(".weight"))} & named:
            found.append(f"{name} is neither pruned nor named")
    return found


def has_asked_zeros(rows: Any, pattern: str) -> bool:
    """Whether a weight [..., out, in] has the zeros of a pattern, `N:M` or `P%` of each row; what is kept may be zero too."""
    if pattern.endswith("%"):
        width = rows.shape[-1]
        return bool(((rows == 0).sum(-1) >= int(width * float(pattern[:-1]) / 100)).all())
    keep, of = map(int, pattern.split(":"))
    return bool((rows.unflatten(-1, (-1, of)).count_nonzero(-1) <= keep).all())


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often weights are left out for the same reason, whatever names it has in it; the most frequent first."""
    general = (re.sub(r"tied to .*", "tied", reason) for reason in reasons)
    return dict(collections.Counter(general).most_common())


def reason_of(error: BaseException) -> str:
    """The class of an error and its first line, or the second where the first only announces it; 300 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {line}".removesuffix(": ")[:300]


# One process for each


def classes(kinds: Iterable[str], only: str | None = None) -> list[str]:
    """The classes of transformers of these kinds whose names match."""
    import transformers

    ends = tuple(end for kind in kinds for end in KINDS[kind])
    names = [name for name in dir(transformers) if name.endswith(ends) and not name.startswith("AutoModel")]
    return [name for name in sorted(names) if only is None or re.search(only, name)]


def kind_of(class_name: str) -> str:
    """`causal`, `conditional`, `image` or `sequence`."""
    return next(kind for kind, ends in KINDS.items() if class_name.endswith(ends))


def _child(class_name: str, pattern: str, memory: int, pipe: Any) -> None:
    """What the process of one class does: say what comes next, and give its record at the end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    pipe.send(try_class(class_name, pattern, pipe.send))


class _Running:
    """The process of one class."""

    def __init__(self, class_name: str, pattern: str, memory: int, seconds: float) -> None:
        self.class_name, self.step, self.record = class_name, "built", None
        self.began = time.monotonic()
        self.limit = seconds
        # A fork: what has been imported already takes no time, and what a model leaves behind ends with the process.
        fork: Any = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe(duplex=False)
        self.process = fork.Process(target=_child, args=(class_name, pattern, memory, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def read(self) -> Record | None:
        """The record, where it is finished, has died or is out of time; None while it runs."""
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                said = self.pipe.recv()
                if isinstance(said, dict):
                    return self._end(said)
                self.step = said
            if time.monotonic() - self.began > self.limit:
                self.process.kill()
                return self._end(failed(self.class_name, self.step, f"took more than {self.limit:g} s"))
            return None
        self.process.join()
        return self._end(failed(self.class_name, self.step, f"its process ended with status {self.process.exitcode}"))

    def _end(self, record: Record) -> Record:
        self.process.join()
        self.pipe.close()
        return {"seconds": round(time.monotonic() - self.began, 1), **record}


def failed(class_name: str, step: str, why: str) -> Record:
    """The record of a class whose process gave none."""
    outcome = "not pruned" if step == "pruned" else "not built"
    return {"class": class_name, "model_type": None, "outcome": outcome, "reason": f"{why} while it was {step}"}


def try_all(names: Sequence[str], pattern: str, *, jobs: int, seconds: float, memory: int) -> Iterator[Record]:
    """Each class's record, as they come."""
    waiting, running = list(names), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Running(waiting.pop(0), pattern, memory, seconds))
            multiprocessing.connection.wait([one.pipe for one in running], timeout=1)
            for one in list(running):
                if (record := one.read()) is not None:
                    running.remove(one)
                    yield record
    finally:
        for one in running:
            one.process.kill()


# Records and tables


def table(records: Sequence[Record], there_are: Mapping[str, int] | None = None) -> str:
    """Markdown: how many of each kind came out how; then all that have no graph, and why."""
    rows = ["| kind | " + " | ".join(OUTCOMES) + " | tried | there are |"]
    rows.append("|---" + "|---:" * (len(OUTCOMES) + 2) + "|")
    for kind in KINDS:
        own = [record for record in records if kind_of(record["class"]) == kind]
        if own:
            counts = collections.Counter(record["outcome"] for record in own)
            numbers = [*(counts[one] for one in OUTCOMES), len(own), (there_are or {}).get(kind, len(own))]
            rows.append(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")
    fed = [record for record in records if kind_of(record["class"]) == "conditional" and record.get("inputs")]
    blind = [record for record in fed if all(name.endswith(("input_ids", "mask")) for name in record["inputs"])]
    if fed:
        rows += ["", f"Of the {len(fed)} conditional ones that ran, {len(blind)} were fed with text alone."]
    reasons: collections.Counter[str] = collections.Counter()
    models: collections.Counter[str] = collections.Counter()
    for record in records:
        reasons.update(record.get("left_out") or {})
        models.update((record.get("left_out") or {}).keys())
    rows += ["", "## Weights that stay dense", "", "| reason | weights | models |", "|---|---:|---:|"]
    rows += [f"| {_cell(reason)} | {count} | {models[reason]} |" for reason, count in reasons.most_common(30)]
    rows += ["", "## What has no graph", "", "| class | outcome | reason |", "|---|---|---|"]
    rows += [
        f"| {record['class']} | {record['outcome']} | {_cell(record['reason'] or '')} |"
        for record in sorted(records, key=lambda record: (list(KINDS).index(kind_of(record["class"])), record["class"]))
        if record["outcome"] != "graph"
    ]
    return "\n".join(rows) + "\n"


def _cell(text: str, longest: int = 180) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def read_records(folder: Path) -> list[Record]:
    """What has been tried already."""
    file = folder / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def write_records(folder: Path, records: Sequence[Record], command: str) -> None:
    """Write `results.json`, a line for each, and the tables."""
    import torch
    import transformers

    ordered = sorted(records, key=lambda record: str(record["class"]))
    lines = ",\n".join(json.dumps(record) for record in ordered)
    _replace(folder / "results.json", f"[\n{lines}\n]\n")
    head = (
        "# Architectures\n\n"
        "Which architectures of transformers can be pruned: each is built small and random, and pruned with the default\n"
        "recipe. What the outcomes mean is said in [the script](../architectures.py). No quality is measured here.\n\n"
        f"```\n{command}\n```\n\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, {datetime.now(UTC):%Y-%m-%d}. "
        "Records: [results.json](results.json).\n\n"
    )
    _replace(folder / "README.md", head + table(ordered, {kind: len(classes([kind])) for kind in KINDS}))


def _replace(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def preload() -> None:
    """Import what each process needs, and export once, so that each fork has it already."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import statprune

    torch.set_num_threads(1)  # threads would not live in a fork
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 16}
    statprune.prune(LlamaForCausalLM(LlamaConfig(**sizes)), [{"input_ids": torch.randint(16, (2, 4))}])


def main() -> None:
    """The command; `--help` tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for results.json and README.md")
    parser.add_argument("--kind", choices=KINDS, action="append", help="which classes; may be given several times (all)")
    parser.add_argument("--only", metavar="REGEX", help="classes whose names match")
    parser.add_argument("--pattern", default="2:4", help="as for `statprune prune` (2:4)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (1)")
    parser.add_argument("--seconds", type=float, default=60, help="that one class may take (60)")
    parser.add_argument("--memory", type=float, default=4, metavar="GB", help="that one class may take (4)")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    given.output.mkdir(parents=True, exist_ok=True)
    records = read_records(given.output)
    finished = {record["class"] for record in records}
    names = [name for name in classes(given.kind or KINDS, given.only) if name not in finished]
    print(f"{len(names)} classes to try, {len(finished)} have a record already", flush=True)
    preload()
    command = f"python configs/architectures.py --output {given.output} --jobs {given.jobs}"
    limits = {"seconds": given.seconds, "memory": int(given.memory * 1e9)}
    for number, record in enumerate(try_all(names, given.pattern, jobs=given.jobs, **limits), 1):
        records.append(record)
        write_records(given.output, records, command)
        said = f"{number}/{len(names)} {record['class']}: {record['outcome']}, {record['seconds']} s"
        print(said + (f"; {record['reason']}" if record["reason"] else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
