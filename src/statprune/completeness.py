"""Whether a model was loaded whole: each of its weights from the files, and each of the files' weights in it.

transformers fills what is missing with random numbers and leaves out what does not belong, and says so in a table of its own.
Here the first is an error, and so is the second but for what is known to be no part of the model. The renames and tied
weights that transformers knows are no faults: its report comes after them.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statprune.errors import ModelError, number_of
from statprune.weight_files import FLOATING, Stored

HEADS = (
    "pooler",
    "cls.seq_relationship",
    "classifier",
    "score",
    "qa_outputs",
    "v_head",
    "value_head",
    "summary",
    "multiple_choice_head",
)
"""What a checkpoint may hold for other tasks than that of the class it is opened with."""

_HEAD = re.compile(rf"(\w+\.)?({'|'.join(map(re.escape, HEADS))})\.")
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Which transformers leaves out of every class that has such a buffer."""


def check_stored(path: str, stored: Mapping[str, Stored], empty: Any) -> list[str]:
    """Refuse, by the headers of the files, weights that are not floating point.

    Args:
        path: the model's, for the message.
        stored: tensors by their names in the files.
        empty: the model without weights.

    Returns:
        Names of the weights that transformers leaves out of this class, which its report does not show.

    Raises:
        ModelError: there is one.
    """
    own = empty.state_dict()
    whole_numbers = {name for name, tensor in own.items() if not tensor.is_floating_point()}
    ignored = _ignored(empty)
    buffers = {name for name, _ in empty.named_buffers()}
    for name, one in stored.items():
        is_buffer = ignored.search(name) or any(_same(name, known) for known in whole_numbers | buffers)
        if one.dtype not in FLOATING and not is_buffer:
            raise ModelError(
                f"{path}: {name} in {one.file} is {one.dtype}, which is not the floating point that a weight is computed with. "
                "Is the model quantized, without a quantization_config that says how? Prune the one that it was made from."
            )
    return [name for name in stored if name.endswith(".weight") and ignored.search(name) and name not in own]


def ignored_names(stored: Mapping[str, Stored], empty: Any) -> list[str]:
    """Names of the tensors in the files that transformers leaves out of this class without a word; see `check_stored`."""
    ignored, own = _ignored(empty), empty.state_dict()
    return [name for name in stored if ignored.search(name) and name not in own]


def _ignored(empty: Any) -> re.Pattern[str]:
    return re.compile("|".join([*(empty._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]))


def _same(stored: str, own: str) -> bool:
    """Whether a name in the files is this name in the model: one of them may lack the base model's prefix."""
    return stored == own or own.endswith(f".{stored}") or stored.endswith(f".{own}")


def check_loaded(path: str, kind: str, found: Mapping[str, Any]) -> list[str]:
    """Refuse what transformers reports of a loaded model as missing, of another shape, or unexpected.

    Args:
        path: the model's, for the message.
        kind: name of its class.
        found: what `from_pretrained(output_loading_info=True)` gives.

    Returns:
        Names of unexpected tensors that are known to be no part of the model: `HEADS`.

    Raises:
        ModelError: there are others, naming some.
    """
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    strays = [name for name in unexpected if not _HEAD.match(name)]
    if missing:
        raise ModelError(
            f"{path}: missing in the files: {number_of(len(missing), 'tensor')} of {kind}, {some(missing)}. Only random "
            "numbers could be put there."
            + (f" In the files, but in no part of {kind}: {some(strays)}." if strays else "")
            + " Was the checkpoint saved whole, and is this its config.json?"
        )
    if found["mismatched_keys"]:
        shapes = {name: (tuple(file), tuple(own)) for name, file, own in found["mismatched_keys"]}
        raise ModelError(wrong_shapes(path, kind, shapes))
    if strays:
        raise ModelError(
            f"{path}: in the files, but in no part of {kind}: {number_of(len(strays), 'tensor')}, {some(strays)}. Is this the "
            "config.json of these weights? Are they those of a quantized model? Prune the one that it was made from."
        )
    return unexpected


def other_shapes(stored: Mapping[str, Stored], empty: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(in the files, in the model) of each tensor that has the same name in both, and not the same shape."""
    own = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    return {name: (one.shape, own[name]) for name, one in stored.items() if name in own and own[name] != one.shape}


def wrong_shapes(path: str, kind: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """The message for tensors of (shape in the files, shape in the model)."""
    listed = some([f"{name} is {list(file)} and should be {list(own)}" for name, (file, own) in sorted(shapes.items())])
    return f"{path}: the files do not have the shapes that a {kind} with this config.json has: {listed}."


def unconverted(reports: Sequence[str]) -> list[str]:
    """Of reports of transformers, the weights that it could not make of what the files hold, such as a stack of experts."""
    rows = [line.split("|") for report in reports for line in report.splitlines() if line.count("|") > 1]
    return [row[0].strip() for row in rows if "CONVERSION" in row[1]]


def some(names: Sequence[str], count: int = 3) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count:,} more" if len(names) > count else "")


@contextlib.contextmanager
def without_report() -> Iterator[list[str]]:
    """Without the table in which transformers says what `check_loaded` says; it is put into the list that this gives."""
    logger = logging.getLogger("transformers.modeling_utils")
    reports: list[str] = []

    def is_other(record: logging.LogRecord) -> bool:
        if is_report := "LOAD REPORT" in record.getMessage():
            reports.append(record.getMessage())
        return not is_report

    logger.addFilter(is_other)
    try:
        yield reports
    finally:
        logger.removeFilter(is_other)
