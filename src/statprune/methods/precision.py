"""Products of float32 in float32, whatever precision the caller's model computes with."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
