"""A sparse model on disk: saved with a record of what was done, and the record verified later.

What is saved is what every runtime reads: dense safetensors with exact zeros, no `quantization_config`, no
`sparsity_config`. What we know beyond that goes into a side file:

    OUTPUT/model.safetensors    the weights, zeros included
    OUTPUT/config.json ...      whatever save_pretrained and the tokenizer write
    OUTPUT/pruning.json         the recipe, the versions, and for each weight what can be recomputed from the file
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from statprune.errors import CheckpointError, first_line
from statprune.grammar import split
from statprune.loading import file_digest, file_digests
from statprune.methods.patterns import PATTERNS, SITE_PATTERNS, Pattern
from statprune.methods.pruner import energy_sq
from statprune.model.kinds import adapter_parameters, unwrapped
from statprune.output import Reserved, refuse_existing, warn
from statprune.progress import Progress, Say, silent
from statprune.report import PruningReport

__all__ = ["Reserved", "check_model", "refuse_existing", "reserve", "save", "verify"]

RECORD = "pruning.json"
FORMAT = 1
ENERGY_TOLERANCE = 1e-6
"""Relative. Energies are float64 sums; another device or number of threads adds them in another order."""


def reserve(output: str | Path, *, model: nn.Module | None = None, say: Say = warn) -> Reserved:
    """Take the place of an output before work begins, so that nothing has been computed in vain when it cannot be written.

    The hidden folder that the output is written into is made at once, and what a killed process left of that output before is
    removed. Give the result to `save` in the place of the output, and `release()` it where there will be no output after all
    (it is a context manager, which does; `save` does as well).

        with statprune.checkpoint.reserve("sparse", model=model) as place:
            report = statprune.prune(model, batches)
            statprune.save(model, report, place)

    A callback reserves in `setup`, without the model where it is built later, calls `check_model(model, place)` in
    `on_fit_start`, saves in `on_train_end`, and releases in `teardown` and `on_exception`. Of several ranks one reserves.

    Args:
        output: a folder that does not exist yet.
        model: what will be saved, where it is known already; see `check_model`.
        say: called with what was removed, in words.

    Raises:
        CheckpointError: something stands in its place, it cannot be written there, or as for `check_model`.
    """
    place = Reserved(output, say=say)
    try:
        if model is not None:
            check_model(model, place)
    except BaseException:
        place.release()
        raise
    return place


def check_model(model: nn.Module, place: Reserved) -> None:
    """Refuse, before work begins, a model that could not be saved at this place in the end.

    Raises:
        CheckpointError: its state holds something else than plain tensors (quantized, sharded, on the meta device), it has
            adapters, or the disk has no room for its weights.
    """
    inner, _ = unwrapped(model)
    name = type(inner).__name__
    if getattr(inner, "_hf_peft_config_loaded", False) or adapter_parameters(inner):
        raise CheckpointError(
            f"{name} has adapters, and a pruned model is saved without. Merge them first (`merge_and_unload` of peft), or save "
            "it yourself with `save_pretrained`."
        )
    seen: dict[tuple[torch.device, int], int] = {}
    for key, value in inner.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: {key} is a {type(value).__name__} and no tensor, and safetensors hold only those.")
        if is_lazy(value):
            continue  # gets its shape in the first batch
        if value.is_meta or value.layout != torch.strided or isinstance(value, DTensor):
            kind = "on the meta device" if value.is_meta else "no dense tensor that this process holds whole"
            raise CheckpointError(f"{name}: {key} is {kind}, so it cannot be saved. Load the model whole, on one device.")
        try:
            pointer = value.untyped_storage().data_ptr()
            safetensors.torch.save({key: torch.zeros(1, dtype=value.dtype)})
        except (KeyError, RuntimeError, NotImplementedError, ValueError, SafetensorError) as e:
            raise CheckpointError(f"{name}: safetensors cannot hold {key}, a {value.dtype}: {first_line(e)}") from e
        if value.numel() and not pointer:
            raise CheckpointError(
                f"{name}: {key} is a {type(value).__name__} without a memory of its own, as quantized weights are. Prune the "
                "model that it was made from."
            )
        seen[value.device, pointer] = max(seen.get((value.device, pointer), 0), value.numel() * value.element_size())
    place.check_room(sum(seen.values()))


def save(
    model: nn.Module,
    report: PruningReport,
    output: str | Path | Reserved,
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
        output: a folder that does not exist yet, or the place that `reserve` took for it.
        tokenizer: saved beside it.
        protocol: what the calibration was (source, samples, seqlen, seed ...), for the record.

    Raises:
        CheckpointError: the output exists, or what was written does not keep a promise.
    """
    with output if isinstance(output, Reserved) else reserve(output, model=model) as place:
        partial = place.folder
        model.save_pretrained(partial)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        record = {"format": FORMAT, **report.to_dict(), "protocol": protocol or {}, "files": file_digests(partial)}
        places = _places(partial)
        for site in record["sites"]:
            site["file"], site["tensor"] = _find(site["parameter"], model.get_parameter(site["parameter"]), places, partial)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        verify(partial)
        return place.publish()


def verify(folder: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Recompute every promise of a folder's `pruning.json` from the files on disk, and return the record.

    Recomputed for each weight: it exists, its shape, number of zeros, energy, and that the pattern holds (at most N
    non-zeros in each M, or at least the promised zeros in each ranking group; where an allocation gave the weight a pattern
    of its own, that one); then the total sparsity, the energy ratio and the digest of each file. No model is built.

    Args:
        folder: what `save` wrote.
        progress: called after each weight, with its layer's name.

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
        usual_pattern = _pattern(record["recipe"]["pattern"])  # and not the recipe, whose method may not be installed here
        zeros, weights, energies = 0, 0, [0.0, 0.0]
        for index, site in enumerate(record["sites"]):
            weight = _read(folder, site)
            if list(weight.shape) != list(site["shape"]):
                raise _broken(folder, site["name"], "shape [out, in]", site["shape"], list(weight.shape))
            num_zeros = int((weight == 0).sum())
            if num_zeros != site["num_zeros"] or num_zeros < site["num_pruned"]:
                raise _broken(folder, site["name"], "number of zeros", site["num_zeros"], num_zeros)
            pattern = _pattern(site["pattern"]) if site.get("pattern") else usual_pattern
            if not pattern.holds(weight):
                raise _broken(folder, site["name"], "pattern", str(pattern), "a group with too few zeros")
            if not _close(num_zeros / weight.numel(), site.get("sparsity", num_zeros / weight.numel())):
                raise _broken(folder, site["name"], "sparsity", site["sparsity"], num_zeros / weight.numel())
            if not _close(energy_sq(weight), site["energy_after"]):
                raise _broken(folder, site["name"], "energy", site["energy_after"], energy_sq(weight))
            zeros, weights = zeros + num_zeros, weights + weight.numel()
            energies = [energies[0] + site["energy_before"], energies[1] + energy_sq(weight)]
            progress(index + 1, len(record["sites"]), site["name"])
        for name, promised, found in (
            ("sparsity", record["sparsity"], zeros / max(1, weights)),
            ("energy ratio", record["energy_ratio"], energies[1] / max(1e-300, energies[0])),
        ):
            if not _close(found, promised):
                raise _broken(folder, "all weights together", name, promised, found)
        for file, digest in record["files"].items():
            if (found_digest := file_digest(folder / file)) != digest:
                raise _broken(folder, file, "SHA-256", digest, found_digest)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise CheckpointError(f"{folder / RECORD} is damaged: {type(e).__name__}: {e}.") from e
    return record


def _pattern(record: dict[str, Any]) -> Pattern:
    name, settings = split(record)
    known: dict[str, Callable[..., Pattern]] = {**PATTERNS, **SITE_PATTERNS}
    return known[name](**settings)


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
