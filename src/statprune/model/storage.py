"""Where a parameter's values lie: whole in the model, as a shard of this rank's, or where accelerate has put them.

FSDP2 (`fully_shard`)        the parameter is a DTensor, each rank has a part                    `sharded`
accelerate (`device_map`)    on several devices; in host memory, with the parameter on meta      `dispatched`
FSDP1, ZeRO-3, tensor parallelism, offloaded to disk                                             refused by name
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from statprune.errors import SiteError


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds a part only of some parameter, as FSDP2 makes them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(
        isinstance(module, FSDPModule) for module in model.modules()
    )


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves values to a device, or between several, while the model runs."""
    return any(True for module in model.modules() for _ in _align_hooks(module))


def is_part(parameter: object) -> bool:
    """Whether this process may hold a part of it only."""
    return isinstance(parameter, DTensor)


def reshard_(model: nn.Module) -> None:
    """Have FSDP2's parameters be the shards that the optimizer trains.

    Behind a forward pass without a backward one the outermost module's are whole: what is written into those is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without gradient: its shard, or all of it; writing to it writes to the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, sharded as another one is; a DTensor. Asks no other rank."""
    assert isinstance(like, DTensor)
    # Contiguous: a slice of the columns of a transpose would keep the whole in memory.
    return _distributed(whole.contiguous(), like)


def total(values: Tensor, parameter: Tensor) -> Tensor:
    """The sum of what each rank has counted on its part of a parameter, on all of them; a collective where it is sharded."""
    if not isinstance(parameter, DTensor):
        return values
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in parameter.placements]
    summed: Tensor = DTensor.from_local(values, parameter.device_mesh, placements, run_check=False).full_tensor()
    return summed


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, with its values where they are kept; of a sharded one those of this rank.

    Raises:
        SiteError: as `refuse_unreadable`.
    """
    refuse_unreadable(model)
    reshard_(model)
    kept = in_host_memory(model)
    for name, parameter in model.named_parameters():
        yield name, kept.get(name, parameter if not isinstance(parameter, DTensor) else local(parameter))


def in_host_memory(model: nn.Module) -> dict[str, Tensor]:
    """By all their names, parameters and buffers that accelerate keeps in host memory, while the model has them on meta.

    Raises:
        SiteError: one is on disk.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for hook in _align_hooks(module):
            if not hook.offload:
                continue
            own = module.named_parameters(recurse=hook.place_submodules, remove_duplicate=False)
            buffers = module.named_buffers(recurse=hook.place_submodules, remove_duplicate=False)
            for name, tensor in (*own, *buffers):
                if not tensor.is_meta:
                    continue
                full = f"{path}.{name}".lstrip(".")
                value = _looked_up(hook.weights_map, name)
                if value is None:
                    raise SiteError(
                        f"The parameter {full} is offloaded to disk by accelerate, whose files are only read. Prune the "
                        "checkpoint with `statprune prune MODEL --output DIR --stream`, or load it with a device_map that "
                        "names no disk. Nothing was changed."
                    )
                found[full] = value
    return found


def compute_device(model: nn.Module) -> torch.device:
    """Where calibration runs: where the first parameter is, or where accelerate would take it."""
    if is_dispatched(model):
        for module in model.modules():
            for hook in _align_hooks(module):
                if hook.execution_device is not None:
                    return _device(hook.execution_device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def refuse_unreadable(model: nn.Module) -> None:
    """Raise SiteError, naming the parameter, where weights lie in parts that cannot be put together, or written."""
    for path, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise SiteError(
                f"The module {path or type(module).__name__} is sharded by FullyShardedDataParallel (FSDP1), which flattens "
                "weights. Shard with FSDP2 instead: torch.distributed.fsdp.fully_shard, in Lightning the "
                "ModelParallelStrategy. Nothing was changed."
            )
    by_fsdp = _below_fsdp(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
            raise SiteError(
                f"The parameter {name} is partitioned by DeepSpeed ZeRO-3, which gathers weights for its own engine only. "
                "Prune the checkpoint before or after the training, with `statprune prune`, or train with FSDP2 "
                "(torch.distributed.fsdp.fully_shard) or ZeRO-2. Nothing was changed."
            )
        if isinstance(parameter, DTensor) and not (name in by_fsdp and _is_of_fsdp(parameter)):
            placements = ", ".join(map(str, parameter.placements))
            raise SiteError(
                f"The parameter {name} is sharded (a DTensor) by something else than fully_shard alone, as tensor parallelism "
                f"does: {placements} over the mesh {parameter.device_mesh.mesh_dim_names or parameter.device_mesh.shape}. "
                "Prune before parallelize_module, or shard with torch.distributed.fsdp.fully_shard only. Nothing was changed."
            )
        if isinstance(parameter, DTensor) and not parameter.is_meta and local(parameter).device.type != _mesh_type(parameter):
            raise SiteError(
                f"The parameter {name} is offloaded by FSDP2 to the {local(parameter).device.type}, and gathered on the "
                f"{_mesh_type(parameter)}. Shard without CPUOffloadPolicy. Nothing was changed."
            )


def refuse_sharded(model: nn.Module, work: str = "pruning") -> None:
    """Raise SiteError, naming it, for a parameter of which this process holds a part only.

    Args:
        model: any module.
        work: what needs whole weights, for the message.
    """
    refuse_unreadable(model)
    reshard_(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise SiteError(
                f"The parameter {name} is sharded (a DTensor, as FSDP makes them), and {work} needs whole weights. Do it "
                "before the model is sharded, on one device, or with DDP. Nothing was changed."
            )


def _distributed(whole: Tensor, like: DTensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank: each takes its part of what it has itself.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    return isinstance(module, FSDPModule)


def _below_fsdp(model: nn.Module) -> set[str]:
    """Names of the parameters in modules that `fully_shard` was called on."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if is_fsdp(module)
        for name, _ in module.named_parameters(remove_duplicate=False)
    }


def _is_of_fsdp(parameter: DTensor) -> bool:
    """Whether the placements are FSDP2's: a shard over the last dimension of its mesh, copies over the others."""
    *others, last = parameter.placements
    return all(one.is_replicate() for one in others) and (type(last) is Shard or (last.is_replicate() and not others))


def _mesh_type(parameter: DTensor) -> str:
    return str(parameter.device_mesh.device_type)


def _align_hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks that move a module's values, also from inside of its SequentialHook; asked without importing it."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "weights_map") and hasattr(one, "execution_device"):
            yield one


def _looked_up(weights_map: Any, name: str) -> Tensor | None:
    """The tensor that a map of accelerate holds in memory; None where it would read a file."""
    while hasattr(weights_map, "dataset") and hasattr(weights_map, "prefix"):
        weights_map, name = weights_map.dataset, f"{weights_map.prefix}{name}"
    held = getattr(weights_map, "state_dict", weights_map)
    value = held.get(name) if isinstance(held, Mapping) else None
    return value if isinstance(value, Tensor) else None


def _device(place: Any) -> torch.device:
    """accelerate names GPUs by their numbers."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
