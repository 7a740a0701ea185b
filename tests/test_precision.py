"""What the caller's model multiplies with is not what statprune multiplies with."""

import pytest
import torch

from statprune.methods import precision
from statprune.methods.precision import full_precision
from statprune.methods.statistics import InputMoments, Statistic
from statprune.recipe import Recipe


@pytest.fixture
def coarse():
    """`set_float32_matmul_precision("medium")`, where it changes anything on this processor."""
    left, right = torch.randn(64, 256), torch.randn(256, 64)
    exact = left @ right
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        if torch.equal(left @ right, exact):
            pytest.skip("this processor multiplies float32 in float32 whatever it is told")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pruned(method, target="pruned"):
    """A weight, pruned on statistics with everything that there is."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(96, 128, generator=generator), torch.randn(512, 128, generator=generator)
    recipe = Recipe(method, pattern="2:4", target=target)
    needs = recipe.pruner().needs | Statistic.GRAM
    moments = InputMoments.zeros(128, needs, has_cross=True).add(inputs)
    moments.add_dense(inputs, inputs + 0.1 * inputs.roll(1, 0), {})
    if Statistic.CURVATURE in needs:
        gradients = torch.randn(256, 96, generator=generator)
        with full_precision("cpu"):
            moments = moments.with_output_gram(gradients.t() @ gradients / 256)
    return recipe.pruner()(recipe.build_target()(weight, moments, "weight"), moments).weight


METHODS = [("sparsegpt", "pruned"), ("optimal-brain+least-squares:steps=6", "dense"), ("best", "pruned")]


@pytest.fixture(scope="module")
def exact():
    return {method: pruned(*method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method[0])
def test_coarse_products_of_the_callers_change_no_bit(exact, coarse, method):
    assert torch.equal(pruned(*method), exact[method])


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_callers_setting_is_put_back(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for device_type in ("cpu", "cuda"):
            kept = [matmul.fp32_precision for matmul in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)]
            with pytest.raises(KeyError), full_precision(device_type):
                raise KeyError
            assert torch.get_float32_matmul_precision() == precision
            assert [one.fp32_precision for one in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)] == kept
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("known", "dtype", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.bfloat16, torch.float32),
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"avx2": True, "amx_bf16": True}, torch.float16, torch.float32),
        ({"avx2": True}, torch.float32, torch.float32),
        ({}, torch.bfloat16, torch.bfloat16),  # a torch that does not tell
    ],
)
def test_narrow_products_are_made_where_the_cpu_has_instructions_for_them(monkeypatch, known, dtype, expected):
    monkeypatch.setattr(precision, "_capabilities", lambda: known)
    assert precision.product_dtype(torch.ones(1, dtype=dtype)) is expected
    assert precision.product_dtype(torch.ones(1, dtype=dtype, device="meta")) is dtype  # any other device decides by itself
