"""Progress: the one way in which long work tells how far it is."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called whenever something is finished; how it is shown, or whether, is the caller's business."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """`done` of `total` steps are finished (layers, windows, cells, seconds), and `what` was the last of them."""


Say = Callable[[str], None]
"""Called with a step in words."""


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


def unsaid(text: str) -> None:
    """Words that nobody reads."""
