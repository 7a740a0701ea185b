"""A Markdown table from entries by (row, column), the best in bold; what an entry says of one or more measurements.

results of one cell, metric -> entry -> Entry -> grid -> | method | 50% | 2:4 |
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from statprune.markdown import table
from statprune.results import DENSE, Result

Row = tuple[str, ...]
"""A row's head: the label, and perhaps the pattern. Rows that differ in nothing but the label compete."""

STANDARD_ERROR = "standard error"
"""What the name of a metric's standard error ends with, in a result's values."""

Best = Callable[[Iterable[float]], float]


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table."""

    text: str

    beside: str = ""
    """Follows the text, and is never bold."""

    competes: float | None = None
    """The number as it is shown, so that what reads the same is bold alike; None takes no part."""


@dataclass(frozen=True)
class Metric:
    """One measured number, and how it is shown."""

    name: str
    """In a result's values."""

    show: Callable[[float], str]

    scale: float = 1.0
    """From the unit it is stored in to the one that is shown."""

    best: Best | None = min
    """Which of several is bold; None for none of them."""

    error: str | None = None
    """In a result's values: the number's standard error, to be shown with it. Repetitions share the questions or windows that
    it comes from, so theirs is averaged and no smaller."""


def entry(results: Sequence[Result], metric: Metric, beside: str = "") -> Entry:
    """The mean of a cell's repetitions; with its standard error, or else with their standard deviation where there are several.

    `failed` where none has finished; no text where the metric was not measured. The dense model does not compete.
    """
    values = finished(results, metric.name)
    num_failed = sum(r.error is not None for r in results)
    if not values:
        return Entry("failed" if num_failed else "", beside)
    mean = metric.show(metric.scale * statistics.fmean(values))
    errors = [] if metric.error is None else finished(results, metric.error)
    beyond = spread(values) if metric.error is None else statistics.fmean(errors) if errors else None
    text = mean + (f" ± {metric.show(metric.scale * beyond)}" if beyond is not None else "")
    takes_part = metric.best is not None and results[0].label != DENSE and math.isfinite(float(mean))
    return Entry(text + (f" ({num_failed} failed)" if num_failed else ""), beside, float(mean) if takes_part else None)


def finished(results: Iterable[Result], metric: str) -> list[float]:
    """The metric's values in the results that did not fail."""
    return [r.values[metric] for r in results if r.error is None and metric in r.values]


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None where it has no meaning, as for one value."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def grid(heads: Sequence[str], columns: Sequence[str], entries: Mapping[tuple[Row, str], Entry], best: Best = min) -> str:
    """A Markdown table, rows in the order they come; of the rows that compete, each column's best is bold.

    Args:
        heads: over the parts of a row's head.
        columns: over the entries; all of them in this order, whether they have entries or not.
        entries: by (row, column); a missing one is left empty.
        best: `min` or `max`.
    """
    contests: dict[tuple[Row, str], list[float]] = {}
    for (row, column), one in entries.items():
        if one.competes is not None:
            contests.setdefault((row[1:], column), []).append(one.competes)

    def text(row: Row, column: str) -> str:
        one = entries.get((row, column), Entry(""))
        is_best = one.competes is not None and one.competes == best(contests[row[1:], column])
        return (f"**{one.text}**" if is_best else one.text) + one.beside

    rows = dict.fromkeys(row for row, _ in entries)
    lines = ([*row, *(text(row, column) for column in columns)] for row in rows)
    return table([*heads, *columns], lines, num_left=len(heads))


def two_decimals(value: float) -> str:
    """Two decimals, none from 1000 on."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def three_digits(value: float) -> str:
    """Three digits that count, never an exponent."""
    decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def ratio(value: float) -> str:
    """A factor, `5.80x`."""
    return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def superscript(number: int) -> str:
    """The mark of a footnote."""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
