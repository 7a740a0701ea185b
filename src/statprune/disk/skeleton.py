"""A model without the values of its weights, to be traced; and where each of its weights is in the files.

transformers loads it "onto the disk": it knows which of a model's weights are renamed, merged or split on the way from the
files, says where each one is, and writes those that it has to make into files of their own.
"""

import contextlib
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from statprune.completeness import check_loaded, check_stored, ignored_names, some, unconverted, without_report
from statprune.configuration import empty_model, load_config, model_class, model_folder
from statprune.disk.ranges import DTYPES, Range, ranges_of
from statprune.errors import ModelError, first_line, number_of
from statprune.weight_files import read_headers


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters hold no values, and the files that do."""

    model: Any
    """Of transformers, in eval mode; its parameters are fake tensors on the device, its buffers are real and there."""

    places: dict[str, Range]
    """Of each parameter by its own name, the first where it has several."""

    canonical: dict[str, str]
    """The own name by each name that a parameter has."""

    kept: dict[str, Range]
    """By their names in the files, the tensors that belong into an output."""

    stored_as: dict[str, str]
    """The name in the files of each parameter that lies there as it is; the others are made of several."""

    @property
    def num_bytes(self) -> int:
        """Of all parameters as they are computed with."""
        return sum(one.numel() * one.element_size() for one in self.model.parameters())


def open_skeleton(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    scratch: Path | None = None,
) -> Skeleton:
    """A model that is read from its files while it is computed with.

    Args:
        path: as for `load_model`, and so are the next three.
        dtype: to compute in.
        device: to compute on.
        revision: on the hub.
        scratch: a folder that stays for as long as the model, for parameters that transformers makes of several tensors;
            None: one in the system's temporary folder, which goes with the model.

    Raises:
        ModelError: as `load_model`; or accelerate is not installed.
    """
    _check_accelerate()
    config = load_config(path, revision)
    folder = model_folder(path, revision, with_weights=True)
    stored = read_headers(folder, getattr(config, "transformers_weights", None))
    empty = empty_model(path, config=config)
    left_out = check_stored(path, stored, empty)
    kind, part = model_class(config)
    offload = tempfile.mkdtemp(prefix="statprune-converted-", dir=scratch)
    try:
        with without_report() as reports, _quiet():
            model, found = kind.from_pretrained(
                folder, config=part, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                ignore_mismatched_sizes=True, output_loading_info=True, device_map={"": "disk"}, offload_folder=offload,
            )  # fmt: skip
    except Exception as e:  # whatever a model class, safetensors and torch raise on weights that do not fit
        if names := unconverted(reports):
            raise ModelError(f"{path}: {some(names)} cannot be made of what the files hold for it.") from e
        raise ModelError(f"The weights in {path} cannot be loaded: {first_line(e)}") from e
    strays = check_loaded(path, kind.__name__, found)
    if left_out + strays:
        warnings.warn(
            f"Of {path}, {number_of(len(left_out + strays), 'tensor')} that {kind.__name__} has no use for will not be in what "
            f"is saved: {some(left_out + strays)}.",
            stacklevel=2,
        )
    index = dict(_index(model))
    canonical = _canonical(model)
    _empty_(model, device)
    ranges: dict[Path, dict[str, Range]] = {}
    places, stored_as = {}, {}
    for name, own in canonical.items():
        if own in places or name not in index:
            continue
        file, tensor = index[name]
        places[own] = ranges.setdefault(file, ranges_of(file))[tensor]
        if file.parent != Path(offload):
            stored_as[own] = tensor
    if missing := sorted(set(canonical.values()) - places.keys()):
        raise ModelError(f"{path}: transformers does not say where {some(missing)} is in the files.")
    in_files = {name: Range(folder / one.file, 0, DTYPES[one.dtype], one.shape) for name, one in stored.items()}
    for name, one in in_files.items():
        in_files[name] = ranges.setdefault(one.file, ranges_of(one.file))[name]
    direct = {tensor for file, tensor in index.values() if file.parent != Path(offload)}
    unused = {*left_out, *strays, *ignored_names(stored, empty)}
    aliases = {index[name][1] for name, own in canonical.items() if name in index} - set(stored_as.values())
    is_converted = len(stored_as) < len(places)
    kept = {
        name: one
        for name, one in in_files.items()
        if name not in unused and name not in aliases and (name in direct or is_converted)
    }
    model.config._commit_hash, model.config.name_or_path, model.name_or_path = config._commit_hash, path, path
    weakref.finalize(model, shutil.rmtree, offload, ignore_errors=True)
    return Skeleton(model.eval(), places, canonical, kept, stored_as)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without accelerate's line that parameters are on the meta device."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_accelerate() -> None:
    try:
        import accelerate  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as e:
        raise ModelError("A model that is streamed from its files needs accelerate: pip install 'statprune[trainer]'.") from e


def _index(model: nn.Module) -> Iterator[tuple[str, tuple[Path, str]]]:
    """(file, tensor) of each parameter and buffer that lies on the disk, from the hooks that would load them."""
    seen: set[int] = set()
    for module in model.modules():
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        dataset: Any = getattr(weights_map, "dataset", weights_map)
        index: Mapping[str, Any] = getattr(dataset, "index", {})
        if id(index) not in seen:
            seen.add(id(index))
            yield from ((name, (Path(one["safetensors_file"]), one["weight_name"])) for name, one in index.items())


def _canonical(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _empty_(model: nn.Module, device: str) -> None:
    """Take accelerate's hooks off, and put fake parameters in the place of the meta ones: as torch.export takes them."""
    from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]

    remove_hook_from_submodules(model)
    vars(model).pop("hf_device_map", None)  # else save_pretrained warns of memory that it does not take here
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # which accelerate has put back into the instance
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    fakes[id(parameter)] = nn.Parameter(fake, requires_grad=False)
            module._parameters[name] = fakes[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
