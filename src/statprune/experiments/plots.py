"""Pictures of results, as a paper would show them. Needs matplotlib, and no display.

sparsity:     perplexity over unstructured sparsity, a line a method
calibration:  perplexity over the number of calibration sequences, with the spread over seeds
runtime:      seconds of statistics and of pruning, a bar a method
correction:   perplexity over the seconds it took, a point a method, and the front of those that nothing beats in both
frontier:     what is lost over the time it took, both as shares of SparseGPT's, a panel a model, a colour a pattern
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statprune.errors import ExperimentError, nearest
from statprune.experiments.beside import REFERENCE, cells_by, loss_shares, shares
from statprune.experiments.drawing import (
    GREY,
    MARKERS,
    PALETTE,
    STYLE,
    finish_lines,
    is_wide,
    labels_of,
    panels_of,
    plain_ticks,
    style_of,
)
from statprune.experiments.grid import finished, ratio, spread, three_digits
from statprune.experiments.grouping import by_sparsity, group, pattern_of, pruned, sparsity
from statprune.results import DENSE, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURED = ("sparsity", "calibration", "runtime", "correction", "frontier")
"""The experiments that have a picture."""

_STATISTICS, _PRUNING = "#B8C4CE", "#3D5A73"
_DOTS_PER_INCH = 200


def plot(experiment: str, results: Sequence[Result], path: str | Path) -> None:
    """Write the picture of an experiment as PNG.

    Raises:
        ExperimentError: the experiment has no picture, no result can be shown, or matplotlib is not installed.
    """
    drawn = figure(experiment, results)
    import matplotlib

    # Ticks are only made when the figure is drawn, and then ask for the style again.
    with matplotlib.rc_context(STYLE):
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
    with matplotlib.rc_context(STYLE):
        return _FIGURES[experiment](measured)


def _sparsity(results: Sequence[Result]) -> "Figure":
    panels = {model: of_model for model, of_model in group(results, lambda r: r.model).items() if pruned(of_model)}
    drawn, axes = panels_of(panels, height=3.3)
    for ax, of_model in zip(axes, panels.values(), strict=True):
        _lines(ax, of_model, lambda r: 100 * sparsity(r.pattern), labels_of(results))
        ax.set_xlabel("sparsity [%]")
        ax.set_xticks(sorted({100 * sparsity(r.pattern) for r in pruned(of_model)}))
        ax.set_yscale("log")
    finish_lines(drawn, axes)
    return drawn


def _calibration(results: Sequence[Result]) -> "Figure":
    cells = group(pruned(results), lambda r: (r.model, r.pattern))
    dense = group([r for r in results if r.label == DENSE], lambda r: r.model)
    panels = {f"{model}, {pattern}": [*dense.get(model, []), *cell] for (model, pattern), cell in cells.items()}
    drawn, axes = panels_of(panels, height=3.3)
    for ax, of_panel in zip(axes, panels.values(), strict=True):
        _lines(ax, of_panel, lambda r: float(r.samples or 0), labels_of(results))
        ticks = sorted({r.samples or 0 for r in pruned(of_panel)})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.set_xlabel("calibration sequences")
        ax.set_yscale("log" if is_wide(ax) else "linear")
    finish_lines(drawn, axes)
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
        style = style_of(label, labels)
        ax.plot(places, means, label=label, zorder=3, **style)
        if any(spreads):
            low, high = ([mean + sign * one for mean, one in zip(means, spreads, strict=True)] for sign in (-1, 1))
            ax.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=2)
    if dense := finished([r for r in results if r.label == DENSE], "perplexity"):
        ax.axhline(statistics.fmean(dense), color=GREY, linewidth=1.0, linestyle=(0, (6, 4)), label=DENSE, zorder=1)


def _runtime(results: Sequence[Result]) -> "Figure":
    cells = group(results, lambda r: (r.model, r.pattern))
    panels = {", ".join(filter(None, key)): cell for key, cell in cells.items()}
    most_bars = max(len(group(of_panel, lambda r: r.label)) for of_panel in panels.values())
    drawn, axes = panels_of(panels, height=1.1 + 0.32 * most_bars)
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
    cells = group(pruned(results), lambda r: (r.model, r.pattern))
    dense = group([r for r in results if r.label == DENSE], lambda r: r.model)
    panels = {f"{model}, {pattern}": [*dense.get(model, []), *cell] for (model, pattern), cell in cells.items()}
    drawn, axes = panels_of(panels, height=3.0)
    # Where no line tells compensations apart, markers do.
    compensations = dict.fromkeys(label.partition("+")[2] for label in labels_of(results))
    markers = dict(zip(compensations, itertools.cycle(MARKERS), strict=False))
    for ax, of_panel in zip(axes, panels.values(), strict=True):
        points = []
        for label, of_label in group(pruned(of_panel), lambda r: r.label).items():
            seconds, perplexity = (statistics.fmean(finished(of_label, name)) for name in ("pruning seconds", "perplexity"))
            points.append((seconds, perplexity))
            style = {**style_of(label, labels_of(results)), "linestyle": "", "marker": markers[label.partition("+")[2]]}
            ax.plot([seconds], [perplexity], label=label, zorder=3, **style)
        front = [(x, y) for x, y in sorted(points) if all(y <= other for at, other in points if at <= x)]
        ax.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=0.9, zorder=2)
        if of_dense := finished([r for r in of_panel if r.label == DENSE], "perplexity"):
            ax.axhline(statistics.fmean(of_dense), color=GREY, linewidth=1.0, linestyle=(0, (6, 4)), label=DENSE, zorder=1)
        ax.set_xlabel("seconds to calibrate and prune")
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
        ax.set_yscale("log" if is_wide(ax) else "linear")
    finish_lines(drawn, axes)
    return drawn


def _frontier(results: Sequence[Result]) -> "Figure":
    from matplotlib.lines import Line2D

    panels = {model: _points(of_model) for model, of_model in group(results, lambda r: r.model).items()}
    panels = {model: points for model, points in panels.items() if any(one.is_shown for one in points)}
    if not panels:
        raise ExperimentError(f"figure('frontier', ...): got no finished result of a method beside {REFERENCE}'s.")
    shown = [one for points in panels.values() for one in points if one.is_shown]
    colors = dict(zip(by_sparsity({one.pattern for one in shown}), itertools.cycle(PALETTE), strict=False))
    markers = dict(zip(dict.fromkeys(one.label for one in shown), itertools.cycle(MARKERS), strict=False))
    drawn, axes = panels_of(panels, height=3.6)
    for ax, points in zip(axes, panels.values(), strict=True):
        for one in points:
            if one.is_shown:
                style = {**_marker(markers[one.label]), "color": colors[one.pattern], "markeredgecolor": "white"}
                ax.plot([one.seconds], [one.lost], label=f"{one.label} {one.pattern}", zorder=3, **style)
        ax.plot([1], [1], label=REFERENCE, zorder=2, **_marker("+"), color=GREY)
        for line in (ax.axhline, ax.axvline):
            line(1, color=GREY, linewidth=0.8, linestyle=(0, (6, 4)), zorder=1)
        ax.set_xscale("log")
        ax.set_yscale("log")
        plain_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)
        ax.set_xlabel(f"time to calibrate and prune / {REFERENCE}'s")
        ax.set_ylabel(f"loss of perplexity / {REFERENCE}'s")
        beyond: dict[str, list[str]] = {}
        for one in points:
            if not one.is_shown:
                beyond.setdefault(one.label, []).append(one.pattern)
        if beyond:
            words = "\n".join(["beyond the edges:", *(f"{label} {' '.join(some)}" for label, some in beyond.items())])
            ax.text(0.99, 0.99, words, transform=ax.transAxes, fontsize=7, color=GREY, ha="right", va="top")
    methods = {**markers, f"{REFERENCE}, any pattern": "+"}
    heads = [Line2D([], [], color=GREY, label=label, **_marker(marker)) for label, marker in methods.items()]
    kinds = [Line2D([], [], color=color, label=pattern, **_marker("o")) for pattern, color in colors.items()]
    is_one = len(axes) == 1
    drawn.legend(
        handles=[*heads, *kinds],
        loc="outside right upper" if is_one else "outside lower center",
        ncols=1 if is_one else 5,
    )
    return drawn


@dataclass(frozen=True)
class _Point:
    """A method and a pattern on one model; time and loss are shares of the reference's."""

    label: str
    pattern: str
    seconds: float
    lost: float

    @property
    def is_shown(self) -> bool:
        """What is ten times as fast or as bad would squeeze all others; what loses nothing has no logarithm."""
        return self.seconds > 0.1 and 0 < self.lost < 10


def _points(results: Sequence[Result]) -> list[_Point]:
    """All of one model but the reference's."""
    cells = cells_by(results, lambda r: r.pattern)
    seconds, lost = shares(cells, "pruning seconds"), loss_shares(results, cells)
    places = [place for place in cells if place in seconds and place in lost and place[0] != (REFERENCE,)]
    return [_Point(row[0], pattern, seconds[row, pattern], lost[row, pattern]) for row, pattern in places]


def _marker(marker: str) -> dict[str, Any]:
    """A marker of a size that looks like the others', and no line."""
    size, edge = {"*": (11, 0.5), "+": (10, 1.2)}.get(marker, (8, 0.5))
    return {"marker": marker, "linestyle": "", "markersize": size, "markeredgewidth": edge}


_FIGURES = {
    "sparsity": _sparsity, "calibration": _calibration, "runtime": _runtime, "correction": _correction, "frontier": _frontier,
}  # fmt: skip
