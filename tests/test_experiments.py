"""Experiments from their YAML to tables: grids, resuming, failing cells, refused results, and the command itself."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from statprune import Recipe, Search, plan
from statprune.commands.cli import main
from statprune.data import calibration_windows, evaluation_windows
from statprune.divergence import evaluate_beside
from statprune.errors import ExperimentError, RecipeError, ResultsError, TracingError
from statprune.experiments import run as running
from statprune.experiments.compare import Cell, compare, markdown_table
from statprune.experiments.cost import measured, peak_of_tensors
from statprune.experiments.definition import NAMES, Experiment
from statprune.experiments.run import CELLS, run
from statprune.experiments.walk_cost import export, measure_walk
from statprune.loading import load_model, load_tokenizer
from statprune.model import layers
from statprune.perplexity import evaluate
from statprune.results import Result, ResultsFile, alone_in, digest
from statprune.tuning.candidates import BASELINES
from test_zero_shot import write_task

WORDS = "to be or not to be, that is the question; whether it is nobler in the mind to suffer\n"


@pytest.fixture
def exported(monkeypatch):
    """The exports that were made; for tests with the marker `real_export`."""
    made, trace = [], layers.trace
    monkeypatch.setattr(layers, "trace", lambda *arguments: made.append(arguments) or trace(*arguments))
    return made


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} {WORDS}" for number in range(60)))
    return str(path)


@pytest.fixture
def settings(tiny_model_folder, text):
    """An experiment that takes no time."""
    return {
        "model": [tiny_model_folder], "calibration": [text], "text": [text], "windows": 3, "samples": 2, "seqlen": 16,
        "batch_size": 2, "dtype": "float32", "methods": ["magnitude", "wanda"], "patterns": ["50%"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return load_model(tiny_model_folder, dtype=torch.float32)


@pytest.fixture
def windows():
    return torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))


def options(settings):
    """The same as options of the command."""
    words = []
    for key, value in settings.items():
        words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def lines(folder):
    return [json.loads(line) for line in (folder / CELLS).read_text().splitlines()[1:]]


class TestDefinition:
    @pytest.mark.parametrize("name", NAMES)
    def test_the_papers_settings_are_installed_and_valid(self, name):
        experiment = Experiment.load(name, {})
        assert all("/" in model for model in experiment.model)
        assert (experiment.calibration, experiment.text, experiment.schedule) == (["c4"], ["wikitext2"], "block")
        assert experiment.cells()

    def test_table_one_has_every_method_at_every_pattern_and_the_dense_model_once(self):
        experiment = Experiment.load("perplexity", {})
        cells = experiment.cells()
        assert [cell.label for cell in cells].count("dense") == 1
        assert {cell.pattern for cell in cells} == {"", "50%", "4:8", "2:4"}
        assert len(cells) == 1 + 3 * len(experiment.methods)
        methods = {
            "magnitude",
            "wanda",
            "sparsegpt",
            "cvr",
            "magnitude+energy",
            "wanda+energy",
            "sparsegpt+energy",
            "cvr+energy",
        }
        assert methods | {"ria", "z-pruner"} <= set(experiment.methods)

    def test_calibration_is_a_grid_of_sizes_and_seeds_for_what_is_calibrated(self):
        given = {"sizes": [1, 4], "seeds": [0, 1, 2], "methods": ["magnitude", "wanda"]}
        cells = Experiment.load("calibration", given).cells()
        assert [(c.label, c.samples, c.seed) for c in cells if c.samples is None] == [
            ("dense", None, None),
            ("magnitude", None, None),
        ]
        assert {(c.samples, c.seed) for c in cells if c.label == "wanda"} == {(n, s) for n in (1, 4) for s in (0, 1, 2)}

    def test_what_measures_the_dense_model_first_is_calibrated(self):
        given = {"methods": ["magnitude", {"method": "magnitude", "allocation": "owl"}, "auto"], "patterns": ["50%"]}
        cells = Experiment.load("perplexity", given).cells()
        assert [(cell.label, cell.samples) for cell in cells[1:]] == [
            ("magnitude", None),
            ("magnitude (owl)", 128),
            ("auto", 128),
        ]

    def test_what_makes_up_for_layers_before_it_is_calibrated(self):
        given = {"methods": [{"method": "magnitude", "target": "dense"}], "patterns": ["50%"]}
        (_, cell) = Experiment.load("perplexity", given).cells()
        assert (cell.label, cell.samples) == ("magnitude (dense)", 128)

    def test_presets_keep_their_own_schedule_and_their_names(self):
        given = {"methods": ["best", "paper", {"method": "paper", "schedule": "block"}, "wanda"], "patterns": ["50%"]}
        cells = Experiment.load("perplexity", given).cells()[1:]
        assert [cell.label for cell in cells] == ["best", "paper", "paper", "wanda"]
        assert [cell.how for cell in cells] == [
            Recipe("best", "50%"), Recipe("cvr+energy", "50%", "walk"), Recipe("cvr+energy", "50%", "block"),
            Recipe("wanda", "50%", "block"),
        ]  # fmt: skip

    def test_two_ways_to_write_a_pattern_are_one_cell(self):
        cells = Experiment.load("perplexity", {"methods": ["wanda"], "patterns": ["50.0 %", "50%"]}).cells()
        assert [cell.pattern for cell in cells] == ["", "50%"]

    def test_the_steps_of_table_five_are_these_recipes(self):
        recipes = {cell.label: cell.how for cell in Experiment.load("ablation", {"patterns": ["50%"]}).cells()}
        assert recipes["cvr+energy:column"].compensation[0]["row"] is False
        assert recipes["alpha 0"].criterion["alpha"] == 0
        assert recipes["activation exponent 0.5"].criterion["exponent"] == 0.5
        assert recipes["schedule walk"].schedule == "walk"

    def test_the_methods_of_the_sweep_are_valid(self):
        sweep = yaml.safe_load((Path(__file__).parents[1] / "configs" / "sweep.yaml").read_text(encoding="utf-8"))
        given = {key: sweep[key] for key in ("methods", "patterns")}
        cells = Experiment.load("perplexity", given).cells()
        assert len({repr(cell.how) for cell in cells}) == 1 + len(sweep["methods"]) * len(sweep["patterns"])

    @pytest.mark.parametrize(
        ("name", "given", "error", "message"),
        [
            ("perplxity", {}, ExperimentError, "no experiment 'perplxity'. Did you mean 'perplexity'"),
            ("al", {}, ExperimentError, "Did you mean 'all'"),
            ("perplexity", {"method": ["wanda"]}, ExperimentError, "no key 'method'. Did you mean 'methods'"),
            ("perplexity", {"methods": ["wnda"]}, RecipeError, "Did you mean 'wanda'"),
            ("perplexity", {"methods": [{"label": "x", "pattern": "2:4"}]}, RecipeError, "expected `method`, or else"),
            ("perplexity", {"patterns": ["half"]}, RecipeError, "'50%' for half of the weights"),
            ("perplexity", {"sizes": [1]}, ExperimentError, "--sizes belongs to the experiment 'calibration'"),
            ("perplexity", {"samples": 0}, ExperimentError, "--samples 0: expected at least 1"),
            ("calibration", {"sizes": [4, 0]}, ExperimentError, "--sizes 0: expected at least 1"),
            (
                "runtime",
                {"methods": ["best"]},
                ExperimentError,
                "'best' needs the dense model beside it or gradients. Leave it out",
            ),
            ("runtime", {"methods": ["auto"]}, ExperimentError, "times a method, and 'auto' is yet to choose one"),
            ("zero-shot", {"tasks": []}, ExperimentError, "has no tasks: give --tasks"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_runs(self, name, given, error, message):
        with pytest.raises(error, match=message):
            Experiment.load(name, given)


class TestResultsFile:
    PROTOCOL, VERSIONS = {"seqlen": 16, "text": ["a.txt"]}, {"torch": "2.13"}

    def open(self, path, **changed):
        return ResultsFile(path, {**self.PROTOCOL, **changed}, self.VERSIONS)

    def test_what_was_added_is_there_when_it_is_opened_again(self, tmp_path):
        one = Result("perplexity", "m", "wanda", "50%", 2, 0, {"a": [1, 2]}, {"d": "x"}, {"perplexity": 0.1 + 0.2}, 1.5, 7)
        self.open(tmp_path / CELLS).add(one)
        assert self.open(tmp_path / CELLS).get(one.key) == one

    def test_a_label_is_only_a_name(self):
        one = Result("perplexity", "m", "wanda")
        assert dataclasses.replace(one, label="mine").key == one.key
        assert dataclasses.replace(one, seed=1).key != one.key

    def test_a_line_that_was_cut_off_is_no_cell_and_the_next_one_follows_cleanly(self, tmp_path):
        path, file = tmp_path / CELLS, self.open(tmp_path / CELLS)
        first, second = (Result("perplexity", "m", "x", seed=seed, values={"perplexity": 1.0}) for seed in (0, 1))
        file.add(first)
        file.add(second)
        path.write_bytes(path.read_bytes()[:-20])
        file = self.open(path)
        assert (file.get(first.key), file.get(second.key)) == (first, None)
        file.add(second)
        assert self.open(path).get(second.key) == second

    def test_a_head_that_was_cut_off_is_no_file(self, tmp_path):
        (tmp_path / CELLS).write_text('{"format": 1, "prot')
        assert self.open(tmp_path / CELLS).get("") is None

    def test_what_a_crash_of_the_machine_leaves_at_the_end_is_passed_over_with_a_word(self, tmp_path):
        path, file, said = tmp_path / CELLS, self.open(tmp_path / CELLS), []
        first, second = (Result("perplexity", "m", "x", seed=seed, values={"perplexity": 1.0}) for seed in (0, 1))
        file.add(first)
        whole = path.read_bytes()
        for tail in (b"\0" * 100, b'{"measure": "perp' + b"\0" * 50, b'{"measure": "perp\0\0\n', b"\0\n\0"):
            path.write_bytes(whole + tail)
            file = ResultsFile(path, self.PROTOCOL, self.VERSIONS, said.append)
            assert "broken off in writing, passed over" in said.pop()
            assert not said
            assert path.read_bytes() == whole
            file.add(second)
            assert self.open(path).results() == [first, second]

    def test_a_broken_line_in_the_middle_is_passed_over_with_a_word(self, tmp_path):
        path, file, said = tmp_path / CELLS, self.open(tmp_path / CELLS), []
        first, second, third = (Result("perplexity", "m", "x", seed=seed, values={"perplexity": 1.0}) for seed in (0, 1, 2))
        for one in (first, second, third):
            file.add(one)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], lines[1], lines[2][:30], lines[3], lines[3]]))
        file = ResultsFile(path, self.PROTOCOL, self.VERSIONS, said.append)
        assert "1 line broken off in writing" in said[0]
        assert file.results() == [first, third]

    @pytest.mark.parametrize("after", [0, 1])
    def test_a_write_that_fails_leaves_no_part_of_a_line(self, tmp_path, monkeypatch, after):
        path, file = tmp_path / CELLS, self.open(tmp_path / CELLS)
        cells = [Result("perplexity", "m", "x", seed=seed, values={"perplexity": 1.0}) for seed in range(after + 1)]
        for cell in cells[:after]:
            file.add(cell)
        before = path.read_bytes() if after else b""

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)  # when the bytes are in the file already
            with pytest.raises(ResultsError, match=r"cannot be written: .*No space left.*run again"):
                file.add(cells[-1])
        assert path.read_bytes() == before
        file.add(cells[-1])
        assert self.open(path).results() == cells

    def test_what_is_no_number_is_valid_json(self, tmp_path):
        values = {"perplexity": 2.0, "other": math.nan, "another": math.inf}
        one = Result("perplexity", "m", "x", values=values)
        self.open(tmp_path / CELLS).add(one)
        text = (tmp_path / CELLS).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        assert self.open(tmp_path / CELLS).get(one.key).values == {"perplexity": 2.0}

    def test_a_failed_cell_is_not_finished(self, tmp_path):
        failed = Result("perplexity", "m", "x", error="why")
        file = self.open(tmp_path / CELLS)
        file.add(failed)
        assert file.get(failed.key) is None
        file.add(dataclasses.replace(failed, error=None, values={"perplexity": 2.0}))
        assert self.open(tmp_path / CELLS).get(failed.key).values == {"perplexity": 2.0}

    def test_another_protocol_is_refused_and_says_what_differs(self, tmp_path):
        self.open(tmp_path / CELLS).add(Result("perplexity", "m", "x"))
        with pytest.raises(ResultsError, match=r"do not compare.*seqlen was 16 and is 32.*Choose another --output"):
            self.open(tmp_path / CELLS, seqlen=32)

    def test_another_version_is_refused(self, tmp_path):
        self.open(tmp_path / CELLS).add(Result("perplexity", "m", "x"))
        with pytest.raises(ResultsError, match=r"versions.torch was '2.13' and is '9'"):
            ResultsFile(tmp_path / CELLS, self.PROTOCOL, {"torch": "9"})

    @pytest.mark.parametrize(
        "content", ["not json\n", '{"a": 1}\n', '{"format": 1, "protocol": {}, "versions": {}}\n{"x": 1}\n']
    )
    def test_another_file_is_refused(self, tmp_path, content):
        (tmp_path / CELLS).write_text(content)
        with pytest.raises(ResultsError, match="is not a file of results"):
            self.open(tmp_path / CELLS)


HOLD = """
import sys
from statprune.results import alone_in
with alone_in(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestAloneIn:
    def test_a_second_run_is_told_who_is_at_work_and_a_killed_one_leaves_no_lock(self, tmp_path):
        folder = tmp_path / "a" / "b"
        command = [sys.executable, "-c", HOLD, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            told = rf"b: another run is at work there \(process {other.pid} on .*, since 20.*choose another --output"
            with pytest.raises(ResultsError, match=told), alone_in(folder):
                pytest.fail("two at once")
            other.kill()
        with alone_in(folder):
            assert folder.is_dir()
        assert list(folder.iterdir()) == []

    def test_a_folder_in_which_nothing_was_written_goes_again(self, tmp_path):
        with alone_in(tmp_path / "a" / "b"):
            pass
        with alone_in(tmp_path / "c"):
            (tmp_path / "c" / "result").write_text("1")
        assert [path.name for path in tmp_path.iterdir()] == ["c"]

    def test_a_folder_that_cannot_be_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ResultsError, match="cannot be written to"), alone_in(tmp_path / "file"):
            pytest.fail("in a file")

    def test_experiments_take_turns(self, tmp_path, settings):
        with alone_in(tmp_path / "out"), pytest.raises(ResultsError, match="another run is at work"):
            run([Experiment.load("perplexity", settings)], tmp_path / "out")


class TestDigest:
    FIRST = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int32)}  # noqa: RUF012

    def test_equal_tensors_have_equal_digests_however_they_lie_in_memory(self):
        both = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        again = {"a": both[:, 0], "b": torch.tensor([3], dtype=torch.int32)[0]}
        assert digest(again) == digest(self.FIRST)
        assert len(digest(self.FIRST)) == 16

    @pytest.mark.parametrize(
        "changed",
        [
            {"a": torch.tensor([1.0, 2.0])},
            {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor(3, dtype=torch.int32)},
            {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3, dtype=torch.int32)},
            {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int32).view(torch.float32)},
            {"a": torch.tensor([1.0, 2.0]), "c": torch.tensor(3, dtype=torch.int32)},
        ],
    )
    def test_names_values_shapes_and_dtypes_count(self, changed):
        assert digest(changed) != digest(self.FIRST)


class TestRun:
    def test_a_cell_holds_what_pruning_and_evaluating_by_hand_give(self, tmp_path, settings, text):
        run([Experiment.load("perplexity", settings)], tmp_path / "out")
        model = load_model(settings["model"][0], dtype=torch.float32)
        tokenizer = load_tokenizer(settings["model"][0])
        windows = calibration_windows([text], tokenizer=tokenizer, model=model, samples=2, seqlen=16, seed=0)
        held_out = evaluation_windows([text], tokenizer=tokenizer, model=model, seqlen=16)[:3]
        twin = plan(model, windows.split(2), Recipe("wanda", "50%", "block"))
        expected = evaluate(model, held_out, batch_size=2, weights=twin.weights)
        dense, magnitude, wanda = lines(tmp_path / "out")
        assert [cell["label"] for cell in (dense, magnitude, wanda)] == ["dense", "magnitude", "wanda"]
        assert dense["values"] == {"perplexity": evaluate(model, held_out, batch_size=2)}
        values = wanda["values"]
        assert values["perplexity"] == pytest.approx(expected, rel=1e-6)
        assert values["loss"] == pytest.approx(math.log(expected / dense["values"]["perplexity"]), abs=1e-6)
        beside = evaluate_beside(model, held_out, batch_size=2, weights=twin.weights)
        assert values["divergence"] == pytest.approx(beside.divergence, rel=1e-4)
        assert values["loss standard error"] == pytest.approx(beside.standard_error, rel=1e-4)
        assert (wanda["samples"], wanda["seed"], magnitude["samples"]) == (2, 0, None)
        assert wanda["recipe"] == Recipe("wanda", "50%", "block").to_dict()
        assert wanda["seconds"] > wanda["values"]["pruning seconds"] > 0
        head = json.loads((tmp_path / "out" / CELLS).read_text().splitlines()[0])
        assert head["protocol"]["seqlen"] == 16
        assert head["versions"]["torch"] == torch.__version__

    def test_tables_and_a_picture_are_written(self, tmp_path, settings):
        outcome = run([Experiment.load("sparsity", {**settings, "patterns": ["10%", "50%"]})], tmp_path / "out")
        assert outcome.failures == []
        assert outcome.tables["sparsity"] + "\n" == (tmp_path / "out" / "sparsity.md").read_text()
        assert "| wanda |" in outcome.tables["sparsity"]
        assert outcome.pictures == ["sparsity"]
        assert (tmp_path / "out" / "sparsity.png").read_bytes().startswith(b"\x89PNG")
        rows = csv.DictReader((tmp_path / "out" / "sparsity.csv").read_text().splitlines())
        assert {row["label"] for row in rows} == {"dense", "magnitude", "wanda"}

    def test_without_matplotlib_there_are_tables_and_a_word_about_pictures(self, tmp_path, settings, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        said = []
        given = {**settings, "methods": ["magnitude"], "patterns": ["10%"]}
        outcome = run([Experiment.load("sparsity", given)], tmp_path / "out", say=said.append)
        assert "no pictures, which need matplotlib: pip install 'statprune[experiments]'" in said[0]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {CELLS, "sparsity.csv", "sparsity.md"}
        assert outcome.contents == "tables and every measurement"
        monkeypatch.undo()
        outcome = run([Experiment.load("sparsity", given)], tmp_path / "out")
        assert (tmp_path / "out" / "sparsity.png").exists()
        assert outcome.contents == "tables, pictures and every measurement"

    def test_what_no_picture_can_show_leaves_the_tables(self, tmp_path, settings):
        said = []
        given = {**settings, "methods": ["magnitude"], "patterns": ["3:5"]}
        outcome = run([Experiment.load("sparsity", given)], tmp_path / "out", say=said.append)
        assert "failed" in outcome.tables["sparsity"]
        assert (outcome.pictures, len(outcome.failures)) == ([], 1)
        assert said[-1].startswith("sparsity: no picture: ")

    def test_experiments_share_cells_and_the_model_is_loaded_once(self, tmp_path, settings, monkeypatch):
        loads, load = [], running.load_causal
        monkeypatch.setattr(running, "load_causal", lambda *arguments: loads.append(arguments) or load(*arguments))
        experiments = [Experiment.load(name, settings) for name in ("perplexity", "sparsity")]
        outcome = run(experiments, tmp_path / "out")
        assert len(loads) == 1
        assert len(lines(tmp_path / "out")) == 3
        assert outcome.tables.keys() == {"perplexity", "sparsity"}

    @pytest.mark.real_export
    def test_one_export_serves_all_cells(self, tmp_path, settings, exported):
        given = {**settings, "methods": ["magnitude", "wanda", "cvr"], "patterns": ["50%", "2:4"]}
        assert run([Experiment.load(name, given) for name in ("perplexity", "runtime")], tmp_path / "out").failures == []
        assert len(exported) == 1

    def test_an_interrupted_run_goes_on_and_repeats_nothing(self, tmp_path, settings, monkeypatch):
        def interrupt(what):
            if "magnitude" in what:
                raise KeyboardInterrupt

        experiment = Experiment.load("perplexity", settings)
        with pytest.raises(KeyboardInterrupt):
            run([experiment], tmp_path / "out", say=interrupt)
        before = (tmp_path / "out" / CELLS).read_text()
        assert len(lines(tmp_path / "out")) == 2
        said = []
        assert run([experiment], tmp_path / "out", say=said.append).failures == []
        assert (tmp_path / "out" / CELLS).read_text().startswith(before)
        assert len(lines(tmp_path / "out")) == 3
        assert [word for word in said if "wanda" in word] == said
        monkeypatch.setattr(running, "evaluate", None)
        again = run([experiment], tmp_path / "out")
        assert (again.failures, len(lines(tmp_path / "out"))) == ([], 3)

    def test_a_text_that_has_changed_is_measured_anew(self, tmp_path, settings, text):
        experiment = Experiment.load("perplexity", {**settings, "methods": ["magnitude"]})
        run([experiment], tmp_path / "out")
        with open(text, "r+") as file:
            file.write("9999 something else altogether")
        run([experiment], tmp_path / "out")
        assert len(lines(tmp_path / "out")) == 4

    def test_a_cell_that_fails_is_recorded_and_the_grid_goes_on(self, tmp_path, settings):
        experiment = Experiment.load("perplexity", {**settings, "patterns": ["3:5", "50%"]})
        outcome = run([experiment], tmp_path / "out")
        cells = lines(tmp_path / "out")
        failed = [cell for cell in cells if cell["error"]]
        assert [(cell["label"], cell["pattern"]) for cell in failed] == [("magnitude", "3:5"), ("wanda", "3:5")]
        assert all("3:5 does not divide its width of 16" in cell["error"] for cell in failed)
        assert len([cell for cell in cells if cell["values"]]) == 3
        assert len(outcome.failures) == 2
        assert "failed" in outcome.tables["perplexity"]

    def test_an_error_of_any_kind_is_one_cells_matter(self, tmp_path, settings, monkeypatch):
        def explode(*arguments, **others):
            raise ZeroDivisionError("of all things")

        monkeypatch.setattr(running, "plan", explode)
        outcome = run([Experiment.load("perplexity", settings)], tmp_path / "out")
        assert len(outcome.failures) == 2
        assert "ZeroDivisionError: of all things" in outcome.failures[0]
        assert lines(tmp_path / "out")[0]["values"]["perplexity"] > 0

    def test_one_sequence_is_singular(self, tmp_path, settings):
        told = []
        experiment = Experiment.load("perplexity", {**settings, "methods": ["wanda"], "samples": 1})
        run([experiment], tmp_path / "out", progress=lambda *step: told.append(step))
        assert told == [  # each with the cell that was finished last
            (0, 2, ""),
            (1, 2, "perplexity: tiny: dense"),
            (2, 2, "perplexity: tiny: wanda 50% 1 sequence, seed 0"),
        ]

    def test_a_model_that_cannot_be_opened_leaves_the_others(self, tmp_path, settings):
        experiment = Experiment.load("perplexity", {**settings, "model": [str(tmp_path / "nothing"), *settings["model"]]})
        outcome = run([experiment], tmp_path / "out")
        assert len(outcome.failures) == 1
        assert "nothing" in outcome.failures[0]
        assert len(lines(tmp_path / "out")) == 3

    def test_experiments_of_several_protocols_need_folders_of_their_own(self, tmp_path, settings):
        experiments = [Experiment.load("perplexity", settings), Experiment.load("sparsity", {**settings, "seqlen": 8})]
        with pytest.raises(ExperimentError, match="several protocols"):
            run(experiments, tmp_path / "out")

    def test_runtime_times_statistics_and_pruning_of_one_block(self, tmp_path, settings):
        given = {**settings, "methods": ["magnitude", "wanda", "sparsegpt", "cvr+energy"], "rounds": 2}
        outcome = run([Experiment.load("runtime", given)], tmp_path / "out")
        assert outcome.failures == []
        cells = {cell["label"]: cell for cell in lines(tmp_path / "out")}
        assert cells.keys() == {"magnitude", "wanda", "sparsegpt", "cvr+energy"}
        assert cells["magnitude"]["values"]["statistics"] == 0
        for cell in cells.values():
            values = cell["values"]
            assert values["total"] == pytest.approx(values["statistics"] + values["pruning"])
            assert values["pruning"] > 0
        # A Gram of 16 x 16 floats for each of three groups of the block and 32 x 32 for the fourth, which Wanda has not.
        assert cells["sparsegpt"]["peak_memory"] - cells["wanda"]["peak_memory"] > 4 * (3 * 16 * 16 + 32 * 32)


class TestCommand:
    def test_zero_shot_runs_offline_on_a_task_file(self, tmp_path, settings, capsys):
        task = write_task(tmp_path / "task")
        arguments = ["experiment", "zero-shot", *options({**settings, "tasks": [task, "next-line"], "questions": 5})]
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        assert "to-be acc" in printed
        assert "next-line acc_norm" in printed
        cells = lines(tmp_path / "out")
        assert [cell["label"] for cell in cells] == ["dense", "magnitude", "wanda"]
        for cell in cells:
            accuracies = [value for name, value in cell["values"].items() if name in ("to-be acc", "next-line acc_norm")]
            assert cell["values"]["average"] == pytest.approx(sum(accuracies) / 2)
            assert len(cell["values"]) == 6  # and a standard error of each

    def test_a_task_whose_data_cannot_be_had_says_what_to_provide_and_the_rest_is_measured(self, tmp_path, settings, capsys):
        own = {**settings, "methods": ["wanda"], "tasks": ["boolq"], "sizes": [1], "rounds": 1}
        assert main(["experiment", "all", *options(own), "--output", str(tmp_path / "out")]) == 1
        error = " ".join(capsys.readouterr().err.split())
        assert "zero-shot" in error
        assert "boolq" in error
        assert "task file" in error or "YAML" in error or "cached" in error
        written = {path.name for path in (tmp_path / "out").iterdir()}
        assert {f"{name}.md" for name in NAMES} - written == {"zero-shot.md"}
        assert {"sparsity.png", "calibration.csv", "runtime.png", "correction.png"} <= written

    def test_failing_cells_end_the_command_with_a_list(self, tmp_path, settings, capsys):
        arguments = ["experiment", "perplexity", *options({**settings, "patterns": ["3:5"]}), "--output", str(tmp_path / "out")]
        assert main(arguments) == 1
        error = " ".join(capsys.readouterr().err.split())
        assert "2 failed" in error
        assert "magnitude 3:5" in error

    def test_where_nothing_was_measured_no_table_is_claimed(self, tmp_path, settings, capsys):
        own = {**settings, "model": [str(tmp_path / "nothing")]}
        assert main(["experiment", "perplexity", *options(own), "--output", str(tmp_path / "out")]) == 1
        captured = capsys.readouterr()
        assert "1 failed" in captured.err
        assert "measurement" not in captured.err
        assert captured.out == ""
        assert not (tmp_path / "out").exists()

    def test_settings_come_from_a_yaml_file_too(self, tmp_path, settings, capsys):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**settings, "methods": [{"label": "mine", "method": "wanda"}]}))
        arguments = ["experiment", "perplexity", "--config", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")]
        assert main(arguments) == 0
        assert "| mine |" in capsys.readouterr().out

    @pytest.mark.slow
    def test_a_killed_process_loses_and_repeats_no_cell(self, tmp_path, settings):
        own = {**settings, "methods": ["wanda", "cvr", "cvr+energy", "ria"], "patterns": ["50%", "2:4"]}
        out = tmp_path / "out"
        arguments = ["experiment", "perplexity", *options(own), "--output", str(out)]
        process = subprocess.Popen(
            [sys.executable, "-m", "statprune", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (out / CELLS).exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        survived = (out / CELLS).read_bytes()
        assert main(arguments) == 0
        whole_lines = survived[: survived.rfind(b"\n") + 1]
        assert (out / CELLS).read_bytes().startswith(whole_lines)
        assert 1 <= len(whole_lines.splitlines()) < 10
        identities = [(cell["label"], cell["pattern"]) for cell in lines(out)]
        assert len(identities) == len(set(identities)) == 9


class TestMeasuring:
    def test_tensors_count_while_anything_uses_their_memory(self):
        def work():
            first = torch.ones(1000)  # 4000 bytes
            view = first.view(10, 100).t()
            second = first + 1  # 8000
            del first  # the view keeps it
            third = second * 2  # 12000
            del view  # 8000
            return third.clone()  # 12000

        assert peak_of_tensors(work, torch.device("cpu")) == 12_000

    def test_what_was_there_before_does_not_count(self):
        held = torch.ones(1000)
        assert peak_of_tensors(lambda: held.mul_(2), torch.device("cpu")) == 0

    def test_seconds_are_those_of_the_work(self):
        with measured(torch.device("cpu")) as cost:
            time.sleep(0.05)
        assert cost.seconds >= 0.05

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of resident memory")
    def test_peak_memory_is_what_the_work_needed_at_once(self):
        size = 200 * 2**20
        with measured(torch.device("cpu")) as cost:
            for _ in range(3):
                torch.ones(size, dtype=torch.uint8)
        assert 0.9 * size < cost.peak_memory < 1.9 * size


class TestCompare:
    def test_the_best_of_each_pattern_is_bold_and_a_label_ends_no_cell(self):
        cells = [
            Cell("dense", "", 5.0, 0.0, {}),
            Cell("a|b", "50%", 7.0, 1.0, {}, divergence=0.25),
            Cell("c", "50%", 6.0, 1.0, {}, divergence=0.5),
        ]
        assert markdown_table(cells).splitlines() == [
            "| perplexity (dense 5.00) | 50% |",
            "|---|---:|",
            r"| a\|b | 7.00 |",
            "| c | **6.00** |",
            "",
            "| KL from dense [nats per token] | 50% |",
            "|---|---:|",
            r"| a\|b | **0.250** |",
            "| c | 0.500 |",
        ]

    def test_a_cell_is_what_plan_and_evaluate_give_and_each_is_told(self, model, windows):
        told = []
        cells = compare(
            model, windows[:2], windows[2:], methods=["wanda", "cvr+energy"], patterns=["2:4"], batch_size=2,
            progress=lambda *step: told.append(step),
        )  # fmt: skip
        twin = plan(model, windows[:2].split(2), Recipe("wanda", "2:4"))
        assert [(cell.method, cell.pattern) for cell in cells] == [("dense", ""), ("wanda", "2:4"), ("cvr+energy", "2:4")]
        assert cells[0].perplexity == evaluate(model, windows[2:], batch_size=2)
        found = evaluate_beside(model, windows[2:], batch_size=2, weights=twin.weights)
        assert (cells[1].perplexity, cells[1].divergence) == (found.perplexity, found.divergence)
        assert cells[0].divergence is None
        assert cells[1].recipe == Recipe("wanda", "2:4").to_dict()
        assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]
        assert told[1][2] == f"cvr+energy 2:4: {cells[2].perplexity:.3f}"

    @pytest.mark.real_export
    def test_one_export_serves_all_cells(self, model, windows, exported):
        compare(model, windows[:2], windows[2:], methods=["magnitude", "wanda"], patterns=["50%", "2:4"], batch_size=2)
        assert len(exported) == 1


class Branching(nn.Module):
    """Cannot be exported: what it does depends on its input's values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.linear(inputs) if inputs.sum() > 0 else inputs


def test_without_a_graph_there_is_no_walk_to_time():
    with pytest.raises(TracingError, match="there is none: "):
        export(Branching(), [torch.ones(2, 4)])


def test_the_walk_is_timed_beside_the_plain_model_and_each_round_is_told(model, windows):
    told = []
    cost = measure_walk(*export(model, windows.split(2)), rounds=2, progress=lambda *step: told.append(step))
    assert told == [(0, 2, "rounds"), (1, 2, "rounds"), (2, 2, "rounds")]
    assert len(cost.forward) == len(cost.walk) == 2
    assert min(*cost.forward, *cost.walk, cost.export) > 0
    assert cost.ratio == pytest.approx(sum(walk / forward for walk, forward in zip(cost.walk, cost.forward, strict=True)) / 2)


def test_what_auto_chose_is_written_down(settings, tmp_path):
    given = {**settings, "methods": ["wanda", "auto:minutes=0.0001"], "patterns": ["2:4"], "samples": 4}
    outcome = run([Experiment.load("correction", given)], tmp_path / "out")
    assert outcome.failures == []
    chosen = {line["label"]: line["chosen"] for line in lines(tmp_path / "out")}
    assert chosen.pop("auto:minutes=0.0001") in {
        f"{recipe.method} ({recipe.conditions})" for recipe in (Search("2:4").recipe(**keys) for keys in BASELINES)
    }
    assert set(chosen.values()) == {None}
    assert "What auto chose: 2:4, seed 0: " in outcome.tables["correction"]


@pytest.fixture
def spoilt_folder(tmp_path, tiny_model_folder):
    """A model with NaN in a weight, as a training may leave it."""
    model = load_model(tiny_model_folder)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = math.nan
    model.save_pretrained(tmp_path / "spoilt")
    load_tokenizer(tiny_model_folder).save_pretrained(tmp_path / "spoilt")
    return str(tmp_path / "spoilt")


@pytest.mark.parametrize("command", ["evaluate", "compare", "tune"])
def test_nan_in_a_weight_is_named_in_valid_json(capsys, tmp_path, spoilt_folder, text, command):
    options = {
        "evaluate": ["--text", text],
        "compare": ["--text", text, "--calibration", text, "--samples", "2"],
        "tune": ["--calibration", text, "--samples", "4", "--output", str(tmp_path / "tuned")],
    }[command]
    assert main([command, spoilt_folder, *options, "--seqlen", "16", "--json"]) == 1
    data = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "up_proj.weight" in data["error"]


def test_an_experiment_with_nan_fails_and_names_the_weight(tmp_path, settings, spoilt_folder):
    outcome = run([Experiment.load("perplexity", {**settings, "model": [spoilt_folder]})], tmp_path / "out")
    assert outcome.tables == {}
    assert outcome.contents == ""
    assert "up_proj.weight" in outcome.failures[0]
    assert "NaN," not in (tmp_path / "out" / CELLS).read_text()


def test_a_method_that_spoils_the_model_is_a_cell_and_the_comparison_goes_on(tmp_path, settings, text, monkeypatch):
    model, tokenizer = load_model(settings["model"][0]), load_tokenizer(settings["model"][0])
    windows = calibration_windows([text], tokenizer=tokenizer, model=model, samples=2, seqlen=16)

    def spoiling(*arguments, **others):
        twin = plan(*arguments, **others)
        if twin.report.recipe["method"] == "magnitude":
            next(iter(twin.weights.values())).fill_(math.nan)
        return twin

    monkeypatch.setattr("statprune.experiments.compare.plan", spoiling)
    dense, bad, good = compare(model, windows, windows, methods=["magnitude", "wanda"], patterns=["50%"])
    assert (dense.error, good.error) == (None, None)
    assert math.isnan(bad.perplexity)
    assert "NaN or infinity in model.layers.0" in bad.error
    table = markdown_table([dense, bad, good])
    assert f"**{good.perplexity:.2f}**" in table
    assert "| nan |" in table


def test_a_search_in_an_experiment_gets_halves_of_the_text(tmp_path, settings, monkeypatch):
    drawn, draw = [], running.calibration_windows
    monkeypatch.setattr(running, "calibration_windows", lambda *a, **k: drawn.append(k["halves"]) or draw(*a, **k))
    given = {**settings, "methods": ["wanda", "auto:minutes=0.000001"], "samples": 4}
    assert run([Experiment.load("perplexity", given)], tmp_path / "out").failures == []
    assert drawn == [False, True]
