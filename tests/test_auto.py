import json

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

import statprune
import statprune.data
from statprune import CausalLM, Recipe, Search, StatisticalPruning
from statprune.checkpoint import verify
from statprune.commands.cli import main
from statprune.errors import ExperimentError, ModelError
from statprune.experiments.compare import compare
from statprune.experiments.definition import Experiment
from statprune.loading import load_tokenizer
from statprune.training.modules import WindowDataset
from statprune.tuning.candidates import BASELINES
from statprune.tuning.search import SearchRun
from tiny_models import changed, classifier, llama, refused, snapshot, tokens

BASELINE_NAMES = [keys["method"] for keys in BASELINES]

pytestmark = pytest.mark.usefixtures("few")


@pytest.fixture
def few(monkeypatch):
    """Two methods, and a variation of one of them."""
    monkeypatch.setattr("statprune.tuning.search.KNOWN_GOOD", ({"method": "default"},))
    monkeypatch.setattr("statprune.tuning.search.METHODS", ("cvr+least-squares", "wanda+energy"))
    monkeypatch.setattr("statprune.tuning.candidates.VARIATIONS", {"cvr": {"alpha": (1.0,)}})


@pytest.fixture
def searches(monkeypatch):
    """One entry for each time that something is tuned."""
    run, made = SearchRun.run, []
    monkeypatch.setattr(SearchRun, "run", lambda self: made.append(self) or run(self))
    return made


def windows(number=8):
    torch.manual_seed(1)
    return tokens(number, 12)


def test_what_unstructured_weights_compete_in_is_for_the_chosen_method_unless_it_is_given():
    tuned = statprune.tune(llama(), windows(4).split(2), pattern="50%", minutes=1e-6)
    ranked = {trial.recipe.method: trial.recipe.build_pattern().rank_over for trial in tuned.trials}
    assert ranked == {Recipe(name).method: "layer" if name == "sparsegpt" else "row" for name in BASELINE_NAMES}


def test_prune_chooses_and_then_prunes_with_all_batches_and_the_report_says_so(searches):
    model, batches = llama(), windows().split(2)
    report = statprune.prune(model, iter(batches), "auto:minutes=1", pattern="2:4")
    assert len(searches) == 1
    chosen = Recipe.from_dict(report.recipe)
    assert report.num_batches == 4
    assert report.chosen_by["search"] == Search(minutes=1).to_dict()
    assert f"{chosen.method}, {chosen.schedule}" in report.chosen_by["finalists"]
    assert min(report.chosen_by["finalists"].values()) == report.chosen_by["perplexity"]
    assert report.seconds["tune"] > 0
    other = llama()
    assert statprune.prune(other, batches, chosen).chosen_by is None
    assert changed(model, snapshot(other)) == set()


def test_plan_chooses_and_leaves_the_model_alone():
    model, batches = llama(), windows().split(2)
    before = snapshot(model)
    twin = statprune.plan(model, iter(batches), Search("50%", 1))
    assert changed(model, before) == set()
    again = statprune.plan(model, batches, Recipe.from_dict(twin.report.recipe), traced=twin.traced)
    assert all(torch.equal(weight, again.weights[name]) for name, weight in twin.weights.items())


def test_a_model_without_a_perplexity_is_refused():
    with refused(model := classifier(), ModelError, "not a causal language model"):
        statprune.prune(model, [torch.randn(4, 8)], "auto")


def test_compare_and_experiments_take_auto_as_a_method():
    cells = compare(llama(), windows(4), windows(4), methods=["wanda", "auto:minutes=1"], patterns=["2:4"], batch_size=2)
    assert [cell.method for cell in cells] == ["dense", "wanda", "auto:minutes=1"]
    assert Recipe.from_dict(cells[-1].recipe).pattern == "2:4"
    settings = {"model": ["tiny"], "methods": ["auto"], "patterns": ["2:4"], "samples": 4}
    (_, cell) = Experiment.load("perplexity", settings).cells()
    assert (cell.label, cell.samples) == ("auto", 4)
    with pytest.raises(ExperimentError, match="'auto' is yet to choose one"):
        Experiment.load("runtime", settings).cells()


def fit_trainer(*callbacks):
    return Trainer(
        accelerator="cpu", max_epochs=2, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def test_the_callback_chooses_once_and_keeps_the_choice(searches):
    data = DataLoader(WindowDataset(windows()), batch_size=2)
    pruning = StatisticalPruning(Search("2:4", 1), calibration=data)
    key, reports = pruning.state_key, []

    class Watch(statprune.training.callback.Callback):
        def on_validation_end(self, trainer, pl_module):
            reports.append(pruning.report)

    module = CausalLM(llama().train())
    fit_trainer(pruning, Watch()).fit(module, data, data)
    assert len(searches) == 1
    assert len(reports) == 2
    assert {report.recipe["schedule"] for report in [*reports, pruning.report]} == {pruning.report.recipe["schedule"]}
    assert reports[0].recipe == reports[1].recipe == pruning.report.recipe == pruning.landed["recipe"]
    assert pruning.report.chosen_by["search"] == pruning.recipe.to_dict()
    assert pruning.state_key == key
    assert pruning.report.sparsity == 0.5


def test_the_callback_chooses_in_validate_too(searches):
    data = DataLoader(WindowDataset(windows()), batch_size=2)
    module = CausalLM(llama())
    pruning = StatisticalPruning(Search("2:4", 1), calibration=data)
    fit_trainer(pruning).validate(module, data, verbose=False)
    assert len(searches) == 1
    assert pruning.report.chosen_by is not None
    assert not any(parameter.is_inference() for parameter in module.parameters())


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, " ".join(printed.out.split()), " ".join(printed.err.split())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question\n" * 40)
    return str(path)


SMALL = ("--seqlen", 16, "--samples", 8, "--batch-size", 2)


def test_the_command_tune_says_what_was_tried_and_its_recipe_prunes(capsys, tmp_path, tiny_model_folder, text):
    output = tmp_path / "tuned"
    options = ("--calibration", text, "--pattern", "2:4", "--minutes", 2, "--output", output, *SMALL)
    status, out, err = run(capsys, "tune", tiny_model_folder, *options)
    assert status == 0, err
    assert "what was tried" in out
    assert out.count(" * ") == 1
    assert "chosen (*): " in out
    assert f"statprune prune {tiny_model_folder} --recipe {output}/recipe.yaml --output" in out
    assert "held-out windows" in err
    status, out, err = run(capsys, "tune", tiny_model_folder, *options, "--json")
    data = json.loads(out)
    assert Recipe.from_dict(data["recipe"]) == Recipe.from_yaml(output / "recipe.yaml")
    assert {Recipe(name).method for name in BASELINE_NAMES} <= {trial["method"] for trial in data["trials"]}
    assert len(data["trials"]) == len((output / "trials.jsonl").read_text().splitlines()) - 2
    pruned = ("--recipe", output / "recipe.yaml", "--calibration", text, "--output", tmp_path / "sparse", *SMALL)
    assert run(capsys, "prune", tiny_model_folder, *pruned)[0] == 0
    assert verify(tmp_path / "sparse")["recipe"] == data["recipe"]
    status, _, err = run(capsys, "tune", tiny_model_folder, *options[:2], "--pattern", "50%", *options[4:])
    assert status == 1
    assert "holds results that do not compare with this run: pattern" in err


@pytest.mark.parametrize("command", ["tune", "prune", "compare"])
def test_the_commands_that_search_cut_the_text_before_they_draw(capsys, tmp_path, tiny_model_folder, monkeypatch, command):
    text, drawn = tmp_path / "text.txt", []
    text.write_text(" ".join(f"{number:05}" for number in range(1000)))
    draw = statprune.data.calibration_windows
    monkeypatch.setattr("statprune.data.calibration_windows", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    given = {
        "tune": ("--output", tmp_path / "out", "--minutes", 1e-6),
        "prune": ("--output", tmp_path / "out", "--method", "auto:minutes=0.000001"),
        "compare": ("--text", text, "--methods", "auto:minutes=0.000001", "--patterns", "2:4"),
    }[command]
    status, _, err = run(capsys, command, tiny_model_folder, "--calibration", text, *SMALL, *given)
    assert status == 0, err
    assert "overlap" not in err
    words = load_tokenizer(tiny_model_folder)
    (windows,) = drawn
    halves = [{word for one in half for word in words.decode(one).split()[1:-1]} for half in (windows[::2], windows[1::2])]
    assert halves[0]
    assert not halves[0] & halves[1]
    if command == "prune":
        assert "alternate blocks" in verify(tmp_path / "out")["protocol"]["places"]


def test_windows_that_cover_more_than_the_text_are_a_line(capsys, tmp_path, tiny_model_folder, text):
    options = ("--seqlen", 48, "--samples", 60, "--batch-size", 20, "--calibration", text, "--minutes", 1e-6)
    status, _, err = run(capsys, "tune", tiny_model_folder, "--output", tmp_path / "out", *options)
    assert status == 0, err
    assert "which 60 windows of 48 cover" in err
    assert "times on average: windows overlap" in err


@pytest.mark.parametrize("option", ["--criterion", "--method"])
def test_the_command_prune_takes_auto(capsys, tmp_path, tiny_model_folder, option):
    status, out, err = run(capsys, "prune", tiny_model_folder, option, "auto:minutes=1", "--output", tmp_path / "out", *SMALL)
    assert status == 0, err
    assert "auto:minutes=1 at 2:4" in out
    assert "chosen by auto:" in out
    assert "candidates tried out on the calibration windows" in out
    record = verify(tmp_path / "out")
    assert "auto" not in record["recipe"]["method"]
    assert record["chosen_by"]["search"] == Search(minutes=1).to_dict()
    assert record["protocol"]["calibration"] == ["generated"]


def test_the_command_refuses_what_cannot_be_tuned(capsys, tmp_path, tiny_model_folder, text):
    options = ("--calibration", text, "--output", tmp_path / "tuned")
    for given, message in (
        (("--minutes", 0), "Search(minutes=0.0): expected a number"),
        (("--samples", 1, "--seqlen", 16), "a single window: expected at least 2"),
        (("--pattern", "2:3", "--seqlen", 16), "does not divide its width of 16"),
        (("--seqlen", 1), "--seqlen 1: expected at least 2"),
        (("--seed", 2**64), f"--seed {2**64}: expected at most"),
        (("--samples", 10**20), f"--samples {10**20}: expected at most"),
        (("--batch-size", 10**20), f"--batch-size {10**20}: expected at most"),
    ):
        status, _, err = run(capsys, "tune", tiny_model_folder, *options, *given)
        assert (status, message in err) == (1, True), err
    assert not (tmp_path / "tuned").exists()
