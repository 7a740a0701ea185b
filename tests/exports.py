"""A graph is exported once in a session for each architecture and kind of inputs, and bound to the model at hand.

An export takes most of the time of most tests, and the same few small models are pruned again and again. A graph of one
instance serves every instance of the architecture, so tests that are not about tracing share it. Those that are have the
marker `real_export`.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from statprune.errors import TracingError
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import architecture
from statprune.model.sites import TracedModel
from statprune.model.trace import check_guards, trace


class Exports:
    """Stands in for `trace`."""

    def __init__(self) -> None:
        self._found: dict[Hashable, TracedModel] = {}

    def __call__(
        self,
        model: nn.Module,
        example: ModelInputs,
        dynamic_dims: Sequence[set[int]] | None = None,
        batches: Sequence[ModelInputs] = (),
    ) -> TracedModel:
        key = self._key(model, example, dynamic_dims or [set() for _ in example.tensors()])
        found = self._found.get(key)
        if found is not None:
            try:
                check_guards(model, found.graph_module, batches)
                return found
            except TracingError:
                pass  # with this example it may have become another graph
        found = trace(model, example, dynamic_dims, batches)
        if key is not None:
            self._found.setdefault(key, found)
        return found

    def _key(self, model: nn.Module, example: ModelInputs, dynamic_dims: Sequence[set[int]]) -> Hashable | None:
        """What an export depends on; None where that cannot be told."""
        modules = list(model.modules())
        if any("forward" in vars(module) for module in modules):
            return None
        # A class that a test defines, or whose forward it replaces, may have the name of another one.
        classes = tuple((type(module), type(module).forward) for module in modules)
        leaves, structure = tree_flatten((example.args, example.kwargs))
        dims = iter(dynamic_dims)
        frame = tuple((_sizes(leaf, next(dims)), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        surroundings: tuple[Any, ...] = (torch.is_autocast_enabled("cpu"), torch.get_default_dtype())
        return architecture(model), classes, str(structure), frame, surroundings


def _sizes(tensor: Tensor, dynamic_dims: set[int]) -> tuple[int | None, ...]:
    return tuple(None if dim in dynamic_dims else size for dim, size in enumerate(tensor.shape))


shared_trace = Exports()
"""The session's; where a test calls `trace` and is not about tracing, it calls this."""
