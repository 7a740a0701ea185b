"""A place for a folder that is not there yet: taken before work begins, given its name when everything is written.

PARENT/.NAME.1a2b3c4d.partial/   made at once: whatever forbids writing shows before the work, and not after it
    lock                         held by the process that works; a folder that nobody holds is a leftover
    new/                         what is written; gets the name PARENT/NAME when it is finished
    old/                         the folder that it replaces, between the two renames
    journal.jsonl                what a long run has finished: where it is there, a leftover is kept to go on with
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from statprune.errors import CheckpointError, first_line, number_of
from statprune.progress import Say
from statprune.ranks import ProcessGroup, gather

LOCK, NEW, OLD, JOURNAL = "lock", "new", "old", "journal.jsonl"
RESCUED = ".rescued"
MOST_BYTES_OF_A_NAME = 255
SECONDS_TO_LOCK = 60.0
"""A hidden folder without a lock file is a leftover when it is older: a process takes its lock at once."""


def warn(text: str) -> None:
    """Say something to those who have said nothing about how they want to be told."""
    warnings.warn(text, stacklevel=3)


class Reserved:
    """The place of an output, held until it is published or released; a context manager that releases it.

    A process that is killed leaves the hidden folder behind, and the next reservation of the same output removes it. One that
    ends without having released it removes it itself. Where a journal lies in it, it stays in both cases: a reservation that
    `resumes` takes it over, and one that does not leaves it alone.

    Args:
        output: the folder to write, or to replace.
        is_replaceable: raises CheckpointError where a folder that stands in the place of the output may not be replaced;
            None: nothing may be.
        say: called with what was removed, in words.
        resumes: whether to go on in a folder that an earlier run has left with a journal.
        restarts: whether to remove such a folder instead.

    Attributes:
        output: the folder that will be there in the end.
        folder: where to write until then; empty, but for what an earlier run has left there to go on with.
        journal: the file to write into what is finished.

    Raises:
        CheckpointError: something stands in its place, or it cannot be written.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        is_replaceable: Callable[[Path], None] | None = None,
        say: Say = warn,
        resumes: bool = False,
        restarts: bool = False,
    ) -> None:
        self.output = Path(output)
        self._is_replaceable = is_replaceable
        with _explained(self.output):
            taken = _clear_leftovers(self.output, say, resumes=resumes and not restarts, restarts=restarts)
            try:
                refuse_existing(self.output, is_replaceable=is_replaceable)
            except BaseException:
                if taken is not None:
                    taken[1].release()
                raise
            made = [parent for parent in (self.output.parent, *self.output.parent.parents) if not parent.exists()]
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                partial, lock = taken or _hidden_folder(self.output)
                (partial / NEW).mkdir(exist_ok=True)
            except BaseException:
                _remove_empty(made)
                raise
        self.folder, self.journal = partial / NEW, partial / JOURNAL
        self._lock = lock
        self.release = weakref.finalize(self, _clean, partial, lock, made, os.getpid())
        """Give the place back, and remove what was written and not published; again and again does no harm."""

    def __enter__(self) -> "Reserved":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def has_work(self) -> bool:
        """Whether the journal names something that is finished, which will not be removed."""
        return _has_work(self.journal.parent)

    def check_held(self) -> None:
        """Raise CheckpointError where the place was given back; make its folder again where somebody has removed it."""
        if not self.release.alive:
            raise CheckpointError(f"The place of the output {self.output} was given back already: reserve it again.")
        with _explained(self.output):
            self.folder.mkdir(parents=True, exist_ok=True)

    def check_room(self, num_bytes: int, what: str = "") -> None:
        """Raise CheckpointError where the disk has no room for so many bytes; `what` says more about them."""
        with _explained(self.output):
            free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise CheckpointError(
                f"The output {self.output} needs {_size(num_bytes)}{what and f', {what}'}, and its disk has {_size(free)} "
                "left. Make room, or choose an output on another disk."
            )

    def publish(self) -> Path:
        """Give what was written its name, and the place back.

        Raises:
            CheckpointError: something stands in its place by now, or it cannot be renamed; what was written is kept where
                it is until the place is released.
        """
        with _explained(self.output):
            refuse_existing(self.output, is_replaceable=self._is_replaceable)
            old = self.folder.parent / OLD
            if self.output.exists():
                os.rename(self.output, old)
            try:
                os.rename(self.folder, self.output)
            except BaseException:
                if old.exists():
                    os.rename(old, self.output)
                raise
            self.journal.unlink(missing_ok=True)
        self.release()
        return self.output

    def keep(self) -> Path:
        """Give what was written another name beside the output, or where that fails in the system's temporary folder."""
        try:
            target = _beside(self.output)
        except OSError:
            target = _in_temporary_folder(self.output)
        target.rmdir()
        return Path(shutil.move(self.folder, target))

    def rescue(self, write: Callable[[Path], None]) -> Path | None:
        """Have something written somewhere else: beside the output, or where that fails in the system's temporary folder.

        What was written so far is removed first, which makes room.

        Args:
            write: writes into an empty folder; any error of it counts as a place that does not do.

        Returns:
            The folder; None where it could be written nowhere.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        for make in (_beside, _in_temporary_folder):
            folder: Path | None = None
            try:
                folder = make(self.output)
                write(folder)
                return folder
            except Exception:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
        return None


def seen_by_all(folder: Path | None, process_group: ProcessGroup = None) -> Path:
    """The first rank's folder, on every rank; inside of `together`.

    Args:
        folder: on the first rank, where it is there; on the others it is not looked at.
        process_group: the ranks that take part.

    Raises:
        CheckpointError: not all see it; on every rank alike.
    """
    found, blind = who_sees(folder, process_group)
    if blind:
        raise CheckpointError(
            f"{found}, which the first rank has made, is not seen by {number_of(len(blind), 'rank')} ({blind}). Expected a "
            "folder on a disk that all ranks see under the same name."
        )
    return found


def who_sees(folder: Path | None, process_group: ProcessGroup = None) -> tuple[Path, list[int]]:
    """The first rank's folder, and the ranks that do not see it; as `seen_by_all`."""
    what = "where the output is made"
    found = Path(gather(None if folder is None else os.path.abspath(folder), process_group, what)[0])
    return found, [rank for rank, sees in enumerate(gather(found.is_dir(), process_group, what)) if not sees]


def refuse_existing(output: str | Path, *, is_replaceable: Callable[[Path], None] | None = None) -> None:
    """Raise CheckpointError where something stands in the place of the output that may not be replaced.

    Args:
        output: a folder to write.
        is_replaceable: as for `Reserved`.
    """
    output = Path(output)
    with _explained(output):
        try:
            os.lstat(output)
        except FileNotFoundError:
            return
        if output.is_symlink() and not output.exists():
            raise CheckpointError(
                f"The output {output} is a symbolic link to {os.readlink(output)}, which does not exist. Remove the link, or "
                "choose another name."
            )
        if is_replaceable is None:
            raise CheckpointError(
                f"The output {output} exists. Choose another name, or remove it first; nothing is overwritten."
            )
        if output.is_symlink() or not output.is_dir():
            raise CheckpointError(
                f"The output {output} is no folder of its own, and only a folder that statprune wrote is replaced. Choose "
                "another name."
            )
        is_replaceable(output)


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
    """An error of the system as one of ours, with the way out."""
    try:
        yield
    except (OSError, ValueError) as e:  # a ValueError where the name holds a NUL or cannot be encoded
        where = f" ({e.filename})" if isinstance(e, OSError) and e.filename and str(e.filename) != str(output) else ""
        reason = e.strerror if isinstance(e, OSError) and e.strerror else first_line(e)
        raise CheckpointError(
            f"The output {str(output)!r} cannot be written: {reason}{where}. Choose an output in a folder that you can write "
            f"to, with a name of at most {MOST_BYTES_OF_A_NAME} bytes."
        ) from e


def _hidden_folder(output: Path) -> tuple[Path, Any]:
    """A new hidden folder beside the output, and its lock, which is held."""
    for _ in range(100):
        partial = output.parent / f".{_stem(output)}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
        lock = _lock(partial)
        try:
            lock.acquire(timeout=0)
            (partial / NEW).mkdir()
            return partial, lock
        except (Timeout, FileNotFoundError):
            lock.release()  # another process took it for a leftover before it was locked
        except BaseException:
            lock.release()
            shutil.rmtree(partial, ignore_errors=True)
            raise
    raise CheckpointError(f"The output {output} cannot be written: other processes remove its hidden folder again and again.")


def _lock(partial: Path) -> Any:
    # Not of one thread: what ends the process may be another one.
    return FileLock(partial / LOCK, thread_local=False)


def _clean(partial: Path, lock: Any, made: Sequence[Path], process: int) -> None:
    if os.getpid() != process:
        return  # a forked child ends, which never owned it
    is_unfinished = _has_work(partial)
    if not is_unfinished:
        shutil.rmtree(partial, ignore_errors=True)
    lock.release()
    if not is_unfinished:
        shutil.rmtree(partial, ignore_errors=True)  # where an open file cannot be removed
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _clear_leftovers(output: Path, say: Say, *, resumes: bool, restarts: bool) -> tuple[Path, Any] | None:
    """Remove the hidden folders that processes left behind which were killed.

    Returns:
        One of them with a journal, and its lock, which is held, where it is to be gone on with; None where there is none.
    """
    form = re.compile(re.escape(f".{_stem(output)}.") + r"[0-9a-f]{8}\.partial")
    try:
        found = [path for path in output.parent.iterdir() if form.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return None
    taken = None
    for partial in sorted(found):
        if partial.is_symlink() or not _is_abandoned(partial):
            continue
        lock = _lock(partial)
        try:
            lock.acquire(timeout=0)
            if (partial / OLD).exists() and not os.path.lexists(output):
                os.rename(partial / OLD, output)
                say(f"{output} was being replaced when a process ended early, and is back.")
            has_journal = _has_work(partial)
            if has_journal and resumes and taken is None:
                taken = partial, lock
                continue
            if has_journal and not restarts:
                say(f"{partial} holds what 'statprune prune' had done when it ended early; the same command goes on with it.")
            else:
                shutil.rmtree(partial)
                say(f"{partial} was left behind by a process that ended early; it was removed.")
        except Timeout:
            continue
        except OSError as e:
            say(f"{partial} was left behind by a process that ended early, and cannot be removed: {e.strerror}.")
        finally:
            if taken is None or taken[1] is not lock:
                lock.release()
    return taken


def _has_work(partial: Path) -> bool:
    """Whether a journal names something that is finished, in a line behind its first."""
    try:
        return (partial / JOURNAL).read_bytes().count(b"\n") > 1
    except OSError:
        return False


def _is_abandoned(partial: Path) -> bool:
    """Whether it may be a leftover; whether its lock is free will be seen."""
    try:
        return (partial / LOCK).exists() or time.time() - partial.stat().st_mtime > SECONDS_TO_LOCK
    except OSError:
        return False


def _stem(output: Path) -> str:
    """What hidden folders and rescued weights are named after: the output's name, or where it is long a part of it."""
    name = os.fsencode(output.name)
    if len(name) <= 200:
        return output.name
    return f"{output.name[:40]}~{hashlib.sha256(name).hexdigest()[:16]}"


def _beside(output: Path) -> Path:
    """A new folder beside the output."""
    for number in range(1, 1000):
        folder = output.parent / f"{_stem(output)}{RESCUED}{f'-{number}' if number > 1 else ''}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise FileExistsError(f"{output}{RESCUED} exists a thousand times")


def _in_temporary_folder(output: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{_stem(output)}{RESCUED}-"))


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= 10 * size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,} bytes"
