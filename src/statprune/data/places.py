"""Windows at random places of a text too large to be tokenized: a place is a byte, and only its neighbourhood is tokenized."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statprune.data.files import Text
from statprune.data.tokens import CONTEXT, check_vocabulary, tokens_with_places
from statprune.data.windows import block_edges, check_coverage
from statprune.errors import CalibrationError, number_of
from statprune.progress import Progress, silent

BYTES_PER_TOKEN = 6
"""That are read at first: more than most texts have."""

BYTES_PER_TOKEN_OF_BLOCK = 64
"""By which blocks are made long enough for a window of any text."""


def windows_at_places(
    text: Text,
    *,
    tokenizer: Any,
    vocabulary: int,
    samples: int,
    seqlen: int,
    seed: int,
    halves: bool = False,
    progress: Progress = silent,
) -> Tensor:
    """Windows [samples, seqlen], int64, each from the first token that begins at or after a random byte of the text.

    They are stretches of the tokens of the whole text, without special tokens. A place whose window would not end in the text,
    or in its block, is drawn again from the places before it. Memory does not depend on the size of the text.

    Args:
        text: the files.
        tokenizer: one that tells which characters a token stands for.
        vocabulary: of the model.
        samples: how many windows.
        seqlen: tokens in each.
        seed: of the places.
        halves: cut the text in alternate blocks first, as `random_windows` does.
        progress: called after each window.

    Raises:
        CalibrationError: the text, or a block of it, is shorter than one window; or it cannot be read.
    """
    edges = block_edges(text.num_bytes, BYTES_PER_TOKEN_OF_BLOCK * seqlen) if halves else [0, text.num_bytes]
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    num_bytes = 0
    for index in range(samples):
        blocks = list(itertools.pairwise(edges))[index % 2 if halves else 0 :: 2]
        window, window_bytes = _window(text, tokenizer, blocks, seqlen, generator)
        check_vocabulary(window, vocabulary)
        found.append(window)
        num_bytes += window_bytes
        progress(index + 1, samples, "windows")
    check_coverage(text.num_bytes * samples * seqlen // max(1, num_bytes), samples, seqlen, is_exact=False)
    return torch.stack(found)


def _window(
    text: Text, tokenizer: Any, blocks: Sequence[tuple[int, int]], seqlen: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """One window [seqlen], and how many bytes it stands for."""
    offset = int(torch.randint(sum(end - begin for begin, end in blocks), (), generator=generator))
    for begin, end in blocks:
        if offset < end - begin:
            break
        offset -= end - begin
    while (window := _window_at(text, tokenizer, begin + offset, end, seqlen)) is None:
        if offset == 0:
            raise CalibrationError(
                f"A stretch of {end - begin:,} bytes of the calibration text has less than {number_of(seqlen, 'token')}: "
                "expected a window in it. Give a smaller --seqlen."
            )
        offset = int(torch.randint(offset, (), generator=generator))
    return window


def _window_at(text: Text, tokenizer: Any, place: int, end: int, seqlen: int) -> tuple[Tensor, int] | None:
    """The window from a byte on; None where it does not end before byte `end`."""
    reach = seqlen * BYTES_PER_TOKEN
    while True:
        stop = min(end, place + reach)
        # Some text before and behind, so that the tokens are those of the running text.
        before, inside, behind = text.between([max(0, place - CONTEXT), place, stop, min(text.num_bytes, stop + CONTEXT)])
        tokens = tokens_with_places(tokenizer, before + inside + behind, -len(before))
        first = next((index for index, token in enumerate(tokens) if token.start >= 0), len(tokens))
        window = tokens[first : first + seqlen]
        if len(window) == seqlen and window[-1].end <= len(inside):
            num_bytes = len(inside[window[0].start : window[-1].end].encode())
            return torch.tensor([token.number for token in window]), num_bytes
        if stop == end:
            return None
        reach *= 2
