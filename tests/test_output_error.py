"""How far pruning puts a layer's output off: measured on a sample of the layer's own inputs, and recorded."""

import json
import math

import pytest
import torch
from torch import nn

import statprune
from statprune import Recipe
from statprune.methods.pruner import output_energies
from statprune.methods.statistics import InputMoments, InputSample, Statistic
from statprune.report import PruningReport
from statprune.training.masks import remeasure
from tiny_models import classifier, llama, tokens


def numbered(num_tokens: int, in_features: int = 1) -> torch.Tensor:
    return torch.arange(num_tokens, dtype=torch.float64)[:, None].expand(-1, in_features)


def places(sample: InputSample) -> list[int]:
    return [int(place) for place in sample.rows[:, 0]]


def test_a_sample_holds_all_tokens_while_they_are_few():
    sample = InputSample(size=8)
    for batch in numbered(8).split(3):
        sample.add(batch)
    assert places(sample) == list(range(8))


@pytest.mark.parametrize("batch_size", [1, 7, 1000, 20_000])
def test_a_sample_is_the_same_however_the_tokens_come(batch_size):
    whole, sample = InputSample(size=64), InputSample(size=64)
    whole.add(numbered(20_000))
    for batch in numbered(20_000).split(batch_size):
        sample.add(batch)
        assert len(sample.rows) <= 64
    assert places(sample) == places(whole)
    assert len(sample.rows) >= 32


@pytest.mark.parametrize("length", [128, 512, 2048, 2000])
def test_a_sample_is_spread_over_all_tokens_and_over_the_places_in_their_sequences(length):
    sample = InputSample(size=128)
    sample.add(numbered(128 * length))
    found = torch.tensor(places(sample))
    for parts in (found // (16 * length), found % length * 8 // length):  # eighths of the tokens, and of a sequence
        counts = parts.bincount(minlength=8)
        assert counts.min() >= 0.3 * len(found) / 8, counts
        assert counts.max() <= 1.7 * len(found) / 8, counts


def test_a_sample_has_the_dtype_of_the_inputs_no_padding_and_no_graph():
    moments = InputMoments.zeros(3, Statistic.SAMPLE)
    inputs = torch.ones(2, 4, 3, dtype=torch.bfloat16, requires_grad=True) * 2
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    moments.add(inputs.masked_fill(keep[..., None] == 0, float("nan")), keep)
    assert torch.equal(moments.sample.rows, torch.full((5, 3), 2, dtype=torch.bfloat16))
    assert not moments.sample.rows.requires_grad
    assert InputMoments.zeros(3).add(inputs).sample is None


def test_the_energies_by_hand():
    weight, pruned = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    # Of (1, 1): outputs 3 and 7, of which 1 and 4 go; of (2, 0): 2 and 6, of which 2 and 0 go.
    changed, dense = output_energies(weight, pruned, torch.tensor([[1.0, 1.0], [2.0, 0.0]])).tolist()
    assert (changed, dense) == (1 + 16 + 4, 9 + 49 + 4 + 36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_are_measured_exactly(dtype):
    layer = nn.Linear(8, 6, dtype=dtype)
    x = torch.randn(5, 8, dtype=dtype)
    plan = statprune.plan(layer, [x], Recipe("wanda", "2:4", targets=["*"]))
    change = plan.weights["weight"].double() - layer.weight.detach().double()
    expected = (x.double() @ change.t()).norm() / (x.double() @ layer.weight.detach().double().t()).norm()
    assert plan.report.sites[0].output_error == pytest.approx(float(expected), rel=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("schedule", ["walk", "block", "one-shot"])
def test_every_layer_has_an_error_in_the_report_its_text_and_its_data(schedule):
    report = statprune.plan(llama(), [tokens(2, 16) for _ in range(3)], Recipe("cvr+energy", "2:4", schedule=schedule)).report
    assert len(report.output_errors) == len(report.sites) == 14
    assert all(0.05 < error < 2 for error in report.output_errors)
    assert f"at most {100 * max(report.output_errors):.1f} %" in str(report)
    data = json.loads(json.dumps(report.to_dict()))
    assert [site["output_error"] for site in data["sites"]] == report.output_errors
    assert PruningReport.from_dict(data) == report


def test_a_dense_pattern_has_no_error():
    assert set(statprune.plan(classifier(), [torch.randn(4, 8)], Recipe("wanda", "0%")).report.output_errors) == {0}


def test_without_statistics_there_is_nothing_to_measure_on():
    report = statprune.plan(llama(), [tokens(2, 16)], Recipe("magnitude", "2:4")).report
    assert {site.output_error for site in report.sites} == {None}
    assert "off by" not in str(report)


def test_module_hooks_measure_as_the_graph_does():
    class Untraceable(nn.Sequential):
        def forward(self, x):
            return super().forward(x if float(x.sum()) < math.inf else -x)

    torch.manual_seed(0)
    model = Untraceable(nn.Linear(8, 12), nn.Linear(12, 8))
    x = torch.randn(6, 8)
    with pytest.warns(UserWarning, match="module hooks"):
        hooked = statprune.plan(model, [x], Recipe("wanda", "2:4", targets=["*"], schedule="one-shot")).report
    traced = statprune.plan(nn.Sequential(*model), [x], Recipe("wanda", "2:4", targets=["*"], schedule="one-shot")).report
    assert hooked.output_errors == pytest.approx(traced.output_errors, rel=1e-6)


def test_outputs_of_zero_have_no_relative_error():
    report = statprune.plan(nn.Linear(8, 4), [torch.zeros(3, 8)], Recipe("wanda", "2:4", targets=["*"])).report
    assert report.sites[0].output_error is None


def test_a_record_of_before_has_no_errors():
    report = statprune.plan(classifier(), [torch.randn(4, 8)], Recipe("wanda", "2:4")).report
    data = json.loads(json.dumps(report.to_dict()))
    for site in data["sites"]:
        del site["output_error"]
    assert PruningReport.from_dict(data).output_errors == []
    del data["sites"][0]["shape"]
    with pytest.raises(KeyError, match="shape"):
        PruningReport.from_dict(data)


def test_weights_that_were_trained_afterwards_have_no_errors_any_more():
    model = classifier()
    report = statprune.prune(model, [torch.randn(4, 8)], Recipe("wanda", "2:4"))
    _, second = report.sites
    assert remeasure(report, model) == report
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    assert [site.output_error for site in remeasure(report, model).sites] == [None, second.output_error]


def _plan(rank, parts, recipe):
    return statprune.plan(classifier(), [parts[rank]], recipe).report.output_errors


def test_ranks_measure_on_the_tokens_of_all(two_ranks):
    recipe = Recipe("wanda", "2:4")
    parts = [torch.randn(5, 8), 3 * torch.randn(2, 8)]
    alone = statprune.plan(classifier(), parts, recipe).report.output_errors
    first, second = two_ranks(_plan, parts, recipe)
    assert first == second == pytest.approx(alone, rel=1e-5)
