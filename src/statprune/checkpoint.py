"""A model on disk: load it safely, save it sparse with a record of what was done, and verify the record later.

What is saved is what every runtime reads: dense safetensors with exact zeros, no `quantization_config`, no
`sparsity_config`. What we know beyond that goes into a side file:

    OUTPUT/model.safetensors    the weights, zeros included
    OUTPUT/config.json ...      whatever save_pretrained and the tokenizer write
    OUTPUT/pruning.json         the recipe, the versions, and for each weight what can be recomputed from the file
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from statprune.errors import CheckpointError, ModelError
from statprune.grammar import split
from statprune.methods.patterns import SITE_PATTERNS
from statprune.methods.pruner import energy_sq
from statprune.recipe import Recipe
from statprune.report import PruningReport

RECORD = "pruning.json"
FORMAT = 1
ENERGY_TOLERANCE = 1e-6
"""Relative. Energies are float64 sums; another device or number of threads adds them in another order."""


def load_config(path: str) -> Any:
    """A model's configuration.

    Raises:
        ModelError: the folder is no model.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{path} is not a model folder: expected config.json and *.safetensors in it, as save_pretrained writes them."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"No model at {path!r}, neither a folder nor a name on the hub: {_first_line(e)}") from e
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{path} is quantized: prune the model that it was made from, and quantize afterwards.")
    return config


def model_class(config: Any) -> Any:
    """The transformers class that the configuration names, or the one for causal language models where it names none."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def load_model(path: str, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
    """A transformers model from a folder or the hub: safetensors only, and no code that came with it.

    Raises:
        ModelError: not a model, quantized, or only pickled weights.
    """
    config = load_config(path)
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        raise ModelError(
            f"{path} has no *.safetensors"
            + (f", only {', '.join(pickled)}: a pickle can run code when it is read. Convert it with save_pretrained "
               "on a machine where you trust it." if pickled else ": a configuration without weights.")
        )  # fmt: skip
    try:
        model = model_class(config).from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError, RuntimeError) as e:
        raise ModelError(f"The weights in {path} cannot be loaded: {_first_line(e)}") from e
    return model.to(device).eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"No tokenizer in {path}: {_first_line(e)}") from e


def fingerprint(path: str, config: Any) -> str:
    """What tells one version of a model from another: its commit on the hub, or a digest of the folder's weight files."""
    if not Path(path).is_dir():
        return str(getattr(config, "_commit_hash", None))
    digests = json.dumps(_digests(Path(path)), sort_keys=True)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def refuse_existing(output: str | Path) -> None:
    """Raise CheckpointError where something stands in the place of the output already."""
    if Path(output).exists():
        raise CheckpointError(f"The output {output} exists. Choose another name, or remove it first; nothing is overwritten.")


def save(
    model: nn.Module,
    report: PruningReport,
    output: str | Path,
    *,
    tokenizer: Any = None,
    protocol: dict[str, Any] | None = None,
) -> Path:
    """Write a pruned transformers model, verify what was written, and only then give it its name.

    Everything is written into a hidden folder beside the output, so that an interrupted save leaves nothing that looks
    finished.

    Args:
        model: a `PreTrainedModel`.
        report: what `prune` returned for it.
        output: a folder that does not exist yet.
        tokenizer: saved beside it.
        protocol: what the calibration was (source, samples, seqlen, seed ...), for the record.

    Raises:
        CheckpointError: the output exists, or what was written does not keep a promise.
    """
    output = Path(output)
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        model.save_pretrained(partial)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        record = {"format": FORMAT, **report.to_dict(), "protocol": protocol or {}, "files": _digests(partial)}
        places = _places(partial)
        for site in record["sites"]:
            site["file"], site["tensor"] = _find(site["parameter"], model.get_parameter(site["parameter"]), places, partial)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        verify(partial)
        refuse_existing(output)
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def verify(folder: str | Path, progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
    """Recompute every promise of a folder's `pruning.json` from the files on disk, and return the record.

    Recomputed for each weight: it exists, its shape, number of zeros, energy, and that the pattern holds (at most N
    non-zeros in each M, or at least the promised zeros in each ranking group; where an allocation gave the weight a pattern
    of its own, that one); then the total sparsity, the energy ratio and the digest of each file. No model is built.

    Args:
        folder: what `save` wrote.
        progress: called with (weights done, weights in all, name).

    Raises:
        CheckpointError: the first promise that is broken.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{folder} has no readable {RECORD}: {e}. Only folders that statprune wrote can be verified."
        ) from e
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{folder / RECORD} is not of format {FORMAT}, the only one this version of statprune knows.")
    try:
        usual_pattern = Recipe(pattern=record["recipe"]["pattern"]).build_pattern()
        zeros, weights, energies = 0, 0, [0.0, 0.0]
        for index, site in enumerate(record["sites"]):
            weight = _read(folder, site)
            if list(weight.shape) != list(site["shape"]):
                raise _broken(folder, site["name"], "shape [out, in]", site["shape"], list(weight.shape))
            num_zeros = int((weight == 0).sum())
            if num_zeros != site["num_zeros"] or num_zeros < site["num_pruned"]:
                raise _broken(folder, site["name"], "number of zeros", site["num_zeros"], num_zeros)
            name, settings = split(site.get("pattern") or {"name": None})
            pattern = SITE_PATTERNS[name](**settings) if name else usual_pattern
            if not pattern.holds(weight):
                raise _broken(folder, site["name"], "pattern", str(pattern), "a group with too few zeros")
            if not _close(num_zeros / weight.numel(), site.get("sparsity", num_zeros / weight.numel())):
                raise _broken(folder, site["name"], "sparsity", site["sparsity"], num_zeros / weight.numel())
            if not _close(energy_sq(weight), site["energy_after"]):
                raise _broken(folder, site["name"], "energy", site["energy_after"], energy_sq(weight))
            zeros, weights = zeros + num_zeros, weights + weight.numel()
            energies = [energies[0] + site["energy_before"], energies[1] + energy_sq(weight)]
            if progress is not None:
                progress(index + 1, len(record["sites"]), site["name"])
        for name, promised, found in (
            ("sparsity", record["sparsity"], zeros / max(1, weights)),
            ("energy ratio", record["energy_ratio"], energies[1] / max(1e-300, energies[0])),
        ):
            if not _close(found, promised):
                raise _broken(folder, "all weights together", name, promised, found)
        for file, digest in record["files"].items():
            if (found_digest := _digest(folder / file)) != digest:
                raise _broken(folder, file, "SHA-256", digest, found_digest)
    except (KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{folder / RECORD} is damaged: {type(e).__name__}: {e}.") from e
    return record


def _broken(folder: Path, name: str, what: str, promised: object, found: object) -> CheckpointError:
    return CheckpointError(f"{folder}: {name}: {what} promised {promised}, found {found}.")


def _close(found: float, promised: float) -> bool:
    return math.isclose(found, promised, rel_tol=ENERGY_TOLERANCE)


def _read(folder: Path, site: dict[str, Any]) -> Tensor:
    """A site's weight as [out, in]."""
    try:
        with safe_open(folder / site["file"], framework="pt") as file:
            stored: Tensor = file.get_tensor(site["tensor"])
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{folder}: {site['name']}: promised in {site['file']} as {site['tensor']}, but: {e}.") from e
    return stored.t() if site["stored"] == "in_out" else stored


def _places(folder: Path) -> dict[str, str]:
    """In which file each tensor is."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path.name))
    return places


def _find(parameter: str, weight: Tensor, places: dict[str, str], folder: Path) -> tuple[str, str]:
    """(file, tensor) that holds a parameter: by its name, or else by its content, since transformers renames some."""
    stored = weight.detach().cpu()
    for name in _candidates(parameter, places):
        with safe_open(folder / places[name], framework="pt") as file:
            if tuple(file.get_slice(name).get_shape()) == tuple(stored.shape) and torch.equal(file.get_tensor(name), stored):
                return places[name], name
    raise CheckpointError(f"{parameter} was saved under no name, in none of {', '.join(sorted(set(places.values())))}.")


def _candidates(parameter: str, places: dict[str, str]) -> Iterator[str]:
    if parameter in places:
        yield parameter
    yield from (name for name in places if name != parameter)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: _digest(path) for path in sorted(folder.glob("*.safetensors"))}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}.") from e


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
