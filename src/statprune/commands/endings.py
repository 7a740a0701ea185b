"""How a command ends: with its result, or with one line that says why not, and the status that belongs to it."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from statprune.errors import StatpruneError, first_line

FAILED, MISUSED = 1, 2
TRACEBACK = "STATPRUNE_TRACEBACK"
"""The environment variable with which the traceback of any error is shown."""

_PACKAGE = Path(__file__).parents[1]


class UsageError(SystemExit):
    """A wrong option: explained on standard error already."""

    def __init__(self, message: str) -> None:
        super().__init__(MISUSED)
        self.message = message


@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
    """The numbers of the signals that came; each raises KeyboardInterrupt, so that what was begun is cleaned up.

    A library may make another error of it: whatever is raised when a signal has come is its consequence.
    """
    came: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    # A signal that is ignored, as Ctrl-C is where a script runs the command in the background, stays ignored.
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(number: int) -> tuple[str, int]:
    """What a signal did, in a word, and the status that shells know it by."""
    return ("terminated" if number == signal.SIGTERM else "interrupted"), 128 + number


def explain(error: Exception) -> str:
    """An error in a line. One of ours explains itself; of others it says what to do."""
    if isinstance(error, StatpruneError):
        return str(error)
    what = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    if _is_out_of_memory(error):
        return (
            f"Out of memory: {first_line(error)}. Less is needed with a smaller --batch-size, --samples or --seqlen, or with "
            "--dtype bfloat16; --device cpu has the whole machine's."
        )
    if isinstance(error, OSError):
        return f"The system refused: {first_line(error)}."
    return (
        f"This is a bug in statprune, or in what it calls: {what}{_place(error)}. Run the same with {TRACEBACK}=1 in the "
        "environment for the traceback, and report it."
    )


def show_traceback(error: BaseException) -> None:
    """Where it was asked for."""
    if wants_traceback():
        traceback.print_exception(error, file=sys.stderr)


def wants_traceback() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def _is_out_of_memory(error: Exception) -> bool:
    torch: Any = sys.modules.get("torch")  # where it was not imported it raised nothing
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _place(error: BaseException) -> str:
    """The last line of our own that was on the way to the error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_PACKAGE)]
    return f" (at {Path(frames[-1].filename).relative_to(_PACKAGE)}:{frames[-1].lineno})" if frames else ""
