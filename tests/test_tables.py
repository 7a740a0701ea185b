import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from statprune.errors import ExperimentError
from statprune.experiments.grid import ratio, superscript, three_digits, two_decimals
from statprune.experiments.grouping import sparsity
from statprune.experiments.published import Published
from statprune.experiments.tables import COLUMNS, markdown, write_csv
from statprune.results import Result, ResultsFile

PUBLISHED = Published.load(Path(__file__).parents[1] / "configs" / "paper" / "published.yaml")
LLAMA = "Llama-2-13b-hf"


def measured(label, pattern, perplexity, model="tiny", samples=128, seed=0):
    if label == "dense":
        return Result("perplexity", model, label, values={"perplexity": perplexity})
    return Result("perplexity", model, label, pattern, samples, seed, values={"perplexity": perplexity})


def failed(label, pattern, model="tiny", measure="perplexity", samples=128, seed=0):
    return Result(measure, model, label, pattern, samples, seed, error="out of memory")


def timed(label, statistics, pruning, model="tiny", pattern="50%", peak_memory=None):
    values = {"statistics": statistics, "pruning": pruning, "total": statistics + pruning}
    return Result("runtime", model, label, pattern, 128, 0, values=values, peak_memory=peak_memory)


def lines(experiment, results):
    return markdown(experiment, results, PUBLISHED).splitlines()


def test_perplexity_has_dense_then_each_pattern_and_a_column_a_model():
    results = [
        measured("dense", "", 5.0, "a"),
        measured("dense", "", 6.0, "b"),
        measured("wanda", "50%", 7.0, "a"),
        measured("wanda", "2:4", 9.0, "a"),
        measured("cvr", "50%", 6.5, "a"),
        measured("cvr", "2:4", 9.25, "a"),
        measured("cvr", "2:4", 1234.5678, "b"),
        measured("wanda", "50%", 8.0, "b"),
        failed("cvr", "50%", "b"),
    ]
    assert lines("perplexity", results) == [
        "| method | sparsity | a | b |",
        "|---|---|---:|---:|",
        "| dense |  | 5.00 | 6.00 |",
        "| wanda | 50% | 7.00 | **8.00** |",
        "| cvr | 50% | **6.50** | failed |",
        "| wanda | 2:4 | **9.00** |  |",
        "| cvr | 2:4 | 9.25 | **1235** |",
    ]


def test_what_reads_the_same_is_bold_alike_and_what_is_not_a_number_never():
    results = [measured("a", "50%", 5.001), measured("b", "50%", 5.004), measured("c", "50%", math.nan)]
    assert lines("perplexity", results)[2:] == ["| a | 50% | **5.00** |", "| b | 50% | **5.00** |", "| c | 50% | nan |"]


def test_published_numbers_stand_beside_ours_with_the_notes_that_occur():
    results = [
        measured("dense", "", 6.85, "Qwen2.5-7B"),
        measured("wanda", "2:4", 15.01, "Qwen2.5-7B"),
        measured("cvr+energy", "2:4", 9.5, "Qwen2.5-7B"),
        failed("magnitude", "2:4", "Qwen2.5-7B"),
        measured("ria", "2:4", 14.0, "Qwen2.5-7B"),
    ]
    found = lines("perplexity", results)
    assert found[2:8] == [
        "| dense |  | 6.85 (paper 6.85) |",
        "| wanda | 2:4 | 15.01 (paper 61.50)¹ |",
        "| cvr+energy | 2:4 | **9.50** (paper 9.67)² |",
        "| magnitude | 2:4 | failed (paper 4119) |",
        "| ria | 2:4 | 14.00 |",
        "",
    ]
    assert found[8].startswith("paper: Table 1, section 4.2 of Efficient Post-Training Pruning")
    assert found[10].startswith("¹ The Wanda baselines of Qwen2.5")
    assert found[12].startswith("² The paper does not state the settings")
    assert len(found) == 13


def test_a_number_with_two_known_errors_has_two_marks():
    found = lines("perplexity", [measured("magnitude", "2:4", 8.33, LLAMA)])
    assert found[2] == "| magnitude | 2:4 | **8.33** (paper 18.17)¹ ² |"


@pytest.mark.parametrize(
    "experiment", ["perplexity", "zero-shot", "runtime", "sparsity", "calibration", "ablation", "correction", "frontier"]
)
def test_without_published_numbers_there_is_no_word_of_the_paper(experiment):
    values = {"perplexity": 5.0, "average": 0.5, "statistics": 1.0, "pruning": 1.0, "total": 2.0}
    results = [Result("any", "tiny", label, "50%", 128, 0, values=values) for label in ("wanda", "sparsegpt")]
    assert "paper" not in markdown(experiment, results, PUBLISHED)


def test_zero_shot_is_in_percent_with_a_table_of_tasks_for_each_model():
    def scored(label, pattern, boolq, arc, model="tiny"):
        values = {"boolq accuracy": boolq, "arc_easy accuracy": arc, "average": (boolq + arc) / 2}
        return Result("zero-shot", model, label, pattern, values=values)

    results = [
        scored("dense", "", 0.8, 0.7),
        scored("wanda", "50%", 0.5, 0.75),
        scored("cvr", "50%", 0.6, 0.6),
        failed("cvr", "2:4", measure="zero-shot"),
        Result("zero-shot", "other", "cvr", "50%", values={"rte accuracy": 0.5, "average": 0.5}),
    ]
    assert lines("zero-shot", results) == [
        "| method | sparsity | tiny | other |",
        "|---|---|---:|---:|",
        "| dense |  | 75.00 |  |",
        "| wanda | 50% | **62.50** |  |",
        "| cvr | 50% | 60.00 | **50.00** |",
        "| cvr | 2:4 | failed |  |",
        "",
        "**tiny**",
        "",
        "| method | sparsity | boolq accuracy | arc_easy accuracy | average |",
        "|---|---|---:|---:|---:|",
        "| dense |  | 80.00 | 70.00 | 75.00 |",
        "| wanda | 50% | 50.00 | **75.00** | **62.50** |",
        "| cvr | 50% | **60.00** | 60.00 | 60.00 |",
        "| cvr | 2:4 | failed | failed | failed |",
        "",
        "**other**",
        "",
        "| method | sparsity | rte accuracy | average |",
        "|---|---|---:|---:|",
        "| cvr | 50% | **50.00** | **50.00** |",
    ]


def test_accuracies_have_the_standard_error_of_their_questions():
    def scored(label, accuracy, seed):
        values = {"next-line acc_norm": accuracy, "average": accuracy}
        errors = {f"{name} standard error": 0.01 for name in values}
        return Result("zero-shot", "tiny", label, "50%", 128, seed, values={**values, **errors})

    found = lines("zero-shot", [scored("wanda", 0.6, 0), scored("wanda", 0.62, 1), scored("cvr", 0.65, 0)])
    assert found == [
        "| method | sparsity | tiny |",
        "|---|---|---:|",
        "| wanda | 50% | 61.00 ± 1.00 |",
        "| cvr | 50% | **65.00 ± 1.00** |",
        "",
        "Accuracies in % ± one standard error over the questions.",
        "",
        "**tiny**",
        "",
        "| method | sparsity | next-line acc_norm | average |",
        "|---|---|---:|---:|",
        "| wanda | 50% | 61.00 ± 1.00 | 61.00 ± 1.00 |",
        "| cvr | 50% | **65.00 ± 1.00** | **65.00 ± 1.00** |",
    ]


def test_published_accuracy_is_not_scaled_again():
    result = Result("zero-shot", "Qwen2.5-32B", "wanda", "50%", values={"average": 0.7})
    assert lines("zero-shot", [result])[2] == "| wanda | 50% | **70.00** (paper 70.99)¹ |"


def test_runtime_says_how_much_faster_than_sparsegpt():
    mib = 2**20
    results = [
        timed("magnitude", 0.0, 0.0125),
        timed("wanda", 0.2, 0.05, peak_memory=12 * mib),
        timed("sparsegpt", 0.25, 0.75, peak_memory=1500 * mib),
        failed("cvr", "50%", measure="runtime"),
    ]
    assert lines("runtime", results) == [
        "**tiny, 50%**",
        "",
        "| method | statistics [ms] | pruning [ms] | total [s] | speed over sparsegpt | peak memory [MiB] |",
        "|---|---:|---:|---:|---:|---:|",
        "| magnitude | 0 | 12.5 | 0.0125 | 80.00x |  |",
        "| wanda | 200 | 50.0 | 0.250 | 4.00x | 12.0 |",
        "| sparsegpt | 250 | 750 | 1.00 | 1.00x | 1500 |",
        "| cvr | failed | failed | failed |  |  |",
    ]


def test_runtime_has_a_table_for_each_model_and_pattern_and_no_ratio_without_sparsegpt():
    results = [timed("wanda", 1.0, 0.5), timed("wanda", 1.0, 0.5, pattern="2:4"), timed("wanda", 1.0, 0.5, model="other")]
    found = lines("runtime", results)
    assert [line for line in found if line.startswith("**")] == ["**tiny, 50%**", "**tiny, 2:4**", "**other, 50%**"]
    assert found.count("| wanda | 1.00 | 500 | 1.50 |  |  |") == 3


def test_published_runtime_is_in_the_unit_of_its_column():
    slow = lines("runtime", [timed("wanda", 4.0, 1.0, LLAMA), timed("sparsegpt", 5.0, 25.0, LLAMA)])
    assert "| 5.00 (paper 4.92)¹ | 6.00x (paper 6.31x)¹ |" in slow[4]
    assert "| 30.0 (paper 31.07)¹ | 1.00x (paper 1.00x)¹ |" in slow[5]
    assert "| 5.00 (paper 4920)¹ |" in lines("runtime", [timed("wanda", 0.004, 0.001, LLAMA)])[4]


def test_sparsity_has_its_patterns_in_order_and_dense_in_the_head():
    results = [
        measured("wanda", "70%", 30.0, LLAMA),
        measured("wanda", "2:4", 7.0, LLAMA),
        measured("wanda", "10%", 4.5, LLAMA),
        measured("cvr", "10%", 4.25, LLAMA),
        measured("cvr", "70%", 40.0, LLAMA),
        measured("dense", "", 4.0, LLAMA),
        measured("cvr", "10%", 4.25, "tiny"),
    ]
    found = lines("sparsity", results)
    assert found[:6] == [
        f"**{LLAMA}**",
        "",
        "| perplexity (dense 4.00) | 10% | 2:4 | 70% |",
        "|---|---:|---:|---:|",
        "| wanda | 4.50 (paper 4.60)¹ | **7.00** | **30.00** (paper 45.77)¹ |",
        "| cvr | **4.25** |  | 40.00 |",
    ]
    assert found[7:12] == ["**tiny**", "", "| perplexity | 10% |", "|---|---:|", "| cvr | **4.25** |"]


def test_calibration_has_the_mean_and_sample_standard_deviation_over_seeds():
    results = [
        measured("dense", "", 4.0),
        *(measured("wanda", "50%", value, samples=16, seed=seed) for seed, value in enumerate([6.0, 7.0, 8.0])),
        *(measured("wanda", "50%", value, samples=4, seed=seed) for seed, value in enumerate([8.0, 10.0])),
        failed("wanda", "50%", samples=4, seed=2),
        measured("cvr", "50%", 7.5, samples=4),
        failed("cvr", "50%", samples=16),
    ]
    assert lines("calibration", results) == [
        "**tiny, 50%, by number of calibration sequences**",
        "",
        "| perplexity (dense 4.00), mean ± standard deviation over 1 to 3 seeds | 4 | 16 |",
        "|---|---:|---:|",
        "| wanda | 9.00 ± 1.41 (1 failed) | **7.00 ± 1.00** |",
        "| cvr | **7.50** | failed |",
    ]


@pytest.mark.parametrize(("num_seeds", "words"), [(1, ", 1 seed |"), (3, ", mean ± standard deviation over 3 seeds |")])
def test_calibration_says_how_many_seeds(num_seeds, words):
    results = [measured("wanda", "50%", 5.0 + seed, seed=seed) for seed in range(num_seeds)]
    assert lines("calibration", results)[2] == f"| perplexity{words} 128 |"


def test_ablation_has_a_column_for_each_model_and_pattern():
    results = [
        measured("dense", "", 4.0, "a"),
        measured("wanda", "50%", 5.5, "a"),
        measured("wanda", "2:4", 7.0, "a"),
        measured("cvr+energy:column", "50%", 5.25, "a"),
        measured("cvr+energy:column", "50%", 5.33, LLAMA),
        measured("one|shot", "2:4", 6.0, "a"),
    ]
    assert lines("ablation", results)[:6] == [
        f"| method | a 50% | a 2:4 | {LLAMA} 50% |",
        "|---|---:|---:|---:|",
        "| dense | 4.00 | 4.00 |  |",
        "| wanda | 5.50 | 7.00 |  |",
        "| cvr+energy:column | **5.25** |  | **5.33** (paper 5.33)¹ ² |",
        r"| one\|shot |  | **6.00** |  |",
    ]


@pytest.mark.parametrize("experiment", ["frontier", "correction"])
def test_the_frontier_has_what_each_method_loses_and_takes_beside_sparsegpt(experiment):
    def cell(label, pattern, perplexity, divergence, seconds, seed=0, peak_memory=None):
        values = {
            "perplexity": perplexity, "divergence": divergence, "loss": math.log(perplexity / 10), "loss standard error": 0.01,
            "pruning seconds": seconds,
        }  # fmt: skip
        return Result("perplexity", "tiny", label, pattern, 128, seed, values=values, peak_memory=peak_memory)

    results = [
        measured("dense", "", 10.0),
        cell("sparsegpt", "2:4", 14.0, 0.4, 4.0),
        cell("best", "2:4", 11.0, 0.05, 16.0, peak_memory=3 * 2**20),
        *(cell("sparsegpt", "70%", 12.0 + 2 * seed, 0.2, 4.0, seed) for seed in (0, 1)),
        *(cell("best", "70%", 11.0 + seed, 0.1, 2.0 + 2 * seed, seed) for seed in (0, 1, 2)),
        failed("wanda", "70%"),
        replace(cell("magnitude", "70%", 16.0, 0.6, 0.04), samples=None, seed=None),
    ]
    results[2] = replace(results[2], chosen="ria (walk)")
    # Seed 2 of `best` counts for its perplexity, and not for its share, as SparseGPT was not run with it: (1 + 2) / (2 + 4).
    # What needs no calibration stands beside both of SparseGPT's: 12 / 6.
    assert lines(experiment, results) == [
        "**tiny**",
        "",
        "| perplexity (dense 10.00) | 70% | 2:4 |",
        "|---|---:|---:|",
        "| sparsegpt | 13.00 ± 1.41 | 14.00 |",
        "| best | **12.00 ± 1.00** | **11.00** |",
        "| wanda | failed |  |",
        "| magnitude | 16.00 |  |",
        "",
        "Kullback-Leibler divergence from the dense model's predictions, in nats per token:",
        "",
        "| method | 70% | 2:4 |",
        "|---|---:|---:|",
        "| sparsegpt | 0.200 ± 0 | 0.400 |",
        "| best | **0.100 ± 0** | **0.0500** |",
        "| wanda | failed |  |",
        "| magnitude | 0.600 |  |",
        "",
        "How much less likely the text is than to the dense model, in nats per token ± one standard error over its windows:",
        "",
        "| method | 70% | 2:4 |",
        "|---|---:|---:|",
        "| sparsegpt | 0.259 ± 0.0100 | 0.336 ± 0.0100 |",
        "| best | 0.180 ± 0.0100 | 0.0953 ± 0.0100 |",
        "| wanda | failed |  |",
        "| magnitude | 0.470 ± 0.0100 |  |",
        "",
        "Share of what sparsegpt loses, by perplexity / by divergence, in so much of its time:",
        "",
        "| method | 70% | 2:4 |",
        "|---|---:|---:|",
        "| sparsegpt | 1.00 / 1.00 in 1.00x | 1.00 / 1.00 in 1.00x |",
        "| best | **0.50** / 0.50 in 0.75x | **0.25** / 0.12 in 4.00x |",
        "| magnitude | 2.00 / 3.00 in 0.01x |  |",
        "",
        "Memory beyond what was held before, at most [MiB]:",
        "",
        "| method | 70% | 2:4 |",
        "|---|---:|---:|",
        "| best |  | 3.00 |",
        "",
        "What auto chose: 2:4, seed 0: ria (walk).",
    ]


def test_the_papers_tables_are_followed_by_what_is_known_beside_the_perplexity():
    values = {"perplexity": 6.0, "divergence": 0.25}
    results = [measured("dense", "", 5.0), replace(measured("wanda", "50%", 6.0), values=values)]
    expected = [
        "Kullback-Leibler divergence from the dense model's predictions, in nats per token:",
        "",
        "| method | 50% |",
        "|---|---:|",
        "| wanda | **0.250** |",
    ]
    for experiment in ("perplexity", "ablation"):
        assert lines(experiment, results)[-7:] == ["**tiny**", "", *expected]
    assert lines("sparsity", results)[-5:] == expected
    expected[2], expected[4] = "| method | 128 |", "| wanda | **0.250** |"
    assert lines("calibration", results)[-5:] == expected


def test_a_share_of_nothing_is_none():
    lost = {"sparsegpt": 5.0, "wanda": 6.0}
    results = [measured("dense", "", 5.0), *(measured(label, "50%", value) for label, value in lost.items())]
    assert not any("Share" in line for line in lines("frontier", results))
    assert not any("Share" in line for line in lines("frontier", results[1:]))  # and none without the dense model


MEASURES = {"correction": "perplexity", "frontier": "perplexity"}
RESULTS = Path(__file__).parents[1] / "configs" / "paper" / "results"


@pytest.mark.parametrize("path", [RESULTS / "runtime.md", *sorted(RESULTS.glob("*/*/*.md"))], ids=lambda path: path.parent.name)
def test_the_tables_that_we_show_come_from_the_results_beside_them(path):
    cells = path.with_name("cells.jsonl")
    head = json.loads(cells.read_text(encoding="utf-8").partition("\n")[0])
    results = ResultsFile(cells, head["protocol"], head["versions"]).results()
    shown = [result for result in results if result.measure == MEASURES.get(path.stem, path.stem)]
    assert markdown(path.stem, shown, PUBLISHED) + "\n" == path.read_text(encoding="utf-8")


def test_an_unknown_experiment_is_refused_with_the_nearest():
    with pytest.raises(ExperimentError, match=r"'sparsety'.*Did you mean 'sparsity'"):
        markdown("sparsety", [], PUBLISHED)


def test_csv_has_a_row_for_each_metric(tmp_path):
    results = [
        Result("perplexity", "tiny", "dense", values={"perplexity": 4.0}, seconds=1.5),
        Result(
            "runtime",
            "tiny",
            'odd, "label"',
            "2:4",
            8,
            1,
            recipe={"schedule": "walk"},
            values={"statistics": 0.1, "total": 0.3},
            seconds=2.0,
            peak_memory=1024,
        ),
        failed("cvr", "50%"),
    ]
    write_csv(results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == COLUMNS
    assert rows == [
        ["perplexity", "tiny", "dense", "", "", "", "", "perplexity", "4.0", "1.5", "", "", ""],
        ["runtime", "tiny", 'odd, "label"', "2:4", "walk", "8", "1", "statistics", "0.1", "2.0", "1024", "", ""],
        ["runtime", "tiny", 'odd, "label"', "2:4", "walk", "8", "1", "total", "0.3", "2.0", "1024", "", ""],
        ["perplexity", "tiny", "cvr", "50%", "", "128", "0", "", "", "0.0", "", "", "out of memory"],
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"), [("50%", 0.5), ("62.5%", 0.625), ("50%:rank_over=layer", 0.5), ("2:4", 0.5), ("1:4", 0.75)]
)
def test_sparsity_of_a_pattern(pattern, expected):
    assert sparsity(pattern) == expected


def test_sparsity_of_a_name_that_does_not_say_it():
    assert math.isnan(sparsity("mine"))


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (two_decimals, 5.128, "5.13"),
        (two_decimals, 999.99, "999.99"),
        (two_decimals, 4119.33, "4119"),
        (two_decimals, math.inf, "inf"),
        (three_digits, 0.0, "0"),
        (three_digits, 0.01234, "0.0123"),
        (three_digits, 1.234, "1.23"),
        (three_digits, 123.4, "123"),
        (three_digits, 12345.6, "12346"),
        (ratio, 5.8, "5.80x"),
        (ratio, 274.7, "275x"),
        (superscript, 10, "¹⁰"),
    ],
)
def test_numbers_as_they_are_shown(show, value, text):
    assert show(value) == text
