"""Token windows: from text files, token files, `datasets`, the standard library's source, or the model's own samples."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.errors import CalibrationError, first_line, number_of
from statprune.progress import Progress, silent

GENERATED = "generated"
"""The calibration source that needs no data: the model's own samples."""

WIKITEXT = "wikitext2"
DATASET_NAMES = {
    "c4": ("allenai/c4", "en", "train", "text"),
    WIKITEXT: ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
}
"""Short names of calibration sets: (hub name, configuration, split, column)."""


def read_text(paths: Sequence[str | Path]) -> str:
    """The files' text, joined by blank lines.

    Raises:
        CalibrationError: a file is missing or is not UTF-8 text.
    """
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise CalibrationError(f"The text file {path} cannot be read: {e}. Expected UTF-8 text.") from e
    return "\n\n".join(texts)


def tokenize(tokenizer: Any, text: str, vocabulary: int | None = None) -> Tensor:
    """The whole text as one sequence [tokens], int64, with the special tokens that the tokenizer adds by default.

    Raises:
        CalibrationError: a token lies beyond the model's vocabulary.
    """
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if vocabulary is not None and tokens.numel() and int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"The tokenizer gives token {int(tokens.max())}, but the model's vocabulary has {vocabulary}: "
            "this tokenizer belongs to another model."
        )
    return tokens


def consecutive_windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Non-overlapping windows [windows, seqlen]; the last partial one is dropped, as the field's WikiText-2 protocol does.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    num_windows = tokens.numel() // seqlen
    if num_windows == 0:
        raise CalibrationError(
            f"The text has {number_of(tokens.numel(), 'token')}, less than one window of {seqlen}: "
            "give more text or a smaller --seqlen."
        )
    return tokens[: num_windows * seqlen].view(num_windows, seqlen)


def random_windows(tokens: Tensor, samples: int, seqlen: int, seed: int) -> Tensor:
    """Windows [samples, seqlen] at random places of the text; the same for the same seed.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    places = tokens.numel() - seqlen + 1
    if places < 1:
        raise CalibrationError(
            f"The calibration text has {number_of(tokens.numel(), 'token')}, less than one window of {seqlen}: "
            "give more text or a smaller --seqlen."
        )
    starts = torch.randint(places, (samples,), generator=torch.Generator().manual_seed(seed))
    return tokens.unfold(0, seqlen, 1)[starts]


def needs_tokenizer(sources: Sequence[str]) -> bool:
    """Whether there is a text to tokenize: the model's own samples and token files are tokens already."""
    return list(sources) != [GENERATED] and not (len(sources) == 1 and ".safetensors" in sources[0])


def calibration_windows(
    sources: Sequence[str],
    *,
    tokenizer: Any,
    model: Any,
    samples: int,
    seqlen: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Token windows [samples, seqlen] from wherever the user says.

    Args:
        sources: text files; or one of: `"generated"` (the model's own samples), a token file `FILE.safetensors` or
            `FILE.safetensors:KEY`, a name in `datasets` (`"c4"`, or `NAME[:CONFIGURATION[:SPLIT[:COLUMN]]]`).
        tokenizer: the model's; not needed for generated samples and token files.
        model: the causal language model; its vocabulary is checked against.
        samples: how many windows. A token file gives its first ones.
        seqlen: tokens in each.
        seed: of the random places and of the sampling.
        progress: called after each window, where that takes long.

    Raises:
        CalibrationError: the source cannot be read, or has too little text; says what was tried.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if list(sources) == [GENERATED]:
        return generated_windows(model, samples, seqlen, seed, progress=progress)
    if len(sources) == 1 and ".safetensors" in sources[0]:
        return token_file_windows(sources[0], samples, seqlen)
    if len(sources) == 1 and not _looks_like_file(sources[0]):
        return dataset_windows(sources[0], tokenizer, samples, seqlen, seed, vocabulary=vocabulary, progress=progress)
    return random_windows(tokenize(tokenizer, read_text(sources), vocabulary), samples, seqlen, seed)


def evaluation_windows(sources: Sequence[str], *, tokenizer: Any, model: Any, seqlen: int) -> Tensor:
    """Consecutive windows [windows, seqlen] of text files joined, or a token file's windows as they are.

    The one name `wikitext2` stands for the test split of WikiText-2 from the hub, its lines joined by blank lines.

    Raises:
        CalibrationError: as `calibration_windows`.
    """
    if len(sources) == 1 and ".safetensors" in sources[0]:
        return token_file_windows(sources[0], None, seqlen)
    text = "\n\n".join(_wikitext_test()) if list(sources) == [WIKITEXT] else read_text(sources)
    return consecutive_windows(tokenize(tokenizer, text, model.config.get_text_config().vocab_size), seqlen)


def _wikitext_test() -> list[str]:
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


def token_file_windows(source: str, samples: int | None, seqlen: int) -> Tensor:
    """Windows of a safetensors file with tokens [windows, length]: `FILE.safetensors`, or `FILE.safetensors:KEY`.

    Raises:
        CalibrationError: no such file, tensor, or not enough windows or tokens in it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, _, key = source.partition(".safetensors")
    key = key.removeprefix(":")
    try:
        tensors = load_file(f"{path}.safetensors")
    except (OSError, SafetensorError) as e:
        raise CalibrationError(f"The token file {path}.safetensors cannot be read: {e}.") from e
    if key not in tensors and (key or len(tensors) != 1):
        raise CalibrationError(
            f"The token file {path}.safetensors holds {', '.join(sorted(tensors))}: "
            f"name one, as in FILE.safetensors:{min(tensors)}."
        )
    windows = tensors[key] if key else next(iter(tensors.values()))
    if windows.ndim != 2 or windows.is_floating_point() or windows.shape[1] < seqlen or len(windows) < (samples or 1):
        raise CalibrationError(
            f"The tokens in {source} have shape {tuple(windows.shape)} and dtype {windows.dtype}: expected whole numbers, "
            f"at least {number_of(samples or 1, 'window')} of at least {number_of(seqlen, 'token')}. "
            "Choose a smaller --samples or --seqlen."
        )
    chosen: Tensor = windows[:samples, :seqlen].long()
    return chosen


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
            f"--calibration {name} is no file, so it was taken for the name of a data set, which needs the package `datasets`: "
            "pip install 'statprune[data]'. Or give text files, or `generated`, which needs no data."
        ) from e
    defaults = DATASET_NAMES.get(name.lower())
    given = [name, *[""] * 3] if defaults else (name.split(":") + [""] * 3)[:4]
    path, configuration, split, column = defaults or (given[0], given[1], given[2] or "train", given[3] or "text")
    try:
        stream = datasets.load_dataset(path, configuration or None, split=split, streaming=True)
        stream = stream.shuffle(seed=seed, buffer_size=1000)
    except Exception as e:  # datasets raises whatever its loaders and the network raise
        raise CalibrationError(
            f"--calibration {name} is no file, and the data set {path!r} cannot be had: {type(e).__name__}: {e}. "
            "Give text files, or `generated`, which needs no data."
        ) from e
    generator = torch.Generator().manual_seed(seed)
    windows: list[Tensor] = []
    for document in stream:
        if column not in document:
            raise CalibrationError(f"The data set {path!r} has the columns {', '.join(document)}, not {column!r}.")
        tokens = tokenize(tokenizer, document[column], vocabulary)
        if tokens.numel() > seqlen:
            start = int(torch.randint(tokens.numel() - seqlen, (), generator=generator))
            windows.append(tokens[start : start + seqlen])
            progress(len(windows), samples, "windows")
        if len(windows) == samples:
            return torch.stack(windows)
    raise CalibrationError(
        f"The data set {path!r} has {number_of(len(windows), 'document')} longer than {number_of(seqlen, 'token')}, "
        f"wanted: {samples:,}. Choose a smaller --samples or --seqlen."
    )


@torch.no_grad()
def generated_windows(
    model: Any, samples: int, seqlen: int, seed: int, *, batch_size: int = 8, progress: Progress = silent
) -> Tensor:
    """Windows [samples, seqlen] sampled from the model itself (temperature 1), so that no data is needed.

    The first token is drawn uniformly from the vocabulary, as LLM-QAT does (Liu et al. 2023, arXiv 2305.17888); the end of
    a text is not sampled, so that every window is full.
    """
    from transformers import GenerationConfig

    config = model.config.get_text_config()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(config.vocab_size, (samples, 1), generator=generator)
    ends = config.eos_token_id if isinstance(config.eos_token_id, int | list) else None
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=seqlen - 1, max_new_tokens=seqlen - 1,
        eos_token_id=ends, pad_token_id=0, use_cache=True,
    )  # fmt: skip
    windows: list[Tensor] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in first.split(batch_size):
            tokens = start.to(device)
            windows.append(model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings).cpu())
            progress(sum(len(window) for window in windows), samples, "windows")
    return torch.cat(windows)


def standard_library_text(max_characters: int | None = None) -> tuple[str, str]:
    """Source text of Python's standard library: (training, held out), split by module, every tenth module held out.

    Every Python has it, so a demonstration needs no network and no file.

    Raises:
        CalibrationError: this Python has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(
        path for path in root.rglob("*.py")
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(path.relative_to(root).parts)
    )  # fmt: skip
    texts = []
    for module in modules:
        try:
            texts.append(module.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue  # a few modules are written in other encodings on purpose; one module more or less is no matter
    if not texts:
        raise CalibrationError(f"No Python source under {root}: this Python was installed without it.")
    held_out, training = "\n\n".join(texts[::10]), "\n\n".join(text for i, text in enumerate(texts) if i % 10)
    return training[:max_characters], held_out[:max_characters]


def _looks_like_file(source: str) -> bool:
    path = Path(source)
    if Path(source.partition(":")[0]).is_dir():
        return False  # a data set's folder
    return path.exists() or path.suffix != "" or source.startswith(("/", "./", "../"))
