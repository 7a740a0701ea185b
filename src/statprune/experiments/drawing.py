"""What pictures have in common: colours, markers, panels and axes. Needs matplotlib where something is drawn."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from statprune.experiments.grouping import group, pruned
from statprune.results import DENSE, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart. A criterion has the same colour everywhere.
_COLORS = {
    "magnitude": "#E69F00", "wanda": "#0072B2", "sparsegpt": "#009E73",
    "cvr": "#D55E00", "ria": "#CC79A7", "z-pruner": "#56B4E9",
}  # fmt: skip
_MARKERS = {"magnitude": "s", "wanda": "o", "sparsegpt": "^", "cvr": "D", "ria": "v", "z-pruner": "P"}
_OTHER_COLORS = ("#000000", "#8C6D31", "#7B4173", "#999999")
_OTHER_MARKERS = "h*X<>"  # of another number than the colours, so that a colour comes back with another marker
_DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
GREY = "#555555"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C6D31")
"""For what has no colour of its own, in order."""

MARKERS = "osD^vP*X<>h"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


def panels_of(titles: Collection[str], height: float) -> tuple["Figure", list["Axes"]]:
    """A figure with a panel for each title, two in a row."""
    from matplotlib.figure import Figure

    columns = min(2, len(titles))
    rows = math.ceil(len(titles) / columns)
    drawn = Figure(figsize=(7.0, height * rows), layout="constrained")
    axes = [drawn.add_subplot(rows, columns, index + 1) for index in range(len(titles))]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left")
    return drawn, axes


def plain_ticks(axis: "Axis") -> None:
    """Plain numbers at 1, 2, 5, 10 ... of a logarithmic axis."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def finish_lines(drawn: "Figure", axes: Sequence["Axes"]) -> None:
    """Plain numbers at the ticks; the vertical axis named once a row, and the methods once for all panels."""
    from matplotlib import ticker

    handles: dict[str, Any] = {}
    for index, ax in enumerate(axes):
        plain_ticks(ax.yaxis)
        if not is_wide(ax):
            ax.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        if index % 2 == 0:
            ax.set_ylabel("perplexity")
        handles |= {str(label): handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    handles = dict(sorted(handles.items(), key=lambda item: item[0] == DENSE))
    if len(axes) == 1:
        drawn.legend(handles.values(), handles.keys(), loc="outside right upper")
    else:
        columns = 4 if max(map(len, handles)) <= 20 else 3
        drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def is_wide(ax: "Axes") -> bool:
    """Whether the values span so much that a logarithmic axis reads better, with ticks at 1, 2, 5, 10 ..."""
    return bool(ax.dataLim.y1 > 4 * ax.dataLim.y0 > 0)


def labels_of(results: Iterable[Result]) -> list[str]:
    """The methods' labels, in the order of first appearance."""
    return list(group(pruned(results), lambda r: r.label))


def style_of(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of the criterion; a compensation has another line, and a hollow marker."""
    criterion, _, compensation = label.partition("+")
    parts = [one.partition("+") for one in labels]
    others = [name for name in dict.fromkeys(name for name, _, _ in parts) if name not in _COLORS]
    compensations = list(dict.fromkeys(["", *(name for _, _, name in parts)]))
    if criterion in _COLORS:
        color, marker = _COLORS[criterion], _MARKERS[criterion]
    else:
        index = others.index(criterion)
        color, marker = _OTHER_COLORS[index % len(_OTHER_COLORS)], _OTHER_MARKERS[index % len(_OTHER_MARKERS)]
    return {
        "color": color,
        "marker": marker,
        "linestyle": _DASHES[compensations.index(compensation) % len(_DASHES)],
        "markerfacecolor": "white" if compensation else color,
    }
