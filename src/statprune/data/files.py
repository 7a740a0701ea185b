"""Text files, joined by blank lines, of which only what is asked for is in memory."""

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from statprune.errors import CalibrationError

JOINT = b"\n\n"
PIECE = 1 << 17
"""Characters that are read at once."""

_BOM = b"\xef\xbb\xbf"
_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PK\x03\x04": "zip",
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"%PDF": "PDF", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
"""What the first bytes of files say that are no UTF-8 text."""

_RECORDS = {".jsonl", ".ndjson", ".parquet", ".arrow"}
"""Files of records, of which one column is the text."""


@dataclass(frozen=True)
class _Part:
    """A file, or what joins two."""

    start: int
    """Byte of the text."""

    size: int
    path: Path | None
    skipped: int = 0
    """Bytes of the file before its text."""


class Text:
    """UTF-8 text files, joined by blank lines: a stream of pieces, or the neighbourhood of a place.

    A byte order mark is no part of the text, and line ends are newlines.

    Args:
        paths: at least one.

    Raises:
        CalibrationError: a file is missing, or is not plain text. Where a file is not UTF-8 further on, or has NUL in it, so do
            the methods, when they come there.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._parts: list[_Part] = []
        for path in map(Path, paths):
            start = self.num_bytes
            if self._parts:
                self._parts.append(_Part(start, len(JOINT), None))
            skipped = _check_file(path)
            self._parts.append(_Part(self.num_bytes, path.stat().st_size - skipped, path, skipped))

    @property
    def num_bytes(self) -> int:
        """Of the whole text, joints and carriage returns among them."""
        return self._parts[-1].start + self._parts[-1].size if self._parts else 0

    def pieces(self) -> Iterator[str]:
        """The text from its beginning, `PIECE` characters of a file at a time."""
        for part in self._parts:
            if part.path is None:
                yield JOINT.decode()
                continue
            try:
                with part.path.open(encoding="utf-8-sig") as file:
                    while piece := file.read(PIECE):
                        yield _checked(piece, part.path)
            except (OSError, UnicodeDecodeError) as e:
                raise _unreadable(part.path, e) from e

    def between(self, places: Sequence[int]) -> list[str]:
        """The texts between places that follow each other, each place moved on to where a character begins.

        Args:
            places: bytes of the text, in [0, `num_bytes`], ascending.
        """
        content = self._bytes(places[0], places[-1] + 3)
        cuts = [place - places[0] for place in places]
        for index, cut in enumerate(cuts):
            while cut < len(content) and content[cut] & 0xC0 == 0x80:
                cut += 1
            cuts[index] = cut
        try:
            texts = [content[start:stop].decode() for start, stop in itertools.pairwise(cuts)]
        except UnicodeDecodeError as e:
            raise _unreadable(self._at(places[0]), e) from e
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        return [_checked(newlines.decode(text), self._at(places[0])) for text in texts]

    def _bytes(self, start: int, stop: int) -> bytes:
        found = []
        for part in self._parts:
            first, last = max(start, part.start) - part.start, min(stop, part.start + part.size) - part.start
            if first >= last:
                continue
            if part.path is None:
                found.append(JOINT[first:last])
                continue
            try:
                with part.path.open("rb") as file:
                    file.seek(part.skipped + first)
                    found.append(file.read(last - first))
            except OSError as e:
                raise _unreadable(part.path, e) from e
        return b"".join(found)

    def _at(self, place: int) -> Path:
        return next(part.path for part in reversed(self._parts) if part.path is not None and part.start <= place)


def read_text(paths: Sequence[str | Path]) -> str:
    """The files' text, joined by blank lines; errors as for `Text`."""
    return "".join(Text(paths).pieces())


def _check_file(path: Path) -> int:
    """The bytes before the text: those of a byte order mark."""
    if path.is_dir():
        raise CalibrationError(f"The text file {path} cannot be read: it is a folder. Give its files, as in {path}/*.txt.")
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError as e:
        raise _unreadable(path, e) from e
    if path.suffix.lower() in _RECORDS:
        raise CalibrationError(
            f"The text file {path} cannot be read: {path.suffix} is a file of records, not plain text. Calibrate on it as a "
            f"data set (its folder, as in {path.parent}:::COLUMN, with `datasets` installed), or write its text to a .txt file."
        )
    for magic, kind in _MAGIC.items():
        if begin.startswith(magic):
            raise CalibrationError(
                f"The text file {path} cannot be read: it is {kind}. Expected plain UTF-8 text: unpack or convert it first."
            )
    return len(_BOM) if begin.startswith(_BOM) else 0


def _checked(text: str, path: Path) -> str:
    if "\0" in text:
        raise CalibrationError(
            f"The text file {path} cannot be read: it has NUL characters in it, so it is binary or UTF-16. Expected UTF-8 text."
        )
    return text


def _unreadable(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(f"The text file {path} cannot be read: {error}. Expected UTF-8 text.")
