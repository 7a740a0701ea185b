"""The terminal that is there: steps and progress, warnings, errors and JSON. What each command shows is in `display`."""

import contextlib
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from statprune.errors import CalibrationWarning
from statprune.plain import finite
from statprune.progress import Progress, silent

LONGEST_SILENCE = 60.0
"""Seconds without a line, where there is no terminal."""


class _Console(Console):
    """Goes on in silence where nobody reads any more, as behind `| head`: the work is not for the reader alone."""

    def tell(self, text: str) -> None:
        """Prose, broken between words on a terminal; in a file a line stays a line."""
        self.print(text, soft_wrap=not self.is_terminal)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


console = _Console(highlight=False, emoji=False)
"""What the command has to say; quiet with --json and --quiet."""

notes = _Console(stderr=True, highlight=False, emoji=False)
"""Progress, steps and warnings; quiet with --quiet."""

errors = _Console(stderr=True, highlight=False, emoji=False)
"""Never quiet; nor is what prints JSON."""


@contextlib.contextmanager
def showing(*, as_json: bool = False, quiet: bool = False) -> Iterator[None]:
    """Only what these options let through, and warnings of Python as a line each."""
    before = console.quiet, notes.quiet
    console.quiet, notes.quiet = as_json or quiet, quiet
    try:
        with only_own_bars(), _signs_of_life(), warnings.catch_warnings():
            warnings.simplefilter("default", CalibrationWarning)
            warnings.showwarning = _show_warning
            if quiet:
                logging.disable(logging.WARNING)  # of transformers and the hub
            yield
    finally:
        console.quiet, notes.quiet = before
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _signs_of_life() -> Iterator[None]:
    """Without a terminal, a line whenever none came for long: work such as loading and exporting has no steps to count."""
    if notes.quiet or notes.is_terminal:
        yield
        return
    ended = threading.Event()
    _latest.text, _latest.at = "", time.monotonic()

    def watch() -> None:
        began = _latest.at
        while not ended.wait(max(0.05, _latest.at + LONGEST_SILENCE - time.monotonic())):
            if time.monotonic() - _latest.at >= LONGEST_SILENCE:
                text = _latest.text
                say(f"at work, {_clock(time.monotonic() - began)} so far{f'; the last was {text}' if text else ''}")
                _latest.text = text

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class _Latest:
    """What was said last."""

    text = ""
    at = 0.0


_latest = _Latest()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    notes.tell(f"[yellow]warning:[/] {escape(' '.join(str(message).split()))}")


def say(text: str) -> None:
    """A step in words."""
    _latest.text, _latest.at = text, time.monotonic()
    notes.tell(f"[dim]·[/] {escape(text)}")


def show_text(text: str) -> None:
    """A text as it is, such as a table in Markdown or a command to copy."""
    console.print(escape(text), soft_wrap=True)


def show_error(text: str) -> None:
    """An error that explains itself needs no traceback."""
    errors.tell(f"[bold red]error:[/] {escape(text)}")


def show_end(text: str) -> None:
    """That somebody ended the command."""
    errors.tell(escape(text))


def show_json(data: Mapping[str, Any]) -> None:
    """One JSON object on standard output. What JSON has no number for, NaN and infinity, becomes null."""
    _Console().out(json.dumps(finite(data), indent=1, allow_nan=False, ensure_ascii=False), highlight=False)


@contextlib.contextmanager
def progress(title: str, *, each: bool = False) -> Iterator[Progress]:
    """How far some work is, on standard error: a bar, or where there is no terminal a line for each finished tenth.

    Nothing is shown before the first step is finished, so that work that does not apply leaves nothing behind. Without a
    terminal a minute does not pass in silence, if steps are finished in it.

    Args:
        title: what the work is.
        each: without a terminal, a line for each finished step: for steps that take long.
    """
    if notes.quiet:
        yield silent
        return
    shown = _Bar(title) if notes.is_terminal else _Lines(title, each=each)
    try:
        yield shown
    finally:
        shown.close()


class _Bar:
    def __init__(self, title: str) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("[dim]{task.fields[what]}"),
        )  # fmt: skip
        self.bar = rich.progress.Progress(*columns, console=notes, transient=True)
        self.task = self.bar.add_task(escape(title), total=None, what="")
        self.room = max(8, notes.width - len(title) - 20 - len(" 1000/1000 0:00:00 0:00:00  "))

    def __call__(self, done: int, total: int, what: str) -> None:
        what = what if len(what) <= self.room else f"{what[: self.room - 1]}…"
        self.bar.update(self.task, completed=done, total=total, what=escape(what))
        if done:
            self.bar.start()  # here, so that it never shows "0/?"

    def close(self) -> None:
        self.bar.stop()


class _Lines:
    def __init__(self, title: str, *, each: bool) -> None:
        self.title, self.each = title, each
        self.done, self.total, self.shown = 0, 0, 0
        self.started = self.latest = time.perf_counter()
        self.first = (0, self.started)
        self.told = self.started

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.perf_counter()
        if total != self.total or done < self.done:  # other work
            self.shown, self.started, self.first = 0, self.latest, (done, now)
        self.done, self.total, self.latest = done, total, now
        part = done if self.each else 10 * done // max(1, total)
        if part > self.shown or (done and now - self.told >= LONGEST_SILENCE):
            self.shown, self.told = part, now
            left = f"about {_clock(self._left(now))} left" if done < total else "finished"
            last = f": {what}" if what else ""
            say(f"{self.title}: {done} of {total}, {_clock(now - self.started)}, {left}{last}")

    def _left(self, now: float) -> float:
        """Seconds, by those of a step since the first one, which may have begun with preparations."""
        done, since = self.first if self.done > self.first[0] else (0, self.started)
        return (now - since) / (self.done - done) * (self.total - self.done)

    def close(self) -> None:
        """Lines stay."""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def only_own_bars() -> Iterator[None]:
    """Without the bars of transformers, `datasets` and lm-evaluation-harness, which are all tqdm's, between ours.

    Those of a download stay, since nothing else tells how far it is.
    """
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    own = tqdm.__init__

    def without_bar(bar: Any, *args: Any, **kwargs: Any) -> None:
        if not type(bar).__module__.startswith("huggingface_hub"):
            kwargs["disable"] = True
        own(bar, *args, **kwargs)

    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = own
