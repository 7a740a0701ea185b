"""`pruning.json`, what a folder promises: written, read and checked against itself. Imports torch for patterns only.

Whoever reads one does not trust it: every number is finite, every name stays inside of the folder, and what can be
computed from other parts of the record is.

    recipe, schedule, protocol, versions ...    how it was done
    sites     for each pruned weight: layer, parameter, shape, pattern, zeros, energy, and the file and tensor that hold it;
              `parts` in their place where a stack of experts lies in several tensors, as transformers saves most of them
    sparsity, energy_ratio                      over all of them
    files     the SHA-256 digest of every other file of the folder
    digest    of all that: published elsewhere, it tells whether this record is the one that was published
"""

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.errors import CheckpointError
from statprune.methods.patterns import PATTERNS, SITE_PATTERNS, Pattern, Unstructured

RECORD = "pruning.json"
FORMAT = 2
"""1 had digests of the weight files only, and no place for what else lies in the folder."""

INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
"""The only folder in a folder: transformers puts chat templates there that have names."""

TOLERANCE = 1e-6
"""Relative. Energies are float64 sums; another device or number of threads adds them in another order."""

MOST_BYTES = 64 * 2**20
"""Of a JSON file. A record of a thousand weights has half a megabyte."""

_KINDS: dict[str, type] = {
    "recipe": dict, "schedule": str, "sites": list, "left_out": list, "protocol": dict, "versions": dict, "files": dict,
}  # fmt: skip
"""What everybody reads in a record, and of which type it is."""

_LOADED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npz", ".py", ".pyc", ".so")
"""Endings of files that a library may load by itself, as weights that nobody counted or as code; never part of an output."""


def digest_of(record: Mapping[str, Any]) -> str:
    """The SHA-256 digest of a record, 64 hexadecimal digits: of its JSON with sorted keys and no spaces, without `digest`."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 digest of a file, 64 hexadecimal digits.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}.") from e


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a folder's record, with its own digest, as the last of its files; a value that JSON does not have as its text."""
    plain = json.loads(json.dumps(record, allow_nan=False, default=str))
    text = json.dumps({**plain, "digest": digest_of(plain)}, indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """A folder's record, checked against itself.

    Raises:
        CheckpointError: there is none, of another format, it cannot be read, or it contradicts itself.
    """
    path = folder / RECORD
    try:
        record = read_json(path)
    except (OSError, ValueError, RecursionError) as e:
        what = "it is nested too deep" if isinstance(e, RecursionError) else e
        raise CheckpointError(
            f"{folder} has no readable {RECORD}: {what}. Only folders that statprune wrote can be verified."
        ) from e
    found = record.get("format") if isinstance(record, dict) else None
    if found == 1:
        raise CheckpointError(
            f"{path} is of format 1, which has no digest of what lies beside the weights, so it proves less than 'verified' "
            f"says. Prune the model anew, or verify it with the version of statprune that wrote it ({_version(record)})."
        )
    if found != FORMAT or isinstance(found, bool | float):
        raise CheckpointError(
            f"{path} is of format {found!r}, and this version of statprune knows format {FORMAT}. Where a later version wrote "
            "it, verify it with that."
        )
    if "unfinished" in record:
        raise CheckpointError(f"{folder} is not an output but what could be rescued of one: {record['unfinished']}")
    try:
        if (digest := digest_of(record)) != record["digest"]:
            raise CheckpointError(
                f"{path} was changed after it was written: its own SHA-256 promised {record['digest']}, found {digest}."
            )
        check_record(record)
        return dict(record)
    except RecursionError as e:
        raise CheckpointError(f"{path} is damaged: it is nested too deep.") from e
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(f"{path} is damaged: {type(e).__name__}: {e}.") from e


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or holds NaN, infinity, a number of over a hundred digits or one key twice.
        RecursionError: it is nested too deep.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no file")
    if (size := status.st_size) > MOST_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, expected at most {MOST_BYTES:,}")
    text = path.read_bytes().decode("utf-8")
    return json.loads(
        text, object_pairs_hook=_mapping, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite_number
    )


def check_record(record: Mapping[str, Any]) -> None:
    """Raise CheckpointError, or KeyError, TypeError or ValueError, where a record contradicts itself."""
    for key, kind in _KINDS.items():
        if not isinstance(record[key], kind):
            raise TypeError(f"{key} is a {type(record[key]).__name__}")
    for one in record["left_out"]:
        if not (isinstance(one["name"], str) and isinstance(one["reason"], str) and isinstance(one["shape"], list)):
            raise TypeError(f"left_out: {one!r}")
    usual = read_pattern(record["recipe"]["pattern"])  # and not the recipe, whose method may not be installed here
    files, sites = record["files"], record["sites"]
    for name, digest in files.items():
        check_name(name)
        if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise ValueError(f"files: {name!r} has no SHA-256 digest")
    if not sites and getattr(usual, "sparsity", 1.0) != 0:
        raise _contradiction("sites", "weights that were pruned", f"at least one, with the pattern {usual}", "none")
    for names in ([site["name"] for site in sites], [place for site in sites for place in places_of(site)]):
        if len(set(names)) != len(names):
            raise ValueError("a weight is named twice")
    for site in sites:
        _check_site(site, usual, files)
    weights = sum(math.prod(site["shape"]) for site in sites)
    energies = [_sum(site[key] for site in sites) for key in ("energy_before", "energy_after")]
    for name, found in (
        ("sparsity", sum(site["num_zeros"] for site in sites) / max(1, weights)),
        ("energy_ratio", energies[1] / max(1e-300, energies[0])),
    ):
        if not close(found, _number(record[name], name)):
            raise _contradiction("all weights together", name, record[name], found)


def _check_site(site: Mapping[str, Any], usual: Pattern, files: Mapping[str, str]) -> None:
    name = site["name"]
    places = places_of(site)
    named = [("name", name), ("parameter", site["parameter"])]
    for key, text in named + [pair for place in places for pair in zip(("file", "tensor"), place, strict=True)]:
        if not (isinstance(text, str) and text.isprintable()):
            raise ValueError(f"{key} of a weight: {text!r}")
    for file, _ in places:
        if file not in files or not file.endswith(".safetensors"):
            raise _contradiction(name, "file", "a *.safetensors with a digest", file)
    if site["stored"] not in ("out_in", "in_out"):
        raise ValueError(f"{name}: stored {site['stored']!r}")
    *stack, rows, columns = (_count(size, f"{name}: shape") for size in site["shape"])
    if len(stack) > 1:
        raise ValueError(f"{name}: a weight of {len(stack) + 2} dimensions")
    matrices = math.prod(stack)
    weights = matrices * rows * columns
    if not weights:
        raise ValueError(f"{name}: a weight of no numbers")
    pattern = pattern_of(site, usual)
    if not pattern.fits(columns):
        raise _contradiction(name, "pattern", str(pattern), f"rows of {columns} inputs, which it does not fit")
    if _count(site["num_pruned"], f"{name}: num_pruned") != (expected := matrices * pattern.pruned_of(rows, columns)):
        raise _contradiction(name, f"number of pruned weights with {pattern}", expected, site["num_pruned"])
    if not site["num_pruned"] <= _count(site["num_zeros"], f"{name}: num_zeros") <= weights:
        raise _contradiction(name, "number of zeros", f"{site['num_pruned']} to {weights}", site["num_zeros"])
    if not close(site["num_zeros"] / weights, _number(site["sparsity"], f"{name}: sparsity")):
        raise _contradiction(name, "sparsity", site["sparsity"], site["num_zeros"] / weights)
    if "parts" in site and (not stack or len(site["parts"]) != matrices):
        raise _contradiction(name, "parts", f"those of {matrices} experts", len(site["parts"]))
    tokens = site.get("tokens")  # earlier versions knew no stacks
    if tokens is not None and (not stack or len([_count(one, f"{name}: tokens") for one in tokens]) != matrices):
        raise _contradiction(name, "tokens of each expert", f"{matrices} numbers", tokens)
    for key in ("energy_before", "energy_after"):
        if _number(site[key], f"{name}: {key}") < 0:
            raise _contradiction(name, key, "0 or more", site[key])


def check_name(name: object) -> None:
    """Raise CheckpointError for a file's name that leads elsewhere, or that stands for something that is loaded unasked."""
    text = str(name)
    folder, _, rest = text.rpartition("/")
    if (
        not isinstance(name, str)
        or folder not in ("", TEMPLATES)
        or (not folder and "/" in text)
        or rest in ("", ".", "..")
        or "\\" in rest
        or ":" in rest
        or not text.isprintable()
    ):
        raise CheckpointError(f"{RECORD} names the file {text!r}: expected a name inside of the folder.")
    if is_loaded_unasked(rest) or rest == RECORD:
        raise CheckpointError(
            f"{RECORD} names the file {text!r}, which statprune never writes: it may be loaded in the place of the weights, or "
            "as code."
        )


def is_loaded_unasked(name: str) -> bool:
    """Whether a library may take a file of this name for weights that nobody counted, an adapter or code."""
    return name.lower().endswith(_LOADED) or name.lower().startswith("adapter_")


def read_pattern(data: Mapping[str, Any]) -> Pattern:
    """The pattern that a mapping of its name and settings stands for; KeyError, TypeError or ValueError where there is none."""
    settings = dict(data)
    known: dict[str, Callable[..., Pattern]] = {**PATTERNS, **SITE_PATTERNS}
    return known[settings.pop("name")](**settings)


def places_of(site: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(file, tensor) of everything that holds a weight."""
    if "parts" not in site:
        return [(site["file"], site["tensor"])]
    return [(file, tensor) for expert in site["parts"] for file, tensor in expert]


def stored_matrices(site: Mapping[str, Any], read: Callable[[str, str], Tensor]) -> Iterator[Tensor]:
    """A weight as its files hold it, [..., out, in]: all of it, or one expert after the other where it lies in parts.

    Args:
        site: of the record.
        read: gives the tensor of a file.
    """
    experts = site.get("parts", [[(site.get("file"), site.get("tensor"))]])
    for parts in experts:
        whole = torch.cat([read(*part) for part in parts]) if len(parts) > 1 else read(*parts[0])
        yield whole.mT if site["stored"] == "in_out" and whole.ndim >= 2 else whole


def pattern_of(site: Mapping[str, Any], usual: Pattern) -> Pattern:
    """A weight's own pattern, where an allocation gave it one; else the recipe's, or what that was in earlier versions.

    They rounded down in each row, where weights competed by row: 70 % of 384 weights were 268 in each. Their folders, and what
    is trained or merged from them, hold what they promised; which of the two it is, the number of pruned weights tells.
    """
    if site.get("pattern"):
        return read_pattern(site["pattern"])
    if isinstance(usual, Unstructured) and usual.rank_over == "row":
        rows, columns = site["shape"][-2:]
        rounded_in_rows = usual.counted(rows * usual.pruned_of(1, columns), columns)
        if site["num_pruned"] == rounded_in_rows.num_pruned:
            return rounded_in_rows
    return usual


def close(found: float, promised: float) -> bool:
    """Whether two numbers are the same but for the order of their sums."""
    return math.isclose(found, promised, rel_tol=TOLERANCE)


def _version(record: Mapping[str, Any]) -> str:
    versions = record.get("versions")
    return str(versions.get("statprune")) if isinstance(versions, dict) else "not known"


def _contradiction(name: str, what: str, expected: object, found: object) -> CheckpointError:
    return CheckpointError(f"{RECORD} contradicts itself: {name}: {what}: expected {expected}, found {found}.")


def _sum(numbers: Any) -> float:
    return math.fsum(_number(number, "energy") for number in numbers)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}, no finite number")
    return float(value)


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{what} is {value!r}, no count")
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number that JSON has")


def _integer(text: str) -> int:
    if len(text) > 100:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number
