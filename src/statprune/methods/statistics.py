"""Statistics of what enters a linear layer, as sums that add up over batches, ranks and resumed runs.

Holds sums over tokens, never means or norms: two halves of a calibration set, or two ranks, merge by addition
and give bit for bit the statistics of the whole order in which they were added. Everything else is derived.
Peers that keep running means get the pooled variance wrong (FLAP, DSnoT) or normalise by sequence (Wanda's code);
neither can happen to a sum.
"""

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from statprune.methods.finite import is_finite
from statprune.methods.precision import full_precision
from statprune.methods.rows import ALONE, Rows, Team
from statprune.methods.symmetric import TOKENS, add_upper_, mirror_

# A channel's variance below this fraction of its second moment is rounding, not signal: inputs carry at most
# float32's 2^-24, whose square is 3.6e-15, and E[x^2] - E[x]^2 cancels to about 1e-16 of E[x^2] in float64.
RELATIVE_VARIANCE_FLOOR = 1e-13

_NARROW, _WIDE = 1 << 17, 1 << 24
"""Elements that are float64 at a time on a CPU, where they stay in a cache, and elsewhere."""

_LEAST_TOKENS = 16
"""Of a block, however wide they are."""


class Statistic(Flag):
    """What a criterion or a compensation must know about a layer's inputs; several are joined by `|`."""

    NONE = 0
    MOMENTS = auto()
    """Sums and sums of squares, channel by channel: 2 numbers a channel."""

    GRAM = auto()
    """The products of all pairs of channels: `in` numbers a channel. The moments always come with it."""

    SAMPLE = auto()
    """A few of the tokens themselves, to measure on them what pruning does to the output. The moments always come with it."""

    CROSS = auto()
    """The products with what the dense model has where this layer's inputs are, from a second stream. The Gram always comes
    with it."""

    CURVATURE = auto()
    """The gradients of the loss with respect to the layer's outputs. Not collected where inputs are observed: it takes a
    backward pass of the dense model."""


Function = TypeVar("Function", bound=Callable[..., Any])
Derived = TypeVar("Derived")


def needs(statistic: Statistic) -> Callable[[Function], Function]:
    """Declare what a criterion or a compensation must know about the inputs, so that only that is collected."""

    def declare(function: Function) -> Function:
        function.needs = statistic  # type: ignore[attr-defined]
        return function

    return declare


SAMPLE_SIZE = 128
"""Tokens that a sample has at most."""

_GOLDEN_RATIO = (1 + 5**0.5) / 2


class InputSample:
    """A few of the tokens that entered a layer, as they were, spread evenly over all that came.

    Token i stays where the fractional part of i times the golden ratio is below a share, which halves whenever there are too
    many: no random numbers, no need to know how many will come, and no step that could fall in with the length of sequences.
    """

    def __init__(self, size: int = SAMPLE_SIZE) -> None:
        self.size = size
        """Tokens at most; half as many at least, where so many came."""
        self.rows: Tensor | None = None
        """[tokens, in], the dtype and the device of the inputs; None before the first."""
        self._places = torch.empty(0, dtype=torch.float64)  # of the tokens in `rows`
        self._share, self._seen = 1.0, 0

    def add(self, tokens_TI: Tensor) -> None:
        """See more tokens: [tokens, in]."""
        first, self._seen = self._seen + 1, self._seen + tokens_TI.shape[0]
        places = (torch.arange(first, self._seen + 1, dtype=torch.float64) * _GOLDEN_RATIO).frac_()
        index = (places < self._share).nonzero().squeeze(1)
        if len(self._places) + len(index) > self.size:
            while int((self._places < self._share).sum()) + int((places < self._share).sum()) > self.size:
                self._share /= 2
            stays = self._places < self._share
            if self.rows is not None:
                self._places, self.rows = self._places[stays], self.rows[stays.to(self.rows.device)]
            index = (places < self._share).nonzero().squeeze(1)
        chosen_TI = tokens_TI.index_select(0, index.to(tokens_TI.device))
        self._places = torch.cat([self._places, places[index]])
        self.rows = chosen_TI if self.rows is None else torch.cat([self.rows, chosen_TI])


class _Gram:
    """The field `gram`: `add` leaves half of it to be copied, which is done when somebody reads it."""

    def __get__(self, moments: "InputMoments | None", owner: type | None = None) -> Tensor | None:
        if moments is None:
            return None  # the field's default
        if moments._is_half:
            assert moments._gram is not None, "there is something to be half of"
            mirror_(moments._gram)
            moments._is_half = False
        return moments._gram

    def __set__(self, moments: "InputMoments", gram: Tensor | None) -> None:
        moments._gram, moments._is_half = gram, False


@dataclass
class InputMoments:
    """Sums over the tokens that entered a linear layer, per input channel.

    A stack of matrices that see different tokens (experts) has leading dimensions, written `...` here.
    """

    num_tokens: Tensor
    """[...], int64: tokens that were added; padding never is."""

    sum: Tensor
    """[..., in], float64: sum of x over tokens."""

    sum_sq: Tensor
    """[..., in], float64: sum of x**2 over tokens. A sum of squares, not a norm."""

    gram: _Gram = _Gram()
    """[..., in, in], float32: sum of x x^T over tokens, padding left out; None where nobody asked for it."""

    sample: InputSample | None = None
    """Of the tokens that were added here, not on other ranks; None where nobody asked for it."""

    cross: Tensor | None = None
    """[..., in, in], float32: sum of x_d x_p^T over tokens: x_p is what enters the layer, x_d what enters it in the dense
    model. None where nobody asked, where the two are still the same, and where all layers that read x have their `targets`."""

    targets: dict[str, Tensor] = field(default_factory=dict)
    """[..., out, in], float32, by the parameter's name: sum of (W x_d + h_d - h_p) x_p^T over tokens, for layers whose output
    is added to a residual stream h. Empty where nobody asked, and where dense and pruned are still the same."""

    output_gram: Tensor | None = None
    """[..., out, out], float32, of one layer: mean over tokens of g g^T, where g is the gradient of the summed token loss of
    the dense model with respect to the layer's output. See `with_output_gram`."""

    team: Team = field(default=ALONE, repr=False, compare=False)
    """Those who prune with these statistics, each some rows of the same weight."""

    _gram: Tensor | None = field(init=False, repr=False, compare=False)
    _is_half: bool = field(init=False, repr=False, compare=False)
    """Whether what is below the diagonal of the Gram is to be copied from above it."""

    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def zeros(
        cls,
        in_features: int,
        needs: Statistic = Statistic.MOMENTS,
        *,
        stack: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        has_cross: bool = False,
        targets: Mapping[str, int] = MappingProxyType({}),
    ) -> "InputMoments":
        """No tokens seen yet.

        Args:
            in_features: channels of the inputs.
            needs: what to collect; the moments always are.
            stack: leading dimensions, of matrices with tokens of their own.
            device: of the inputs.
            has_cross: whether `add_dense` collects `cross`.
            targets: `out` of the layers, by parameter name, for which `add_dense` collects `targets`.
        """
        has_gram = bool((Statistic.GRAM | Statistic.CROSS) & needs)
        # A Lightning validation loop runs in inference mode; sums that outlive it must be ordinary tensors.
        with torch.inference_mode(False):
            return cls(
                num_tokens=torch.zeros(stack, dtype=torch.int64, device=device),
                sum=torch.zeros(*stack, in_features, dtype=torch.float64, device=device),
                sum_sq=torch.zeros(*stack, in_features, dtype=torch.float64, device=device),
                gram=torch.zeros(*stack, in_features, in_features, device=device) if has_gram else None,
                sample=InputSample() if Statistic.SAMPLE in needs else None,
                cross=torch.zeros(*stack, in_features, in_features, device=device) if has_cross else None,
                targets={name: torch.zeros(*stack, out, in_features, device=device) for name, out in targets.items()},
            )

    def add(self, inputs: Tensor, keep_token: Tensor | None = None) -> "InputMoments":
        """Add tokens in place and return self.

        Args:
            inputs: [*, in], any float dtype; every leading position is one token.
            keep_token: bool or 0/1, as many elements as there are positions; False and 0 are padding.

        Raises:
            ValueError: the mask has another number of positions than the inputs.
        """
        tokens_TI = _kept(inputs, keep_token)
        self._derived.clear()
        if self.sample is not None:
            self.sample.add(tokens_TI)
        if self._gram is not None:
            add_upper_(self._gram, tokens_TI)
            self._is_half = True
        num_tokens, in_features = tokens_TI.shape
        block = _tokens_in_block(in_features, self.sum.device.type)
        wide_TI = self.sum.new_empty(min(block, num_tokens), in_features)
        ones_T = self.sum.new_ones(len(wide_TI))
        # Apart, so that this batch's sums do not depend on those before it, and then at once, as `merge` does.
        sums_I, squares_I = self.sum.new_zeros(2, in_features)
        for narrow_TI in tokens_TI.split(block):
            part_TI, ones = wide_TI[: len(narrow_TI)], ones_T[: len(narrow_TI)]
            # A product with ones is several times faster here than a reduction over the first dimension.
            sums_I.addmv_(part_TI.copy_(narrow_TI).t(), ones)
            squares_I.addmv_(part_TI.square_().t(), ones)
        self.num_tokens += num_tokens
        self.sum += sums_I
        self.sum_sq += squares_I
        return self

    def add_dense(
        self,
        inputs: Tensor,
        dense: Tensor,
        outputs: Mapping[str, Tensor],
        keep_token: Tensor | None = None,
    ) -> "InputMoments":
        """Add what the dense model has in the places of tokens that `add` has seen, in place, and return self.

        Args:
            inputs: [*, in], any float dtype: what `add` was called with.
            dense: [*, in], any float dtype: the same tokens in the dense model.
            outputs: [*, out] each, by parameter name: W x_d + h_d - h_p, of every layer in `targets`.
            keep_token: as for `add`.

        Raises:
            ValueError: as `add`.
        """
        tokens_TI = _kept(inputs, keep_token).float()
        self._derived.clear()
        with full_precision(tokens_TI.device.type):
            if self.cross is not None:
                self.cross.addmm_(_kept(dense, keep_token).float().t(), tokens_TI)
            for name, target_OI in self.targets.items():
                target_OI.addmm_(_kept(outputs[name], keep_token).float().t(), tokens_TI)
        return self

    def merge(self, other: "InputMoments") -> "InputMoments":
        """The statistics of both token sets together, as a new object; without a sample, which is no sum."""
        gram = self.gram + other.gram if self.gram is not None and other.gram is not None else None
        cross = self.cross + other.cross if self.cross is not None and other.cross is not None else None
        return InputMoments(
            self.num_tokens + other.num_tokens, self.sum + other.sum, self.sum_sq + other.sum_sq, gram, cross=cross,
            targets={name: self.targets[name] + other.targets[name] for name in self.targets.keys() & other.targets.keys()},
        )  # fmt: skip

    def with_output_gram(self, output_gram: Tensor | None) -> "InputMoments":
        """The same with one layer's curvature: [..., out, out], float32; all else, and what was derived of it, is shared."""
        own = copy.copy(self)
        own.output_gram = output_gram
        return own

    def of_rows(self, parameter: str, rows: Rows, team: Team) -> "InputMoments":
        """The same for a stretch of one layer's rows: its target has these alone; all else is shared."""
        own = copy.copy(self)
        own.team = team
        # What is derived together is derived by all of the team or by none, whatever each has derived alone.
        own._derived = self._derived.setdefault("together", {})
        own.targets = {
            name: target_OI[..., rows.first : rows.end, :] for name, target_OI in self.targets.items() if name == parameter
        }
        return own

    def derive(self, key: Hashable, compute: Callable[[], Derived]) -> Derived:
        """What follows from these statistics alone, computed once for all the layers that share them (a factorisation)."""
        if key not in self._derived:
            self._derived[key] = compute()
        found: Derived = self._derived[key]
        return found

    def totals(self) -> list[Tensor]:
        """The tensors that add up over ranks."""
        products = [product for product in (self.gram, self.cross) if product is not None]
        return [self.num_tokens, self.sum, self.sum_sq, *products, *self.targets.values()]

    @property
    def mean(self) -> Tensor:
        """[..., in], float64: E[x]."""
        return self.sum / self.num_tokens[..., None]

    @property
    def second_moment(self) -> Tensor:
        """[..., in], float64: E[x**2]."""
        return self.sum_sq / self.num_tokens[..., None]

    @property
    def variance(self) -> Tensor:
        """[..., in], float64: population variance E[x**2] - E[x]**2; exactly 0 for a constant channel."""
        second_moment = self.second_moment
        variance = second_moment - self.mean.square()
        return torch.where(variance > RELATIVE_VARIANCE_FLOOR * second_moment, variance, 0.0)

    def is_finite(self) -> bool:
        """Whether every input that was added was finite (a sum beyond the range of its dtype counts as infinite)."""
        return all(map(is_finite, self.totals()))


def bytes_to_add(num_tokens: int, in_features: int, dtype: torch.dtype, *, has_gram: bool) -> int:
    """What `InputMoments.add` takes of memory on a CPU for tokens of this dtype, besides them and the statistics."""
    wide = 8 * min(num_tokens, _tokens_in_block(in_features, "cpu")) * in_features
    narrow = 4 * min(num_tokens, TOKENS) * in_features if has_gram and dtype is not torch.float32 else 0
    return max(wide, narrow)


def _tokens_in_block(in_features: int, device_type: str) -> int:
    return max(_LEAST_TOKENS, (_NARROW if device_type == "cpu" else _WIDE) // max(1, in_features))


def _kept(tokens: Tensor, keep_token: Tensor | None) -> Tensor:
    """[tokens, channels] of [*, channels], without the padding."""
    tokens_TI = tokens.detach().reshape(-1, tokens.shape[-1])
    if keep_token is None:
        return tokens_TI
    if keep_token.numel() != tokens_TI.shape[0]:
        raise ValueError(
            f"InputMoments.add(inputs {tuple(tokens.shape)}, keep_token {tuple(keep_token.shape)}): "
            f"expected {tokens_TI.shape[0]} mask elements, one for each token, got {keep_token.numel()}."
        )
    return tokens_TI[keep_token.reshape(-1).to(device=tokens_TI.device, dtype=torch.bool)]
