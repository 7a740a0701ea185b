"""Zeros and energies by blocks, against sums of Python's own numbers; the blocks are small, so that there are many."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods import counting
from statprune.methods.counting import energy_sq, most_in_group, num_zeros, zeros_by_row
from statprune.methods.patterns import NM, Counted

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.int64]
FLOATS = DTYPES[:4]

quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    patch = pytest.MonkeyPatch()
    patch.setattr(counting, "_NARROW", 40)
    yield
    patch.undo()


def sparse(seed, shape, dtype, density=0.5):
    """Values of all sizes that the dtype has, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, shape, generator=generator, dtype=torch.float64)
    if dtype.is_floating_point:
        values *= 2.0 ** torch.randint(-20, 8, shape, generator=generator)
        values *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (values * (torch.rand(shape, generator=generator) < density)).to(dtype)


def laid_out(tensor, how):
    """The same values, elsewhere in memory."""
    if how == "transposed":
        return tensor.mT.contiguous().mT
    if how == "strided":
        return torch.stack([tensor, torch.ones_like(tensor)], dim=-1)[..., 0]
    if how == "unaligned":
        return torch.cat([tensor.new_ones(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor


shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 50))
layouts = st.sampled_from(["plain", "transposed", "strided", "unaligned"])


@quick
@given(shapes, st.sampled_from(DTYPES), layouts, st.integers(0, 2**32), st.floats(0, 1))
def test_zeros_are_those_that_are_counted_one_by_one(shape, dtype, layout, seed, density):
    tensor = laid_out(sparse(seed, shape, dtype, density), layout)
    by_row = [[sum(value == 0 for value in row) for row in matrix] for matrix in tensor.tolist()]
    assert zeros_by_row(tensor).tolist() == by_row
    assert zeros_by_row(tensor).dtype == torch.int64
    assert num_zeros(tensor) == sum(map(sum, by_row))
    assert zeros_by_row(tensor[0]).tolist() == by_row[0]
    assert num_zeros(tensor[0, 0]) == by_row[0][0]


@quick
@given(shapes, st.sampled_from(FLOATS), layouts, st.integers(0, 2**32))
def test_the_energy_is_the_sum_of_squares(shape, dtype, layout, seed):
    tensor = laid_out(sparse(seed, shape, dtype), layout)
    expected = math.fsum(value * value for value in tensor.double().flatten().tolist())
    assert energy_sq(tensor) == pytest.approx(expected, rel=1e-14, abs=0)


@quick
@given(
    st.integers(1, 12), st.integers(1, 6), st.integers(1, 20), st.sampled_from(FLOATS), layouts, st.integers(0, 2**32),
    st.floats(0, 1),
)  # fmt: skip
def test_the_fullest_group_is_the_one_that_is_found_one_by_one(rows, groups, of, dtype, layout, seed, density):
    weight = laid_out(sparse(seed, (rows, groups * of), dtype, density), layout)
    most = max(
        sum(value != 0 for value in row[start : start + of]) for row in weight.tolist() for start in range(0, groups * of, of)
    )
    assert most_in_group(weight, of) == most
    assert NM(max(1, most), of).holds(weight)
    assert most < 2 or not NM(most - 1, of).holds(weight)


def test_a_single_element_more_is_found_in_every_place():
    for of in (2, 3, 4, 8, 12, 16, 1024):
        weight = torch.zeros(2, 2 * of, dtype=torch.bfloat16)
        for place in {0, 1, of // 2, of - 1, of, 2 * of - 1}:
            weight[1, place] = -1e-38
            assert (most_in_group(weight, of), num_zeros(weight)) == (1, 4 * of - 1)
            weight[1, place] = 0
        weight[0, of:] = 1
        assert most_in_group(weight, of) == of


def test_wide_rows_are_counted_whole(monkeypatch):
    monkeypatch.setattr(counting, "_NARROW", 1 << 17)
    weight = torch.ones(3, 300_001, dtype=torch.float16)
    weight[1, 7] = 0
    assert zeros_by_row(weight).tolist() == [0, 1, 0]
    assert energy_sq(weight) == 900_002
    assert not Counted(1, 300_001, "row").holds(weight[:1])


def test_what_is_no_number_is_no_zero():
    odd = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, -0.0]])
    assert (num_zeros(odd), most_in_group(odd, 5)) == (2, 3)
    assert math.isnan(energy_sq(odd))
    assert energy_sq(odd[:, 1:]) == math.inf


def test_energies_of_very_small_and_very_large_weights():
    assert energy_sq(torch.full((2, 3), 1e30)) == pytest.approx(6e60)
    assert energy_sq(torch.full((2, 3), 1e-30)) == pytest.approx(6e-60)


def test_nothing_has_no_zeros_and_no_energy():
    for shape in ((0,), (3, 0), (0, 4)):
        assert (num_zeros(torch.zeros(shape)), energy_sq(torch.zeros(shape))) == (0, 0.0)
        assert zeros_by_row(torch.zeros(shape)).shape == shape[:-1]
    assert most_in_group(torch.zeros(0, 4), 4) == 0
    assert (num_zeros(torch.tensor(0.0)), energy_sq(torch.tensor(3.0))) == (1, 9.0)


def test_integers_have_no_energy():
    with pytest.raises(TypeError, match=r"energy_sq\(weight of torch.int8\): expected floating-point numbers"):
        energy_sq(torch.ones(2, dtype=torch.int8))
