"""Choices that follow one context are scored with one pass over the context, where the harness reads it again for each choice.

context                 [1, context]    once, with a key-value cache
choices                 [choices, longest - 1]    from the cache, repeated for each
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch

Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and choice, and the tokens of both."""

Answer = tuple[float, bool]
"""A choice's log-likelihood, and whether each of its tokens is the likeliest."""


@functools.cache
def sharing_contexts(base: Any) -> Any:
    """A subclass of the harness' `HFLM` that shares contexts.

    Its model takes `use_cache` and `past_key_values`. Where it returns no cache that can be repeated, where nothing is shared,
    and where a prompt is longer than the model's context, everything is as with the harness' own.
    """

    class Sharing(base):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[Answer]:
            places: dict[tuple[int, ...], list[int]] = {}
            for index, (_, context, choice) in enumerate(requests):
                fits = len(context) + len(choice) <= self.max_length
                places.setdefault(tuple(context) if fits else (-1, index), []).append(index)
            answers: dict[int, Answer] = {}
            for of_context in places.values():
                if len(of_context) > 1:
                    found = _score(self, requests[of_context[0]][1], [requests[index][2] for index in of_context])
                    if found is None:
                        break
                    answers.update(zip(of_context, found, strict=True))
            others = [index for index in range(len(requests)) if index not in answers]
            if others:
                found = super()._loglikelihood_tokens([requests[index] for index in others], *args, **kwargs)
                answers.update(zip(others, found, strict=True))
            return [answers[index] for index in range(len(requests))]

    return Sharing


@torch.no_grad()
def _score(harness: Any, context: list[int], choices: list[list[int]]) -> list[Answer] | None:
    """The answers; None where the model has no cache that can be repeated."""
    model, dtype = harness.model, harness.softmax_dtype
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(torch.tensor([context], device=harness.device), use_cache=True, **last_only)
    cache: Any = getattr(output, "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):
        return None
    first_V = output.logits[0, -1].log_softmax(-1, dtype=dtype)
    # What stands to the right of a shorter choice is seen by none of its tokens.
    longest = max(map(len, choices))
    tokens_CT = torch.tensor([choice + [0] * (longest - len(choice)) for choice in choices], device=harness.device)
    log_p_CTV = first_V.expand(len(choices), 1, -1)
    if longest > 1:
        cache.batch_repeat_interleave(len(choices))
        output = model(tokens_CT[:, :-1], use_cache=True, past_key_values=cache)
        log_p_CTV = torch.cat([log_p_CTV, output.logits.log_softmax(-1, dtype=dtype)], dim=1)
    scores_CT = log_p_CTV.gather(-1, tokens_CT[..., None])[..., 0]
    likeliest_CT = log_p_CTV.argmax(-1) == tokens_CT
    return [
        (float(scores_CT[index, : len(choice)].sum()), bool(likeliest_CT[index, : len(choice)].all()))
        for index, choice in enumerate(choices)
    ]
