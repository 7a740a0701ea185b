import functools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.methods.criteria import CRITERIA, cvr, magnitude, optimal_brain, ria, wanda, z_pruner
from statprune.methods.statistics import InputMoments, Statistic
from statprune.methods.triangles import cholesky_

quick = settings(max_examples=20, deadline=None, derandomize=True)


def moments_of(tokens: torch.Tensor) -> InputMoments:
    return InputMoments.zeros(tokens.shape[-1], needs=Statistic.GRAM).add(tokens)


def random_layer(seed: int, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the tokens that enter it; channels differ in mean and in spread, columns in spread."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * torch.rand(in_features, generator=generator)
    spread, mean = torch.rand(2, in_features, generator=generator) * torch.tensor([[4.0], [9.0]])
    return weight, torch.randn(11, in_features, generator=generator) * spread + mean


def reference_magnitude(weight, tokens):
    return [[abs(w) for w in row] for row in weight]


def reference_wanda(weight, tokens):
    channels = list(zip(*tokens, strict=True))
    rms = [(sum(x**2 for x in channel) / len(channel)) ** 0.5 for channel in channels]
    return [[abs(w) * rms[j] for j, w in enumerate(row)] for row in weight]


def reference_ria(weight, tokens, exponent=0.5):
    norms = [(sum(x**2 for x in channel) / len(channel)) ** 0.5 for channel in zip(*tokens, strict=True)]
    columns, rows = ([sum(abs(w) for w in line) for line in lines] for lines in (zip(*weight, strict=True), weight))
    return [
        [(abs(w) / columns[j] + abs(w) / rows[i]) * norms[j] ** exponent for j, w in enumerate(row)]
        for i, row in enumerate(weight)
    ]


def z_scores(values):
    flat = [value for row in values for value in row]
    deviation = statistics.stdev(flat) if len(flat) > 1 else 0
    return [[(value - statistics.fmean(flat)) / deviation if deviation else 0.0 for value in row] for row in values]


def reference_z_pruner(weight, tokens):
    norms = [(sum(x**2 for x in channel) / len(channel)) ** 0.5 for channel in zip(*tokens, strict=True)]
    columns, rows = ([sum(w**2 for w in line) ** 0.5 for line in lines] for lines in (zip(*weight, strict=True), weight))
    by_row = z_scores([[w / rows[i] for w in row] for i, row in enumerate(weight)])
    by_column = z_scores([[w / columns[j] for j, w in enumerate(row)] for row in weight])
    sizes = [abs(w) for row in weight for w in row]
    share = sum(size < 0.1 * statistics.fmean(sizes) for size in sizes) / len(sizes)
    a = 0.7 * (1 - 0.3 * share)
    return [
        [(a * abs(by_row[i][j]) ** 3 + (1 - a) * abs(by_column[i][j]) ** 3) * norms[j] ** 1.5 for j in range(len(row))]
        for i, row in enumerate(weight)
    ]


def reference_cvr(weight, tokens, alpha=0.5, exponent=0.25, eps=1e-8):
    scores = [[0.0] * len(weight[0]) for _ in weight]
    for j in range(len(weight[0])):
        inputs, column = [token[j] for token in tokens], [row[j] for row in weight]
        input_mean, column_mean = sum(inputs) / len(inputs), sum(column) / len(column)
        input_variance = sum((x - input_mean) ** 2 for x in inputs) / len(inputs)
        column_variance = sum((w - column_mean) ** 2 for w in column) / len(column)
        for i, w in enumerate(column):
            scores[i][j] = abs(w) * input_variance**exponent * (column_variance + eps) ** (-alpha / 2)
    return scores


def reference_optimal_brain(weight, tokens, damping=0.01):
    """The saliency as the increase of the error when one weight goes and all others of its row adapt, solved for each."""
    gram = torch.tensor(tokens, dtype=torch.float64).mT @ torch.tensor(tokens, dtype=torch.float64)
    gram = gram + max(damping, 0.001) * torch.diag(gram.diagonal())
    scores = [[0.0] * len(weight[0]) for _ in weight]
    for j in range(len(weight[0])):
        others = [k for k in range(len(weight[0])) if k != j]
        adapted = torch.linalg.solve(gram[others][:, others], gram[others, j]) if others else torch.zeros(0)
        # Removing w and moving the others by adapted * w costs w^2 (H_jj - h . adapted).
        cost = float(gram[j, j] - gram[j, others] @ adapted) if others else float(gram[j, j])
        for i, row in enumerate(weight):
            scores[i][j] = abs(row[j]) * cost**0.5
    return scores


REFERENCES = {
    "magnitude": reference_magnitude, "wanda": reference_wanda, "ria": reference_ria, "z-pruner": reference_z_pruner,
    "cvr": reference_cvr, "optimal-brain": reference_optimal_brain,
}  # fmt: skip


def test_magnitude_by_hand():
    assert magnitude(torch.tensor([[-2.0, 1.0], [0.0, -3.0]])).tolist() == [[2, 1], [0, 3]]


def test_wanda_by_hand():
    # Root mean squares: sqrt((1 + 49) / 2) = 5 and sqrt((4 + 196) / 2) = 10. The norms would be sqrt(50) and sqrt(200),
    # the mean squares 25 and 100, the variances 9 and 36.
    moments = moments_of(torch.tensor([[1.0, -2.0], [7.0, -14.0]]))
    weight = torch.tensor([[-2.0, 1.0], [0.5, -3.0], [0.0, 4.0]])
    assert wanda(weight, moments).tolist() == [[10, 10], [2.5, 30], [0, 40]]


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (0.0, [[3 / 4, 3 / 2], [1, 3 / 4]]),
        (0.5, [[3 / 2, 9 / 2], [2, 9 / 4]]),
        (1.0, [[3, 27 / 2], [4, 27 / 4]]),
    ],
)
def test_ria_by_hand(exponent, expected):
    # Root mean squares 4 and 9. Columns sum up to 2 and 4, rows to 4 and 2: 1/2 + 1/4, 3/4 + 3/4; 1/2 + 1/2, 1/4 + 1/2.
    moments, weight = moments_of(torch.tensor([[-4.0, 9.0]])), torch.tensor([[-1.0, 3.0], [1.0, -1.0]])
    torch.testing.assert_close(ria(weight, moments, exponent=exponent), torch.tensor(expected, dtype=torch.float32))
    if exponent == 0.5:
        assert torch.equal(ria(weight, moments), ria(weight, moments, exponent=0.5))


def test_z_pruner_by_hand():
    # The one row divided by its norm 5 is 3/5, 4/5, 0: mean 7/15, z (2, 5, -7) / sqrt(39). Column by column it is 1, 1, 0:
    # z (1, 1, -2) / sqrt(3). One weight of three is below 7/30: a = 0.7 (1 - 0.1) = 0.63. Norms 4, 1 and 9.
    by_row = [2**3 / 39**1.5, 5**3 / 39**1.5, 7**3 / 39**1.5]
    by_column = [1 / 3**1.5, 1 / 3**1.5, 8 / 3**1.5]
    expected = [(0.63 * r + 0.37 * c) * n for r, c, n in zip(by_row, by_column, [8, 1, 27], strict=True)]
    score = z_pruner(torch.tensor([[3.0, 4.0, 0.0]]), moments_of(torch.tensor([[4.0, -1.0, 9.0], [4.0, 1.0, -9.0]])))
    assert score[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_z_pruner_without_small_weights_by_hand():
    # Row: 3/5 and 4/5, z -1/sqrt(2) and 1/sqrt(2); columns: 1 and 1, which differ in nothing. a = 0.7.
    score = z_pruner(torch.tensor([[3.0, 4.0]]), moments_of(torch.tensor([[1.0, 4.0]])))
    assert score[0].tolist() == pytest.approx([0.7 * 0.5**1.5, 8 * 0.7 * 0.5**1.5], rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [[2, 42], [2, 42], [2, 42], [10, 6]]),
        (1.0, [[1, 6], [1, 6], [1, 6], [5, 6 / 7]]),
        (2.0, [[1 / 2, 6 / 7], [1 / 2, 6 / 7], [1 / 2, 6 / 7], [5 / 2, 6 / 49]]),
    ],
)
def test_cvr_by_hand(alpha, expected):
    # Input channels 7, -1 and 19, 1: variances 16 and 81 (sample 32 and 162; E[x^2] 25 and 181), fourth roots 2 and 3.
    moments = moments_of(torch.tensor([[7.0, 19.0], [-1.0, 1.0]]))
    # Column 0: mean -2, variance (1 + 1 + 1 + 9) / 4 = 3 (sample 4), + eps = 4, ^(-alpha/2) = 1, 1/2, 1/4.
    # Column 1: mean -10, variance (16 + 16 + 16 + 144) / 4 = 48 (sample 64), + eps = 49, ^(-alpha/2) = 1, 1/7, 1/49.
    weight = torch.tensor([[-1.0, -14.0], [-1.0, -14.0], [-1.0, -14.0], [-5.0, 2.0]])
    torch.testing.assert_close(cvr(weight, moments, alpha=alpha, eps=1.0), torch.tensor(expected, dtype=torch.float32))


@quick
@given(st.sampled_from(sorted(CRITERIA)), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**32))
def test_scores_equal_a_plain_reference(name, out_features, in_features, seed):
    weight, tokens = random_layer(seed, out_features, in_features)
    expected = torch.tensor(REFERENCES[name](weight.tolist(), tokens.tolist()), dtype=torch.float64)
    torch.testing.assert_close(
        CRITERIA[name](weight, moments_of(tokens)).double(),
        expected,
        rtol=1e-4 if name == "optimal-brain" else 1e-5,
        atol=1e-4 if name == "z-pruner" else 1e-7,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"alpha": 1.3},
        {"eps": 0.7},
        {"alpha": 2.0, "eps": 1e-3},
        {"exponent": 0.5},
        {"exponent": 0.7, "alpha": 1.0},
    ],
)
def test_cvr_settings_equal_a_plain_reference(settings):
    weight, tokens = random_layer(0, 5, 7)
    expected = torch.tensor(reference_cvr(weight.tolist(), tokens.tolist(), **settings))
    torch.testing.assert_close(cvr(weight, moments_of(tokens), **settings), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_the_dtype_of_the_weight(name, dtype):
    weight, tokens = random_layer(1, 6, 8)
    weight, moments = weight.to(dtype), moments_of(tokens)
    score = CRITERIA[name](weight, moments)
    assert score.dtype == torch.float32
    assert torch.equal(score, CRITERIA[name](weight.float(), moments))
    assert weight.dtype == dtype


KEYS = ("num_tokens", "sum", "sum_sq", "gram")


@pytest.mark.parametrize("name", CRITERIA)
def test_a_stack_is_scored_matrix_by_matrix(name):
    # Of different size and spread: what holds for the stack as a whole holds for none of them.
    layers = [random_layer(seed, 4, 6) for seed in range(3)]
    layers = [(weight.pow(2 * seed + 1) * 100**seed, tokens) for seed, (weight, tokens) in enumerate(layers)]
    alone = [CRITERIA[name](weight, moments_of(tokens)) for weight, tokens in layers]
    moments = [moments_of(tokens) for _, tokens in layers]
    stacked = InputMoments(*(torch.stack([getattr(one, key) for one in moments]) for key in KEYS))
    together = CRITERIA[name](torch.stack([weight for weight, _ in layers]), stacked)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4 if name == "optimal-brain" else 1e-6, atol=0)


@pytest.mark.parametrize("name", CRITERIA)
def test_scoring_does_not_change_the_weight(name):
    weight, tokens = random_layer(2, 4, 6)
    before = weight.clone()
    CRITERIA[name](weight, moments_of(tokens))
    assert torch.equal(weight, before)


def test_a_channel_that_never_varies_scores_nothing_in_cvr_and_something_in_wanda():
    moments = moments_of(torch.tensor([[5.0, 1.0], [5.0, 3.0]]))
    weight = torch.tensor([[1.0, 1.0], [3.0, 2.0]])
    assert cvr(weight, moments)[:, 0].tolist() == [0, 0]
    assert wanda(weight, moments)[:, 0].tolist() == [5, 15]


def test_exponents_of_cvr_by_hand():
    # Variances 16 and 0: a half is the standard deviation, and nothing of it leaves the weights alone, even of a channel that
    # never varies.
    moments = moments_of(torch.tensor([[7.0, 5.0], [-1.0, 5.0]]))
    weight = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    assert cvr(weight, moments, alpha=0.0, exponent=0.5).tolist() == [[4, 0], [12, 0]]
    assert torch.equal(cvr(weight, moments, alpha=0.0, exponent=0.0), weight.abs())
    assert torch.equal(cvr(weight, moments), cvr(weight, moments, exponent=0.25))


AWKWARD = {
    "all zeros": torch.zeros(4, 6),
    "a row of zeros": torch.ones(4, 6).index_fill(0, torch.tensor([1]), 0.0),
    "a column of zeros": torch.ones(4, 6).index_fill(1, torch.tensor([1]), 0.0),
    "all equal": torch.full((4, 6), 1 / 3),
    "one row": torch.tensor([[1.0, -2.0, 0.0, 4.0, 5.0, 0.1]]),
    "one weight a row": torch.eye(6) * 3,
    "tiny": torch.full((4, 6), 1e-30) * torch.arange(6),
}


@pytest.mark.parametrize("weight", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("name", CRITERIA)
def test_awkward_weights_have_finite_scores(name, weight):
    tokens = torch.tensor([[1.0, 2.0, 0.0, 4.0, 3.0, 0.0], [-1.0, 0.0, 0.0, 4.0, 1.0, 0.0]])
    score = CRITERIA[name](weight, moments_of(tokens))
    assert score.isfinite().all()
    assert (score >= 0).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_one_weight_alone_has_a_finite_score(name):
    score = CRITERIA[name](torch.tensor([[3.0]]), moments_of(torch.tensor([[1.0], [2.0]])))
    assert score.isfinite().all()


@quick
@given(st.integers(1, 40), st.integers(2, 40), st.floats(-100, 100, width=32))
def test_z_pruner_has_moderate_scores_where_all_weights_are_equal(out_features, in_features, value):
    score = z_pruner(torch.full((out_features, in_features), value), moments_of(torch.ones(2, in_features)))
    # What rounding leaves of a deviation of 0 may count as one, but not as infinitely many.
    assert (score <= 1e6).all()


def test_weights_of_zero_score_nothing_in_ria_and_a_row_or_column_of_them_disturbs_no_other():
    weight, tokens = random_layer(4, 3, 5)
    wide = torch.zeros(4, 5)
    wide[[0, 1, 3]] = weight
    scores = ria(wide, moments_of(tokens))
    assert scores[2].tolist() == [0] * 5
    torch.testing.assert_close(scores[[0, 1, 3]], ria(weight, moments_of(tokens)))


@pytest.mark.parametrize("weight", [torch.zeros(4, 3), torch.full((4, 3), 0.7), torch.tensor([[1.0, -2.0, 0.0]])])
def test_columns_without_variance_have_finite_scores_in_cvr(weight):
    moments = moments_of(torch.tensor([[1.0, 2.0, 4.0], [-1.0, 0.0, 3.0]]))
    assert cvr(weight, moments, alpha=2.0).isfinite().all()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (functools.partial(cvr, alpha=-0.1), r"cvr\(alpha=-0.1\): expected a number from 0 to 4"),
        (functools.partial(cvr, alpha=float("nan")), r"cvr\(alpha=nan\)"),
        (functools.partial(cvr, exponent=-0.25), r"cvr\(exponent=-0.25\): expected a number from 0 to 2"),
        (functools.partial(cvr, exponent=float("nan")), r"cvr\(exponent=nan\)"),
        (functools.partial(cvr, eps=0.0), r"cvr\(eps=0.0\): expected a number from 1e-12 to 1,000"),
        (functools.partial(ria, exponent=-1.0), r"ria\(exponent=-1.0\): expected a number from 0 to 4"),
        (functools.partial(ria, exponent=float("nan")), r"ria\(exponent=nan\)"),
        (functools.partial(optimal_brain, damping=0.0), r"optimal-brain\(damping=0.0\): expected a number from 1e-30 to 100"),
    ],
)
def test_settings_out_of_range_are_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        criterion(torch.ones(2, 2), moments_of(torch.ones(2, 2)))


@pytest.mark.parametrize("scale", [1e-23, 1e22])
@pytest.mark.parametrize(("name", "power"), [("wanda", 1), ("ria", 0.5), ("z-pruner", 1.5), ("cvr", 0.5)])
def test_inputs_whose_squares_are_beyond_float32_are_scored_as_others(name, power, scale):
    weight, tokens = random_layer(3, 4, 6)
    scaled = InputMoments.zeros(6).add(tokens.double() * scale)
    score = CRITERIA[name](weight, scaled).double() / scale**power
    torch.testing.assert_close(score, CRITERIA[name](weight, moments_of(tokens)).double(), rtol=1e-5, atol=0)


def test_what_each_criterion_needs():
    needs = {name: criterion.needs for name, criterion in CRITERIA.items()}
    assert needs.pop("magnitude") is Statistic.NONE
    assert needs.pop("optimal-brain") is Statistic.GRAM
    assert set(needs.values()) == {Statistic.MOMENTS}


def test_optimal_brain_without_a_gram_is_refused():
    with pytest.raises(ValueError, match="optimal-brain needs the Gram"):
        optimal_brain(torch.ones(2, 2), InputMoments.zeros(2).add(torch.ones(1, 2)))


def test_optimal_brain_knows_that_two_equal_channels_can_stand_in_for_each_other():
    tokens = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    scores = optimal_brain(torch.ones(1, 3), moments_of(tokens[:, [0, 0, 1]]), damping=1e-4)
    assert (scores[0, :2] < 0.1 * scores[0, 2]).all()


def test_layers_that_share_their_inputs_share_what_optimal_brain_makes_of_them_for_each_damping(monkeypatch):
    weight, tokens = random_layer(5, 4, 6)
    moments, inverted = moments_of(tokens), []

    def counted(matrix, team):
        inverted.append(round(float(matrix[0, 0]) - 1, 5))
        return cholesky_(matrix, team)

    monkeypatch.setattr("statprune.methods.gram.cholesky_", counted)
    scores = [optimal_brain(weight, moments, damping=damping) for damping in (0.01, 1.0, 0.01)]
    assert inverted == [0.01, 1.0]
    assert torch.equal(scores[0], scores[2])
    torch.testing.assert_close(scores[1], optimal_brain(weight, moments_of(tokens), damping=1.0))
    assert not torch.allclose(scores[0], scores[1], rtol=0.01)
