"""Pruning a trained model, against the numbers that others gave on the same tokens: a prototype, and a peer."""

import json

import pytest
import torch
from safetensors.torch import load_file

import statprune
from statprune import Recipe
from statprune.commands.cli import main
from statprune.loading import load_model
from statprune.model.inputs import bind_batches
from statprune.model.trace import trace
from statprune.perplexity import evaluate

pytestmark = pytest.mark.slow
PROTOTYPE = {
    ("wanda", "50%"): 25.21,
    ("cvr+energy", "50%"): 24.90,
    ("cvr+energy", "2:4"): 26.09,
}
A_FEW_HUNDREDTHS = 0.05


@pytest.fixture(scope="module")
def model(shared):
    return load_model(str(shared / "models" / "pycode-llama"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens(shared):
    return load_file(shared / "data" / "pycode" / "prototype_tokens.safetensors")


@pytest.fixture(scope="module")
def traced(model, tokens):
    inputs = bind_batches(model, tokens["calibration"].split(4))
    return trace(model, inputs[0], batches=inputs)


def test_the_dense_model_has_the_perplexity_that_is_known(model, tokens):
    assert evaluate(model, tokens["evaluation"], batch_size=4) == pytest.approx(24.229, abs=2e-3)


@pytest.mark.parametrize(("method", "pattern"), PROTOTYPE)
def test_pruned_perplexity_is_the_prototypes_within_a_few_hundredths(model, tokens, traced, method, pattern):
    twin = statprune.plan(model, tokens["calibration"].split(4), Recipe(method, pattern=pattern), traced=traced)
    perplexity = evaluate(model, tokens["evaluation"], batch_size=4, weights=twin.weights)
    assert twin.report.schedule == "walk"
    assert perplexity == pytest.approx(PROTOTYPE[method, pattern], abs=A_FEW_HUNDREDTHS)


PEER = {
    ("wanda", "50%"): (25.213, 0.01),
    ("wanda", "2:4"): (27.035, 0.01),
    ("sparsegpt", "50%"): (24.558, 0.05),
    ("sparsegpt", "2:4"): (25.196, 0.05),
}
"""llm-compressor 0.14 on the same tokens, and how near we must come."""


@pytest.mark.parametrize(("method", "pattern"), PEER)
def test_block_by_block_pruned_perplexity_is_the_peers(model, tokens, traced, method, pattern):
    recipe = Recipe(method, pattern=pattern, schedule="block")
    perplexities = []
    # SparseGPT's choices hang on rounding: the order in which the Gram is added up alone moves its perplexity by 0.03, so
    # two equally good orders are averaged. Wanda's moves in the fourth decimal.
    for batch_size in (4, 8) if method == "sparsegpt" else (4,):
        graph = traced if batch_size == 4 else None
        twin = statprune.plan(model, tokens["calibration"].split(batch_size), recipe, traced=graph)
        assert twin.report.schedule == "block"
        perplexities.append(evaluate(model, tokens["evaluation"], batch_size=4, weights=twin.weights))
    expected, tolerance = PEER[method, pattern]
    assert sum(perplexities) / len(perplexities) == pytest.approx(expected, abs=tolerance)


def test_the_command_compresses_the_model_from_disk_to_disk(shared, tmp_path, capsys):
    text = shared / "data" / "pycode" / "calibration.txt"
    model = str(shared / "models" / "pycode-llama")
    options = ["--pattern", "2:4", "--calibration", str(text), "--samples", "4", "--seqlen", "128", "--dtype", "float32"]
    assert main(["prune", model, "--output", str(tmp_path / "sparse"), *options]) == 0
    assert main(["verify", str(tmp_path / "sparse")]) == 0
    record = json.loads((tmp_path / "sparse" / "pruning.json").read_text())
    assert record["sparsity"] == 0.5
    assert len(record["sites"]) == 56
    assert record["schedule"] == "walk"
