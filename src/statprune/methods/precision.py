"""In which precision products are made: float32 in float32 whatever the caller set, and narrow ones where a device has them."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which this device multiplies such a tensor the fastest, and no less exactly: its own, or float32.

    Without instructions for bfloat16 or float16 a CPU takes five times as long for them as for float32.
    """
    kinds = _INSTRUCTIONS.get(tensor.dtype, ()) if tensor.device.type == "cpu" else ()
    known = _capabilities() if kinds else {}
    return torch.float32 if known and not any(known.get(kind) for kind in kinds) else tensor.dtype


_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"), torch.float16: ("amx_fp16", "avx512_fp16", "fp16")}
"""By any of these names torch knows a CPU that multiplies the dtype."""


@functools.cache
def _capabilities() -> dict[str, Any]:
    """What torch knows of this CPU; empty where it is too old to tell."""
    tell: Any = getattr(torch.cpu, "get_capabilities", dict)
    return dict(tell())


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Inside, no autocast is on, and float32 products on this kind of device are rounded to float32 alone.

    `torch.set_float32_matmul_precision("high")`, which trainings are told to set, has a GPU round what it multiplies to TF32
    (10 bits), and `"medium"` has a CPU round it to bfloat16: a Gram of such products is off in its third digit, and its inverse
    in the first. The model itself goes on with the caller's setting, as it will when it is used.
    """
    backends: Any = torch.backends
    matmul = backends.cuda.matmul if device_type == "cuda" else backends.mkldnn.matmul
    # Of the two ways to ask and set, the one by backend can put back what was there, whichever of them the caller used.
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
