"""Windows of one sequence of tokens: consecutive ones, and random ones, of the whole or of two halves that share no token."""

import warnings

import torch
from torch import Tensor

from statprune.errors import CalibrationError, CalibrationWarning, number_of

MAX_TOKENS = 1 << 34
"""Of all windows together; 128 GiB."""

MAX_BLOCKS = 64
WINDOWS_PER_BLOCK = 8
"""Blocks that halves are made of are this much longer than a window, where the text allows it."""


def check_size(samples: int, seqlen: int, seed: int) -> None:
    """Raise CalibrationError for numbers of calibration windows that cannot be, before there are any."""
    if seqlen < 2:
        raise CalibrationError(f"--seqlen {seqlen}: expected at least 2. In a window of one token, nothing predicts anything.")
    if samples < 1:
        raise CalibrationError(f"--samples {samples}: expected at least 1.")
    if samples * seqlen > MAX_TOKENS:
        raise CalibrationError(
            f"--samples {samples} windows of {number_of(seqlen, 'token')}: expected at most {MAX_TOKENS:,} tokens together. "
            "Calibration takes about 128 windows."
        )
    if not -(1 << 63) <= seed < 1 << 63:
        raise CalibrationError(f"--seed {seed}: expected a number of 64 bits, below {1 << 63}.")


def consecutive_windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Non-overlapping windows [windows, seqlen]; the last partial one is dropped, as the field's WikiText-2 protocol does.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    num_windows = tokens.numel() // seqlen
    if num_windows == 0:
        raise CalibrationError(_too_short("The text", tokens.numel(), seqlen))
    return tokens[: num_windows * seqlen].view(num_windows, seqlen)


def random_windows(tokens: Tensor, samples: int, seqlen: int, seed: int, *, halves: bool = False) -> Tensor:
    """Windows [samples, seqlen] at random places of the text; the same for the same seed.

    Args:
        tokens: [tokens] of the text.
        samples: how many windows.
        seqlen: tokens in each.
        seed: of the places.
        halves: cut the text in alternate blocks first, and draw windows 0, 2, 4 ... in the blocks 0, 2, 4 ... and the others in
            the others: no token of the text is in windows of both halves.

    Raises:
        CalibrationError: the text is shorter than one window, or with `halves` than two.
    """
    if tokens.numel() < seqlen:
        raise CalibrationError(_too_short("The calibration text", tokens.numel(), seqlen))
    generator = torch.Generator().manual_seed(seed)
    if not halves:
        starts = torch.randint(tokens.numel() - seqlen + 1, (samples,), generator=generator)
        return tokens.unfold(0, seqlen, 1)[starts]
    if tokens.numel() < 2 * seqlen:
        raise CalibrationError(
            f"The calibration text has {number_of(tokens.numel(), 'token')}, less than two windows of {seqlen}: expected one "
            "to prune on and another one to score on. Give more text or a smaller --seqlen."
        )
    edges = block_edges(tokens.numel(), seqlen)
    starts = torch.empty(samples, dtype=torch.int64)
    for half in (0, 1):
        places = torch.cat(
            [torch.arange(a, b - seqlen + 1) for a, b in zip(edges[half::2], edges[half + 1 :: 2], strict=False)]
        )
        starts[half::2] = places[torch.randint(len(places), (len(starts[half::2]),), generator=generator)]
    return tokens.unfold(0, seqlen, 1)[starts]


def block_edges(length: int, window: int) -> list[int]:
    """Where alternate blocks of a text begin and end: an even number of them, each longer than a window where that can be.

    Args:
        length: of the text, and `window`: of a window, in the same units.
        window: at most half of the text.
    """
    num_blocks = max(2, min(MAX_BLOCKS, 2 * (length // (2 * WINDOWS_PER_BLOCK * window))))
    return [length * index // num_blocks for index in range(num_blocks + 1)]


def check_coverage(tokens: int, samples: int, seqlen: int, *, is_exact: bool = True) -> None:
    """Warn where the windows of a text must overlap, and refuse where they must repeat.

    Args:
        tokens: of the text.
        samples: windows that are drawn.
        seqlen: tokens in each.
        is_exact: or about so many.

    Raises:
        CalibrationError: fewer places than windows.
    """
    places = tokens - seqlen + 1
    text = f"The calibration text has {'' if is_exact else 'about '}{number_of(tokens, 'token')}"
    if 1 <= places < samples:
        raise CalibrationError(
            f"{text}: {number_of(places, 'place')} for a window of {seqlen}, fewer than the {samples:,} windows that are "
            "wanted, so that some would be the same. Give more text, or smaller --samples or --seqlen."
        )
    if samples * seqlen > tokens:
        warnings.warn(
            f"{text}, which {samples:,} windows of {seqlen:,} cover {samples * seqlen / tokens:.2f} times on average: windows "
            "overlap, and tell less than as many of a longer text. Give more text, or smaller --samples.",
            CalibrationWarning,
            stacklevel=3,
        )


def _too_short(what: str, tokens: int, seqlen: int) -> str:
    return f"{what} has {number_of(tokens, 'token')}, less than one window of {seqlen}: give more text or a smaller --seqlen."
