"""Semi-structured weights on a CPU: packed as for CUTLASS, by torch's own conversions; multiplied by what they unpack to."""

from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from statprune.acceleration.measuring import Timings
from statprune.acceleration.packing import SemiStructured


class OnCPU(SparseSemiStructuredTensorCUTLASS):
    """All but the product is torch's: the dispatch of linear, addmm, t and detach too."""

    BACKEND = "cpu"

    @classmethod
    def _validate_device_dim_dtype_shape(cls, original_tensor):
        pass

    @classmethod
    def from_dense(cls, original_tensor):
        packed, meta = sparse_semi_structured_from_dense_cutlass(original_tensor)
        return cls(
            original_tensor.shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
        )

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **kwargs):
        dense = sparse_semi_structured_to_dense_cutlass(self.packed, self.meta)
        if should_transpose_dense:
            found = B @ dense.t()
            return found if bias is None else found + bias
        found = dense @ B  # up to torch 2.12 the caller transposes what goes in and what comes out
        return found if bias is None else found + bias[:, None]


class Halved(OnCPU):
    """Computes something else."""

    BACKEND = "halved"

    def _mm(self, B, **kwargs):
        return super()._mm(B, **kwargs) / 2


class Forgetful(OnCPU):
    """Loses a weight when it is packed."""

    BACKEND = "forgetful"

    def to_dense(self):
        dense = super().to_dense()
        dense[0] = 0
        return dense


KERNEL, HALVED, FORGETFUL = (SemiStructured(kind, device="cpu") for kind in (OnCPU, Halved, Forgetful))


class FakeStopwatch:
    """Says of each layer and pass what it is told.

    Args:
        ratios: how many times faster than dense a layer is, by (out, in), the kernel's name and the number of tokens, or by
            fewer of them.
        forwards: seconds of the passes, in order.
    """

    def __init__(self, ratios, forwards=()):
        self.ratios, self.forwards, self.layers = ratios, list(forwards), []

    def layer(self, weight, bias, kernels, tokens):
        shape = tuple(weight.shape)
        self.layers.append((shape, tuple(kernel.name for kernel in kernels), tuple(tokens)))
        found = Timings(dense={count: 100.0 * count for count in tokens})
        for kernel in kernels:
            found.packed[kernel] = {count: 100.0 * count / self._ratio(shape, kernel.name, count) for count in tokens}
        return found

    def forward(self, run):
        run()
        return self.forwards.pop(0)

    def _ratio(self, shape, name, count):
        known = self.ratios
        return (
            known
            if isinstance(known, float)
            else next(
                known[key] for key in ((shape, name, count), (shape, count), (name, count), shape, name, count) if key in known
            )
        )
