"""How much of what is held out was seen: held-out tokens that stand in a pruning window too."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from statprune.errors import CalibrationWarning

RUN = 24
"""Tokens in a row that are no chance: what two windows share is at least as long, or as long as the window."""

MAX_SHARE = 0.1
"""Of the held-out tokens, without a word: source code with its licences repeats 5 % of itself, elsewhere."""

_BASE = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd number of 64 bits: powers of it mix tokens into one number."""


def shared_share(pruning: Sequence[Mapping[str, Tensor]], scoring: Sequence[Mapping[str, Tensor]]) -> float:
    """The share of the held-out tokens, in [0, 1], that stand in a run of `RUN` tokens which a pruning window has too.

    Windows drawn at random places of a short text overlap, and so do halves of a text that repeats itself. Where all windows
    are shorter than `RUN`, runs are as long as the longest; shorter windows are not looked at.

    Args:
        pruning: batches of windows: `input_ids` [batch, length], and perhaps an `attention_mask`, where 0 is padding.
        scoring: the same, of the held-out half.
    """
    seen_in, held_out = _windows(pruning), _windows(scoring)
    length = min(RUN, max(map(len, [*seen_in, *held_out])))
    seen = [_runs(window, length) for window in seen_in if len(window) >= length]
    rows = [_runs(window, length) for window in held_out if len(window) >= length]
    if not seen or not rows:
        return 0.0
    is_seen = torch.isin(torch.cat(rows), torch.cat(seen)).int()
    num_shared = 0
    for starts in is_seen.split([len(row) for row in rows]):
        # A token is shared where a run has begun that has not ended.
        begun = torch.nn.functional.pad(starts, (0, length - 1)).cumsum(0)
        ended = torch.nn.functional.pad(starts, (length, 0)).cumsum(0)[: len(begun)]
        num_shared += int((begun > ended).sum())
    return num_shared / sum(len(row) + length - 1 for row in rows)


def _windows(batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Each window's tokens, without padding."""
    return [
        tokens if mask is None else tokens[mask != 0]
        for batch in batches
        for tokens, mask in zip(
            batch["input_ids"].long().cpu(), batch.get("attention_mask", [None] * len(batch["input_ids"])), strict=True
        )
    ]


def _runs(window: Tensor, length: int) -> Tensor:
    """A number for each run of so many tokens, [runs], int64; the same for the same run, and as good as never otherwise."""
    numbers = torch.zeros(len(window) - length + 1, dtype=torch.int64)
    for offset in range(length):
        numbers = numbers * _BASE + window[offset : offset + len(numbers)]
    return numbers


def warn_of_shared(share: float) -> None:
    """Say so where scores are flattered."""
    if share > MAX_SHARE:
        warnings.warn(
            f"{100 * share:.0f} % of the held-out tokens stand in a window to prune on too, so that scores flatter what fits "
            "most: the windows overlap, or the text repeats itself. Draw them with calibration_windows(..., halves=True), "
            "which cuts the text first, or from more text.",
            CalibrationWarning,
            stacklevel=4,
        )
