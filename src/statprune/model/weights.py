"""Weights: where a model's weights are read from, and where pruned ones land. No other module changes a parameter.

    InPlace    read from the model, written into the model
    Twin       read from the model until they are pruned; pruned ones are kept aside, and the model stays as it is
    Sharded, Dispatched, and a twin of each     where each rank has a part, or accelerate keeps them (`sharded`, `dispatched`)
    Streamed   read from files and written into others (`disk/streamed`)
    Dense      read from any of these as they were, for as long as somebody has use for that
    Original   read from any of these as they were, one segment after another

Written is in place, under `no_grad`, never with a new `nn.Parameter`: ties, optimizers and hooks keep working. `swapped` has
packed weights in the parameters' place for a while, changes none of them, and is undone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from statprune.errors import NonFiniteError, SiteError
from statprune.methods.finite import finite_flag, is_finite
from statprune.methods.pruner import PrunedWeight
from statprune.model.sites import LinearSite
from statprune.model.storage import is_part, local, stored_parameters


class Readable(Protocol):
    """Parameters and buffers of a model by name, to compute with."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a parameter or buffer of this name."""

    def get(self, name: str) -> Tensor:
        """As stored, whole."""


class Segmented(Readable, Protocol):
    """Parameters and buffers that are there for one segment after another."""

    def prepare(self, names: Sequence[str], following: Sequence[str] = ()) -> None:
        """These are read from now on, until they are released; those of the segment behind it come next.

        Every rank calls it with the same names at the same place, so that it may talk to the others.
        """

    def release(self, names: Iterable[str]) -> None:
        """These are not read again in this walk, or prepared before they are."""


class Weights(Segmented, Protocol):
    """The parameters and buffers of a model by name, as the walk computes with them: pruned where they were put."""

    @property
    def is_in_place(self) -> bool:
        """Whether what is put changes the model at once."""

    def original(self, name: str) -> Tensor:
        """As it was before this run, or at least as it is before it is put."""

    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Land a pruned weight; every name that it is tied to reads it from now on."""


class InPlace:
    """A model's own weights; memory never holds a second model."""

    is_in_place = True

    def __init__(self, model: nn.Module) -> None:
        self._tensors = named_tensors(model)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> Tensor:
        """The model's own tensor."""
        return self._tensors[name]

    def original(self, name: str) -> Tensor:
        """The model's own tensor: whoever needs it later keeps a copy."""
        return self._tensors[name]

    def prepare(self, names: Sequence[str], following: Sequence[str] = ()) -> None:
        """They are there."""

    @torch.no_grad()
    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Write it into the model."""
        site.view(self._tensors[site.parameter]).copy_(pruned.weight)
        torch.clear_autocast_cache()  # inside an autocast of the caller's, a low-precision copy of the dense weight may live on

    def release(self, names: Iterable[str]) -> None:
        """They belong to the model, and stay."""


class Twin:
    """A model's weights with pruned ones in the place of some; the model itself stays as it is."""

    is_in_place = False

    def __init__(self, model: nn.Module) -> None:
        self._tensors = named_tensors(model)
        self._model = dict(self._tensors)
        self.pruned: dict[str, Tensor] = {}
        """By the site's name of the parameter, as the parameter is stored: ready for `torch.func.functional_call`."""

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> Tensor:
        """The pruned one where there is one."""
        return self._tensors[name]

    def original(self, name: str) -> Tensor:
        """The model's own."""
        return self._model[name]

    def prepare(self, names: Sequence[str], following: Sequence[str] = ()) -> None:
        """They are there."""

    def put(self, site: LinearSite, pruned: PrunedWeight) -> None:
        """Keep it aside."""
        # Outside of the view: functional_call wants the parameter's own layout, in memory too.
        stored = site.view(pruned.weight).contiguous()
        self.pruned[site.parameter] = stored
        self._tensors.update(dict.fromkeys((site.parameter, *site.aliases), stored))

    def release(self, names: Iterable[str]) -> None:
        """They belong to the model or to the plan, and stay."""


class Dense:
    """Weights as they were before they were pruned; in memory is a copy of those that are kept and not released yet."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._kept: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def get(self, name: str) -> Tensor:
        """The one that was kept, or else the weight as it is now."""
        return self._kept[name] if name in self._kept else self._weights.get(name)

    def keep(self, site: LinearSite) -> None:
        """This one will be pruned."""
        weight = self._weights.original(site.parameter).detach()
        dense = weight.clone() if self._weights.is_in_place else weight
        self._kept.update(dict.fromkeys((site.parameter, *site.aliases), dense))

    def release(self, names: Iterable[str]) -> None:
        """These are not read again."""
        for name in names:
            self._kept.pop(name, None)


class Original:
    """Weights as they were before the run, a segment at a time: for a pass over the model before anything is pruned.

    An earlier run that goes on may have pruned some of them already.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._there: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def prepare(self, names: Sequence[str], following: Sequence[str] = ()) -> None:
        """As `Weights`."""
        self._weights.prepare(names, following)
        self._there.update({name: self._weights.original(name).detach() for name in names if name not in self._there})

    def get(self, name: str) -> Tensor:
        """One that was prepared; it asks for no gradient."""
        return self._there[name]

    def release(self, names: Iterable[str]) -> None:
        """As `Weights`."""
        names = list(names)
        for name in names:
            self._there.pop(name, None)
        self._weights.release(names)


@torch.no_grad()
def write_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into a model, all or none.

    Args:
        model: changed in place.
        weights: by parameter name, as the parameter is stored.

    Raises:
        SiteError: a name that is no parameter, or another shape; nothing is changed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(weight.shape):
            raise SiteError(
                f"The weight {name} {tuple(weight.shape)} belongs to another model: {type(model).__name__} has "
                + (f"{name} {shape}" if shape is not None else "no such parameter")
                + ". Nothing was changed."
            )
    for name, weight in weights.items():
        parameters[name].copy_(weight)
    torch.clear_autocast_cache()


@torch.no_grad()
def hold_(parameter: Tensor, keep: Tensor) -> None:
    """Make exact zeros of a parameter's pruned places again, in place; what is kept does not change.

    Args:
        parameter: as it is stored, any dtype; of a sharded one this rank's part is written.
        keep: bool, of the shape of what this rank holds, on its device: True = kept.
    """
    local(parameter).masked_fill_(~keep, 0)  # a product with the mask would leave NaN where NaN was written
    torch.clear_autocast_cache()


def check_weights(model: nn.Module) -> None:
    """Refuse, naming it, a parameter that cannot be read or written, or that holds NaN or infinity.

    Raises:
        SiteError: it is on the meta device, was made in inference mode, is quantized, or lies where it cannot be read and
            written (`storage.refuse_unreadable`).
        NonFiniteError: NaN or infinity.
    """
    for name, parameter in _readable(model):
        if parameter.is_floating_point() and not is_finite(parameter):
            raise _not_finite(name)


def check_and_sum_weights(model: nn.Module) -> dict[str, int]:
    """`check_weights`, and each parameter's checksum: 64 bits that differ where a bit of it does, whatever device it is on.

    Every weight is read once. Sharded ones have none: no other rank has the same part.
    """
    read = [(name, *_read_once(parameter.detach())) for name, parameter in _readable(model)]
    for name, all_finite, _ in read:
        if not all_finite:
            raise _not_finite(name)
    parts = {name for name, parameter in model.named_parameters() if is_part(parameter)}
    whole = [(name, total) for name, _, total in read if name not in parts]
    sums = torch.stack([total.cpu() for _, total in whole]).tolist() if whole else []
    return {name: total % 2**64 for (name, _), total in zip(whole, sums, strict=True)}


_WORDS = 1 << 18
"""Of 8 bytes, that are read at a time: they stay in a cache between the two looks."""

_HALF = (1 << 32) - 1
_MIX = (0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D)
"""Large odd numbers."""


@torch.no_grad()
def _read_once(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Whether all is finite (bool), and a checksum of the bits (int64), both scalars on the parameter's device.

    The checksum is a sum of words times odd numbers of their places, modulo 2**64. It is of integers, so that no order of
    adding changes it; one changed word always does.
    """
    flat = parameter.contiguous().view(-1)
    places = torch.arange(min(_WORDS, flat.numel()), device=flat.device) * _MIX[0]
    places = ((places >> 29) ^ places) * _MIX[1] | 1
    all_finite = torch.ones((), dtype=torch.bool, device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_WORDS * 8 // flat.element_size()):
        if chunk.is_floating_point():
            all_finite &= finite_flag(chunk)
        words = _words(chunk) * _MIX[0]
        words ^= (words >> 32) & _HALF  # else the highest bits, which are signs, would count modulo 2 alone
        total = total * _MIX[1] + words.mul_(places[: len(words)]).sum()
    return all_finite, total


def _words(chunk: Tensor) -> Tensor:
    """[n] of any dtype as int64 words, with zeros after the last byte."""
    spare = -chunk.numel() * chunk.element_size() % 8
    if not spare and chunk.storage_offset() * chunk.element_size() % 8 == 0:
        return chunk.view(torch.int64)
    padded = torch.zeros(chunk.numel() * chunk.element_size() + spare, dtype=torch.uint8, device=chunk.device)
    padded[: len(padded) - spare] = chunk.view(torch.uint8)
    return padded.view(torch.int64)


def _readable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    _refuse_quantized(model)
    for name, parameter in stored_parameters(model):
        if parameter.is_meta:
            raise SiteError(f"The parameter {name} is on the meta device and has no values. Load the weights first.")
        if parameter.is_inference():
            raise SiteError(
                f"The parameter {name} was made in torch.inference_mode, where torch lets nobody write to it from outside. "
                "Build or load the model outside of it."
            )
        yield name, parameter


def _not_finite(name: str) -> NonFiniteError:
    return NonFiniteError(f"NaN or infinity in the parameter {name}. Was the checkpoint saved whole? Nothing was changed.")


def _refuse_quantized(model: nn.Module) -> None:
    """Raise SiteError, naming it, for a weight that is not the numbers that are computed with."""
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            is_integer = isinstance(module, nn.Linear) and not parameter.is_floating_point() and not parameter.is_complex()
            is_eight_bit = parameter.is_floating_point() and parameter.dtype.itemsize < 2
            is_wrapper = is_traceable_wrapper_subclass(parameter) and not is_part(parameter)
            if is_integer or is_eight_bit or is_wrapper:
                kind = type(parameter).__name__ if is_wrapper else str(parameter.dtype)
                raise SiteError(
                    f"The parameter {f'{path}.{own}'.lstrip('.')} is quantized ({kind}): prune the model that it was made "
                    "from, and quantize afterwards. Nothing was changed."
                )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all names that they have."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)
