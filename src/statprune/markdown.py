"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int = 1) -> str:
    """A Markdown table; a `|` in a text ends no cell.

    Args:
        heads: over the columns.
        rows: as many texts each as there are heads; Markdown in them stays what it is.
        num_left: columns that are aligned to the left, from the first on; the others hold numbers.
    """
    rule = "|" + "---|" * num_left + "---:|" * (len(heads) - num_left)
    return "\n".join([_line(heads), rule, *map(_line, rows)])


def escape(text: str) -> str:
    """Text that ends no cell of a Markdown table."""
    return text.replace("|", "\\|")


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape, texts))} |"
