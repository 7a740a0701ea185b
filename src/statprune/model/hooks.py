"""The fallback where a model cannot be exported: module hooks, here with the statistics of the dense model (else `blocks`).

Sees the modules `nn.Linear` and `transformers.Conv1D` only. Whoever uses it says so, and why.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statprune.errors import CalibrationError
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import is_transformers_model
from statprune.model.observe import ForwardContext, Observations, complete, fit_mask
from statprune.model.sites import InputGroup, LeftOut, LinearSite
from statprune.ranks import ProcessGroup


@torch.no_grad()
def find_linear_modules(
    model: nn.Module, example: ModelInputs, *, forward_context: ForwardContext = contextlib.nullcontext
) -> tuple[list[InputGroup], list[LeftOut]]:
    """Linear modules in the order in which one batch reaches them; neighbours called on the same tensor form a group.

    Raises:
        CalibrationError: the model cannot run the batch.
    """
    names_of_module = {module: name for name, module in linear_modules(model).items()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    with hooked(names_of_module, lambda *call: calls.append(call)), forward_context():
        result = run_model(model, example, 0)
    # An output model of transformers is a mapping; a cache in it is an object that tree_leaves leaves whole.
    outputs = [leaf for leaf in tree_leaves(dict(result) if hasattr(result, "items") else result) if isinstance(leaf, Tensor)]
    transformers_models: list[Any] = [module for module in model.modules() if is_transformers_model(module)]
    heads = [module.get_output_embeddings() for module in transformers_models]
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
        own_name = f"{names_of_module[module]}.weight".removeprefix(".")
        rows, columns = weight.shape
        is_out_in = isinstance(module, nn.Linear)
        site = LinearSite(
            name=own_name.removesuffix(".weight"),
            parameter=own_name,
            layout="out_in" if is_out_in else "in_out",
            shape=(rows, columns) if is_out_in else (columns, rows),
            aliases=tuple(name for name in names_of[id(weight)] if name != own_name),
            num_reads=num_calls[id(weight)],
            feeds_output=module in heads or any(_hands_on(output, leaf) for leaf in outputs),
        )
        if tensor is not last_tensor:
            grouped.append([])
        grouped[-1].append(site)
        last_tensor = tensor
    left_out = [
        LeftOut(name.removesuffix(".weight"), tuple(parameter.shape), "not the weight of a linear module that ran")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in seen
    ]
    return [InputGroup(tuple(sites)) for sites in grouped], left_out


@torch.no_grad()
def observe_modules(
    model: nn.Module,
    groups: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    *,
    needs: Statistic = Statistic.MOMENTS,
    process_group: ProcessGroup = None,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Observations:
    """Run all batches through the dense model once, and yield every group with its statistics afterwards.

    Raises:
        NonFiniteError: a group's input holds NaN or infinity; names the first such layer, before anything is pruned.
        CalibrationError: padding in the batches of an encoder-decoder; the model cannot run a batch.
    """
    leaders = {model.get_submodule(group.sites[0].parameter.rpartition(".")[0]): group for group in groups}
    device = next(model.parameters()).device
    moments = {group.name: InputMoments.zeros(group.in_features, needs, device=device) for group in groups}
    for number, batch in enumerate(batches):
        mask = padding_mask(batch, number)

        def add(module: nn.Module, tensor: Tensor, _: Tensor, mask: Tensor | None = mask) -> None:
            moments[leaders[module].name].add(tensor, fit_mask(mask, tensor))

        with hooked(leaders, add), forward_context():
            run_model(model, batch, number)
    for group in groups:
        complete(group, moments[group.name], process_group)
    for group in groups:
        yield group, moments.pop(group.name)


def run_model(model: nn.Module, batch: ModelInputs, number: int) -> Any:
    """The model's output for a batch.

    Raises:
        CalibrationError: it cannot run it; names the batch's number.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except Exception as e:
        raise CalibrationError(f"{type(model).__name__} cannot run calibration batch {number}: {e}.") from e


def padding_mask(batch: ModelInputs, number: int) -> Tensor | None:
    """[batch, length], 0 where there is padding; None where nothing says so.

    Raises:
        CalibrationError: padding in the batches of an encoder-decoder.
    """
    mask = batch.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if any(name.startswith("decoder_") for name in batch.kwargs) and not bool(mask.all()):
        raise CalibrationError(
            f"Calibration batch {number} has padding, and without a graph of the model nothing tells the encoder's tokens from "
            "the decoder's. Give batches without padding."
        )
    return mask


def _hands_on(output: Tensor, leaf: Tensor) -> bool:
    """Whether an output of the model is a linear's result as it is: the same memory, or the same numbers in another dtype."""
    if leaf.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
        return True
    return leaf.shape == output.shape and torch.equal(leaf, output.to(leaf.dtype))


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `transformers.Conv1D`, by name, but those whose weight is computed of other parameters."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and isinstance(module._parameters.get("weight"), Tensor)
    }


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor, Tensor], Any]) -> Iterator[None]:
    """Inside, `see` is called with (module, input, output) whenever one of these linear modules has run."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        see(module, next(iter([*args, *kwargs.values()])), output)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
