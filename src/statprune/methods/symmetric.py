"""Products of all pairs of channels, of which the blocks on and above the diagonal are computed and the others copied.

columns of tokens  | 1 2 3       X_1^T X_1   X_1^T X_2   X_1^T X_3
                                             X_2^T X_2   X_2^T X_3      added with every batch
                                                         X_3^T X_3      mirrored once, when somebody reads it
"""

from collections.abc import Iterator

from torch import Tensor

from statprune.methods.precision import full_precision

NARROW, WIDE = 256, 2048
"""Columns of a block on a CPU, and elsewhere, where a product must be large to be worth its start."""

TOKENS = 2048
"""That are converted to float32 at a time."""


def add_upper_(gram: Tensor, tokens: Tensor) -> None:
    """Add the products of all pairs of channels in place, in float32; what lies below the diagonal means nothing afterwards.

    Args:
        gram: [channels, channels], float32.
        tokens: [tokens, channels], any float dtype, on the same device.
    """
    with full_precision(gram.device.type):
        for some_TI in tokens.split(TOKENS):
            narrow_TI = some_TI.float()
            for start, end in _blocks(gram):
                gram[start:end, start:].addmm_(narrow_TI[:, start:end].t(), narrow_TI[:, start:])


def mirror_(gram: Tensor) -> Tensor:
    """Copy what lies above the diagonal of [..., channels, channels] to below it, in place; symmetric to the bit."""
    for start, end in _blocks(gram):
        corner_PP = gram[..., start:end, start:end]
        corner_PP.copy_(corner_PP.triu() + corner_PP.triu(1).mT)
        for low in range(end, gram.shape[-1], end - start):  # squares, which a cache holds while they are turned
            high = low + end - start
            gram[..., low:high, start:end] = gram[..., start:end, low:high].mT
    return gram


def _blocks(gram: Tensor) -> Iterator[tuple[int, int]]:
    size, width = gram.shape[-1], NARROW if gram.device.type == "cpu" else WIDE
    for start in range(0, size, width):
        yield start, min(start + width, size)
