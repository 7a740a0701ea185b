"""Statistics that are added up in blocks: the blocks are made small, so that small inputs have many of them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods import statistics, symmetric
from statprune.methods.statistics import InputMoments, Statistic, bytes_to_add
from statprune.methods.symmetric import add_upper_, mirror_

quick = settings(max_examples=40, deadline=None, derandomize=True)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    patch = pytest.MonkeyPatch()
    patch.setattr(symmetric, "NARROW", 3)
    patch.setattr(symmetric, "TOKENS", 5)
    patch.setattr(statistics, "TOKENS", 5)
    patch.setattr(statistics, "_NARROW", 12)
    patch.setattr(statistics, "_LEAST_TOKENS", 2)
    yield
    patch.undo()


def random_tokens(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def products_one_by_one(tokens):
    rows = tokens.double().tolist()
    width = tokens.shape[-1]
    return torch.tensor([[math.fsum(row[i] * row[j] for row in rows) for j in range(width)] for i in range(width)])


def test_blocks_above_the_diagonal_by_hand():
    gram = torch.zeros(4, 4)
    add_upper_(gram, torch.tensor([[1.0, 2.0, 3.0, 10.0]]))
    assert gram[:3].tolist() == [[1, 2, 3, 10], [2, 4, 6, 20], [3, 6, 9, 30]]
    assert gram[3].tolist() == [0, 0, 0, 100]  # the block below the diagonal is nobody's
    gram[3, :3] = 7
    assert mirror_(gram)[3].tolist() == [10, 20, 30, 100]


@quick
@given(st.integers(0, 14), st.integers(1, 11), st.sampled_from(DTYPES), st.integers(0, 2**32), st.integers(0, 14))
def test_a_gram_in_blocks_is_that_of_all_pairs_and_symmetric_to_the_bit(num_tokens, width, dtype, seed, cut):
    tokens = random_tokens(seed, num_tokens, width).to(dtype)
    expected = products_one_by_one(tokens).float()
    moments = InputMoments.zeros(width, Statistic.GRAM)
    for part in (tokens[:cut], tokens[cut:]):
        moments.add(part)
        if seed % 2:
            assert torch.equal(moments.gram, moments.gram.T)  # read in between, which changes nothing
    torch.testing.assert_close(moments.gram, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(moments.gram, moments.gram.T)


@quick
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_a_stack_is_mirrored_as_each_of_its_matrices(stack, width, seed):
    grams = random_tokens(seed, stack, width, width)
    expected = torch.stack([gram.triu() + gram.triu(1).T for gram in grams])
    assert torch.equal(mirror_(grams), expected)


@quick
@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 2**32), st.booleans())
def test_moments_in_blocks_are_the_sums_of_all_tokens(num_tokens, width, dtype, seed, is_turned):
    tokens = random_tokens(seed, num_tokens, width).to(dtype)
    before = tokens.clone()
    moments = InputMoments.zeros(width).add(tokens.T.contiguous().T if is_turned else tokens)
    columns = tokens.double().T.tolist()
    assert moments.num_tokens.item() == num_tokens
    expected = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    torch.testing.assert_close(moments.sum, expected, rtol=1e-13, atol=1e-12)
    expected = torch.tensor([math.fsum(x * x for x in column) for column in columns], dtype=torch.float64)
    torch.testing.assert_close(moments.sum_sq, expected, rtol=1e-13, atol=0)
    assert torch.equal(tokens, before)


@quick
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 2**32))
def test_batches_that_are_added_are_batches_that_are_merged_to_the_bit(sizes, width, seed):
    batches = random_tokens(seed, sum(sizes), width).split(sizes)
    added, merged = InputMoments.zeros(width), InputMoments.zeros(width)
    for batch in batches:
        added.add(batch)
        merged = merged.merge(InputMoments.zeros(width).add(batch))
    assert torch.equal(added.sum, merged.sum)
    assert torch.equal(added.sum_sq, merged.sum_sq)


def test_everyone_who_reads_a_gram_reads_all_of_it():
    tokens = random_tokens(0, 9, 7)
    expected = products_one_by_one(tokens).float()
    for read in (
        lambda moments: moments.gram,
        lambda moments: moments.totals()[-1],
        lambda moments: moments.merge(InputMoments.zeros(7, Statistic.GRAM)).gram,
        lambda moments: moments.with_output_gram(torch.eye(2)).gram,
        lambda moments: dataclasses.replace(moments).gram,
        lambda moments: InputMoments(moments.num_tokens, moments.sum, moments.sum_sq, moments.gram).gram,
    ):
        torch.testing.assert_close(read(InputMoments.zeros(7, Statistic.GRAM).add(tokens)), expected, rtol=1e-5, atol=1e-4)


def test_a_value_that_is_not_finite_is_found_in_every_place():
    for place in range(7):
        tokens = random_tokens(0, 9, 7)
        tokens[place, place] = math.inf
        assert not InputMoments.zeros(7, Statistic.GRAM).add(tokens).is_finite()


def test_what_it_takes_to_add_is_a_block_of_float64_or_of_float32():
    # Blocks of 12 elements in float64, two tokens at least; for the Gram five tokens in float32, where they are not already.
    assert bytes_to_add(100, 4, torch.float32, has_gram=False) == 8 * 3 * 4
    assert bytes_to_add(1, 4, torch.float32, has_gram=False) == 8 * 1 * 4
    assert bytes_to_add(100, 50, torch.float32, has_gram=True) == 8 * 2 * 50
    assert bytes_to_add(100, 50, torch.bfloat16, has_gram=True) == 4 * 5 * 50
    assert bytes_to_add(3, 50, torch.bfloat16, has_gram=True) == 8 * 2 * 50
