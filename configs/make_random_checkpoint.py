"""Write a random LLaMA of any size, tensor by tensor: a checkpoint larger than memory, to try things on.

    python configs/make_random_checkpoint.py random-7b
    python configs/make_random_checkpoint.py random-70b --shape llama-2-70b --layers 2
    python configs/make_random_checkpoint.py small --shape tiny --dtype float32

Weights are normal with a standard deviation of 0.02, those whose results are added to the residual stream (`o_proj`,
`down_proj`) of 0.02 / sqrt(2 * layers), as GPT-2 was begun; norms are ones. Such a model predicts nothing, and no perplexity
of it means anything; time and memory are those of a trained one. There is no tokenizer: calibrate on the random tokens that
are written beside the folder, 128 windows of 2048 (fewer where the context is shorter):

    statprune prune random-7b --output pruned --stream --calibration random-7b-tokens.safetensors:tokens --seqlen 128

Every number is drawn, 16 MiB at a time into one buffer, about 300 million in a second on one core: nothing else is held in
memory, whatever the size. A tensor's values follow from the seed, its name and its shape, whatever the size of the shards.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

STD = 0.02
CHUNK = 1 << 22
"""Numbers that are drawn at a time."""

WINDOWS, LENGTH = 128, 2048
"""Of random tokens."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""torch's names and those of safetensors."""


@dataclass(frozen=True)
class Shape:
    """Of a LLaMA; the defaults are LLaMA-2-7B."""

    hidden: int = 4096
    """Width of the residual stream."""

    intermediate: int = 11008
    """Width inside the feed-forward part."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    """Heads of keys and values; fewer than `heads` is grouped-query attention."""

    vocabulary: int = 32000
    context: int = 4096
    """Tokens that a sequence may have."""


SHAPES = {
    "llama-2-7b": Shape(),
    "llama-2-13b": Shape(hidden=5120, intermediate=13824, layers=40, heads=40, kv_heads=40),
    "llama-2-70b": Shape(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8),
    "tiny": Shape(hidden=64, intermediate=160, layers=2, heads=4, kv_heads=2, vocabulary=256, context=128),
}


def write_checkpoint(
    folder: Path, shape: Shape, *, dtype: str = "bfloat16", shard_bytes: int = 5 * 10**9, seed: int = 0
) -> int:
    """Write config.json, the shards and their index; and tokens beside the folder (`tokens_of`).

    Args:
        folder: one that does not exist yet.
        shape: of the model.
        dtype: of the weights: bfloat16, float16 or float32.
        shard_bytes: of tensors in a file at most; a larger tensor has a file of its own.
        seed: of the weights.

    Returns:
        The bytes of the weights.

    Raises:
        ValueError: a shape that is no LLaMA, an unknown dtype, no bytes in a shard.
        FileExistsError: there is something of that name, or of the token file's.
    """
    _check(shape, dtype, shard_bytes)
    if tokens_of(folder).exists():
        raise FileExistsError(f"{tokens_of(folder)} exists already")
    folder.mkdir(parents=True)
    itemsize = getattr(torch, dtype).itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, sizes in _tensors(shape):
        size = math.prod(sizes) * itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = sizes
        room -= size
    buffer = torch.empty(CHUNK)
    placed: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        placed |= dict.fromkeys(tensors, file)
        with (folder / file).open("wb") as opened:
            _write_header(opened, tensors, dtype)
            for name, sizes in tensors.items():
                for values in _values(name, math.prod(sizes), shape, seed, buffer):
                    opened.write(values.to(getattr(torch, dtype)).view(torch.uint8).numpy())
    total = sum(math.prod(sizes) for _, sizes in _tensors(shape)) * itemsize
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})
    tokens = torch.randint(
        shape.vocabulary,
        (WINDOWS, min(LENGTH, shape.context)),
        dtype=torch.int32,
        generator=torch.Generator().manual_seed(seed),
    )
    save_file({"tokens": tokens}, tokens_of(folder))
    _write_json(folder / "config.json", _config(shape, dtype))  # last: without it nobody takes a torn folder for a model
    return total


def tokens_of(folder: Path) -> Path:
    """The file of random tokens, int32 [windows, length] under the key `tokens`: not in the folder, where all are weights."""
    return folder.with_name(f"{folder.name}-tokens.safetensors")


def _check(shape: Shape, dtype: str, shard_bytes: int) -> None:
    wrong = [f"{field.name} {getattr(shape, field.name)}" for field in fields(shape) if getattr(shape, field.name) < 1]
    if wrong:
        raise ValueError(f"a model with {', '.join(wrong)}: expected at least 1.")
    if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise ValueError(
            f"hidden {shape.hidden}, heads {shape.heads}, kv-heads {shape.kv_heads}: expected heads of an even width "
            "(hidden a multiple of 2 * heads), and as many of them for each head of keys and values."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    if shard_bytes < 1:
        raise ValueError(f"shards of {shard_bytes} bytes: expected more.")


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes, as transformers saves them."""
    hidden, inside = shape.hidden, shape.intermediate
    keys = hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        yield f"{block}input_layernorm.weight", (hidden,)
        for part, rows in {"q": hidden, "k": keys, "v": keys, "o": hidden}.items():
            yield f"{block}self_attn.{part}_proj.weight", (rows, hidden)
        yield f"{block}post_attention_layernorm.weight", (hidden,)
        yield f"{block}mlp.gate_proj.weight", (inside, hidden)
        yield f"{block}mlp.up_proj.weight", (inside, hidden)
        yield f"{block}mlp.down_proj.weight", (hidden, inside)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def _values(name: str, numel: int, shape: Shape, seed: int, buffer: Tensor) -> Iterator[Tensor]:
    """A tensor's float32 values, flat, in pieces that lie in the buffer until the next one."""
    is_norm = name.endswith("norm.weight")
    std = STD / math.sqrt(2 * shape.layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else STD
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    for start in range(0, numel, CHUNK):
        piece = buffer[: min(CHUNK, numel - start)]
        yield piece.fill_(1) if is_norm else piece.normal_(0, std, generator=generator)


def _write_header(opened: BinaryIO, tensors: dict[str, tuple[int, ...]], dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in tensors.items():
        begin, end = end, end + math.prod(sizes) * getattr(torch, dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": sizes, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that values begin at a multiple of 8
    opened.write(len(text).to_bytes(8, "little") + text)


def _config(shape: Shape, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
    }


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _bytes(text: str) -> int:
    """`5GB`, `300MB`, `1GiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, flags=re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected one like 5GB, 300MB or 1GiB.")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def main() -> None:
    """The command; `--help` tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="what the numbers below default to (llama-2-7b)")
    helps = {
        "hidden": "width of the residual stream",
        "intermediate": "width inside the feed-forward part",
        "layers": "blocks",
        "heads": "attention heads",
        "kv_heads": "heads of keys and values; fewer than --heads is grouped-query attention",
        "vocabulary": "tokens there are",
        "context": "tokens that a sequence may have",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{text} ({getattr(Shape(), name)})")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (bfloat16)")
    parser.add_argument("--shard-size", type=_bytes, default="5GB", help="largest file, such as 300MB or 1GiB (5GB)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    given = parser.parse_args()
    shape = replace(SHAPES[given.shape], **{name: value for name in helps if (value := getattr(given, name)) is not None})
    try:
        total = write_checkpoint(given.folder, shape, dtype=given.dtype, shard_bytes=given.shard_size, seed=given.seed)
    except (ValueError, OSError) as e:
        sys.exit(f"make_random_checkpoint {given.folder}: {e}")
    print(f"{given.folder}: {total / 1e9:.2f} GB of weights, {given.dtype}, {shape}")
    print(f"calibrate it with --calibration {tokens_of(given.folder)}:tokens")


if __name__ == "__main__":
    main()
