"""Observing: what statistics of a group's inputs are made of, whoever runs the model (the walk, or module hooks)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from statprune.errors import CalibrationError, NonFiniteError
from statprune.methods.experts import ExpertMoments
from statprune.methods.statistics import InputMoments
from statprune.model.sites import InputGroup
from statprune.ranks import ProcessGroup, sum_over_ranks

ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Entered around every stretch of model code: Lightning's precision plugin, or nothing."""

Moments = InputMoments | ExpertMoments
"""The statistics of a group's inputs: of one matrix, or of each matrix of a stack."""

Observations = Iterator[tuple[InputGroup, Moments | None]]
"""Each input group once, in execution order, with its complete statistics, or None where it is pruned already; what is read
next sees what was pruned by then."""


def complete(group: InputGroup, moments: Moments, process_group: ProcessGroup = None) -> Moments:
    """A group's statistics over all ranks, checked.

    Raises:
        NonFiniteError: NaN or infinity entered the group.
    """
    sum_over_ranks(moments.totals(), process_group, f"the statistics of {group.name}")
    if not moments.is_finite():
        raise NonFiniteError(
            f"NaN or infinity in the input of {group.name}, the first layer where it shows. Look at what comes just before "
            "it; in float16, try bfloat16 or float32."
        )
    return moments


def fit_mask(mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """The padding mask [batch, length] in the order of a linear's inputs; None where these are no such tokens (pooled ones)."""
    if mask is None:
        return None
    positions, expected = ([size for size in shape if size != 1] for shape in (inputs.shape[:-1], mask.shape))
    if positions == expected or positions == [mask.numel()]:
        return mask
    return mask.t() if positions == expected[::-1] else None  # [length, batch], as in XLNet


def fit_routed_mask(mask: Tensor | None, inputs: Tensor, rows: Tensor | None, name: str) -> Tensor | None:
    """Which rows of a stack's inputs are tokens: bool, [rows]; None where all are.

    Args:
        mask: the padding mask [batch, length], 0 at padding.
        inputs: [rows, in] or [experts, rows, in].
        rows: the position of each row's token in the batch.
        name: of the layer, for an error.

    Raises:
        CalibrationError: there is padding, and nothing tells which rows it has become.
    """
    if mask is None:
        return None
    keep = mask.reshape(-1) != 0
    if rows is not None:
        return keep[rows]
    if inputs.ndim == 3 and inputs.shape[1] == len(keep):
        return keep
    if not bool(keep.all()):
        raise CalibrationError(
            f"{name}: the calibration data has padding, and the graph does not show which of the experts' rows it has become. "
            "Give batches without padding."
        )
    return None
