"""2:4 weights in float8, as torchao packs them: weights and inputs are rounded, so nothing here is exact.

Rounded to float8 a layer is faster for that alone. So the same without 2:4 is measured beside it (`reference`), and 2:4 counts
as faster only where it is faster than that, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from statprune.acceleration.packing import dtype_name
from statprune.errors import AccelerationError


@dataclass(frozen=True)
class Float8:
    """torchao's `Float8DynamicActivationFloat8WeightConfig` by rows, in one of its packing formats."""

    packing_format: str = "sparse_2d_data_2d_metadata"
    """What torchao calls it."""

    device: str = "cuda"
    """The type of the device that it runs on."""

    is_exact = False
    tolerance = 0.1
    """3 bits of a mantissa are off by 2.7 % in the root mean square, in the weight and in the input."""

    @property
    def name(self) -> str:
        """`float8` or `float8-dense`."""
        return "float8-dense" if self.is_reference else "float8"

    @property
    def is_reference(self) -> bool:
        """Whether it makes no use of zeros."""
        return self.packing_format == "plain"

    def why_not(self, weight: Tensor) -> str | None:
        """Another dtype, a size that is no multiple of 32 x 128, or no GPU."""
        wanted = (torch.bfloat16,)  # of which torchao rounds rows
        if weight.dtype not in wanted:
            return f"{dtype_name(weight.dtype)}: float8 is made of {dtype_name(wanted[0])}"
        if weight.shape[0] % 32 or weight.shape[1] % 128:
            return f"{self.name} takes multiples of 32 x 128"
        return None if weight.device.type == self.device else f"no GPU: it is on the {weight.device.type}"

    def tuned(self, weight: Tensor, tokens: Sequence[int]) -> "list[Float8]":
        """There are no settings; packed once, to see that it can be."""
        self.pack(weight)
        return [self]

    @torch.no_grad()
    def pack(self, weight: Tensor) -> Tensor:
        """What torchao makes of an `nn.Linear` with this weight.

        Raises:
            RuntimeError: this GPU, or this torchao, cannot.
        """
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
        from torchao.quantization.quant_api import Float8PackingFormat

        holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
        holder[0].weight = nn.Parameter(weight.detach(), requires_grad=False)
        try:
            quantize_(
                holder,
                Float8DynamicActivationFloat8WeightConfig(
                    granularity=PerRow(), packing_format=Float8PackingFormat(self.packing_format)
                ),
            )
        except (AssertionError, ValueError) as e:  # with which torchao says that a GPU is too old
            raise RuntimeError(str(e)) from e
        packed: Tensor = holder[0].weight
        if type(packed) is nn.Parameter:
            raise RuntimeError("torchao left the weight as it was")
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """There is no way back from what was rounded."""
        raise NotImplementedError


def float8_kernels() -> tuple[Float8, ...]:
    """2:4 in float8, and float8 without it.

    Raises:
        AccelerationError: torchao is not installed, or is older than this format.
    """
    try:
        from torchao.quantization.quant_api import Float8PackingFormat

        Float8PackingFormat(Float8.packing_format)
    except (ImportError, ValueError) as e:
        try:
            found = f"torchao {version('torchao')} has none"
        except PackageNotFoundError:
            found = "torchao is not installed"
        raise AccelerationError(f"quantize='float8': {found}. 2:4 in float8 takes `pip install 'torchao>=0.18'`.") from e
    return Float8(), Float8("plain")
