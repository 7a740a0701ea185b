"""One step of the graph for one batch: computed, or taken from what batches of its shape have in common."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from statprune.errors import CalibrationError, first_line
from statprune.model.inputs import ModelInputs
from statprune.model.segments import batch_independent
from statprune.model.sites import InputGroup, TracedModel
from statprune.model.streams import Environment, Executor


class Common:
    """What the batches of one shape have in common: positions, causal masks, rotary tables. Each is computed once."""

    def __init__(self, traced: TracedModel) -> None:
        self.nodes = batch_independent(traced)
        self._values: dict[Any, Environment] = defaultdict(dict)

    def of(self, batch: ModelInputs) -> Environment:
        """The values for batches of this one's shape, as far as they were computed."""
        return self._values[tuple(tensor.shape for tensor in batch.tensors())]

    def drop(self, nodes: Iterable[Node]) -> None:
        """Nothing reads these any more."""
        for node in nodes:
            for values in self._values.values():
                values.pop(node, None)

    def take(self, node: Node, known: Environment, executors: Sequence[Executor], environments: Sequence[Environment]) -> None:
        """Put a node's value into one batch's values, in each stream.

        Args:
            node: what it reads is there.
            known: of this batch's shape (`of`).
            executors: of the streams.
            environments: the batch's values in each stream.
        """
        if node in self.nodes:
            if node not in known:
                known[node] = executors[0].run(node, environments[0])
            for environment in environments:
                environment[node] = known[node]
        else:
            for executor, environment in zip(executors, environments, strict=True):
                environment[node] = executor.run(node, environment)


@contextlib.contextmanager
def told(batch: str, step: "Node | InputGroup") -> Iterator[None]:
    """What torch raises inside says which batch it was, such as `Calibration batch 0`, and where in the model.

    Raises:
        CalibrationError: the model cannot run this batch.
    """
    try:
        yield
    except IndexError as e:
        raise CalibrationError(_out_of_range(batch, step, e)) from e
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        raise CalibrationError(_cannot_run(batch, step, e)) from e


def _out_of_range(batch: str, step: "Node | InputGroup", error: IndexError) -> str:
    return (
        f"{batch}: {error} (at {_place(step)}). Are there token ids beyond the "
        "vocabulary, or sequences longer than the model's context?"
    )


def _cannot_run(batch: str, step: "Node | InputGroup", error: RuntimeError) -> str:
    return (
        f"{batch}: {first_line(error)} (at {_place(step)}). Expected inputs of the dtype and the shape that "
        "the model computes with."
    )


def _place(step: "Node | InputGroup") -> object:
    modules = list(step.meta.get("nn_module_stack", {}).values()) if isinstance(step, Node) else []
    return modules[-1][0] if modules else step
