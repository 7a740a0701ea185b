import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statprune.criteria import CRITERIA, cvr, magnitude, wanda
from statprune.statistics import InputMoments, Statistic

quick = settings(max_examples=20, deadline=None, derandomize=True)


def moments_of(tokens: torch.Tensor) -> InputMoments:
    return InputMoments.zeros(tokens.shape[-1]).add(tokens)


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


def reference_cvr(weight, tokens, alpha=0.5, eps=1e-8):
    scores = [[0.0] * len(weight[0]) for _ in weight]
    for j in range(len(weight[0])):
        inputs, column = [token[j] for token in tokens], [row[j] for row in weight]
        input_mean, column_mean = sum(inputs) / len(inputs), sum(column) / len(column)
        input_variance = sum((x - input_mean) ** 2 for x in inputs) / len(inputs)
        column_variance = sum((w - column_mean) ** 2 for w in column) / len(column)
        for i, w in enumerate(column):
            scores[i][j] = abs(w) * input_variance ** (1 / 4) * (column_variance + eps) ** (-alpha / 2)
    return scores


REFERENCES = {"magnitude": reference_magnitude, "wanda": reference_wanda, "cvr": reference_cvr}


def test_magnitude_by_hand():
    assert magnitude(torch.tensor([[-2.0, 1.0], [0.0, -3.0]])).tolist() == [[2, 1], [0, 3]]


def test_wanda_by_hand():
    # Root mean squares: sqrt((1 + 49) / 2) = 5 and sqrt((4 + 196) / 2) = 10. The norms would be sqrt(50) and sqrt(200),
    # the mean squares 25 and 100, the variances 9 and 36.
    moments = moments_of(torch.tensor([[1.0, -2.0], [7.0, -14.0]]))
    weight = torch.tensor([[-2.0, 1.0], [0.5, -3.0], [0.0, 4.0]])
    assert wanda(weight, moments).tolist() == [[10, 10], [2.5, 30], [0, 40]]


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
    torch.testing.assert_close(CRITERIA[name](weight, moments_of(tokens)).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.3}, {"eps": 0.7}, {"alpha": 2.0, "eps": 1e-3}])
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


@pytest.mark.parametrize("name", CRITERIA)
def test_a_stack_is_scored_matrix_by_matrix(name):
    layers = [random_layer(seed, 4, 6) for seed in range(3)]
    alone = [CRITERIA[name](weight, moments_of(tokens)) for weight, tokens in layers]
    moments = [moments_of(tokens) for _, tokens in layers]
    stacked = InputMoments(*(torch.stack([getattr(one, key) for one in moments]) for key in ("num_tokens", "sum", "sum_sq")))
    together = CRITERIA[name](torch.stack([weight for weight, _ in layers]), stacked)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("weight", [torch.zeros(4, 3), torch.full((4, 3), 0.7), torch.tensor([[1.0, -2.0, 0.0]])])
def test_columns_without_variance_have_finite_scores_in_cvr(weight):
    moments = moments_of(torch.tensor([[1.0, 2.0, 4.0], [-1.0, 0.0, 3.0]]))
    assert cvr(weight, moments, alpha=2.0).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, r"cvr\(alpha=-0.1\): expected alpha >= 0"),
        ({"alpha": float("nan")}, r"cvr\(alpha=nan\)"),
        ({"eps": 0.0}, r"cvr\(eps=0.0\): expected eps > 0"),
    ],
)
def test_cvr_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        cvr(torch.ones(2, 2), moments_of(torch.ones(2, 2)), **settings)


def test_only_magnitude_needs_no_statistics():
    assert {name for name, criterion in CRITERIA.items() if criterion.needs is Statistic.NONE} == {"magnitude"}
