"""Which layers of a model can run on packed weights, and why the others cannot."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from statprune.acceleration.packing import Kernel
from statprune.methods.patterns import NM
from statprune.model.sites import LeftOut


@dataclass(frozen=True)
class Kind:
    """What the time of a layer hangs on: layers of one kind are measured once."""

    shape: tuple[int, int]
    """(out, in)."""

    dtype: torch.dtype
    device: torch.device
    has_bias: bool


@dataclass(frozen=True)
class Candidate:
    """A 2:4 layer that there is a kernel for."""

    name: str
    """The parameter's name without `.weight`."""

    module: nn.Linear
    kernels: tuple[Kernel, ...]
    """Those that take its weight."""

    @property
    def kind(self) -> Kind:
        """Of this layer."""
        weight = self.module.weight
        return Kind((weight.shape[0], weight.shape[1]), weight.dtype, weight.device, self.module.bias is not None)


def find_candidates(model: nn.Module, kernels: Sequence[Kernel]) -> tuple[list[Candidate], list[LeftOut]]:
    """Every layer that could run on a packed weight, and every other weight with two or more dimensions.

    Args:
        model: any module.
        kernels: to choose from.
    """
    names: dict[int, list[str]] = defaultdict(list)
    owners: dict[int, set[tuple[nn.Module, str]]] = defaultdict(set)
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names[id(parameter)].append(f"{path}.{own}".lstrip("."))
            owners[id(parameter)].add((module, own))
    candidates, left_out = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        module, own = next(iter(owners[id(parameter)]))
        short = name.removesuffix(".weight")
        why = _why_no_linear(module, own, parameter)
        if why is None and len(owners[id(parameter)]) > 1:
            why = f"tied to {', '.join(other for other in names[id(parameter)] if other != name)}"
        if why is None and not NM(2, 4).holds(parameter.detach()):
            why = "not 2:4"
        reasons = [] if why else [kernel.why_not(parameter) for kernel in kernels]
        fitting = tuple(kernel for kernel, reason in zip(kernels, reasons, strict=False) if reason is None)
        if fitting:
            assert isinstance(module, nn.Linear)
            candidates.append(Candidate(short, module, fitting))
        else:
            why = why or "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or "no kernel"
            left_out.append(LeftOut(short, tuple(parameter.shape), why))
    return candidates, left_out


def _why_no_linear(module: nn.Module, own: str, parameter: Tensor) -> str | None:
    # A class made of nn.Linear may read its weight elsewhere than in F.linear, as nn.MultiheadAttention does.
    if type(module) is not nn.Linear or own != "weight":
        return f"in {type(module).__name__}, not in nn.Linear"
    if type(parameter) is not nn.Parameter:
        return f"a {type(parameter).__name__} already"
    return "on meta, without values" if parameter.is_meta else None
