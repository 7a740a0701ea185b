"""Texts to tokens, piece by piece: the tokens of the whole text, without the memory that tokenizing it at once takes.

Tokenizers need about 200 times the memory of what they are given. Where one piece ends and the next begins, both are tokenized
with some of the text around, and are joined where they agree: a token depends on the text near it alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statprune.data.files import PIECE, Text
from statprune.errors import CalibrationError

CONTEXT = 1024
"""Characters around a place that its tokens may depend on. Where pieces do not agree there, more are looked at."""

AGREEMENT = 8
"""Tokens in a row that both sides must have where pieces are joined."""

HISTORY = PIECE // 2
"""Characters before a piece that are kept, to look for agreement in."""


class Token(NamedTuple):
    """A token, and which characters it stands for."""

    start: int
    end: int
    number: int


def tokenize(tokenizer: Any, text: str | Text, vocabulary: int | None = None, limit: int | None = None) -> Tensor:
    """The text as one sequence [tokens], int64, with the special tokens that the tokenizer adds by default.

    Args:
        tokenizer: of transformers. One that does not tell which characters a token stands for gets the whole text at once.
        text: a string, or text files.
        vocabulary: of the model.
        limit: at most so many tokens from the beginning; no more of the text is tokenized than they need.

    Raises:
        CalibrationError: a token lies beyond the model's vocabulary; or the text cannot be read.
    """
    pieces = text.pieces() if isinstance(text, Text) else (text[start : start + PIECE] for start in range(0, len(text), PIECE))
    if not has_places(tokenizer):
        pieces = iter(["".join(pieces)])
    found: list[Tensor] = []
    count = 0
    for numbers in _numbers(tokenizer, _regular(pieces)):
        found.append(torch.tensor(numbers, dtype=torch.int32))  # half the memory, while there may be many
        check_vocabulary(found[-1], vocabulary)
        count += len(numbers)
        if limit is not None and count >= limit:
            break
    tokens = torch.empty(count, dtype=torch.int64)
    while found:
        part = found.pop()
        tokens[count - len(part) : count] = part
        count -= len(part)
    return tokens[:limit]


def has_places(tokenizer: Any) -> bool:
    """Whether the tokenizer tells which characters a token stands for."""
    return bool(getattr(tokenizer, "is_fast", False))


def tokens_with_places(tokenizer: Any, text: str, begin: int = 0) -> list[Token]:
    """The tokens of a text without special ones, by a tokenizer that `has_places`.

    Args:
        tokenizer: of transformers.
        text: a part of a longer one.
        begin: where in that it begins.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    pairs = zip(encoding["offset_mapping"], encoding["input_ids"], strict=True)
    return [Token(begin + start, begin + end, number) for (start, end), number in pairs]


def check_vocabulary(tokens: Tensor, vocabulary: int | None) -> None:
    """Raise CalibrationError where a token lies beyond the model's vocabulary."""
    if vocabulary is not None and tokens.numel() and int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"The tokenizer gives token {int(tokens.max())}, but the model's vocabulary has {vocabulary}: "
            "this tokenizer belongs to another model."
        )


def _regular(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The pieces, none shorter than `PIECE` but the last, and whether it is the last."""
    waiting: list[str] = []
    length = 0
    for piece in pieces:
        if length >= PIECE:
            yield "".join(waiting), False
            waiting, length = [], 0
        waiting.append(piece)
        length += len(piece)
    yield "".join(waiting), True


def _numbers(tokenizer: Any, pieces: Iterator[tuple[str, bool]]) -> Iterator[list[int]]:
    """The numbers of the text's tokens, part by part."""
    first, is_all = next(pieces)
    if is_all:
        yield tokenizer(first, verbose=False)["input_ids"]
        return
    before, after = _special_tokens(tokenizer, first[:CONTEXT])
    yield before
    joined = _Joined(tokenizer)
    yield joined.add(first, is_last=False)
    for piece, is_last in pieces:
        yield joined.add(piece, is_last=is_last)
    yield after


def _special_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before and after a text."""
    encoding = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=True, verbose=False)
    numbers, places = encoding["input_ids"], encoding["offset_mapping"]
    # What stands in the text itself has a place there.
    is_added = [bool(mask) and start == end for mask, (start, end) in zip(encoding["special_tokens_mask"], places, strict=True)]
    num_before = next((index for index, added in enumerate(is_added) if not added), len(is_added))
    num_after = next((index for index, added in enumerate(reversed(is_added[num_before:])) if not added), 0)
    return numbers[:num_before], numbers[len(numbers) - num_after :]


class _Joined:
    """The tokens of a text that comes in pieces."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text, self.begin = "", 0  # what may still be looked at, and where in the whole text it begins
        self.tokens: list[Token] = []  # of this text

    def add(self, piece: str, *, is_last: bool) -> list[int]:
        """The numbers of the tokens that are certain now."""
        self.text += piece
        end = self.tokens[-1].end if self.tokens else 0
        context = CONTEXT
        while True:
            begin = max(self.begin, end - context)
            new = tokens_with_places(self.tokenizer, self.text[begin - self.begin :], begin)
            agreed = (0, 0) if begin == 0 else _agreement(self.tokens, new)
            if agreed is not None or begin == self.begin:
                break
            context *= 4
        if agreed is None:
            # Tokens that depend on text this far away, such as those of one character 100,000 times: either way is one.
            agreed = len(self.tokens), next((index for index, token in enumerate(new) if token.start >= end), len(new))
        self.tokens = self.tokens[: agreed[0]] + new[agreed[1] :]
        if is_last:
            return [token.number for token in self.tokens]
        # The last ones may be others with the text that follows.
        certain = self.begin + len(self.text) - CONTEXT
        while self.tokens and self.tokens[-1].end > certain:
            self.tokens.pop()
        begin = max(self.begin, (self.tokens[-1].end if self.tokens else self.begin) - HISTORY)
        num_done = next((index for index, token in enumerate(self.tokens) if token.start >= begin), len(self.tokens))
        done, self.tokens = self.tokens[:num_done], self.tokens[num_done:]
        self.text, self.begin = self.text[begin - self.begin :], begin
        return [token.number for token in done]


def _agreement(old: Sequence[Token], new: Sequence[Token]) -> tuple[int, int] | None:
    """How many of the old and of the new tokens stand before the last place where both go on alike."""
    places = {token.start: index for index, token in enumerate(old)}
    for after in range(len(new), AGREEMENT - 1, -1):
        index = places.get(new[after - 1].start, -1)
        if index + 1 >= AGREEMENT and old[index + 1 - AGREEMENT : index + 1] == new[after - AGREEMENT : after]:
            return index + 1, after
    return None
