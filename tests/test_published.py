import dataclasses
from pathlib import Path

import pytest
import yaml

from statprune.errors import ResultsError
from statprune.experiments.published import Published

FILE = Path(__file__).parents[1] / "configs" / "paper" / "published.yaml"


@pytest.fixture(scope="module")
def published():
    return Published.load(FILE)


@pytest.mark.parametrize(
    ("experiment", "model", "method", "pattern", "expected"),
    [
        ("perplexity", "Llama-2-7b-hf", "dense", "", 5.12),
        ("perplexity", "Llama-2-7b-hf", "wanda", "50%", 6.41),
        ("perplexity", "Llama-2-70b-hf", "magnitude+energy", "4:8", 5.75),
        ("perplexity", "Meta-Llama-3-8B", "magnitude", "2:4", 3202.50),
        ("perplexity", "Meta-Llama-3-70B", "wanda+energy", "2:4", 54.02),
        ("perplexity", "Qwen2.5-14B", "wanda", "4:8", 19.79),
        ("perplexity", "Qwen2.5-72B", "cvr+energy", "2:4", 5.86),
        ("zero-shot", "Llama-2-13b-hf", "dense", "", 63.03),
        ("zero-shot", "Qwen2.5-32B", "wanda", "4:8", 70.60),
        ("zero-shot", "Meta-Llama-3-70B", "cvr+energy", "2:4", 59.53),
        ("runtime", "Llama-2-13b-hf", "sparsegpt", "50%", 31.07),
        ("speedup", "Llama-2-13b-hf", "magnitude", "2:4", 274.7),
        ("sparsity", "Llama-2-13b-hf", "wanda", "50%", 5.59),
        ("sparsity", "Llama-2-13b-hf", "cvr+energy", "70%", 10.52),
        ("ablation", "Llama-2-7b-hf", "cvr", "50%", 6.32),
        ("ablation", "Llama-2-13b-hf", "cvr+energy:column", "50%", 5.33),
    ],
)
def test_numbers_are_those_of_the_paper(published, experiment, model, method, pattern, expected):
    assert published.value(experiment, model, method, pattern) == expected


def test_every_cell_of_the_paper_is_there(published):
    counted = {experiment: sum(place[0] == experiment for place in published.values) for experiment in published.places}
    assert counted == {"perplexity": 144, "zero-shot": 144, "runtime": 4, "speedup": 4, "sparsity": 20, "ablation": 8}


@pytest.mark.parametrize("model", ["qwen2.5-7b", "Qwen/Qwen2.5-7B", "folder/QWEN2.5-7B/"])
def test_a_model_is_matched_by_its_last_part_in_upper_or_lower_case(published, model):
    assert published.value("perplexity", model, "dense", "") == 6.85


@pytest.mark.parametrize(
    ("experiment", "model", "method", "pattern"),
    [
        ("perplexity", "pycode-llama", "dense", ""),
        ("perplexity", "Qwen2.5-7B-Instruct", "dense", ""),
        ("perplexity", "Qwen2.5-7B", "ria", "50%"),
        ("perplexity", "Qwen2.5-7B", "wanda", "70%"),
        ("calibration", "Llama-2-13b-hf", "wanda", "50%"),
    ],
)
def test_what_was_not_published_has_neither_value_nor_note(published, experiment, model, method, pattern):
    assert published.value(experiment, model, method, pattern) is None
    assert published.notes(experiment, model, method, pattern) == ()


def test_known_errors_stay_with_their_cells(published):
    copied = " ".join(published.notes("perplexity", "Llama-2-7b-hf", "magnitude", "2:4"))
    assert "DenoiseRotator" in copied
    assert "4096" in copied
    assert "DenoiseRotator" not in " ".join(published.notes("perplexity", "Llama-2-7b-hf", "magnitude", "4:8"))
    assert published.notes("perplexity", "Meta-Llama-3-8B", "magnitude", "2:4") == ()
    assert "15.01" in " ".join(published.notes("perplexity", "Qwen2.5-7B", "wanda", "2:4"))
    assert "54.02" in " ".join(published.notes("perplexity", "Meta-Llama-3-70B", "wanda+energy", "50%"))
    assert "5.59 in table 4" in " ".join(published.notes("ablation", "Llama-2-13b-hf", "wanda", "50%"))
    assert "task suites" in " ".join(published.notes("zero-shot", "Qwen2.5-7B", "wanda", "50%"))
    assert "alpha" in " ".join(published.notes("zero-shot", "Qwen2.5-7B", "cvr+energy", "50%"))


def test_every_known_error_concerns_a_published_number(published):
    for error in published.known_errors:
        assert any(error.concerns(*place) for place in published.values), error.note
        named = (error.experiments, error.models, error.methods, error.patterns)
        for names, known in zip(named, zip(*published.values, strict=True), strict=True):
            assert names <= set(known)


def test_it_is_frozen(published):
    with pytest.raises(dataclasses.FrozenInstanceError):
        published.source = "another"


def test_the_file_comes_with_the_package(published):
    assert Published.load() == published


@pytest.mark.parametrize("text", ["", "- 1", "source: x", "{", "source: x\nmodels: {}\ntables: {a: {}}\nknown_errors: []"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(ResultsError, match=r"(?s)other\.yaml.*Expected a YAML file with source"):
        Published.load(tmp_path / "other.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"none\.yaml"):
        Published.load(tmp_path / "none.yaml")


def test_a_row_with_a_value_too_few_is_refused(tmp_path):
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    data["tables"]["ablation"]["rows"][0].pop()
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ResultsError, match="shorter"):
        Published.load(tmp_path / "short.yaml")
