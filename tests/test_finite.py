import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods.finite import finite_flag, is_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(1, 300), st.integers(1, 5), st.sampled_from(DTYPES), st.sampled_from([math.nan, math.inf, -math.inf]), st.data()
)
def test_one_element_is_found_wherever_it_is(rows, columns, dtype, bad, data):
    tensor = torch.linspace(-200, 200, rows * columns).to(dtype).reshape(rows, columns)
    assert is_finite(tensor)
    place = data.draw(st.integers(0, tensor.numel() - 1))
    tensor.view(-1)[place] = bad
    assert not is_finite(tensor)
    assert not is_finite(tensor.T)
    strided = torch.zeros(rows, 2 * columns, dtype=dtype)
    strided[:, ::2] = tensor
    assert not is_finite(strided)
    strided[:, ::2] = 0
    strided[:, 1::2] = tensor
    assert is_finite(strided[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_is_finite_and_so_is_nothing(dtype):
    limits = torch.finfo(dtype)
    assert is_finite(torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=torch.float64).to(dtype))
    assert is_finite(torch.zeros(3, 0, dtype=dtype))


def test_the_flag_is_a_scalar_without_a_graph():
    flag = finite_flag(torch.ones(3, requires_grad=True))
    assert (flag.dtype, flag.shape, flag.requires_grad, bool(flag)) == (torch.bool, (), False, True)
