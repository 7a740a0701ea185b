"""Forward passes of a whole model: on which inputs, what it predicts, and what that takes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statprune.acceleration.measuring import Stopwatch, many_graphs, relative_error
from statprune.errors import AccelerationError, CalibrationError, NonFiniteError, TracingError, first_line
from statprune.model.inputs import ModelInputs, bind_batches, example_inputs, read_inputs
from statprune.model.kinds import is_transformers_model, predictions_of, unwrapped, vocabulary_and_context
from statprune.model.undisturbed import undisturbed

MOST_CHECKED = 2048
"""Tokens whose predictions are compared; more would hold gigabytes of logits."""


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    tokens: int
    """How many go in; of inputs that are no tokens, how many numbers their first tensor has."""

    inputs: ModelInputs


def passes(model: nn.Module, tokens: Sequence[int], inputs: Any) -> list[Pass]:
    """What the model is run on: one pass for each number of tokens, made up, or one for each batch that was given.

    Args:
        model: any module.
        tokens: how many.
        inputs: batches as `prune` takes them; None makes tokens up, for a transformers model that takes some.

    Raises:
        AccelerationError: none can be made up.
        CalibrationError: as `bind_batches`.
    """
    if inputs is not None:
        return [Pass(max(one.numel() for one in batch.tensors()), batch) for batch in bind_batches(model, inputs)]
    inner, _ = unwrapped(model)
    vocabulary, context = vocabulary_and_context(inner)
    with contextlib.suppress(TracingError):
        example = example_inputs(inner) if is_transformers_model(inner) else {}
        if vocabulary and example and all(name.endswith("input_ids") for name in example):
            generator = torch.Generator().manual_seed(0)
            made = []
            for count in tokens:
                rows = math.ceil(count / (context or count))
                size = (rows, math.ceil(count / rows))
                batch = {name: torch.randint(vocabulary, size, generator=generator) for name in example}
                made.append(Pass(size[0] * size[1], read_inputs(model, batch)))
            return made
    raise AccelerationError(
        f"No inputs can be made up for {type(inner).__name__}, on which packed weights are compared with dense ones: give some "
        "of its own, accelerate(model, tokens, inputs=[batch, ...])."
    )


class Passes:
    """The passes of one model, dense first, and then on packed weights.

    Args:
        model: any module, dense.
        some: passes.
        compiled: whether it goes through `torch.compile`.

    Raises:
        CalibrationError: the model does not run on these inputs, or gives no tensor.
        NonFiniteError: what it predicts is NaN or infinite.
    """

    def __init__(self, model: nn.Module, some: Sequence[Pass], *, compiled: bool) -> None:
        self.model, self.passes, self.compiled = model, some, compiled
        self.expected: list[Tensor] = []
        try:
            with self._running() as run:
                self.expected = [_predicted(run, one) for one in some]
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            raise CalibrationError(f"{type(model).__name__} does not run on the inputs that it is measured with: {e}") from e
        for one, found in zip(some, self.expected, strict=True):
            if not bool(torch.isfinite(found).all()):
                raise NonFiniteError(f"{type(model).__name__} predicts NaN or infinity for {one.tokens} tokens while dense.")

    def seconds(self, stopwatch: Stopwatch) -> list[float]:
        """Of each pass, as the model is now."""
        with self._running() as run:
            return [stopwatch.forward(lambda one=one: run(one)) for one in self.passes]  # type: ignore[misc]

    def errors(self) -> list[float]:
        """How far each pass is off, relative to the norm of what the dense model predicts.

        Raises:
            AccelerationError: the model does not run as it is now.
        """
        try:
            with self._running() as run:
                found = [_predicted(run, one) for one in self.passes]
        except (RuntimeError, CalibrationError) as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            raise AccelerationError(f"The model does not run on packed weights: {first_line(e)}") from e
        return [relative_error(one, other) for one, other in zip(found, self.expected, strict=True)]

    @contextlib.contextmanager
    def _running(self) -> Iterator[Callable[[Pass], Any]]:
        call: Callable[..., Any] = torch.compile(self.model) if self.compiled else self.model
        with undisturbed(self.model), many_graphs() if self.compiled else contextlib.nullcontext():
            yield lambda one: call(*one.inputs.args, **one.inputs.kwargs)


def _predicted(run: Callable[[Pass], Any], one: Pass) -> Tensor:
    """The first tokens' logits [tokens, channels], or whatever tensor the model gives."""
    found = predictions_of(run(one))
    if found is None:
        raise CalibrationError("The model gives no tensor to compare.")
    flat = found.detach().reshape(-1, found.shape[-1]) if found.ndim else found.detach().reshape(1, 1)
    return flat[:MOST_CHECKED].clone()
