"""Pruning by blocks of rows: what comes out is what the whole weight at once gives."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statprune.methods import spread
from statprune.methods.compensations import activation_energy, energy
from statprune.methods.criteria import cvr, magnitude, optimal_brain, ria, wanda
from statprune.methods.network import selection_network
from statprune.methods.patterns import NM, Pattern, Unstructured
from statprune.methods.pruner import MaskPruner, PrunedWeight, compose
from statprune.methods.spread import Spread, columns_of
from statprune.methods.statistics import InputMoments, Statistic


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows."""
    monkeypatch.setitem(spread._BLOCK, "cpu", 40)


def moments_of(width: int, seed: int) -> InputMoments:
    moments = InputMoments.zeros(width, Statistic.GRAM, device=torch.device("cpu"))
    moments.add(torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed)))
    return moments


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Of any float dtype, with ties, zero rows and constant columns; one matrix or several."""
    rows, width = draw(st.integers(1, 40)), 8 * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(*draw(st.sampled_from([(), (2,)])), rows, width, generator=generator)
    if draw(st.booleans()):
        weight = (3 * weight).round() / 3
    if draw(st.booleans()):
        weight[..., rows // 2, :] = 0.0
        weight[..., width // 2] = 0.7
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def whole(function: object) -> object:
    """The same, which nobody knows to be made of columns."""
    return lambda *args: function(*args)  # type: ignore[operator]


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None, max_examples=150)
@given(
    weight=weights(),
    criterion=st.sampled_from([magnitude, wanda, cvr, functools.partial(cvr, alpha=0.2), optimal_brain]),
    pattern=st.sampled_from([NM(2, 4), NM(4, 8), NM(3, 8), Unstructured(0.5), Unstructured(0.37), Unstructured(0.5, "layer")]),
    compensation=st.sampled_from(
        [energy, functools.partial(energy, column=False), functools.partial(energy, row=False, strength=0.5), activation_energy]
    ),
)
def test_blocks_give_what_the_whole_weight_gives(
    weight: Tensor, criterion: object, pattern: Pattern, compensation: object
) -> None:
    moments, before = moments_of(weight.shape[-1], 1), weight.clone()
    by_blocks = compose(criterion, pattern, compensation)(weight, moments)  # type: ignore[arg-type]
    at_once = compose(whole(criterion), pattern, whole(compensation))(weight, moments)  # type: ignore[arg-type]
    assert torch.equal(by_blocks.keep, at_once.keep)
    assert torch.equal(by_blocks.weight, at_once.weight)
    assert by_blocks.weight.dtype == weight.dtype
    assert torch.equal(weight, before)
    zeros = by_blocks.weight[~by_blocks.keep]
    assert not zeros.any()
    assert not zeros.signbit().any()


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None, max_examples=50)
@given(weight=weights(), criterion=st.sampled_from([wanda, cvr, ria]), pattern=st.sampled_from([NM(2, 4), Unstructured(0.5)]))
def test_masks_alone(weight: Tensor, criterion: object, pattern: Pattern) -> None:
    moments = moments_of(weight.shape[-1], 2)
    masks: list[PrunedWeight] = [
        MaskPruner(one, pattern)(weight, moments)  # type: ignore[arg-type]
        for one in (criterion, whole(criterion))
    ]
    assert torch.equal(masks[0].keep, masks[1].keep)
    assert torch.equal(masks[0].weight, masks[1].weight)


def test_energy_does_not_write_to_what_it_is_given() -> None:
    weight = torch.randn(6, 8)
    keep = NM(2, 4)(weight.abs())
    pruned = weight * keep
    copies = weight.clone(), pruned.clone(), keep.clone()
    energy(weight, pruned, keep)
    assert all(torch.equal(one, copy) for one, copy in zip((weight, pruned, keep), copies, strict=True))


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None)
@given(weight=weights(), offset=st.sampled_from([0.0, 5.0, 1000.0]))
def test_columns_added_up_by_blocks(weight: Tensor, offset: float) -> None:
    matrix = weight.float() + offset
    columns, exact = columns_of(matrix), matrix.double()
    torch.testing.assert_close(columns.mean, exact.mean(-2, keepdim=True), rtol=1e-6, atol=1e-6)
    rounding = 1e-12 * (1 + offset) ** 2 * matrix.shape[-2]
    torch.testing.assert_close(
        columns.energy, (exact - exact.mean(-2, keepdim=True)).square().sum(-2, keepdim=True), rtol=1e-5, atol=rounding
    )
    assert float(columns.count) == matrix.shape[-2]


def test_a_spread_by_hand() -> None:
    first, second = Spread.of(torch.tensor([[1.0, 3.0]]), -1), Spread.of(torch.tensor([[8.0]]), -1)
    both = first.joined(second)
    assert (float(both.count), float(both.mean), float(both.energy)) == (3.0, 4.0, 26.0)  # 9 + 1 + 16
    assert float(both.around(torch.tensor(0.0))) == 74.0  # 1 + 9 + 64
    assert float(both.variance) == pytest.approx(26 / 3)
    shares = Spread.of(torch.tensor([[1.0, 3.0]]), -1, torch.tensor([3.0, 1.0]))
    assert (float(shares.count), float(shares.mean), float(shares.energy)) == (4.0, 1.5, 3.0)  # 3 * .25 + 2.25


def sorted_lane(network: object, lanes: np.ndarray, position: int) -> np.ndarray:
    lanes = list(lanes)
    for low, high, needed in network:  # type: ignore[attr-defined]
        first, second = lanes[low], lanes[high]
        if needed != "high":
            lanes[low] = np.minimum(first, second)
        if needed != "low":
            lanes[high] = np.maximum(first, second)
    return lanes[position]


@pytest.mark.parametrize("size", range(1, 13))
def test_a_network_finds_every_position(size: int) -> None:
    """What does so for all zeros and ones does so for all numbers (Knuth, 5.3.4)."""
    lanes = np.array(list(itertools.product([0, 1], repeat=size))).T
    for position in range(size):
        found = sorted_lane(selection_network(size, position), lanes, position)
        assert np.array_equal(found, np.sort(lanes, axis=0)[position])


@pytest.mark.parametrize("size", [16, 21, 32])
def test_a_network_of_many(size: int) -> None:
    lanes = np.random.default_rng(0).integers(0, 50, (size, 2000))
    for position in (0, 1, size // 2, size - 1):
        assert np.array_equal(sorted_lane(selection_network(size, position), lanes, position), np.sort(lanes, axis=0)[position])


def test_two_of_four_take_seven_minima_and_maxima() -> None:
    assert sum(2 if needed == "both" else 1 for _, _, needed in selection_network(4, 2)) == 7
