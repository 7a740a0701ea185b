"""Every error statprune raises on purpose.

One root class, so that `except StatpruneError` catches them all; each child is also the builtin that a
caller who has never heard of statprune would expect. A message names the thing, what came, what was
expected, and the way out.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator


class StatpruneError(Exception):
    """Root of every error that statprune raises on purpose."""


class RecipeError(StatpruneError, ValueError):
    """A recipe asks for something that does not exist or makes no sense."""


class CalibrationError(StatpruneError, ValueError):
    """The calibration or evaluation data cannot be used with this model."""


class CalibrationWarning(UserWarning):
    """The calibration data can be used, and is worth less than it seems."""


class NonFiniteError(StatpruneError, ValueError):
    """NaN or infinity in weights, inputs or activations."""


class SiteError(StatpruneError, ValueError):
    """A weight cannot be pruned as asked, or a name pattern matches no weight."""


class TracingError(StatpruneError, RuntimeError):
    """The model could not be turned into a graph of linear layers."""


class ModelError(StatpruneError, ValueError):
    """The model folder cannot be loaded safely."""


class CheckpointError(StatpruneError, RuntimeError):
    """A checkpoint cannot be written, or does not keep a promise of its `pruning.json`."""


class MaskError(StatpruneError, RuntimeError):
    """Weights that were pruned are no longer zero, or cannot be held at zero."""


class AdapterError(StatpruneError, ValueError):
    """An adapter cannot be loaded, or cannot be merged into a sparse model."""


class AccelerationError(StatpruneError, RuntimeError):
    """A model cannot run on packed weights, or is another one on them."""


class ResultsError(StatpruneError, ValueError):
    """A file of results cannot be read, or holds numbers that do not compare with this run."""


class RanksError(StatpruneError, RuntimeError):
    """The processes that work together do not all take part."""


class ExperimentError(StatpruneError, RuntimeError):
    """An experiment cannot run, or some of its cells failed."""


@contextlib.contextmanager
def adding(consequence: Callable[[], str], kind: type[StatpruneError] = StatpruneError) -> Iterator[None]:
    """An error of this kind inside says also what follows from it, unless it says so already."""
    try:
        yield
    except kind as e:
        if (said := consequence()) in str(e):
            raise
        raise type(e)(f"{e} {said}") from e


def nearest(name: object, known: Iterable[str]) -> str:
    """`" Did you mean 'cvr'?"` for the closest known name, or an empty string where nothing is close."""
    # Looking for what is close to a long text takes long.
    close = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) and len(name) < 100 else []
    return f" Did you mean {close[0]!r}?" if close else ""


def shown(value: object, longest: int = 200) -> str:
    """A value as an error quotes it: its `repr`, cut where it is long, and a word where it has none."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists in lists
        return f"<{type(value).__name__} too large to show>"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def number_of(count: int, noun: str) -> str:
    """`"1 window"`, `"2 windows"`, `"2,048 tokens"`; of nouns that take an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_line(error: BaseException) -> str:
    """What an error of another package says in its first line, and in the next where a colon promises more.

    The name of its class where it says nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    end = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])
