"""Merging LoRA adapters into a pruned model, so that what was zero stays exactly zero.

    base weight     1  0  0  2        An adapter's update B A is dense. Where it is added, the sparsity is gone:
    update         .1 .3 .2 .1        so it is added where the base weight is not zero.
    merged        1.1  0  0 2.1

The arithmetic of the merge (ranks, scaling, several adapters, transposed storage) is peft's own; the mask is applied to what
it leaves, in the weight's own dtype. The merged model is not the one that was trained: that one had the whole update. Measure
it, or prune with `StatisticalPruning(then="finetune")`, which trains what it keeps.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from statprune.errors import AdapterError, MaskError
from statprune.model.weights import check_weights, hold_
from statprune.report import PruningReport
from statprune.training.masks import absent, keep_mask

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def merge_adapters(peft_model: Any, report: PruningReport | None = None) -> nn.Module:
    """Merge the active LoRA adapters into the base model, except where its weights are zero, and return it without adapters.

    What peft merges beside linear updates is merged as well: biases, embeddings, `modules_to_save`. A pruned weight of
    `modules_to_save` gets its zeros back.

    Args:
        peft_model: a `peft.PeftModel` whose adapters are not merged yet. Its base model is changed in place.
        report: of the pruning, such as `PruningReport.from_dict` of a `pruning.json`: these weights are held, and have all the
            zeros that it promises. Without it, every weight with two or more dimensions that holds zeros is held at
            them, embeddings aside.

    Returns:
        The base model: the same modules, with the same parameters, as before peft wrapped them.

    Raises:
        AdapterError: not a `PeftModel`, an adapter of another kind than LoRA, merged already, quantized weights, or a variant
            of LoRA that is no sum of weight and update (DoRA) on a pruned weight; or peft cannot merge it.
        MaskError: a pruned weight has lost zeros before the merge, or does not exist.
        NonFiniteError: NaN or infinity in the model or in an adapter.
    """
    peft = _import_peft()
    if not isinstance(peft_model, peft.PeftModel):
        raise AdapterError(f"merge_adapters({type(peft_model).__name__}): expected a peft.PeftModel, a model with adapters.")
    for name in peft_model.active_adapters:
        if (kind := peft_model.peft_config[name].peft_type) != peft.PeftType.LORA:
            raise AdapterError(
                f"The adapter {name!r} is of type {kind.value}: expected LORA, which adds an update to a weight."
            )
    wrapped = peft_model.get_base_model()
    _refuse_quantized(wrapped)
    check_weights(peft_model)
    _refuse_merged(wrapped)
    masks = _keep_masks(wrapped, report)
    _refuse_unmergeable(wrapped, peft_model.active_adapters, masks)
    try:
        merged: nn.Module = peft_model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as e:
        raise AdapterError(
            f"peft cannot merge this adapter: {e} Some layers may be merged already: load the model anew."
        ) from e
    for name, keep in masks.items():
        hold_(merged.get_parameter(name), keep)
    for name, keep in masks.items():
        if bool(merged.get_parameter(name).detach()[~keep].any()):
            raise MaskError(
                f"{name}: zeros were lost in the merge. Is it one parameter with another that was pruned differently?"
            )
    return merged


def check_adapter_folder(folder: str | Path) -> None:
    """Raise AdapterError where the folder is none that peft's `save_pretrained` wrote, with safetensors."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is not an adapter's folder: expected {CONFIG} and {WEIGHTS} in it, as peft writes them.")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{folder} has no {WEIGHTS}"
            + (", only adapter_model.bin: a pickle can run code when it is read. Save it anew with save_pretrained "
               "on a machine where you trust it." if pickled else ": a configuration without weights.")
        )  # fmt: skip


def load_adapter(model: nn.Module, folder: str | Path) -> Any:
    """A `peft.PeftModel` of this model and the adapter in a folder: safetensors only.

    Raises:
        AdapterError: no adapter there, not for this model, or with other tensors than its configuration says.
    """
    check_adapter_folder(folder)
    peft = _import_peft()
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
        device = str(next(model.parameters()).device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below, with the unknown ones
            peft_model = peft.PeftModel.from_pretrained(model, str(folder), torch_device=device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
        raise AdapterError(f"The adapter in {folder} does not fit {type(model).__name__}: {_first_lines(e)}") from e
    expected = set(peft.get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    # An adapter may bring embeddings along, which are no part of it; anything else would be silently left unread.
    stray = (expected - saved) | {name for name in saved - expected if "lora_" in name}
    if stray:
        raise AdapterError(
            f"The adapter in {folder} does not fit {type(model).__name__}: {len(stray)} tensors are missing or unknown, such "
            f"as {min(stray)}. Was it trained on another model, or saved with another version of peft?"
        )
    return peft_model


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as e:
        raise AdapterError("LoRA adapters need the package peft: pip install 'statprune[lora]'") from e
    return peft


def _keep_masks(wrapped: nn.Module, report: PruningReport | None) -> dict[str, Tensor]:
    """By the names that the parameters have without adapters."""
    parameters = dict(_base_parameters(wrapped))
    if report is not None:
        for site in report.sites:
            if site.parameter not in parameters:
                raise absent(site, wrapped)
        return {site.parameter: keep_mask(site, parameters[site.parameter]) for site in report.sites}
    # The row of the padding token is zero in an embedding that nobody has pruned.
    embeddings = {id(module.weight) for module in wrapped.modules() if isinstance(module, nn.Embedding)}
    masks = {
        name: parameter.detach() != 0
        for name, parameter in parameters.items()
        if parameter.ndim >= 2 and parameter.is_floating_point() and id(parameter) not in embeddings
    }
    return {name: keep for name, keep in masks.items() if not keep.all()}


def _base_parameters(wrapped: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's parameters, without the adapters', by the names that they have without adapters."""
    inner = _inner_names(wrapped)
    for name, parameter in wrapped.named_parameters(remove_duplicate=False):
        path, plain = "", []
        for part in name.split("."):
            if path not in inner:
                plain.append(part)
            elif part != inner[path]:
                break  # an adapter's own
            path = f"{path}.{part}" if path else part
        else:
            yield ".".join(plain), parameter


def _inner_names(wrapped: nn.Module) -> dict[str, str]:
    """For each module that peft has put around another one, the attribute that holds the other one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner[name] = "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner[name] = "original_module"
    return inner


def _refuse_merged(wrapped: nn.Module) -> None:
    for name, module in wrapped.named_modules():
        if getattr(module, "merged", False) is True:
            raise AdapterError(
                f"{name}: an adapter is merged into it already, and its zeros are lost. Load the pruned model and the "
                "adapter anew."
            )


def _refuse_quantized(wrapped: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in wrapped.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weights = layer.get_base_layer().parameters()
            if any(not (weight.is_floating_point() or weight.is_complex()) for weight in weights):
                raise AdapterError(f"{name} is quantized: load the base model in the dtype that it was pruned in.")


def _refuse_unmergeable(wrapped: nn.Module, active: list[str], masks: dict[str, Tensor]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    held = {id(parameter) for name, parameter in _base_parameters(wrapped) if name in masks}
    for name, layer in wrapped.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        weights = list(layer.get_base_layer().parameters())
        variants = [one for one in active if one in getattr(layer, "lora_variant", {})]
        if variants and any(id(weight) in held for weight in weights):
            kind = type(layer.lora_variant[variants[0]]).__name__
            raise AdapterError(
                f"{name}: the adapter {variants[0]!r} is no plain LoRA but {kind}, which does more than add to a weight: "
                "what a mask leaves of that is not what was trained. Train it anew without (for DoRA, use_dora=False)."
            )


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
