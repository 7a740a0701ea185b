"""The model card: `README.md` of an output, with the metadata that the hub reads; made from the record alone.

It cannot quote the digest of the record, which covers the card; it says how to get and compare it.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from statprune.grammar import write_pattern
from statprune.markdown import escape, table
from statprune.model.kinds import is_causal, is_transformers_model

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Of the metadata of the model's own card, what holds for the sparse one as well."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SNAPSHOT = re.compile(r"models--(.+)--(.+)/snapshots/[0-9a-f]+/?$")


def base_of(model: nn.Module, source: str | Path | None, folder: Path | None) -> dict[str, Any]:
    """What the card says of the model that was pruned, as plain data for the record.

    Args:
        model: the one that is saved.
        source: folder or hub name that it came from.
        folder: the same as a folder, if there is one; its card is read.
    """
    metadata = _metadata(folder / "README.md") if folder is not None else {}
    kept = {key: metadata[key] for key in KEPT if isinstance(metadata.get(key), str | list)}
    name = hub_name(source)
    if is_causal(model):
        kept.setdefault("pipeline_tag", "text-generation")
    return {
        **({"name": name} if name else {}),
        "class": type(model).__name__,
        "library": "transformers" if is_transformers_model(model) else "pytorch",
        **kept,
    }


def hub_name(source: str | Path | None) -> str | None:
    """The name on the hub of what a model came from; None for a folder of one's own."""
    if source is None:
        return None
    if snapshot := _SNAPSHOT.search(str(source)):
        return f"{snapshot[1]}/{snapshot[2]}"
    return str(source) if _HUB_NAME.fullmatch(str(source)) and not Path(source).exists() else None


def render(record: dict[str, Any]) -> str:
    """The card of a record, Markdown."""
    from huggingface_hub import ModelCardData

    base, recipe, name = record["base"], record["recipe"], _name(record)
    data = ModelCardData(
        base_model=base.get("name"),
        # The hub knows adapter, merge, quantized and finetune: of these, dense weights in the same layout.
        base_model_relation="finetune" if "name" in base else None,
        library_name=base["library"],
        pipeline_tag=base.get("pipeline_tag"),
        tags=["pruned", "sparse", "statprune"],
        **{key: base[key] for key in KEPT if key in base and key != "pipeline_tag"},
    )
    facts = [
        ("pattern", write_pattern(recipe["pattern"])),
        ("method", _method(recipe)),
        ("schedule", str(record["schedule"])),
        ("allocation", _words(recipe.get("allocation"))),
        ("target", _words(recipe.get("target", "pruned"))),
        ("pruned weights", f"{len(record['sites'])} of {base['class']}, {100 * record['sparsity']:.2f} % zeros"),
        ("left dense", f"{len(record['left_out'])} weights, with the reason for each in `pruning.json`"),
        ("energy", f"{100 * record['energy_ratio']:.1f} % of the dense weights' sum of squares"),
        ("calibration", _calibration(record)),
    ]
    if steps := record.get("finetuning_steps"):
        facts.append(("fine-tuning", f"{steps:,} optimizer steps with the zeros held"))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, sparse",
        f"{f'[{name}](https://huggingface.co/{name})' if 'name' in base else 'A model'} with weights set to zero by "
        "statprune. The files are dense safetensors with exact zeros: they load like the dense model's, and are as large.",
        table(["", ""], facts, num_left=2),
        *_perplexity(record.get("perplexity")),
        "## Reproduce",
        "The recipe, `recipe.yaml`:",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False).strip()}\n```",
        f"```\n{_command(record)}\n```",
        f"Done with {', '.join(f'{name} {version}' for name, version in record['versions'].items())}. The whole protocol, and "
        "what was done to each weight, is in `pruning.json`.",
        "## Verify",
        "```\nstatprune verify FOLDER\n```",
        "This recomputes the zeros, pattern and energy of each weight from the files, and the SHA-256 digest of every file, "
        "this one included. It prints the digest of the record; where its author has published that, "
        "`statprune verify FOLDER --digest SHA256` tells whether this is the same record.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a model's card; nothing where there is none that can be read."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path) if path.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(record: dict[str, Any]) -> str:
    source = record["protocol"].get("model")
    return str(record["base"].get("name") or (Path(source).name if isinstance(source, str) else record["base"]["class"]))


def _words(part: Any) -> str:
    """A part of a recipe as text: its name, and its settings."""
    if not isinstance(part, dict):
        return str(part)
    settings = ", ".join(f"{key} {value}" for key, value in part.items() if key != "name")
    return f"{part.get('name')} ({settings})" if settings else str(part.get("name"))


def _method(recipe: dict[str, Any]) -> str:
    compensations = recipe.get("compensation") or []
    steps = [recipe.get("criterion"), *(compensations if isinstance(compensations, list) else [compensations])]
    return ", then ".join(_words(step) for step in steps if step is not None)


def _calibration(record: dict[str, Any]) -> str:
    protocol = record["protocol"]
    known = [f"{record['num_tokens']:,} tokens"]
    if isinstance(protocol.get("calibration"), list):
        known.append(f"of {', '.join(_last(text) for text in protocol['calibration'])}")
    if "samples" in protocol:
        known.append(f"({protocol['samples']} windows of {protocol.get('seqlen')}, seed {protocol.get('seed')})")
    return " ".join(known)


def _perplexity(evaluation: dict[str, Any] | None) -> list[str]:
    if not evaluation:
        return []
    shown = {"dense": "dense", "pruned": "pruned", "wanda": "Wanda's mask alone"}
    rows = [(shown[name], f"{evaluation[name]:.4f}") for name in shown if isinstance(evaluation.get(name), float)]
    texts = evaluation.get("text") or []
    text = ", ".join(_last(one) for one in ([texts] if isinstance(texts, str) else texts))
    told = [f"on {text}" if text else "", f"windows of {evaluation['seqlen']} tokens" if "seqlen" in evaluation else ""]
    note = f"Measured {', in '.join(one for one in told if one)}." if any(told) else ""
    return ["## Perplexity", table(["", "perplexity"], rows), *([note] if note else [])] if rows else []


def _command(record: dict[str, Any]) -> str:
    protocol = record["protocol"]
    if not isinstance(protocol.get("calibration"), list):
        return "statprune.prune(model, batches, statprune.Recipe.from_yaml('recipe.yaml'))"
    words = ["statprune prune", record["base"].get("name") or "MODEL", "--output sparse --recipe recipe.yaml --calibration"]
    words += [_last(text) for text in protocol["calibration"]]
    words += [f"--{key.replace('_', '-')} {protocol[key]}" for key in ("samples", "seqlen", "seed", "batch_size", "dtype")
              if protocol.get(key) is not None]  # fmt: skip
    return " ".join(words)


def _last(path: str) -> str:
    """A file's name without its folder, which is of somebody's machine; other texts as they are."""
    return escape(Path(path).name if Path(path).is_absolute() else path)
