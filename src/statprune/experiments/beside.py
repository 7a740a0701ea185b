"""What stands under a table of perplexities: the divergence from the dense model, and what a method loses and costs beside a
reference.

cells -> divergence, loss ± standard error, share of the reference's loss and time, memory
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from statprune.experiments.grid import (
    STANDARD_ERROR,
    Entry,
    Metric,
    Row,
    entry,
    finished,
    grid,
    ratio,
    three_digits,
)
from statprune.experiments.grouping import dense_perplexity, group, pruned
from statprune.results import Result

REFERENCE = "sparsegpt"
"""The label of the method that the others are shown beside."""

DIVERGENCE = Metric("divergence", three_digits)
LOSS = Metric("loss", three_digits, best=None, error=f"loss {STANDARD_ERROR}")

_TITLES = {
    DIVERGENCE: "Kullback-Leibler divergence from the dense model's predictions, in nats per token:",
    LOSS: "How much less likely the text is than to the dense model, in nats per token ± one standard error over its windows:",
}

Cells = Mapping[tuple[Row, str], Sequence[Result]]
"""By label and column (a pattern, a number of sequences); several results are repetitions with other seeds."""


def beside(results: Sequence[Result], columns: Sequence[str], column: Callable[[Result], str]) -> Iterator[str]:
    """Texts and tables, methods down; only of what was measured.

    Args:
        results: of one model.
        columns: in the order in which they are shown.
        column: the one that a pruned result stands in.
    """
    cells = cells_by(results, column)
    for metric, title in _TITLES.items():
        if any(finished(cell, metric.name) for cell in cells.values()):
            yield title
            yield grid(["method"], columns, {place: entry(cell, metric) for place, cell in cells.items()})
    lost = loss_shares(results, cells)
    if lost:
        by_divergence, seconds = shares(cells, DIVERGENCE.name), shares(cells, "pruning seconds")
        parts = ["by perplexity", *(["by divergence"] if by_divergence else [])]
        yield f"Share of what {REFERENCE} loses, {' / '.join(parts)}{', in so much of its time' if seconds else ''}:"
        yield grid(["method"], columns, {
            place: Entry(
                f"{share:.2f}",
                (f" / {by_divergence[place]:.2f}" if place in by_divergence else "")
                + (f" in {ratio(seconds[place])}" if place in seconds else ""),
                competes=round(share, 2),
            )
            for place, share in lost.items()
        })  # fmt: skip
    peaks = {
        place: Entry(three_digits(max(known) / 2**20))
        for place, cell in cells.items()
        if (known := [r.peak_memory for r in cell if r.peak_memory is not None])
    }
    if peaks:
        yield "Memory beyond what was held before, at most [MiB]:"
        yield grid(["method"], columns, peaks)


def cells_by(results: Sequence[Result], column: Callable[[Result], str]) -> Cells:
    """The pruned results of one model by place."""
    return group(pruned(results), lambda r: _place(r.label, column(r)))


def _place(label: str, column: str) -> tuple[Row, str]:
    return (label,), column


def loss_shares(results: Sequence[Result], cells: Cells) -> dict[tuple[Row, str], float]:
    """`(perplexity - dense) / (reference - dense)` of the cells of one model; nothing where it was not measured dense."""
    dense = dense_perplexity(results)
    return {} if dense is None else shares(cells, "perplexity", above=dense)


def shares(cells: Cells, metric: str, *, above: float = 0.0) -> dict[tuple[Row, str], float]:
    """What the metric is above a value, as a share of what it is with the reference in the same column.

    Of the means over the repetitions with the same calibration: a seed that only one of the two has finished does not count.
    What needs no calibration stands beside all of the reference's.

    Args:
        cells: of one model.
        metric: one of the results' values.
        above: what the dense model has: `(value - above) / (reference - above)`.

    Returns:
        By place, where both are measured; not where the reference has lost nothing.
    """
    found = {}
    for (row, column), cell in cells.items():
        own, reference = (_by_calibration(some, metric) for some in (cell, cells.get(_place(REFERENCE, column), ())))
        if (None, None) in own:
            own = dict.fromkeys(reference, own[None, None])
        both = own.keys() & reference.keys()
        expected = sum(reference[key] - above for key in both)
        if expected > 0:
            found[row, column] = sum(own[key] - above for key in both) / expected
    return found


def _by_calibration(cell: Sequence[Result], metric: str) -> dict[tuple[int | None, int | None], float]:
    return {(r.samples, r.seed): r.values[metric] for r in cell if r.error is None and metric in r.values}
