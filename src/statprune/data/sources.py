"""Windows from wherever the user says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.data.documents import WIKITEXT, dataset_windows, wikitext_test
from statprune.data.files import Text
from statprune.data.places import windows_at_places
from statprune.data.tokens import has_places, tokenize
from statprune.data.windows import check_coverage, check_size, consecutive_windows, random_windows
from statprune.errors import CalibrationError, first_line, number_of
from statprune.progress import Progress, silent

GENERATED = "generated"
"""The calibration source that needs no data: the model's own samples."""

LARGE = 4 << 20
"""Bytes of text above which only the neighbourhoods of windows are tokenized."""


def calibration_windows(
    sources: Sequence[str],
    *,
    tokenizer: Any,
    model: Any,
    samples: int,
    seqlen: int,
    seed: int = 0,
    halves: bool = False,
    progress: Progress = silent,
) -> Tensor:
    """Token windows [samples, seqlen], int64, from wherever the user says.

    Args:
        sources: text files; or one of: `"generated"` (the model's own samples), a token file `FILE.safetensors` or
            `FILE.safetensors:KEY`, a name in `datasets` (`"c4"`, or `NAME[:CONFIGURATION[:SPLIT[:COLUMN]]]`). Of text of more
            than 4 MiB only the neighbourhoods of the windows are tokenized.
        tokenizer: the model's; not needed for generated samples and token files.
        model: the causal language model; its vocabulary is checked against.
        samples: how many windows. A token file gives its first ones.
        seqlen: tokens in each.
        seed: of the random places and of the sampling.
        halves: the windows are for `tune` or for a `Search`, which hold every second one out: a text is cut first, so that no
            token of it is in a window to prune on and in one to score on. (Samples, the documents of a data set and the windows
            of a token file are apart in any case.)
        progress: called after each window, where that takes long.

    Raises:
        CalibrationError: a number that cannot be; the source cannot be read, or has too little text; says what was tried.

    Warns:
        CalibrationWarning: the windows must overlap, since they have more tokens than the text.
    """
    check_size(samples, seqlen, seed)
    vocabulary = model.config.get_text_config().vocab_size
    if list(sources) == [GENERATED]:
        return generated_windows(model, samples, seqlen, seed, progress=progress)
    if _is_token_file(sources):
        return token_file_windows(sources[0], samples, seqlen)
    if len(sources) == 1 and not _looks_like_file(sources[0]):
        return dataset_windows(sources[0], tokenizer, samples, seqlen, seed, vocabulary=vocabulary, progress=progress)
    text = Text(sources)
    if _is_large(text, tokenizer):
        return windows_at_places(
            text, tokenizer=tokenizer, vocabulary=vocabulary, samples=samples, seqlen=seqlen, seed=seed, halves=halves,
            progress=progress,
        )  # fmt: skip
    tokens = tokenize(tokenizer, text, vocabulary)
    check_coverage(tokens.numel(), samples, seqlen)
    return random_windows(tokens, samples, seqlen, seed, halves=halves)


def evaluation_windows(
    sources: Sequence[str], *, tokenizer: Any, model: Any, seqlen: int, windows: int | None = None
) -> Tensor:
    """Consecutive windows [windows, seqlen], int64, of text files joined, or a token file's windows as they are.

    The one name `wikitext2` stands for the test split of WikiText-2 from the hub, its lines joined by blank lines.

    Args:
        sources: text files, a token file or `wikitext2`.
        tokenizer: the model's.
        model: the causal language model; its vocabulary is checked against.
        seqlen: tokens in a window.
        windows: at most so many, from the beginning; no more of the text is tokenized than they need. None for all.

    Raises:
        CalibrationError: as `calibration_windows`.
    """
    if _is_token_file(sources):
        return token_file_windows(sources[0], None, seqlen)[:windows]
    text = "\n\n".join(wikitext_test()) if list(sources) == [WIKITEXT] else Text(sources)
    limit = None if windows is None else windows * seqlen
    vocabulary = model.config.get_text_config().vocab_size
    return consecutive_windows(tokenize(tokenizer, text, vocabulary, limit), seqlen)


def needs_tokenizer(sources: Sequence[str]) -> bool:
    """Whether there is a text to tokenize: samples of the model and token files are tokens already."""
    return list(sources) != [GENERATED] and not _is_token_file(sources)


def how_drawn(sources: Sequence[str], tokenizer: Any, *, halves: bool = False) -> str | None:
    """How `calibration_windows` draws from a text, for the record; None where the source is none.

    Raises:
        CalibrationError: a file cannot be read.
    """
    if not needs_tokenizer(sources) or (len(sources) == 1 and not _looks_like_file(sources[0])):
        return None
    at = "bytes" if _is_large(Text(sources), tokenizer) else "tokens"
    return f"random {at} of {'alternate blocks, of which each half has every second' if halves else 'the text'}"


def _is_large(text: Text, tokenizer: Any) -> bool:
    """Whether only neighbourhoods of windows are tokenized, and places are bytes in place of tokens."""
    return text.num_bytes > LARGE and has_places(tokenizer)


def _is_token_file(sources: Sequence[str]) -> bool:
    named = [source for source in sources if ".safetensors" in source]
    if named and len(sources) > 1:
        raise CalibrationError(f"{' '.join(sources)}: a token file stands alone. Give {named[0]}, or text files.")
    return bool(named)


def _looks_like_file(source: str) -> bool:
    path = Path(source)
    if Path(source.partition(":")[0]).is_dir():
        return False  # a data set's folder
    return path.exists() or path.suffix != "" or source.startswith(("/", "./", "../"))


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
    if seqlen < 2:  # transformers would refuse to sample no token, in its own words
        raise CalibrationError(f"--seqlen {seqlen}: expected at least 2 tokens in a window of the model's own samples.")
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
            try:
                chosen = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
            except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:  # the model's own code
                raise CalibrationError(
                    f"The model cannot sample calibration text: {type(e).__name__}: {first_line(e)}. Are the settings in its "
                    "config.json those that it was saved with? Or name texts: --calibration train.txt."
                ) from e
            windows.append(chosen.cpu())
            progress(sum(len(window) for window in windows), samples, "windows")
    return torch.cat(windows)
