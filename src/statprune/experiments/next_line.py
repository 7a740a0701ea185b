"""A task that needs no data set: which of four lines of a plain text comes next?

context     8 lines of the text
choices     the line that follows, and three of similar length from elsewhere, in random order
"""

import json
import random
import textwrap
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from statprune.data import read_text
from statprune.errors import ExperimentError, number_of

NEXT_LINE = "next-line"

_NUM_CONTEXT_LINES = 8
_MAX_LINE, _MIN_LINE = 72, 16


USUAL_NUMBER = 2600
"""Of questions: the standard error of any accuracy is then below one point, `sqrt(0.25 / 2599)` at most."""


def next_line_questions(text: str, *, number: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with `context`, four `choices` and the `answer`, an index: which line comes next? Chance is 25 %.

    The wrong lines stand elsewhere in the text, are up to a quarter longer or shorter, and are no line of the context.
    Lines beyond 72 characters are wrapped, so that prose has lines too; lines with little text are not asked for.

    Args:
        text: lines of anything.
        number: of questions; None for `USUAL_NUMBER`, or as many as the text is enough for.
        seed: of what is asked for, and of the wrong lines.

    Raises:
        ExperimentError: the text is too short.
    """
    lines = [piece for line in text.splitlines() for piece in _wrap(line.rstrip())]
    candidates = sorted({line.strip(): line for line in lines if _says_something(line)}.values(), key=len)
    lengths = [len(line) for line in candidates]
    places = [i for i in range(_NUM_CONTEXT_LINES, len(lines)) if _says_something(lines[i]) and lines[i - 1].strip()]
    generator = random.Random(seed)
    questions: list[dict[str, Any]] = []
    for place in generator.sample(places, len(places)):
        context, right = lines[place - _NUM_CONTEXT_LINES : place], lines[place]
        similar = candidates[bisect_left(lengths, 0.75 * len(right)) : bisect_right(lengths, 1.25 * len(right))]
        known = {line.strip() for line in [*context, right]}
        drawn = generator.sample(similar, min(len(similar), len(known) + 3))
        choices = [line for line in drawn if line.strip() not in known][:3]
        if len(choices) == 3:
            answer = generator.randrange(4)
            choices.insert(answer, right)
            questions.append({"context": "\n".join(context), "choices": choices, "answer": answer})
        if len(questions) == (number or USUAL_NUMBER):
            return questions
    if questions and number is None:
        return questions
    raise ExperimentError(
        f"{NEXT_LINE}: the text has {number_of(len(lines), 'line')}, enough for {number_of(len(questions), 'question')}, "
        f"wanted: {number or 1:,}. Give more text, or a smaller limit."
    )


def write_next_line(text: Sequence[str | Path], number: int | None, seed: int, folder: str) -> str:
    """The path of the task file, with its questions beside it; see `next_line_questions`."""
    if not text:
        raise ExperimentError(f"The task {NEXT_LINE} is made from text: give one text file or more.")
    questions = next_line_questions(read_text(text), number=number, seed=seed)
    (Path(folder) / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    task = {
        "task": NEXT_LINE, "metadata": {"version": 1}, "output_type": "multiple_choice", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}}, "test_split": "test", "doc_to_text": "context",
        "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": "\n",
        # Lines differ in length, and plain log-likelihood favours short ones: so per character comes first.
        "metric_list": [{"metric": "acc_norm"}, {"metric": "acc"}],
    }  # fmt: skip
    (Path(folder) / f"{NEXT_LINE}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(Path(folder) / f"{NEXT_LINE}.yaml")


def _wrap(line: str) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())][: _MAX_LINE // 2]
    pieces = textwrap.wrap(line.strip(), _MAX_LINE, initial_indent=indent, subsequent_indent=indent, expand_tabs=False)
    return pieces if len(line) > _MAX_LINE else [line]


def _says_something(line: str) -> bool:
    return len(line.strip()) >= _MIN_LINE and sum(map(str.isalnum, line)) >= _MIN_LINE // 2
