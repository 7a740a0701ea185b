import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from statprune.methods.patterns import NM, Counted, Unstructured, parse_shorthand
from statprune.methods.select import FEW, keep_highest

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]

quick = settings(max_examples=40, deadline=None, derandomize=True)

stacks = st.lists(st.integers(1, 3), max_size=2).map(tuple)
per_mille = st.integers(0, 999)


@st.composite
def scores(draw, widths):
    """Scores of any float dtype under any leading stack: ordinary ones, integers with many ties, all equal, and zeros."""
    shape = (*draw(stacks), draw(st.integers(1, 6)), draw(widths))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "ties", "equal", "zero", "sparse"]))
    score = torch.randn(shape, generator=generator).abs()
    if kind == "ties":
        score = torch.randint(0, 3, shape, generator=generator).float()
    elif kind == "equal":
        score = torch.full(shape, 0.3)
    elif kind == "zero":
        score = torch.zeros(shape)
    elif kind == "sparse":
        score = score * (torch.rand(shape, generator=generator) < 0.3)
    return score.to(draw(st.sampled_from(FLOAT_DTYPES)))


def assert_keeps_the_highest(score, keep, ranked_shape):
    """No pruned score is above a kept one of the same ranking group."""
    score, keep = score.float().reshape(ranked_shape), keep.reshape(ranked_shape)
    lowest_kept = score.masked_fill(~keep, float("inf")).amin(-1)
    highest_pruned = score.masked_fill(keep, float("-inf")).amax(-1)
    assert (highest_pruned <= lowest_kept).all()


def asked_for(per_mille, rows, columns):
    """How many go by row: rounded down once, and each row keeps one."""
    return min(per_mille * rows * columns // 1000, rows * (columns - 1))


def assert_goes_in_turns(keep, number):
    """Every matrix loses the number, its rows the same or the first ones one more."""
    rows = keep.shape[-2]
    assert ((~keep).sum(-1) == torch.tensor([len(range(row, number, rows)) for row in range(rows)])).all()


def test_two_of_four_by_hand():
    # two stay in each four consecutive inputs; N:M as "N pruned" could not be told apart here, see the next test
    score = torch.tensor([[9.0, 1.0, 3.0, 4.0, 0.1, 0.4, 0.2, 0.3]])
    assert NM(keep=2, of=4)(score).int().tolist() == [[1, 0, 0, 1, 0, 1, 0, 1]]
    assert NM(keep=2, of=4)(torch.full((1, 4), 2.0)).int().tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(("keep", "expected"), [(1, [[0, 0, 1, 0]]), (3, [[1, 0, 1, 1]]), (4, [[1, 1, 1, 1]])])
def test_the_first_number_is_what_stays(keep, expected):
    assert NM(keep=keep, of=4)(torch.tensor([[2.0, 1.0, 4.0, 3.0]])).int().tolist() == expected


def test_unstructured_rows_compete_within_themselves_by_hand():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 80.0, 70.0, 60.0]])
    assert Unstructured(0.5)(score).int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    assert Unstructured(0.25)(score).int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]


def test_unstructured_layer_competes_as_a_whole_by_hand():
    score = torch.tensor([[1.0, 2.0, 3.0, 60.0], [50.0, 80.0, 70.0, 4.0]])
    assert Unstructured(0.5, rank_over="layer")(score).int().tolist() == [[0, 0, 0, 1], [1, 1, 1, 0]]
    assert Unstructured(0.25, rank_over="layer")(score).int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


@quick
@given(scores(st.integers(1, 40)), per_mille)
def test_a_matrix_loses_exactly_the_asked_number_by_row(score, sparsity):
    keep = Unstructured(sparsity / 1000)(score)
    assert (keep.shape, keep.dtype) == (score.shape, torch.bool)
    assert_goes_in_turns(keep, asked_for(sparsity, *score.shape[-2:]))
    assert keep.any(-1).all()
    assert_keeps_the_highest(score, keep, score.shape)


@quick
@given(st.integers(1, 6), st.integers(1, 40), per_mille, per_mille)
def test_more_sparsity_keeps_no_weight_that_less_takes(rows, columns, some, more):
    score = torch.rand(rows, columns)
    for rank_over in ("row", "layer"):
        low, high = (Unstructured(sparsity / 1000, rank_over) for sparsity in sorted((some, more)))
        assert low.pruned_of(rows, columns) <= high.pruned_of(rows, columns)
        assert not (high(score) & ~low(score)).any()


@quick
@given(scores(st.integers(1, 40)), per_mille)
def test_a_layer_loses_exactly_the_asked_number(score, sparsity):
    keep = Unstructured(sparsity / 1000, rank_over="layer")(score)
    assert (keep.shape, keep.dtype) == (score.shape, torch.bool)
    num_weights = score.shape[-2] * score.shape[-1]
    assert ((~keep).sum((-2, -1)) == sparsity * num_weights // 1000).all()
    assert_keeps_the_highest(score, keep, (*score.shape[:-2], num_weights))


@quick
@given(st.data(), st.integers(1, 9), st.integers(1, 5))
def test_every_group_of_nm_keeps_exactly_its_number(data, of, num_groups):
    keep_count = data.draw(st.integers(1, of))
    score = data.draw(scores(st.just(of * num_groups)))
    keep = NM(keep=keep_count, of=of)(score)
    assert (keep.shape, keep.dtype) == (score.shape, torch.bool)
    groups = keep.reshape(*score.shape[:-1], num_groups, of)
    assert (groups.sum(-1) == keep_count).all()
    assert_keeps_the_highest(score, keep, groups.shape)


def slices(data, width: int, step: int = 1) -> list[int]:
    """Where to cut a width: from 0 to its end, in multiples of the step."""
    cuts = data.draw(st.sets(st.integers(1, width // step)))
    return sorted({0, width} | {step * cut for cut in cuts})


def sliced(pattern, score, cuts):
    parts = [pattern.slice(score[..., start:end], start) for start, end in itertools.pairwise(cuts)]
    assert all(part.dtype == torch.bool for part in parts)
    return torch.cat(parts, dim=-1)


@quick
@given(st.data(), scores(st.integers(1, 40)), per_mille)
def test_slice_by_slice_a_matrix_loses_exactly_the_asked_number_by_row(data, score, sparsity):
    pattern, cuts = Unstructured(sparsity / 1000), slices(data, score.shape[-1])
    keep = sliced(pattern, score, cuts)
    for start, end in itertools.pairwise(cuts):
        assert_goes_in_turns(keep[..., :end], asked_for(sparsity, score.shape[-2], end))
        assert_keeps_the_highest(score[..., start:end], keep[..., start:end], score[..., start:end].shape)
    assert pattern.holds(torch.ones_like(score).masked_fill(~keep, 0))


@quick
@given(st.data(), scores(st.integers(1, 40)), per_mille)
def test_a_layer_pruned_slice_by_slice_loses_exactly_the_asked_number(data, score, sparsity):
    pattern, cuts = Unstructured(sparsity / 1000, rank_over="layer"), slices(data, score.shape[-1])
    keep = sliced(pattern, score, cuts)
    for start, end in itertools.pairwise(cuts):
        assert ((~keep[..., :end]).sum((-2, -1)) == sparsity * score.shape[-2] * end // 1000).all()
        part, kept = (one[..., start:end].flatten(-2) for one in (score, keep))
        assert_keeps_the_highest(part, kept, part.shape)
    assert pattern.holds(torch.ones_like(score).masked_fill(~keep, 0))


@quick
@given(st.data(), st.integers(1, 9), st.integers(1, 5))
def test_nm_slice_by_slice_is_nm_at_once_but_for_equal_scores(data, of, num_groups):
    pattern = NM(data.draw(st.integers(1, of)), of)
    score = data.draw(scores(st.just(of * num_groups)))
    kept = [
        score.masked_fill(~keep, -1).unflatten(-1, (-1, of)).sort(-1).values
        for keep in (sliced(pattern, score, slices(data, of * num_groups, of)), pattern(score))
    ]
    assert torch.equal(*kept)


@quick
@given(scores(st.integers(1, FEW)), st.data())
def test_counting_keeps_what_sorting_does_and_the_first_of_equal_scores(score, data):
    num_kept = data.draw(st.integers(1, score.shape[-1]))
    order = score.sort(dim=-1, descending=True, stable=True).indices
    expected = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :num_kept], True)
    assert torch.equal(keep_highest(score, num_kept), expected)


@quick
@given(scores(st.integers(FEW + 1, 99)), st.data())
def test_of_many_the_highest_stay_and_exactly_so_many(score, data):
    num_kept = data.draw(st.integers(0, score.shape[-1]))
    keep = keep_highest(score, num_kept)
    assert (keep.sum(-1) == num_kept).all()
    lowest_kept = torch.where(keep, score, torch.inf).amin(-1)
    highest_gone = torch.where(keep, -torch.inf, score).amax(-1)
    assert (lowest_kept >= highest_gone).all()


@pytest.mark.parametrize("of", [FEW, FEW + 1])
def test_long_groups_are_no_other_than_short_ones(of):
    score = torch.rand(3, 2 * of)
    groups = NM(of // 3, of)(score).unflatten(-1, (-1, of))
    assert torch.equal(groups, keep_highest(score.unflatten(-1, (-1, of)), of // 3))


def test_what_one_slice_rounds_off_the_next_makes_up_for():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    # A third of two weights: none. Of four: one, the first row's. Of six: one more, the second row's. And so on.
    assert sliced(Unstructured(1 / 3), score, range(7)).int().tolist() == [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0]]
    whole = sliced(Unstructured(1 / 3, rank_over="layer"), score, range(7))
    assert whole.int().tolist() == [[1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("rank_over", ["row", "layer"])
def test_one_slice_of_everything_is_the_pattern(rank_over):
    score, pattern = torch.rand(3, 7), Unstructured(0.4, rank_over)
    assert torch.equal(pattern.slice(score, 0), pattern(score))


@pytest.mark.parametrize(
    ("pattern", "weight", "holds"),
    [
        (NM(2, 4), [[1, 0, 0, 2, 0, 3, 4, 0]], True),
        (NM(2, 4), [[1, 0, 0, 0, 0, 0, 0, 0]], True),  # a kept weight may be zero by itself
        (NM(2, 4), [[1, 0, 0, 2, 0, 3, 4, 5]], False),
        (NM(2, 4), [[1, 0, 3, 2, 0, 0, 4, 0]], False),  # half of the row is zero, but not half of each group
        (NM(2, 4), [[1, 0, 2, 0, 0, 0]], False),  # no whole groups
        (Unstructured(0.5), [[1, 0, 0, 2], [0, 0, 3, 4]], True),
        (Unstructured(0.5), [[1, 0, 3, 2], [0, 0, 0, 4]], False),
        (Unstructured(0.5, rank_over="layer"), [[1, 0, 3, 2], [0, 0, 0, 4]], True),
        (Unstructured(0.5, rank_over="layer"), [[1, 0, 3, 2], [0, 0, 5, 4]], False),
        (Unstructured(0.5), [[0, 0, 2], [0, 3, 4]], True),  # three of six
        (Unstructured(0.5), [[0, 1, 2], [0, 0, 4]], False),  # the first row's turn comes first
        (Unstructured(0.4), [[1, 0, 2], [0, 3, 4]], True),  # 2.4 of six: rounded down
        (Unstructured(0.5), [[1, 0, 0, 0], [0, 0, 0, 0]], True),  # more zeros than asked for
        (Counted(3, 4, "layer"), [[1, 0, 0, 0], [0, 1, 2, 3]], True),
        (Counted(3, 4), [[0, 0, 0, 0], [0, 0, 2, 3]], True),
    ],
)
def test_whether_a_weight_holds_a_pattern_by_hand(pattern, weight, holds):
    assert pattern.holds(torch.tensor(weight, dtype=torch.float32)) is holds


@quick
@given(
    scores(st.sampled_from([4, 8, 12])), st.sampled_from([Unstructured(0.3), Unstructured(0.7, rank_over="layer"), NM(1, 4)])
)
def test_what_a_pattern_selects_holds_it(score, pattern):
    keep = pattern(score)
    assert pattern.holds(torch.ones_like(score).masked_fill(~keep, 0))
    one_too_many = torch.ones_like(score).masked_fill(~keep, 0).flatten()
    pruned_places = (one_too_many == 0).nonzero()
    assume(len(pruned_places))
    one_too_many[pruned_places[0]] = 1
    assert not pattern.holds(one_too_many.view_as(score))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, rank_over="layer"), NM(2, 4)])
def test_patterns_do_not_change_the_scores(pattern):
    score = torch.rand(4, 8)
    before = score.clone()
    pattern(score)
    assert torch.equal(score, before)


@pytest.mark.parametrize("pattern", [Unstructured(0.3), Unstructured(0.3, rank_over="layer"), NM(2, 4)])
def test_scores_may_be_transposed_views(pattern):
    score = torch.rand(8, 6)
    assert torch.equal(pattern(score.t()), pattern(score.t().contiguous()))


@pytest.mark.parametrize(
    ("sparsity", "width", "pruned"),
    [
        (0.29, 100, [29, 29, 29]),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, [57, 57, 57]),  # 0.57 * 100 is 56.99999999999999
        (0.7, 384, [269, 269, 268]),  # 806.4 of 1152
        (0.5, 7, [4, 3, 3]),  # 10.5 of 21
        (0.999, 100, [99, 99, 99]),
        (0.9999999999, 10, [9, 9, 9]),  # rounding to a full row is no reason to empty it
        (0.5, 1, [0, 0, 0]),
        (0.0, 10, [0, 0, 0]),
    ],
)
def test_the_number_pruned_is_rounded_down_once_as_in_decimal(sparsity, width, pruned):
    assert (~Unstructured(sparsity)(torch.rand(2, 3, width))).sum(-1).tolist() == [pruned] * 2
    assert Unstructured(sparsity).pruned_of(3, width) == sum(pruned)


def test_a_single_row_is_rounded_down():
    assert (~Unstructured(0.7)(torch.rand(1, 384))).sum() == 268


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, float("nan")])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf"Unstructured\(sparsity={sparsity}\): expected a number from 0 to 1, but not 1"):
        Unstructured(sparsity)


def test_an_unknown_ranking_group_is_refused():
    with pytest.raises(ValueError, match=r"Unstructured\(rank_over='column'\): expected 'row' or 'layer'"):
        Unstructured(0.5, rank_over="column")


@pytest.mark.parametrize(("keep", "of"), [(5, 4), (0, 4), (-1, 4), (0, 0)])
def test_impossible_nm_is_refused(keep, of):
    with pytest.raises(ValueError, match=r"NM\(keep=.*\): expected (keep <= of|a whole number from 1 to 1,024)"):
        NM(keep=keep, of=of)


@pytest.mark.parametrize("width", [3, 6, 9])
def test_a_width_that_does_not_divide_is_refused(width):
    assert not NM(2, 4).fits(width)
    with pytest.raises(ValueError, match=rf"2:4 on rows of {width} inputs: expected a width that 4 divides"):
        NM(2, 4)(torch.rand(2, width))


@pytest.mark.parametrize(("pattern", "width"), [(NM(2, 4), 8), (NM(1, 3), 9), (Unstructured(0.5), 7)])
def test_widths_that_fit(pattern, width):
    assert pattern.fits(width)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("50%", Unstructured(0.5)),
        (" 62.5 % ", Unstructured(0.625)),
        ("0%", Unstructured(0.0)),
        ("2:4", NM(keep=2, of=4)),
        (" 4 : 8 ", NM(keep=4, of=8)),
        ("1:4", NM(keep=1, of=4)),
        ("50", None),
        ("50%x", None),
        ("2:4:8", None),
        ("-5%", None),
        ("half", None),
        ("", None),
    ],
)
def test_shorthands(text, pattern):
    assert parse_shorthand(text) == pattern


@quick
@given(st.one_of(per_mille.map(lambda n: Unstructured(n / 1000)), st.integers(1, 32).map(lambda n: NM(keep=n, of=32))))
def test_a_pattern_prints_as_its_shorthand(pattern):
    parsed = parse_shorthand(str(pattern))
    assert type(parsed) is type(pattern)
    assert vars(parsed) == pytest.approx(vars(pattern))


@pytest.mark.parametrize(("text", "message"), [("100%", r"sparsity=1.0"), ("250%", r"sparsity=2.5"), ("4:2", r"keep=4, of=2")])
def test_shorthands_out_of_range_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shorthand(text)


# --- on the way to a pattern -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.5), Unstructured(0.5, "layer"), Counted(20, 8), Counted(20, 8, "layer"), NM(2, 4), NM(1, 4)],
    ids=repr,
)
def test_a_mask_on_the_way_has_its_share_and_ends_at_the_pattern(pattern):
    score = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    counts = [int((~pattern.partly(score, share)).sum()) for share in (0.0, 0.25, 0.5, 1.0)]
    whole = int((~pattern(score)).sum())
    assert (counts[0], counts[2], counts[3]) == (0, whole // 2, whole)
    assert 0 < counts[1] <= whole // 4
    assert torch.equal(pattern.partly(score, 1.0), pattern(score))


def test_a_mask_on_the_way_to_two_of_four_by_hand():
    # The lowest two of each group may go: 1 2 and 5 6; half of the four that will go are the lowest of these.
    score = torch.tensor([[1.0, 9.0, 2.0, 8.0, 7.0, 5.0, 6.0, 9.0]])
    assert NM(2, 4).partly(score, 0.5).int().tolist() == [[0, 1, 0, 1, 1, 1, 1, 1]]
    assert NM(2, 4).partly(score, 0.75).int().tolist() == [[0, 1, 0, 1, 1, 0, 1, 1]]


def test_a_part_of_a_rounded_number_is_rounded_down_by_hand():
    # Half of 5 is 2; 0.9 of 2 is 1, where 0.9 of 2.5 would be 2, and so would 1.8 rounded up.
    score = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]])
    for pattern in (Unstructured(0.5), Unstructured(0.5, "layer"), Counted(2, 5), Counted(2, 5, "layer")):
        assert pattern.partly(score, 0.9).int().tolist() == [[1, 0, 1, 1, 1]]
    assert NM(2, 4).partly(score[:, :4], 0.9).int().tolist() == [[1, 0, 1, 1]]
