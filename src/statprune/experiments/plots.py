"""Pictures of results, as a paper would show them. Needs matplotlib, and no display.

sparsity:     perplexity over unstructured sparsity, a line a method
calibration:  perplexity over the number of calibration sequences, with the spread over seeds
runtime:      seconds of statistics and of pruning, a bar a method
correction:   perplexity over the seconds it took, a point a method, and the front of those that nothing beats in both
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statprune.errors import ExperimentError, nearest
from statprune.experiments.beside import REFERENCE
from statprune.experiments.grid import finished, ratio, spread, three_digits
from statprune.experiments.grouping import group, pattern_of, pruned, sparsity
from statprune.results import DENSE, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURED = ("sparsity", "calibration", "runtime", "correction")
"""The experiments that have a picture."""

# Okabe and Ito's palette, which people with any colour vision can tell apart. A criterion has the same colour everywhere.
_COLORS = {
    "magnitude": "#E69F00", "wanda": "#0072B2", "sparsegpt": "#009E73",
    "cvr": "#D55E00", "ria": "#CC79A7", "z-pruner": "#56B4E9",
}  # fmt: skip
_MARKERS = {"magnitude": "s", "wanda": "o", "sparsegpt": "^", "cvr": "D", "ria": "v", "z-pruner": "P"}
_OTHER_COLORS = ("#000000", "#8C6D31", "#7B4173", "#999999")
_OTHER_MARKERS = "h*X<>"  # of another number than the colours, so that a colour comes back with another marker
_DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_GREY = "#555555"
_STATISTICS, _PRUNING = "#B8C4CE", "#3D5A73"
_STYLE: dict[Any, Any] = {
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
_DOTS_PER_INCH = 200


def plot(experiment: str, results: Sequence[Result], path: str | Path) -> None:
    """Write the picture of an experiment as PNG.

    Raises:
        ExperimentError: the experiment has no picture, no result can be shown, or matplotlib is not installed.
    """
    drawn = figure(experiment, results)
    import matplotlib

    # Ticks are only made when the figure is drawn, and then ask for the style again.
    with matplotlib.rc_context(_STYLE):
        drawn.savefig(path, dpi=_DOTS_PER_INCH, format="png")


def figure(experiment: str, results: Sequence[Result]) -> "Figure":
    """The picture of an experiment, one panel a model (for runtime and calibration: a model and a pattern).

    Raises:
        ExperimentError: as `plot`.
    """
    if experiment not in PICTURED:
        raise ExperimentError(
            f"figure({experiment!r}, ...): there is no picture of it.{nearest(experiment, PICTURED)} "
            f"Known: {', '.join(PICTURED)}."
        )
    measured = [r for r in results if r.error is None and (experiment != "sparsity" or _is_on_the_axis(r))]
    if not pruned(measured):
        raise ExperimentError(f"figure({experiment!r}, ...): got no finished result of a pruned model that it can show.")
    try:
        import matplotlib
    except ImportError as e:
        raise ExperimentError(
            f"figure({experiment!r}, ...): pictures need matplotlib, which is not installed. "
            "Install it with: pip install 'statprune[experiments]'"
        ) from e
    with matplotlib.rc_context(_STYLE):
        return _FIGURES[experiment](measured)


def _sparsity(results: Sequence[Result]) -> "Figure":
    panels = {model: of_model for model, of_model in group(results, lambda r: r.model).items() if pruned(of_model)}
    drawn, axes = _panels(panels, height=3.3)
    for ax, of_model in zip(axes, panels.values(), strict=True):
        _lines(ax, of_model, lambda r: 100 * sparsity(r.pattern), _labels(results))
        ax.set_xlabel("sparsity [%]")
        ax.set_xticks(sorted({100 * sparsity(r.pattern) for r in pruned(of_model)}))
        ax.set_yscale("log")
    _finish_lines(drawn, axes)
    return drawn


def _calibration(results: Sequence[Result]) -> "Figure":
    cells = group(pruned(results), lambda r: (r.model, r.pattern))
    dense = group([r for r in results if r.label == DENSE], lambda r: r.model)
    panels = {f"{model}, {pattern}": [*dense.get(model, []), *cell] for (model, pattern), cell in cells.items()}
    drawn, axes = _panels(panels, height=3.3)
    for ax, of_panel in zip(axes, panels.values(), strict=True):
        _lines(ax, of_panel, lambda r: float(r.samples or 0), _labels(results))
        ticks = sorted({r.samples or 0 for r in pruned(of_panel)})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.set_xlabel("calibration sequences")
        ax.set_yscale("log" if _is_wide(ax) else "linear")
    _finish_lines(drawn, axes)
    return drawn


def _is_on_the_axis(result: Result) -> bool:
    """2:4 is no point of a line through 30, 50 and 70 %."""
    pattern = pattern_of(result.pattern)
    return result.label == DENSE or (pattern is not None and pattern.is_unstructured)


def _lines(ax: "Axes", results: Sequence[Result], position: Callable[[Result], float], labels: Sequence[str]) -> None:
    """Mean perplexity over the position, a line a method with a band of the spread; dense as a horizontal line."""
    for label, of_label in group(pruned(results), lambda r: r.label).items():
        points = sorted(group(of_label, position).items())
        values = [finished(cell, "perplexity") for _, cell in points]
        places, means = [place for place, _ in points], [statistics.fmean(some) for some in values]
        spreads = [spread(some) or 0.0 for some in values]
        style = _style(label, labels)
        ax.plot(places, means, label=label, zorder=3, **style)
        if any(spreads):
            low, high = ([mean + sign * one for mean, one in zip(means, spreads, strict=True)] for sign in (-1, 1))
            ax.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=2)
    if dense := finished([r for r in results if r.label == DENSE], "perplexity"):
        ax.axhline(statistics.fmean(dense), color=_GREY, linewidth=1.0, linestyle=(0, (6, 4)), label=DENSE, zorder=1)


def _runtime(results: Sequence[Result]) -> "Figure":
    cells = group(results, lambda r: (r.model, r.pattern))
    panels = {", ".join(filter(None, key)): cell for key, cell in cells.items()}
    most_bars = max(len(group(of_panel, lambda r: r.label)) for of_panel in panels.values())
    drawn, axes = _panels(panels, height=1.1 + 0.32 * most_bars)
    for ax, of_panel in zip(axes, panels.values(), strict=True):
        methods = group(of_panel, lambda r: r.label)
        statistic, pruning, total = (
            {label: statistics.fmean(finished(cell, name)) for label, cell in methods.items()}
            for name in ("statistics", "pruning", "total")
        )
        unit, scale = ("s", 1.0) if max(total.values()) >= 1 else ("ms", 1000.0)
        first, second = ([scale * part[label] for label in methods] for part in (statistic, pruning))
        ax.barh(list(methods), first, height=0.62, color=_STATISTICS, label="statistics")
        ax.barh(list(methods), second, left=first, height=0.62, color=_PRUNING, label="pruning")
        for row, label in enumerate(methods):
            text = f"{three_digits(scale * total[label])} {unit}"
            if REFERENCE in total and label != REFERENCE:
                text += f" ({ratio(total[REFERENCE] / total[label])})"
            ax.annotate(text, (first[row] + second[row], row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.margins(x=0.45)
        ax.set_xlim(left=0)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(f"time [{unit}]" + (f" (speed over {REFERENCE})" if REFERENCE in total else ""))
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn


def _correction(results: Sequence[Result]) -> "Figure":
    from matplotlib import ticker

    cells = group(pruned(results), lambda r: (r.model, r.pattern))
    dense = group([r for r in results if r.label == DENSE], lambda r: r.model)
    panels = {f"{model}, {pattern}": [*dense.get(model, []), *cell] for (model, pattern), cell in cells.items()}
    drawn, axes = _panels(panels, height=3.0)
    # Where no line tells compensations apart, markers do.
    compensations = dict.fromkeys(label.partition("+")[2] for label in _labels(results))
    markers = dict(zip(compensations, itertools.cycle("osD^vP*X<>h"), strict=False))
    for ax, of_panel in zip(axes, panels.values(), strict=True):
        points = []
        for label, of_label in group(pruned(of_panel), lambda r: r.label).items():
            seconds, perplexity = (statistics.fmean(finished(of_label, name)) for name in ("pruning seconds", "perplexity"))
            points.append((seconds, perplexity))
            style = {**_style(label, _labels(results)), "linestyle": "", "marker": markers[label.partition("+")[2]]}
            ax.plot([seconds], [perplexity], label=label, zorder=3, **style)
        front = [(x, y) for x, y in sorted(points) if all(y <= other for at, other in points if at <= x)]
        ax.step(*zip(*front, strict=True), where="post", color=_GREY, linewidth=0.9, zorder=2)
        if of_dense := finished([r for r in of_panel if r.label == DENSE], "perplexity"):
            ax.axhline(statistics.fmean(of_dense), color=_GREY, linewidth=1.0, linestyle=(0, (6, 4)), label=DENSE, zorder=1)
        ax.set_xlabel("seconds to calibrate and prune")
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.set_yscale("log" if _is_wide(ax) else "linear")
    _finish_lines(drawn, axes)
    return drawn


_FIGURES = {"sparsity": _sparsity, "calibration": _calibration, "runtime": _runtime, "correction": _correction}


def _panels(panels: dict[str, list[Result]], height: float) -> tuple["Figure", list["Axes"]]:
    """A figure with a panel for each title, two in a row."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = Figure(figsize=(7.0, height * rows), layout="constrained")
    axes = [drawn.add_subplot(rows, columns, index + 1) for index in range(len(panels))]
    for ax, title in zip(axes, panels, strict=True):
        ax.set_title(title, loc="left")
    return drawn, axes


def _finish_lines(drawn: "Figure", axes: Sequence["Axes"]) -> None:
    """Plain numbers at the ticks; the vertical axis named once a row, and the methods once for all panels."""
    from matplotlib import ticker

    handles: dict[str, Any] = {}
    for index, ax in enumerate(axes):
        ax.yaxis.set_major_locator(
            ticker.LogLocator(subs=(1, 2, 5)) if _is_wide(ax) else ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
        )
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
        if index % 2 == 0:
            ax.set_ylabel("perplexity")
        handles |= {str(label): handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    handles = dict(sorted(handles.items(), key=lambda item: item[0] == DENSE))
    if len(axes) == 1:
        drawn.legend(handles.values(), handles.keys(), loc="outside right upper")
    else:
        columns = 4 if max(map(len, handles)) <= 20 else 3
        drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def _is_wide(ax: "Axes") -> bool:
    """Whether the values span so much that a logarithmic axis reads better, with ticks at 1, 2, 5, 10 ..."""
    return bool(ax.dataLim.y1 > 4 * ax.dataLim.y0 > 0)


def _labels(results: Iterable[Result]) -> list[str]:
    return list(group(pruned(results), lambda r: r.label))


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
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
