"""Where each layer stands in a picture: stacks of blocks side by side, a row for each kind of layer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Site = Mapping[str, Any]
"""A weight, as the record has it."""

MOST_COLUMNS = 64
MOST_ROWS = 24
MOST_PANELS = 6
"""What a page shows at most, so that it stays small whatever the model."""

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Panel:
    """A stack of blocks."""

    title: str
    """What the names of its layers begin with; empty where they have no blocks."""

    columns: tuple[str, ...]
    """Blocks: `3`, or `6-7` where there are more than fit."""

    rows: tuple[tuple[str, tuple[tuple[Site, ...], ...]], ...]
    """Kinds of layer, each with the sites of every column."""

    num_more: int = 0
    """Kinds that were left away."""


def panels(sites: Sequence[Site]) -> list[Panel]:
    """The sites of a model in panels, in order. A name's first number is its block, what comes after it the kind of layer."""
    stacks: dict[str, list[tuple[int, str, Site]]] = {}
    for site in sites:
        name = str(site["name"])
        if (found := _BLOCK.search(name)) is not None:
            stacks.setdefault(name[: found.start()], []).append((int(found[1]), name[found.end() :].lstrip("."), site))
        else:
            stacks.setdefault("", []).append((-1, name, site))
    return [_panel(title, members) for title, members in list(stacks.items())[:MOST_PANELS]]


def _panel(title: str, members: list[tuple[int, str, Site]]) -> Panel:
    if len({kind for _, kind, _ in members}) > MOST_ROWS:  # experts: one row for all of a kind
        members = [(block, _NUMBER.sub("*", kind), site) for block, kind, site in members]
    blocks = sorted({block for block, _, _ in members})
    width = -(-len(blocks) // MOST_COLUMNS)
    parts = [blocks[first : first + width] for first in range(0, len(blocks), width)]
    column_of = {block: column for column, part in enumerate(parts) for block in part}
    cells: dict[str, list[list[Site]]] = {}
    for block, kind, site in members:
        cells.setdefault(kind, [[] for _ in parts])[column_of[block]].append(site)
    labels = _short(list(cells))
    rows = [(labels[kind], tuple(map(tuple, row))) for kind, row in cells.items()]
    columns = tuple("" if part == [-1] else str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return Panel(title, columns, tuple(rows[:MOST_ROWS]), max(0, len(rows) - MOST_ROWS))


def _short(kinds: list[str]) -> dict[str, str]:
    """The last part of each name where that is enough to tell them apart."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: short if last.count(short) == 1 and short != "*" else kind for kind, short in zip(kinds, last, strict=True)}
