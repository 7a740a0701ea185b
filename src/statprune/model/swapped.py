"""Swapped: packed weights in the place of linear layers' parameters, for as long as the model is to run on them.

The parameter itself is kept, without its values, which the packed weight has: undone, the module has the same parameter again,
with the same bits, so that whoever else holds it (an optimizer, a hook) never sees another one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Swapped:
    """The layers that run on a packed weight, and what it takes to undo that."""

    def __init__(self) -> None:
        self._held: list[tuple[nn.Linear, Tensor, Callable[[Tensor], Tensor]]] = []

    @torch.no_grad()
    def put(self, module: nn.Linear, packed: Tensor, unpack: Callable[[Tensor], Tensor]) -> None:
        """Run this layer on a packed weight, and let the values of its parameter go.

        Args:
            module: whose `weight` [out, in] no other module has.
            packed: what `F.linear` takes in the weight's place, on the same device.
            unpack: gives the weight back, bit for bit; called with the packed one when this is undone.
        """
        dense = module.weight
        module.weight = nn.Parameter(packed, requires_grad=False)
        self._held.append((module, dense, unpack))
        dense.data = dense.data.new_empty(0)

    @torch.no_grad()
    def undo(self) -> None:
        """Give each layer its own parameter and values back, the last one first. Undone already, there is nothing to do."""
        while self._held:
            module, dense, unpack = self._held[-1]
            dense.data = unpack(module.weight)
            module.weight = dense
            self._held.pop()
