"""Results as tables: all of them as CSV, and each experiment in the paper's layout as Markdown, published numbers beside ours.

results -> layout of the experiment -> entries by (row, column) -> grid -> Markdown
"""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from statprune.errors import ExperimentError, nearest
from statprune.experiments.beside import REFERENCE, beside
from statprune.experiments.grid import (
    STANDARD_ERROR,
    Entry,
    Metric,
    Row,
    entry,
    finished,
    grid,
    ratio,
    superscript,
    three_digits,
    two_decimals,
)
from statprune.experiments.grouping import by_sparsity, group, pruned, sparsity
from statprune.experiments.published import Published
from statprune.markdown import escape
from statprune.results import DENSE, Result

COLUMNS = (
    "measure", "model", "label", "pattern", "schedule", "samples", "seed", "metric", "value", "seconds", "peak_memory",
    "chosen", "error",
)  # fmt: skip
"""Of the CSV."""

PERPLEXITY = Metric("perplexity", two_decimals)
ACCURACY = Metric("average", two_decimals, scale=100.0, best=max, error=f"average {STANDARD_ERROR}")
Entries = dict[tuple[Row, str], Entry]


def write_csv(results: Iterable[Result], path: str | Path) -> None:
    """Write a row for each metric of each cell; a failed cell has one row, without metric and value."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for r in results:
            for metric, value in r.values.items() if r.error is None else [("", None)]:
                cell = (r.measure, r.model, r.label, r.pattern, r.recipe.get("schedule"), r.samples, r.seed)
                writer.writerow((*cell, metric, value, r.seconds, r.peak_memory, r.chosen, r.error))


def markdown(experiment: str, results: Sequence[Result], published: Published) -> str:
    """The tables of one experiment, with the notes on published numbers under them.

    A published number stands beside a result whose label is the method's short name, such as `wanda+energy`.

    Raises:
        ExperimentError: there is no layout for the experiment.
    """
    if experiment not in _LAYOUTS:
        raise ExperimentError(
            f"markdown({experiment!r}, ...): there is no table for it.{nearest(experiment, _LAYOUTS)} "
            f"Known: {', '.join(_LAYOUTS)}."
        )
    paper = _Paper(experiment, published)
    return "\n\n".join([*_LAYOUTS[experiment](results, paper), *paper.footnotes()]) + "\n"


@dataclass
class _Paper:
    """The published numbers of one experiment, and the notes on those that were shown."""

    experiment: str
    published: Published
    shown: bool = False
    notes: list[str] = field(default_factory=list)

    def beside(self, result: Result, show: Callable[[float], str], experiment: str | None = None) -> str:
        """` (paper 6.41)` with footnote marks; empty where nothing was published."""
        place = (experiment or self.experiment, result.model, result.label, result.pattern)
        value = self.published.value(*place)
        if value is None:
            return ""
        self.shown = True
        notes = self.published.notes(*place)
        self.notes += [note for note in notes if note not in self.notes]
        marks = sorted(self.notes.index(note) + 1 for note in notes)
        return f" (paper {show(value)})" + " ".join(map(superscript, marks))

    def footnotes(self) -> Iterator[str]:
        """Where the numbers are from, then the notes; nothing where no published number was shown."""
        if self.shown:
            yield f"paper: {self.published.places[self.experiment]} of {self.published.source}."
            yield from (f"{superscript(index + 1)} {note}" for index, note in enumerate(self.notes))


def _perplexity_layout(results: Sequence[Result], paper: _Paper) -> Iterator[str]:
    yield _by_pattern(results, PERPLEXITY, paper)
    for model, of_model in group(results, _model).items():
        yield from _under(_title(model), beside(of_model, list(group(pruned(of_model), _pattern)), _pattern))


def _zero_shot_layout(results: Sequence[Result], paper: _Paper) -> Iterator[str]:
    yield _by_pattern(results, ACCURACY, paper)
    if any(finished(results, ACCURACY.error or "")):
        yield "Accuracies in % ± one standard error over the questions."
    for model, of_model in group(_ordered(results), _model).items():
        names = dict.fromkeys(name for r in of_model for name in r.values if not name.endswith(STANDARD_ERROR))
        tasks = [name for name in names if name != ACCURACY.name]
        metrics = [*(replace(ACCURACY, name=task, error=f"{task} {STANDARD_ERROR}") for task in tasks), ACCURACY]
        cells = group(of_model, _label_and_pattern)
        entries = {(row, metric.name): entry(cell, metric) for row, cell in cells.items() for metric in metrics}
        yield _title(model)
        yield grid(("method", "sparsity"), [metric.name for metric in metrics], entries, max)


def _by_pattern(results: Sequence[Result], metric: Metric, paper: _Paper) -> str:
    """Tables 1 and 2: dense, then the labels of each pattern; a column a model."""
    entries = _entries(_ordered(results), _label_and_pattern, _model, metric, paper)
    return grid(("method", "sparsity"), list(group(results, _model)), entries, metric.best or min)


def _sparsity_layout(results: Sequence[Result], paper: _Paper) -> Iterator[str]:
    """Table 4."""
    for model, of_model in group(results, _model).items():
        patterns = sorted(group(pruned(of_model), _pattern), key=lambda pattern: (math.isnan(s := sparsity(pattern)), s))
        yield _title(model)
        yield grid([_head(of_model, paper)], patterns, _entries(pruned(of_model), _label, _pattern, PERPLEXITY, paper))
        yield from beside(of_model, patterns, _pattern)


def _calibration_layout(results: Sequence[Result], paper: _Paper) -> Iterator[str]:
    """Figure 2, as a table."""
    for (model, pattern), cells in group(pruned(results), _model_and_pattern).items():
        repeats = {len(cell) for cell in group(cells, lambda r: (r.label, r.samples)).values()}
        dense = [r for r in results if r.model == model and r.label == DENSE]
        head = _head(dense, paper)
        head += ", mean ± standard deviation over " if max(repeats) > 1 else ", "
        head += " to ".join(map(str, sorted({min(repeats), max(repeats)}))) + (" seeds" if max(repeats) > 1 else " seed")
        columns = group(sorted(cells, key=lambda r: r.samples or 0), _samples)
        yield _title(f"{model}, {pattern}, by number of calibration sequences")
        yield grid([head], list(columns), _entries(cells, _label, _samples, PERPLEXITY, paper))
        yield from beside([*dense, *cells], list(columns), _samples)


def _ablation_layout(results: Sequence[Result], paper: _Paper) -> Iterator[str]:
    """Table 5, with the dense perplexity in all columns of its model."""
    columns = {key: " ".join(key) for key in group(pruned(results), _model_and_pattern)}
    entries: Entries = {
        ((DENSE,), name): entry([r], PERPLEXITY, paper.beside(r, PERPLEXITY.show))
        for (model, _), name in columns.items()
        for r in results
        if r.label == DENSE and r.model == model
    }
    entries |= _entries(pruned(results), _label, lambda r: columns[_model_and_pattern(r)], PERPLEXITY, paper)
    yield grid(["method"], list(columns.values()), entries)
    for model, of_model in group(results, _model).items():
        yield from _under(_title(model), beside(of_model, list(group(pruned(of_model), _pattern)), _pattern))


def _runtime_layout(results: Sequence[Result], paper: _Paper) -> Iterator[str]:
    """Table 3. Nothing is bold: magnitude, which needs no statistics, always wins."""
    speed, memory = f"speed over {REFERENCE}", "peak memory [MiB]"
    for (model, pattern), of_model in group(results, _model_and_pattern).items():
        cells = group(of_model, _label)
        columns, entries = _times(cells, paper)
        totals = {row: statistics.fmean(times) for row, cell in cells.items() if (times := finished(cell, "total"))}
        for row, total in totals.items():
            if (REFERENCE,) in totals:
                beside = paper.beside(cells[row][0], ratio, "speedup")
                entries[row, speed] = Entry(ratio(totals[(REFERENCE,)] / total), beside)
            peaks = [r.peak_memory for r in cells[row] if r.peak_memory is not None]
            entries[row, memory] = Entry(three_digits(max(peaks) / 2**20) if peaks else "")
        yield _title(f"{model}, {pattern}" if pattern else model)
        yield grid(["method"], [*columns, speed, memory], entries)


def _frontier_layout(results: Sequence[Result], paper: _Paper) -> Iterator[str]:
    """Not in the paper: perplexities, and what each method loses and costs beside the reference."""
    for model, of_model in group(results, _model).items():
        patterns = by_sparsity(group(pruned(of_model), _pattern))
        yield _title(model)
        yield grid([_head(of_model, paper)], patterns, _entries(pruned(of_model), _label, _pattern, PERPLEXITY, paper))
        yield from beside(of_model, patterns, _pattern)
        if chosen := [f"{r.pattern}, seed {r.seed}: {escape(r.chosen)}" for r in of_model if r.chosen is not None]:
            yield "What auto chose: " + "; ".join(chosen) + "."


def _under(title: str, texts: Iterable[str]) -> Iterator[str]:
    """The texts under a title; nothing at all where there are none."""
    for index, text in enumerate(texts):
        if index == 0:
            yield title
        yield text


def _times(cells: dict[Row, list[Result]], paper: _Paper) -> tuple[list[str], Entries]:
    """The columns of times and their entries; each column in seconds, or in milliseconds where all are below one second."""
    columns: list[str] = []
    entries: Entries = {}
    for name in ("statistics", "pruning", "total"):
        longest = max((seconds for cell in cells.values() for seconds in finished(cell, name)), default=0.0)
        unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1000.0)
        metric = Metric(name, three_digits, scale, best=None)
        columns.append(f"{name} [{unit}]")
        for row, cell in cells.items():
            beside = paper.beside(cell[0], _in_unit(scale)) if name == "total" else ""
            entries[row, columns[-1]] = entry(cell, metric, beside)
    return columns, entries


def _in_unit(scale: float) -> Callable[[float], str]:
    """Shows published seconds as they were published, but in the unit of their column."""
    return lambda seconds: f"{scale * seconds:g}"


_LAYOUTS: dict[str, Callable[[Sequence[Result], _Paper], Iterator[str]]] = {
    "perplexity": _perplexity_layout,
    "zero-shot": _zero_shot_layout,
    "runtime": _runtime_layout,
    "sparsity": _sparsity_layout,
    "calibration": _calibration_layout,
    "ablation": _ablation_layout,
    "correction": _frontier_layout,
    "frontier": _frontier_layout,
}


def _head(results: Sequence[Result], paper: _Paper) -> str:
    """The head cell, with the dense perplexity where it was measured."""
    dense = [r for r in results if r.label == DENSE]
    if not dense:
        return "perplexity"
    one = entry(dense, PERPLEXITY, paper.beside(dense[0], PERPLEXITY.show))
    return f"perplexity (dense {one.text}{one.beside})"


def _entries(
    results: Iterable[Result], row: Callable[[Result], Row], column: Callable[[Result], str], metric: Metric, paper: _Paper
) -> Entries:
    cells = group(results, lambda r: (row(r), column(r)))
    return {place: entry(cell, metric, paper.beside(cell[0], metric.show)) for place, cell in cells.items()}


def _ordered(results: Sequence[Result]) -> list[Result]:
    """Dense first, then by pattern, then by label, both in the order of their first appearance."""
    patterns, labels = list(group(results, _pattern)), list(group(results, _label))
    return sorted(results, key=lambda r: (r.label != DENSE, patterns.index(r.pattern), labels.index(_label(r))))


def _model(result: Result) -> str:
    return result.model


def _pattern(result: Result) -> str:
    return result.pattern


def _model_and_pattern(result: Result) -> tuple[str, str]:
    return result.model, result.pattern


def _label(result: Result) -> Row:
    return (result.label,)


def _label_and_pattern(result: Result) -> Row:
    return (result.label, result.pattern)


def _samples(result: Result) -> str:
    return str(result.samples)


def _title(text: str) -> str:
    return f"**{escape(text)}**"
