"""A model's twin with parameters of its own: the same modules, without the hooks that gather or move weights while it runs.

What is traced, checked or saved in the place of a model whose weights lie elsewhere or in parts. Nothing is copied but the
modules themselves: buffers and everything else they hold are the model's own.
"""

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_STATE = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OWN = {"_parameters", "_buffers", "_modules", *_HOOKS, *_HOOKS_OF_STATE}


def whole_twin(
    model: nn.Module,
    parameter_of: Callable[[str, nn.Parameter], Tensor],
    buffer_of: Callable[[str, Tensor], Tensor] = lambda _, buffer: buffer,
) -> nn.Module:
    """The twin, with the classes and plain attributes that the modules had before FSDP2 or accelerate took them.

    Args:
        model: stays as it is.
        parameter_of: what stands in a parameter's place, by its first name; called once for tied ones.
        buffer_of: the same for buffers.
    """
    twins: dict[int, Any] = {id(module): _class_of(module).__new__(_class_of(module)) for module in model.modules()}
    made: dict[int, Tensor] = {}
    names = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        twin, path = twins[id(module)], names[id(module)]

        def stand_in_of(tensor: Any, own: str, make: Callable[[str, Any], Tensor], path: str = path) -> Any:
            if tensor is not None and id(tensor) not in made:
                value = make(f"{path}.{own}".lstrip("."), tensor)
                if isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter):
                    value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                made[id(tensor)] = value
            return None if tensor is None else made[id(tensor)]

        def own_of(value: Any) -> Any:
            if isinstance(value, types.MethodType) and id(value.__self__) in twins:
                return types.MethodType(value.__func__, twins[id(value.__self__)])
            return twins.get(id(value), value)

        held = {key: value for key, value in vars(module).items() if key not in _OWN and not _is_of_accelerate(module, key)}
        vars(twin).update({key: tree_map(own_of, value) for key, value in held.items()})
        twin._parameters = {own: stand_in_of(one, own, parameter_of) for own, one in module._parameters.items()}
        twin._buffers = {own: stand_in_of(one, own, buffer_of) for own, one in module._buffers.items()}
        twin._modules = {own: None if one is None else twins[id(one)] for own, one in module._modules.items()}
        for key in _HOOKS:
            hooks = getattr(module, key)
            setattr(twin, key, OrderedDict((number, hook) for number, hook in hooks.items() if not _is_of_torch(hook)))
        for key in _HOOKS_OF_STATE:
            setattr(twin, key, OrderedDict())
    whole: nn.Module = twins[id(model)]
    return whole


def skeleton(model: nn.Module, device: torch.device) -> nn.Module:
    """A twin whose parameters have their shape and no values, to trace a graph with; on this device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(_: str, parameter: nn.Parameter) -> Tensor:
        with mode:
            return torch.empty(tuple(parameter.shape), dtype=parameter.dtype, device=device)

    return whole_twin(model, fake, lambda _, buffer: buffer.to(device) if not buffer.is_meta else buffer)


def stand_in(model: nn.Module) -> nn.Module:
    """A twin whose parameters have their shape and take no memory, to ask whether it could be saved."""
    return whole_twin(model, lambda _, parameter: torch.empty(1, dtype=parameter.dtype).expand(tuple(parameter.shape)))


def _class_of(module: nn.Module) -> type[nn.Module]:
    """`fully_shard` derives a class of its own from each module's."""
    kind: type[nn.Module] = next(
        base for base in type(module).__mro__ if issubclass(base, nn.Module) and not issubclass(base, FSDPModule)
    )
    return kind


def _is_of_torch(hook: Any) -> bool:
    """Whether FSDP2 registered it."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _is_of_accelerate(module: nn.Module, key: str) -> bool:
    """Whether accelerate put it there: its hook, and a `forward` around the module's own."""
    return hasattr(module, "_hf_hook") and key in ("_hf_hook", "_old_forward", "forward", "hf_device_map")
