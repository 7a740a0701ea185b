"""What is checked before a run begins, and what its ranks compare: else they might do what nobody asked for."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from statprune.disk.ranges import glance
from statprune.disk.skeleton import Skeleton
from statprune.errors import SiteError
from statprune.methods.statistics import Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import has_values
from statprune.model.layers import Layers
from statprune.model.storage import compute_device, is_dispatched, is_sharded
from statprune.model.weights import check_and_sum_weights, check_weights
from statprune.ranks import Common, ProcessGroup, agree, is_distributed
from statprune.recipe import Recipe, Search


def device_of(model: nn.Module) -> torch.device:
    """Where calibration runs: of a model's first parameter, or where accelerate would take that."""
    return compute_device(model)


def check_start(model: nn.Module, how: Recipe | Search, inputs: Sequence[ModelInputs], process_group: ProcessGroup) -> None:
    """Check the model's weights; several ranks, inside of `together`, compare them, what is to be done and the kind of inputs.

    The sizes and the number of batches may differ, and so may buffers, such as a batch norm's averages under DDP.

    Args:
        model: whose weights are whole, or sharded by FSDP2.
        how: what is to be done.
        inputs: this rank's calibration data.
        process_group: the ranks that work together.

    Raises:
        SiteError, NonFiniteError: as `check_weights`.
        RanksError: something differs between the ranks; names it. Nothing is changed.
    """
    if not is_distributed(process_group):
        check_weights(model)
        return
    weights = [f"{name} with the checksum {total:016x}" for name, total in check_and_sum_weights(model).items()]
    _agree(model, how, inputs, weights, process_group)


def check_streamed_start(
    skeleton: Skeleton, recipe: Recipe, inputs: Sequence[ModelInputs], process_group: ProcessGroup
) -> None:
    """`check_start` where the weights are in files, of which each rank reads its own; inside of `together`.

    Whether they are finite is seen when they are read. Of each tensor the ranks compare the ends.

    Raises:
        ModelError: a file cannot be read.
        RanksError: something differs between the ranks; names it. Nothing is changed.
    """
    if is_distributed(process_group):
        weights = [f"{name} with the beginning and end {glance(one)}" for name, one in skeleton.places.items()]
        _agree(skeleton.model, recipe, inputs, weights, process_group)


def _agree(
    model: nn.Module, how: Recipe | Search, inputs: Sequence[ModelInputs], weights: Sequence[str], process_group: ProcessGroup
) -> None:
    recipe = [
        f"{key} {json.dumps(value, sort_keys=True)}" for key, value in {"kind": type(how).__name__, **how.to_dict()}.items()
    ]
    parameters = [f"{name} {list(one.shape)} {_short(one.dtype)}" for name, one in model.named_parameters()]
    agree(
        process_group,
        [
            Common("recipes", recipe, "Expected the same one on every rank. Nothing was changed."),
            Common("parameters", parameters, "Load the same model in the same dtype on every rank. Nothing was changed."),
            Common(
                "weights",
                weights,
                "Load the same checkpoint on every rank, or send the first rank's around before: for p in model.parameters(): "
                "torch.distributed.broadcast(p.data, 0). Nothing was changed.",
            ),
            Common(
                "batches",
                _kind(inputs[0]),
                "Expected the same inputs with the same dtypes on every rank; sizes may differ. Nothing was changed.",
            ),
        ],
    )


def refuse_what_runs_whole(model: nn.Module, how: Recipe | Search, *, has_own_loss: bool) -> None:
    """Refuse what runs the whole model with other weights than its own, where those lie in parts or elsewhere.

    Args:
        model: whose weights may be sharded, or kept in host memory by accelerate.
        how: what is to be done.
        has_own_loss: whether a loss-aware method is given a loss, which sees the whole model.

    Raises:
        SiteError: names it.
    """
    if is_sharded(model):
        kind, way_out = "sharded", "before the model is sharded, on one device, or with DDP"
    elif is_dispatched(model) and not has_values(model):
        kind, way_out = "in host memory, where accelerate has put them", "on one device"
    else:
        return
    if isinstance(how, Search):
        what = f"{how.method!r} tries recipes out on the whole model"
        instead = "Give a recipe, or search"
    elif how.probes_whole_model:
        what = f"the allocation {how.allocation} runs the whole model for each layer"
        instead = "Take the allocation uniform or owl (or curves, where the method is loss-aware), or prune"
    elif has_own_loss and Statistic.CURVATURE in how.needs:
        what = "a loss-aware method is given the whole model's loss where the model is no causal language model"
        instead = "Take a method without gradients, or prune"
    else:
        return
    raise SiteError(f"The weights are {kind}, and {what}. {instead} {way_out}. Nothing was changed.")


def check_layers(layers: Layers, process_group: ProcessGroup) -> None:
    """Compare what the ranks have found in the model, inside of `together`.

    Raises:
        RanksError: one runs the model along its graph and another cannot, or not all batches reach the same layers.
    """
    if is_distributed(process_group):
        runs = "along the graph"
        if layers.traced is None:
            runs = "by module hooks" + (f" on {layers.stacks}" if layers.stacks is not None else "")
        found = [
            f"{site.name} {list(site.shape)}, in the group of {group.name}" for group in layers.groups for site in group.sites
        ]
        way_out = (
            "Give every rank batches of the same kind, with the same sizes or as many different ones. Nothing was changed."
        )
        agree(process_group, [Common("ways to run the model", [runs], way_out), Common("layers", found, way_out)])


def _kind(inputs: ModelInputs) -> list[str]:
    leaves, _ = tree_flatten_with_path((inputs.args, inputs.kwargs))
    return [
        f"input{keystr(path[1:])} "
        + (f"{_short(leaf.dtype)} of {leaf.ndim} dimensions" if isinstance(leaf, Tensor) else repr(leaf))
        for path, leaf in leaves
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
