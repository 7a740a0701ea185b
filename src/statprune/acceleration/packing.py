"""What a 2:4 weight can become: a packed tensor that sparse kernels multiply by, and the same weight again, bit for bit.

[1 0 0 5 | 0 2 0 0]     weight [out, in], at most two of every four inputs
[1 5 | 2 0]             what is kept [out, in / 2], and 2 bits for the place of each: 9/16 of the bytes of bfloat16
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

DTYPES = (torch.float16, torch.bfloat16)
"""Float32 would be rounded to TF32 on the way, and int8 is multiplied by int8 inputs only, which no layer of a floating-point
model has."""


class Kernel(Protocol):
    """One way to pack a weight, and with it the code that multiplies by it."""

    @property
    def name(self) -> str:
        """As tables have it."""

    @property
    def is_exact(self) -> bool:
        """Whether the packed weight is the same weight, and not rounded."""

    @property
    def is_reference(self) -> bool:
        """Whether it is measured only for others to be faster than, since it makes no use of zeros."""

    @property
    def tolerance(self) -> float:
        """How far its output may be off, relative to the norm of the dense layer's."""

    def why_not(self, weight: Tensor) -> str | None:
        """Why it does not take a weight [out, in] of this size and dtype, where it lies; None where it does."""

    def tuned(self, weight: Tensor, tokens: Sequence[int]) -> "list[Self]":
        """This one, and the same with other settings that may be faster for these numbers of tokens.

        Raises:
            RuntimeError: this GPU cannot run it.
        """

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] to what `F.linear` takes in its place.

        Raises:
            RuntimeError: this GPU cannot run it.
        """

    def unpack(self, packed: Tensor) -> Tensor:
        """The weight [out, in] again, but that a zero may have lost its sign."""


@dataclass(frozen=True)
class SemiStructured:
    """A kind of `torch.sparse.SparseSemiStructuredTensor`: cuSPARSELt's, or CUTLASS's."""

    kind: Any
    """Its class. `torch.sparse.to_sparse_semi_structured` takes the one that a global flag names."""

    algorithm: int | None = None
    """cuSPARSELt's number of one of its algorithms; None leaves it at its default."""

    device: str = "cuda"
    """The type of the device that it runs on."""

    is_exact = True
    is_reference = False
    tolerance = 0.02
    """Bfloat16 rounds to 0.4 %, and a sum that is added up in another order is rounded elsewhere."""

    @property
    def name(self) -> str:
        """`cusparselt`, `cusparselt:7` or `cutlass`."""
        return str(self.kind.BACKEND) + ("" if self.algorithm is None else f":{self.algorithm}")

    def why_not(self, weight: Tensor) -> str | None:
        """A dtype that is not in `DTYPES`, a size that is no multiple of the kernel's, or no GPU."""
        if weight.dtype not in DTYPES:
            return f"{dtype_name(weight.dtype)}: the kernels multiply {' and '.join(map(dtype_name, DTYPES))}"
        limits = self.kind._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
        rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
        if weight.shape[0] % rows or weight.shape[1] % columns:
            return f"{self.name} takes multiples of {rows} x {columns}"
        if weight.device.type != self.device:
            return f"no GPU: it is on the {weight.device.type}"
        return None

    def tuned(self, weight: Tensor, tokens: Sequence[int]) -> "list[SemiStructured]":
        """This one, and of cuSPARSELt those algorithms that its own search finds for these numbers of tokens."""
        packed: Any = self.pack(weight)
        if self.kind is not SparseSemiStructuredTensorCUSPARSELT:
            return [self]
        found = set()
        for count in tokens:
            inputs = weight.new_zeros(-(-count // 8) * 8, weight.shape[1])  # the kernels take eights of tokens
            found.add(int(torch._cslt_sparse_mm_search(packed.packed, inputs.t(), transpose_result=True)))
        return [self, *(replace(self, algorithm=one) for one in sorted(found - {0}))]

    @torch.no_grad()
    def pack(self, weight: Tensor) -> Tensor:
        """A semi-structured tensor [out, in]; a weight that is not 2:4 would lose what is too much."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, that this is a prototype
            packed = self.kind.from_dense(weight.detach().contiguous())
        if self.algorithm is not None:
            packed.alg_id_cusparselt = self.algorithm  # not every torch from 2.11 on takes it above
        return packed  # type: ignore[no-any-return]

    @torch.no_grad()
    def unpack(self, packed: Tensor) -> Tensor:
        """What `to_dense` gives: of cuSPARSELt a product with the identity, in which each sum has one term that is not zero."""
        own: Any = packed.detach()
        own.alg_id_cusparselt = 0  # an algorithm that was found for other sizes may not take these
        return own.to_dense()  # type: ignore[no-any-return]


KERNELS: tuple[Kernel, ...] = (
    SemiStructured(SparseSemiStructuredTensorCUSPARSELT),
    SemiStructured(SparseSemiStructuredTensorCUTLASS),
)
"""What torch has. Which of them a GPU can run shows when it is tried: CUTLASS's are for Ampere and Ada only."""


def pack_undoably(kernel: Kernel, weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """A packed weight, and the function that gives the weight back, bit for bit; None where that does not.

    Of a kernel that is exact it unpacks the packed weight. Of another one it has a copy of the weight in host memory.

    Args:
        kernel: that takes it.
        weight: [out, in], 2:4.

    Raises:
        RuntimeError: this GPU cannot run it.
    """
    weight = weight.detach()
    packed = kernel.pack(weight)
    if not kernel.is_exact:
        kept, device = weight.to("cpu", copy=True), weight.device
        return packed, lambda _: kept.to(device, copy=True)
    # Small numbers that were rounded to zero may have left a minus, which packing forgets.
    minus_zeros = ((weight == 0) & torch.signbit(weight)).view(-1).nonzero().squeeze(1)

    def unpack(packed: Tensor) -> Tensor:
        dense = kernel.unpack(packed)
        dense.view(-1)[minus_zeros] = -0.0
        return dense

    return (packed, unpack) if _same_bits(unpack(packed), weight) else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32}.get(one.element_size(), torch.uint8)
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")
