"""The walk on a trained model, against the numbers that an independent block-sequential prototype gave on the same tokens."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import statprune
from statprune import Recipe
from statprune.batches import bind_batches
from statprune.checkpoint import load_model
from statprune.cli import main
from statprune.perplexity import evaluate
from statprune.selection import select
from statprune.tracing import trace
from statprune.transform import apply_
from statprune.walk import walk

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


def test_the_dense_model_has_the_perplexity_that_is_known(model, tokens):
    assert evaluate(model, tokens["evaluation"], batch_size=4) == pytest.approx(24.229, abs=2e-3)


@pytest.mark.parametrize(("method", "pattern"), PROTOTYPE)
def test_pruned_perplexity_is_the_prototypes_within_a_few_hundredths(model, tokens, method, pattern):
    twin = statprune.plan(model, tokens["calibration"].split(4), Recipe.parse(method, pattern=pattern))
    perplexity = evaluate(
        model, tokens["evaluation"], batch_size=4,
        forward=lambda batch: functional_call(model, twin.weights, (batch,)).logits,
    )  # fmt: skip
    assert twin.report.schedule == "walk"
    assert perplexity == pytest.approx(PROTOTYPE[method, pattern], abs=A_FEW_HUNDREDTHS)


def test_statistics_taken_block_by_block_give_the_perplexity_that_a_peer_measured(model, tokens):
    """llm-compressor 0.14: Wanda, 50 %, on the same tokens, each block pruned with the statistics of its dense self: 25.213."""
    pruned = copy.deepcopy(model)
    inputs = bind_batches(pruned, tokens["calibration"].split(4))
    traced, recipe = trace(pruned, inputs[0]), Recipe.parse("wanda", pattern="50%")
    pruner = recipe.pruner()

    def prune_group(group, moments):
        for site in group.sites:
            apply_(pruned, site, pruner(site.view(pruned.get_parameter(site.parameter).detach()), moments))

    groups = select(traced.groups, traced.left_out, recipe).groups
    for block in range(pruned.config.num_hidden_layers):
        own = [group for group in groups if f".layers.{block}." in group.name]
        walk(traced, own, inputs, prune_group, schedule="one-shot")
    assert evaluate(pruned, tokens["evaluation"], batch_size=4) == pytest.approx(25.213, abs=2e-3)


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
