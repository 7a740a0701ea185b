import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods.statistics import InputMoments, Statistic, needs

FLOAT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

quick = settings(max_examples=25, deadline=None, derandomize=True)


def random_tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def moments_of(tokens: torch.Tensor) -> InputMoments:
    return InputMoments.zeros(tokens.shape[-1]).add(tokens)


def assert_same(one: InputMoments, other: InputMoments, rtol: float = 0.0) -> None:
    assert torch.equal(one.num_tokens, other.num_tokens)
    torch.testing.assert_close(one.sum, other.sum, rtol=rtol, atol=rtol * 100)
    torch.testing.assert_close(one.sum_sq, other.sum_sq, rtol=rtol, atol=0)


def two_pass(tokens: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean, second moment and population variance of each channel, by the definitions."""
    means, second_moments, variances = [], [], []
    for channel in zip(*tokens, strict=True):
        mean = sum(channel) / len(channel)
        means.append(mean)
        second_moments.append(sum(x * x for x in channel) / len(channel))
        variances.append(sum((x - mean) ** 2 for x in channel) / len(channel))
    return means, second_moments, variances


def test_moments_by_hand():
    moments = moments_of(torch.tensor([[1.0, 10.0], [3.0, -10.0], [8.0, 3.0]]))
    # channel 0: 1 + 3 + 8 = 12, 1 + 9 + 64 = 74; channel 1: 10 - 10 + 3 = 3, 100 + 100 + 9 = 209
    assert moments.num_tokens.item() == 3
    assert moments.sum.tolist() == [12, 3]
    assert moments.sum_sq.tolist() == [74, 209]
    assert moments.mean.tolist() == [4, 1]
    assert moments.second_moment.tolist() == pytest.approx([74 / 3, 209 / 3])
    # population: 74/3 - 16 and 209/3 - 1; the sample variances would be 13 and 103
    assert moments.variance.tolist() == pytest.approx([26 / 3, 206 / 3])


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (40, 5), (3, 4, 6), (2, 3, 4, 5)])
def test_moments_equal_a_two_pass_reference(shape):
    tokens = random_tokens(0, *shape)
    moments = moments_of(tokens)
    mean, second_moment, variance = two_pass(tokens.reshape(-1, shape[-1]).tolist())
    assert moments.mean.tolist() == pytest.approx(mean)
    assert moments.second_moment.tolist() == pytest.approx(second_moment)
    assert moments.variance.tolist() == pytest.approx(variance)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sums_are_wide_whatever_the_dtype_of_the_inputs(dtype):
    moments = moments_of(torch.full((100, 1), 300.0, dtype=dtype))  # 300 ** 2 is infinite in float16
    assert (moments.num_tokens.dtype, moments.sum.dtype, moments.sum_sq.dtype) == (torch.int64, torch.float64, torch.float64)
    assert moments.sum.item() == 100 * 300
    assert moments.sum_sq.item() == 100 * 300**2


@quick
@given(st.integers(1, 40), st.integers(1, 6), st.data(), st.integers(0, 2**32))
def test_merging_two_halves_is_adding_everything(num_tokens, in_features, data, seed):
    tokens = random_tokens(seed, num_tokens, in_features)
    cut = data.draw(st.integers(0, num_tokens))
    first, second, everything = moments_of(tokens[:cut]), moments_of(tokens[cut:]), moments_of(tokens)
    merged = first.merge(second)
    assert_same(merged, everything, rtol=1e-12)
    assert_same(merged, second.merge(first))
    assert_same(merged, moments_of(tokens[:cut]).add(tokens[cut:]))


def test_merging_changes_neither_half():
    first, second = moments_of(torch.ones(2, 3)), moments_of(torch.ones(4, 3))
    first.merge(second).add(torch.ones(1, 3))
    assert_same(first, moments_of(torch.ones(2, 3)))
    assert_same(second, moments_of(torch.ones(4, 3)))


@quick
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32))
def test_order_and_batching_do_not_matter(num_tokens, in_features, batch_size, seed):
    tokens = random_tokens(seed, num_tokens, in_features)
    shuffled = tokens[torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))]
    batched = InputMoments.zeros(in_features)
    for batch in shuffled.split(batch_size):
        assert batched.add(batch) is batched
    assert_same(batched, moments_of(tokens), rtol=1e-12)


@quick
@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32), st.sampled_from([torch.bool, torch.int64, torch.float32]))
def test_padding_never_counts(batch, length, seed, mask_dtype):
    tokens = random_tokens(seed, batch, length, 3)
    keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    padded = tokens.masked_fill(~keep[..., None], float("nan"))  # one look at padding would spoil the sums
    assert_same(InputMoments.zeros(3).add(padded, keep.to(mask_dtype)), moments_of(tokens[keep]))


@pytest.mark.parametrize("length", [4, 6])
def test_a_mask_of_another_length_is_refused(length):
    message = rf"inputs \(2, 5, 3\), keep_token \(2, {length}\)\): expected 10 mask elements.*got {2 * length}"
    with pytest.raises(ValueError, match=message):
        InputMoments.zeros(3).add(torch.ones(2, 5, 3), torch.ones(2, length))


def test_one_token_has_no_variance():
    moments = moments_of(torch.tensor([[0.1, -7.3, 1e4]], dtype=torch.float64))
    assert moments.mean.tolist() == [0.1, -7.3, 1e4]
    assert moments.variance.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("mean", "std", "accuracy"), [(1e4, 1.0, 1e-6), (-1e4, 1.0, 1e-6), (1.0, 1e-5, 1e-4), (0.0, 1e-12, 1e-6)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_variance_survives_a_large_mean(mean, std, accuracy, dtype):
    noise = torch.randn(8, 512, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = (noise * std + mean).to(dtype)
    moments = InputMoments.zeros(4)
    for batch in tokens:
        moments.add(batch)
    expected = tokens.double().reshape(-1, 4).var(dim=0, correction=0)
    torch.testing.assert_close(moments.variance, expected, rtol=accuracy, atol=0)


@quick
@given(
    st.floats(-1e6, 1e6, width=32),
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.sampled_from(FLOAT_DTYPES),
)
def test_a_constant_channel_has_exactly_no_variance(value, batches, dtype):
    moments = InputMoments.zeros(1)
    for num_tokens in batches:
        moments.add(torch.full((num_tokens, 1), value / 100).to(dtype))
    assert moments.variance.item() == 0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_adding_does_not_change_the_inputs(dtype):
    tokens = torch.full((4, 3), 3.0, dtype=dtype)
    moments_of(tokens)
    assert torch.equal(tokens, torch.full((4, 3), 3.0, dtype=dtype))


def test_sums_hold_no_graph():
    assert not moments_of(torch.ones(4, 3, requires_grad=True) * 2).sum_sq.requires_grad


def test_moments_started_in_inference_mode_go_on_after_it():
    with torch.inference_mode():
        moments = moments_of(torch.ones(2, 3))
    assert_same(moments.add(torch.ones(5, 3)), moments_of(torch.ones(7, 3)))


def test_a_stack_has_statistics_of_its_own_for_each_matrix():
    few, many = random_tokens(1, 2, 3), random_tokens(2, 9, 3)
    alone = [moments_of(few), moments_of(many)]
    stacked = InputMoments(*(torch.stack([getattr(one, key) for one in alone]) for key in ("num_tokens", "sum", "sum_sq")))
    for key in ("mean", "second_moment", "variance"):
        assert torch.equal(getattr(stacked, key), torch.stack([getattr(one, key) for one in alone])), key
    empty = InputMoments.zeros(3, stack=(2,))
    assert [tuple(part.shape) for part in (empty.num_tokens, empty.sum, empty.sum_sq)] == [(2,), (2, 3), (2, 3)]
    assert_same(empty.merge(stacked), stacked)


@pytest.mark.parametrize(
    ("value", "finite"), [(1e30, True), (float("inf"), False), (float("-inf"), False), (float("nan"), False)]
)
def test_one_value_that_is_not_finite_is_noticed(value, finite):
    tokens = torch.ones(5, 3)
    tokens[2, 1] = value
    assert moments_of(tokens).add(torch.ones(5, 3)).is_finite() is finite


def test_needs_marks_a_function_and_leaves_it_as_it_is():
    @needs(Statistic.NONE)
    def double(x: int) -> int:
        return 2 * x

    assert (double.needs, double(4)) == (Statistic.NONE, 8)


# --- the Gram --------------------------------------------------------------------------------------------------------


def gram_moments_of(tokens: torch.Tensor) -> InputMoments:
    return InputMoments.zeros(tokens.shape[-1], needs=Statistic.GRAM).add(tokens)


def test_a_gram_by_hand():
    moments = gram_moments_of(torch.tensor([[1.0, 10.0], [3.0, -10.0]]))
    # 1 + 9, 10 - 30, 100 + 100: sums over tokens, as they are
    assert moments.gram.tolist() == [[10, -20], [-20, 200]]
    assert moments.gram.dtype == torch.float32
    assert moments.sum.tolist() == [4, 0]
    assert moments.sum_sq.tolist() == [10, 200]


def test_nobody_who_does_not_ask_gets_a_gram():
    assert moments_of(torch.ones(2, 3)).gram is None
    assert len(moments_of(torch.ones(2, 3)).totals()) == 3
    assert len(gram_moments_of(torch.ones(2, 3)).totals()) == 4


@quick
@given(
    st.integers(1, 4), st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32), st.sampled_from(FLOAT_DTYPES), st.booleans()
)
def test_a_gram_is_the_product_of_the_kept_tokens(batch, length, in_features, seed, dtype, has_padding):
    tokens = random_tokens(seed, batch, length, in_features).to(dtype)
    keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < (0.6 if has_padding else 2)
    padded = tokens.masked_fill(~keep[..., None], float("nan"))
    moments = InputMoments.zeros(in_features, needs=Statistic.GRAM).add(padded, keep)
    kept = tokens[keep].double()
    expected = torch.tensor(
        [[sum(a * b for a, b in kept[:, [i, j]].tolist()) for j in range(in_features)] for i in range(in_features)]
    )
    torch.testing.assert_close(moments.gram, expected.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.gram.diagonal().double(), moments.sum_sq, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.gram, moments.gram.T)
    assert_same(moments, moments_of(tokens[keep]))  # the moments are what they are without a Gram


@quick
@given(st.integers(1, 40), st.integers(1, 6), st.data(), st.integers(0, 2**32))
def test_grams_merge_by_addition(num_tokens, in_features, data, seed):
    tokens = random_tokens(seed, num_tokens, in_features)
    cut = data.draw(st.integers(0, num_tokens))
    first, second, everything = (gram_moments_of(part) for part in (tokens[:cut], tokens[cut:], tokens))
    before = first.gram.clone()
    merged = first.merge(second)
    torch.testing.assert_close(merged.gram, everything.gram, rtol=1e-5, atol=1e-4)
    assert torch.equal(merged.gram, second.merge(first).gram)
    assert torch.equal(first.gram, before)
    assert_same(merged, everything, rtol=1e-12)


def test_what_is_merged_has_a_gram_only_where_both_have_one():
    with_gram, without = gram_moments_of(torch.ones(2, 3)), moments_of(torch.ones(2, 3))
    assert with_gram.merge(without).gram is None
    assert without.merge(with_gram).gram is None


def test_a_gram_of_a_stack_and_one_started_in_inference_mode():
    assert InputMoments.zeros(3, stack=(2,), needs=Statistic.GRAM).gram.shape == (2, 3, 3)
    with torch.inference_mode():
        moments = gram_moments_of(torch.ones(2, 3))
    assert torch.equal(moments.add(torch.ones(5, 3)).gram, torch.full((3, 3), 7.0))


def test_a_gram_does_not_change_the_inputs_and_holds_no_graph():
    tokens = torch.full((4, 3), 3.0, requires_grad=True)
    assert not gram_moments_of(tokens).gram.requires_grad
    assert torch.equal(tokens.detach(), torch.full((4, 3), 3.0))


def test_a_gram_beyond_float32_counts_as_infinite():
    tokens = torch.full((4, 3), 1e20)
    assert moments_of(tokens).is_finite()
    assert not gram_moments_of(tokens).is_finite()
    mixed = gram_moments_of(torch.tensor([[1e20, 0.0], [1e20, 0.0], [0.0, 1.0]]))
    assert not mixed.is_finite()
    assert gram_moments_of(torch.full((4, 3), 1e18)).is_finite()


def test_what_follows_from_the_statistics_is_computed_once_and_forgotten_when_they_change():
    moments, computed = gram_moments_of(torch.ones(2, 3)), []

    def total() -> float:
        computed.append(float(moments.gram.sum()))
        return computed[-1]

    assert [moments.derive("total", total) for _ in range(3)] == [18, 18, 18]
    assert moments.derive(("total", 0.5), lambda: "another key") == "another key"
    assert computed == [18]
    moments.add(torch.ones(1, 3))
    assert moments.derive("total", total) == 27
    assert moments.derive(("total", 0.5), lambda: "anew") == "anew"
    assert moments.merge(moments).derive("total", lambda: "merged") == "merged"
    assert computed == [18, 27]


def test_a_derived_nothing_is_remembered_too():
    moments, calls = moments_of(torch.ones(2, 3)), []
    for _ in range(2):
        assert moments.derive("nothing", lambda: calls.append(1)) is None
    assert calls == [1]


def test_what_several_need_is_joined_and_nothing_is_false():
    assert not Statistic.NONE
    assert Statistic.NONE | Statistic.MOMENTS is Statistic.MOMENTS
    both = Statistic.MOMENTS | Statistic.GRAM
    assert Statistic.GRAM in both
    assert Statistic.GRAM not in Statistic.MOMENTS
    for needed, has_gram in ((Statistic.NONE, False), (Statistic.MOMENTS, False), (Statistic.GRAM, True), (both, True)):
        moments = InputMoments.zeros(3, needed)
        assert (moments.gram is not None) == has_gram
        assert moments.sum.shape == moments.sum_sq.shape == (3,)


def pair_of(pruned: torch.Tensor, dense: torch.Tensor, outputs: torch.Tensor, keep=None) -> InputMoments:
    moments = InputMoments.zeros(pruned.shape[-1], Statistic.CROSS, has_cross=True, targets={"w": outputs.shape[-1]})
    return moments.add(pruned, keep).add_dense(pruned, dense, {"w": outputs}, keep)


def test_products_of_two_streams_by_hand():
    moments = pair_of(torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 100.0]]), torch.tensor([[3.0], [5.0]])[:1])
    assert moments.cross.tolist() == [[10, 20], [100, 200]]  # dense channel first
    assert moments.targets["w"].tolist() == [[3, 6]]
    assert moments.gram.tolist() == [[1, 2], [2, 4]]
    assert len(moments.totals()) == 6


@quick
@given(st.integers(0, 20), st.integers(1, 5), st.integers(0, 2**32), st.sampled_from(FLOAT_DTYPES))
def test_products_of_two_streams_leave_padding_out_and_merge_by_addition(cut, in_features, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    pruned, dense = (random_tokens(seed + one, 4, 5, in_features).to(dtype) for one in (0, 1))
    outputs, keep = random_tokens(seed + 2, 4, 5, 3), torch.rand(4, 5, generator=generator) < 0.6
    whole = pair_of(*(tokens.masked_fill(~keep[..., None], float("nan")) for tokens in (pruned, dense, outputs)), keep)
    torch.testing.assert_close(whole.cross, dense[keep].float().t() @ pruned[keep].float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.targets["w"], outputs[keep].float().t() @ pruned[keep].float(), rtol=1e-5, atol=1e-4)
    flat = [tokens.flatten(0, 1) for tokens in (pruned, dense, outputs)]
    first, second = (pair_of(*(t[part] for t in flat), keep.flatten()[part]) for part in (slice(cut), slice(cut, None)))
    merged = first.merge(second)
    for mine, one in zip(merged.totals(), whole.totals(), strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-4)


def test_nobody_who_does_not_ask_gets_products_of_two_streams():
    moments = InputMoments.zeros(3, Statistic.CROSS)
    assert moments.gram is not None
    assert (moments.cross, moments.targets, moments.output_gram) == (None, {}, None)
    both = pair_of(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1))
    assert (moments.merge(both).cross, moments.merge(both).targets) == (None, {})


def test_infinity_in_the_dense_stream_alone_is_found():
    assert not pair_of(torch.ones(2, 3), torch.full((2, 3), torch.inf), torch.ones(2, 1)).is_finite()
    assert not pair_of(torch.ones(2, 3), torch.ones(2, 3), torch.full((2, 1), torch.nan)).is_finite()


def test_a_curvature_is_of_one_layer_and_the_rest_is_shared():
    moments, calls = gram_moments_of(torch.ones(2, 3)), []
    first, second = (moments.with_output_gram(one) for one in (torch.eye(2), torch.ones(4, 4)))
    assert (first.output_gram.tolist(), second.output_gram.shape, moments.output_gram) == (torch.eye(2).tolist(), (4, 4), None)
    assert first.gram is second.gram is moments.gram
    for one in (first, second, moments):
        one.derive("factor", lambda: calls.append(1))
    assert calls == [1]
    assert len(first.totals()) == 4  # it is no sum over ranks
