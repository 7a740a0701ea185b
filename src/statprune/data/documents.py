"""Windows of the documents of a data set, from the hub or from a folder, by `datasets`."""

import difflib
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.data.tokens import tokenize
from statprune.errors import CalibrationError, first_line, number_of
from statprune.progress import Progress, silent

WIKITEXT = "wikitext2"
DATASET_NAMES = {
    "c4": ("allenai/c4", "en", "train", "text"),
    WIKITEXT: ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
}
"""Short names of calibration sets: (hub name, configuration, split, column)."""


def dataset_windows(
    name: str,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    seed: int,
    *,
    vocabulary: int | None = None,
    progress: Progress = silent,
) -> Tensor:
    """One random window [samples, seqlen] from each of `samples` documents that are long enough (Wanda's protocol).

    No two windows are of the same document: one that was there before, by the same text, is passed over.

    Args:
        name: `"c4"`, `"wikitext2"`, or `NAME[:CONFIGURATION[:SPLIT[:COLUMN]]]` of a data set on the hub or in a folder.
        tokenizer: the model's.
        samples: how many windows.
        seqlen: tokens in each.
        seed: of the choice of documents and places.
        vocabulary: the model's; tokens beyond it are an error.
        progress: called after each window.

    Raises:
        CalibrationError: `datasets` is not installed, the data set cannot be had, or has too few long documents.
    """
    try:
        import datasets
    except ImportError as e:
        raise CalibrationError(
            f"--calibration {name}: {_what_it_is(name)}, and a data set needs the package `datasets`: pip install "
            "'statprune[data]'. Or give text files, or `generated`, which needs no data."
        ) from e
    defaults = DATASET_NAMES.get(name.lower())
    given = [name, *[""] * 3] if defaults else (name.split(":") + [""] * 3)[:4]
    path, configuration, split, column = defaults or (given[0], given[1], given[2] or "train", given[3] or "text")
    try:
        stream = datasets.load_dataset(path, configuration or None, split=split, streaming=True)
        stream = stream.shuffle(seed=seed, buffer_size=1000)
    except Exception as e:  # datasets raises whatever its loaders and the network raise
        raise CalibrationError(
            f"--calibration {name}: {_what_it_is(name)}, and the data set {path!r} cannot be had: {type(e).__name__}: "
            f"{first_line(e)}. Give text files, or `generated`, which needs no data."
        ) from e
    generator = torch.Generator().manual_seed(seed)
    windows: list[Tensor] = []
    seen: set[bytes] = set()
    for document in stream:
        if not isinstance(document.get(column), str):
            raise CalibrationError(
                f"The data set {path!r} has the columns {', '.join(document)}: expected text in {column!r}. Name another "
                "column, as in NAME:::COLUMN."
            )
        digest = hashlib.sha256(document[column].encode(errors="surrogatepass")).digest()
        if digest in seen:
            continue
        tokens = tokenize(tokenizer, document[column], vocabulary)
        if tokens.numel() > seqlen:
            start = int(torch.randint(tokens.numel() - seqlen, (), generator=generator))
            windows.append(tokens[start : start + seqlen])
            seen.add(digest)
            progress(len(windows), samples, "windows")
        if len(windows) == samples:
            return torch.stack(windows)
    raise CalibrationError(
        f"The data set {path!r} has {number_of(len(windows), 'different document')} longer than {number_of(seqlen, 'token')}, "
        f"wanted: {samples:,}. Choose a smaller --samples or --seqlen."
    )


def wikitext_test() -> list[str]:
    """The lines of WikiText-2's test split.

    Raises:
        CalibrationError: `datasets` is not installed, or the data set cannot be had.
    """
    path, configuration, _, column = DATASET_NAMES[WIKITEXT]
    advice = "Or give --text its test split, or any other text, as a file."
    try:
        import datasets
    except ImportError as e:
        raise CalibrationError(
            f"--text {WIKITEXT} needs the package `datasets`: pip install 'statprune[data]'. {advice}"
        ) from e
    try:
        lines: list[str] = datasets.load_dataset(path, configuration, split="test")[column]
    except Exception as e:  # datasets raises whatever its loaders and the network raise
        raise CalibrationError(
            f"--text {WIKITEXT}: the data set {path!r} cannot be had: {type(e).__name__}: {first_line(e)}. {advice}"
        ) from e
    return lines


def _what_it_is(name: str) -> str:
    """What there is of this name here, and what may have been meant."""
    if name.lower() in DATASET_NAMES:
        return "a data set's short name"
    path = Path(name.partition(":")[0])
    if path.is_dir():
        hint = f" (for the text files in it: {path}/*.txt)" if any(path.glob("*.txt")) else ""
        return f"a folder{hint}, taken for a data set"
    near = [one.name for one in path.parent.iterdir() if one.is_file()] if path.parent.is_dir() else []
    found = [one for one in near if Path(one).stem == path.name] or difflib.get_close_matches(path.name, near, n=1)
    return f"there is no such file{f' (did you mean {path.parent / found[0]}?)' if found else ''}"
