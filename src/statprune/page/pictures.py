"""Pictures of a report: heat maps as tables, whose numbers can be read and copied, bars, and a mask as SVG.

Colours are classes (`c0` to `c7`: little to much; `d0` to `d6`: below and above a middle), which `style` gives a palette for
light, for dark and for print.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from statprune.page.panels import Panel, Site

NUM_STEPS = 8
ZOOM = (32, 64)
"""Rows and columns of a mask that are shown one by one."""
OVERVIEW = (24, 48)
"""Rows and columns of tiles that a whole mask is shown in."""

USUAL = 0.98
"""So many of the values have colours of their own where the others are far beyond."""

_FEW = 12
_MANY = 32
"""So many columns have room for their numbers on a phone, and on a desk."""


def percent(share: float) -> str:
    """A share for people, in percent, with as many digits as matter; without the sign."""
    value = 100 * share
    return f"{value:.1f}" if 0 < abs(value) < 9.95 else f"{value:.0f}"


class Scale:
    """Colours from 0 up: eight steps, and what is beyond the usual range has the last one."""

    def __init__(self, values: Sequence[float], *, low: float = 0.0) -> None:
        ordered = sorted(values)
        usual = ordered[int(USUAL * (len(ordered) - 1))]
        self.low, self.is_cut = low, ordered[-1] > 2 * usual > 0
        self.high = usual if self.is_cut else ordered[-1]

    def __call__(self, value: float) -> str:
        """The class of a value's colour."""
        part = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return f"c{max(0, min(NUM_STEPS - 1, int(NUM_STEPS * part)))}"

    def legend(self) -> str:
        """What the colours mean."""
        steps = [f"c{step}" for step in range(NUM_STEPS)]
        above = "\u2265 " if self.is_cut else ""
        return _legend(steps, f"{percent(self.low)} %", "", f"{above}{percent(self.high)} %")


class Around:
    """Colours on both sides of 1, by the ratio: seven steps."""

    def __init__(self, values: Sequence[float]) -> None:
        reaches = sorted(abs(math.log(value)) for value in values if value > 0) or [0.0]
        usual = reaches[int(USUAL * (len(reaches) - 1))]
        self.is_cut = reaches[-1] > 2 * usual
        self.reach = max(0.01, usual if self.is_cut else reaches[-1])

    def __call__(self, value: float) -> str:
        """The class of a value's colour."""
        part = math.log(value) / self.reach if value > 0 else -1.0
        return f"d{3 + round(3 * max(-1.0, min(1.0, part)))}"

    def legend(self) -> str:
        """What the colours mean."""
        low, high = (f"{100 * math.exp(sign * self.reach):.0f} %" for sign in (-1, 1))
        below, above = ("\u2264 ", "\u2265 ") if self.is_cut else ("", "")
        return _legend([f"d{step}" for step in range(7)], below + low, "100 %", above + high)


def _legend(steps: Sequence[str], low: str, middle: str, high: str) -> str:
    swatches = "".join(f"<i class={step}></i>" for step in steps)
    texts = "".join(f"<span>{text}</span>" for text in (low, middle, high))
    return f"<div class=legend aria-hidden=true><div class=swatches>{swatches}</div><div class=ends>{texts}</div></div>"


def heat_map(
    panel: Panel, value: Callable[[Site], float | None], scale: Scale | Around, *, corner: str = "block", last: str = "median"
) -> str:
    """A table of a panel's layers, a row for each kind, coloured by a share that each layer has.

    Args:
        panel: which layer stands where; a cell of several shows their median.
        value: of a layer; None leaves the cell empty.
        scale: the colours.
        corner: over the kinds.
        last: over the medians of the rows.
    """
    num_columns = len(panel.columns)
    every = 1 if num_columns <= _FEW else -(-num_columns // 8)
    heads = "".join(f"<th scope=col>{head if index % every == 0 else ''}" for index, head in enumerate(panel.columns))
    body = []
    for kind, cells in panel.rows:
        shown = [[found for site in cell if (found := value(site)) is not None] for cell in cells]
        medians = [statistics.median(cell) if cell else None for cell in shown]
        known = [median for median in medians if median is not None]
        row = "".join("<td>" if median is None else f"<td class={scale(median)}>{percent(median)}" for median in medians)
        total = f"<td class=sum>{percent(statistics.median(known))}" if known and num_columns > 1 else "<td class=sum>"
        body.append(f"<tr><th scope=row>{escape(kind) or 'layer'}{row}{total}")
    size = "few" if num_columns <= _FEW else "many" if num_columns <= _MANY else "many most"
    title = f"<caption>{escape(panel.title)}</caption>" if panel.title else ""
    more = f"<p class=note>and {panel.num_more} more kinds of layer</p>" if panel.num_more else ""
    return (
        f'<table class="heat {size}" style="--columns:{num_columns}">{title}'
        f"<thead><tr><th>{corner if num_columns > 1 else ''}{heads}<th class=sum>{last if num_columns > 1 else ''}</thead>"
        f"<tbody>{''.join(body)}</tbody></table>{more}"
    )


def bars(rows: Iterable[tuple[str, float, str]]) -> str:
    """Horizontal bars from 0, each with a label and its value in words; the longest fills the width.

    Args:
        rows: (label, value, the value in words); the texts are escaped here.
    """
    rows = list(rows)
    longest = max([value for _, value, _ in rows], default=0.0) or 1.0
    return (
        "<dl class=bars>"
        + "".join(
            f'<dt>{escape(label)}<dd><span class=track><b style="width:{100 * value / longest:.1f}%"></b></span>'
            f"<span class=value>{escape(words)}</span>"
            for label, value, words in rows
        )
        + "</dl>"
    )


def zoom(keep: Tensor, group: int | None) -> str:
    """The corner of a mask, weight by weight.

    Args:
        keep: [out, in], bool, True = kept.
        group: so many columns stand together, as in an N:M pattern.
    """
    part = keep[: ZOOM[0], : ZOOM[1]].cpu()
    rows, columns = part.shape
    group = group if group and group <= columns else 8
    step = 10 * group + 4
    width, height = 10 * columns + 4 * (-(-columns // group) - 1), 10 * rows
    cells = "".join(f"M{10 * column + 4 * (column // group)} {10 * row}h9v9h-9z" for row, column in part.nonzero().tolist())
    blank = "".join(f"M{10 * column} 0h9v9h-9z" for column in range(group))
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="Which weights are kept: {rows} outputs, {columns} inputs">'
        f"<defs><pattern id=cells width={step} height=10 patternUnits=userSpaceOnUse>"
        f'<path class=gone d="{blank}"/></pattern></defs>'
        f'<rect width={width} height={height} fill="url(#cells)"/><path class=kept d="{cells}"/></svg>'
    )


def overview(keep: Tensor) -> tuple[str, str]:
    """A whole mask as tiles, by the share of weights that each keeps, and the legend; empty where all are the same.

    Args:
        keep: [out, in], bool, True = kept.
    """
    rows, columns = (min(most, size) for most, size in zip(OVERVIEW, keep.shape, strict=True))
    edges = [keep.shape[0] * row // rows for row in range(rows + 1)]
    lines = [keep[first:end].float().mean(dim=0) for first, end in itertools.pairwise(edges)]
    shares = adaptive_avg_pool1d(torch.stack(lines), columns).cpu()
    values = shares.flatten().tolist()
    if max(values) - min(values) < 0.005:
        return "", ""
    scale = Scale(values, low=min(values))
    tiles: dict[str, list[str]] = {}
    for row, line in enumerate(shares.tolist()):
        for column, share in enumerate(line):
            tiles.setdefault(scale(share), []).append(f"M{column} {row}h1v1h-1z")
    paths = "".join(f'<path class={step} d="{"".join(parts)}"/>' for step, parts in sorted(tiles.items()))
    label = f"Share of weights kept, {rows} by {columns} tiles"
    svg = f'<svg viewBox="0 0 {columns} {rows}" role=img shape-rendering=crispEdges aria-label="{label}">{paths}</svg>'
    return svg, scale.legend()
