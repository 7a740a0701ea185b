"""The fallback where a model cannot be exported: module hooks, and the statistics of the dense model.

Sees the modules `nn.Linear` and `transformers.Conv1D` only. Whoever uses it says so, and why.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statprune.batches import ModelInputs
from statprune.sites import InputGroup, LeftOut, LinearSite
from statprune.statistics import InputMoments
from statprune.walk import ForwardContext, OnGroup, complete


def find_linear_modules(model: nn.Module, example: ModelInputs) -> tuple[list[InputGroup], list[LeftOut]]:
    """Linear modules in the order in which one batch reaches them; neighbours called on the same tensor form a group."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    with _hooked(_linear_modules(model).values(), lambda module, tensor, output: calls.append((module, tensor, output))):
        result = model(*example.args, **example.kwargs)
    output_ids = {id(leaf) for leaf in tree_leaves(dict(result) if hasattr(result, "items") else result)}
    module_names = {id(module): name for name, module in _linear_modules(model).items()}
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    num_calls = Counter(id(module.weight) for module, _, _ in calls)

    grouped: list[list[LinearSite]] = []
    seen: set[int] = set()
    last_tensor: Tensor | None = None
    for module, tensor, output in calls:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        parameter = f"{module_names[id(module)]}.weight".removeprefix(".")
        rows, columns = weight.shape
        stored_out_in = isinstance(module, nn.Linear)
        site = LinearSite(
            name=parameter.removesuffix(".weight"),
            parameter=parameter,
            layout="out_in" if stored_out_in else "in_out",
            shape=(rows, columns) if stored_out_in else (columns, rows),
            aliases=tuple(name for name in names_of[id(weight)] if name != parameter),
            num_reads=num_calls[id(weight)],
            feeds_output=id(output) in output_ids,
        )
        if tensor is not last_tensor:
            grouped.append([])
        grouped[-1].append(site)
        last_tensor = tensor
    left_out = [
        LeftOut(name, tuple(parameter.shape), "not the weight of a linear module that ran")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in seen
    ]
    return [InputGroup(tuple(sites)) for sites in grouped], left_out


@torch.no_grad()
def observe_modules(
    model: nn.Module,
    groups: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    on_group: OnGroup,
    *,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> None:
    """Run all batches through the dense model once, and hand every group its statistics afterwards.

    Raises:
        NonFiniteError: a group's input holds NaN or infinity; names the first such layer, before anything is pruned.
    """
    leaders = {model.get_submodule(group.name): group for group in groups}
    device = next(model.parameters()).device
    moments = {group.name: InputMoments.zeros(group.in_features, device=device) for group in groups}
    for batch in batches:
        mask = batch.kwargs.get("attention_mask")

        def add(module: nn.Module, tensor: Tensor, _: Tensor, mask: Tensor | None = mask) -> None:
            fits = mask is not None and mask.ndim == 2 and tensor.shape[:-1] == mask.shape
            moments[leaders[module].name].add(tensor, mask if fits else None)

        with _hooked(leaders, add), forward_context():
            model(*batch.args, **batch.kwargs)
    totals = [complete(group, moments[group.name]) for group in groups]
    for group, total in zip(groups, totals, strict=True):
        on_group(group, total)


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor))
    }


@contextlib.contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Tensor, Tensor], Any]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, args, output: hook(module, args[0], output) and None) for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
