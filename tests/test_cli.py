import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import statprune.zeros
from statprune import Recipe, Search
from statprune.checkpoint import verify
from statprune.commands import COMMANDS, console, display
from statprune.commands.cli import main, parse
from statprune.errors import NonFiniteError, RecipeError
from statprune.loading import load_model, load_tokenizer
from statprune.methods import catalog, registry
from statprune.methods.budget import ALLOCATIONS
from statprune.methods.patterns import PATTERNS
from statprune.methods.target import TARGETS
from statprune.perplexity import evaluate
from statprune.presets import PRESETS, Preset
from statprune.report import PruningReport

TEXT = "to be or not to be, that is the question\n" * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, " ".join(printed.out.split()), " ".join(printed.err.split())


def prune(capsys, model, output, *options):
    return run(capsys, "prune", model, "--output", output, "--seqlen", 16, "--samples", 4, *options)


@contextlib.contextmanager
def counted_exports():
    """A list that grows by one with each call of torch.export."""
    calls, own = [], torch.export.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
        yield calls


@dataclass
class Pruned:
    folder: Path
    text: str
    out: str
    err: str
    exports: int


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny_model_folder):
    """What `statprune prune` leaves and says, with what takes longest: schedule block and an allocation."""
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "text.txt").write_text(TEXT)
    options = ["--calibration", folder / "text.txt", tiny_model_folder, "--output", folder / "out", "--pattern", "50%"]
    options += ["--allocation", "owl:spread=0.1", "--schedule", "block", "--samples", 20, "--seqlen", 16, "--batch_size", 2]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), counted_exports() as exports:
        assert main(["prune", *map(str, options)]) == 0
    return Pruned(folder / "out", str(folder / "text.txt"), out.getvalue(), err.getvalue(), len(exports))


class TestPrune:
    def test_says_what_it_will_do_prunes_saves_and_the_result_verifies(self, capsys, pruned):
        out = " ".join(pruned.out.split())
        for said in (
            "schedule block, allocation owl:spread=0.1, target pruned", "model.layers.*.mlp.up_proj", "lm_head",
            "feeds the output",
            "2,304 of 11,952 parameters (19.3 %)", "9.6 % of all will be zero", "0.0 MB", "zeros are stored",
        ):  # fmt: skip
            assert said in out, said
        assert run(capsys, "verify", pruned.folder)[:1] == (0,)
        record = json.loads((pruned.folder / "pruning.json").read_text())
        assert record["protocol"] == {
            "model": record["protocol"]["model"], "calibration": [pruned.text], "samples": 20, "seqlen": 16, "seed": 0,
            "places": "random tokens of the text", "batch_size": 2, "dtype": "float32", "device": "cpu",
        }  # fmt: skip
        assert record["recipe"]["allocation"] == {"name": "owl", "threshold": 5.0, "spread": 0.1, "sparsity": None}
        assert {site["sparsity"] for site in record["sites"]} == {0.5}  # of one block

    def test_every_step_is_shown_with_its_time_and_as_often_as_it_was_taken(self, pruned):
        lines = {line[:68].strip(): line[68:].split() for line in pruned.out.splitlines() if line.endswith(" s")}
        assert list(lines) == [
            "export to a graph",
            "allocation: owl, measured on the dense model",
            "first batch through the dense model, before any change",
            "walk: the calibration set through the graph, twice, block by block",
            "scores, masks and compensation",
            "save and verify",
        ]
        seconds = verify(pruned.folder)["seconds"]
        assert float(lines["allocation: owl, measured on the dense model"][0]) == pytest.approx(seconds["allocate"], abs=0.051)
        assert float(lines["export to a graph"][0]) == pytest.approx(seconds["trace"], abs=0.051)
        assert seconds["trace"] > 0.1

    def test_exports_once(self, pruned):
        assert pruned.exports == 1

    def test_without_a_terminal_progress_is_a_line_for_each_tenth_and_no_foreign_bar(self, pruned):
        assert all(line.startswith("· ") for line in pruned.err.splitlines())
        # Groups of 3, 1, 2 and 1 layers.
        lines = [line.split(",")[0] for line in pruned.err.splitlines() if line.startswith("· pruning: ")]
        assert lines == [f"· pruning: {done} of 7" for done in (3, 4, 6, 7)]
        for foreign in ("Loading weights", "Writing model shards", "it/s"):
            assert foreign not in pruned.err

    def test_needs_no_data_at_all(self, capsys, tmp_path, tiny_model_folder):
        assert prune(capsys, tiny_model_folder, tmp_path / "out")[0] == 0
        assert verify(tmp_path / "out")["protocol"]["calibration"] == ["generated"]

    def test_every_option_can_come_from_yaml_and_a_recipe_from_its_own_file(self, capsys, tmp_path, tiny_model_folder, text):
        (tmp_path / "recipe.yaml").write_text("criterion: {name: cvr, alpha: 0.25}\npattern: '1:4'\nignore: ['*.down_proj']\n")
        (tmp_path / "options.yaml").write_text(f"recipe: {tmp_path}/recipe.yaml\ncalibration: [{text}]\nbatch_size: 2\n")
        status, _, err = prune(capsys, tiny_model_folder, tmp_path / "out", "--config", tmp_path / "options.yaml")
        assert status == 0, err
        record = verify(tmp_path / "out")
        assert record["recipe"]["criterion"]["alpha"] == 0.25
        assert record["recipe"]["compensation"] == []
        assert record["protocol"]["batch_size"] == 2
        assert record["sparsity"] == 0.75
        assert "ignored by the recipe" in {one["reason"] for one in record["left_out"]}

    @pytest.mark.real_export
    def test_a_search_exports_once_too(self, capsys, tmp_path, tiny_model_folder, text):
        with counted_exports() as exports:
            options = ["--method", "auto:minutes=0.001", "--calibration", text]
            status, out, err = prune(capsys, tiny_model_folder, tmp_path / "out", *options)
        assert (status, len(exports)) == (0, 1), err
        assert "chosen by auto: " in out
        assert verify(tmp_path / "out")["chosen_by"]["measurements"] >= 3

    def test_a_model_that_cannot_be_exported_is_pruned_with_hooks_and_the_reason_is_shown(
        self, capsys, tmp_path, tiny_model_folder, text, monkeypatch
    ):
        look_at_values(monkeypatch)
        status, out, err = prune(capsys, tiny_model_folder, tmp_path / "out", "--calibration", text)
        assert status == 0, err
        assert "torch.export cannot trace LlamaForCausalLM: GuardOnDataDependentSymNode" in out
        assert "the calibration set through the dense model with hooks, once" in out
        record = verify(tmp_path / "out")
        assert record["schedule"] == "one-shot (module hooks)"
        assert (len(record["sites"]), record["sparsity"]) == (7, 0.5)


class TestPerplexityBeforeAndAfter:
    def test_is_measured_shown_and_recorded(self, capsys, tmp_path, tiny_model_folder, text):
        status, out, err = prune(capsys, tiny_model_folder, tmp_path / "out", "--text", text, "--pattern", "75%")
        assert status == 0, err
        found = verify(tmp_path / "out")["perplexity"]
        assert f"perplexity {found['pruned']:.4f}, dense {found['dense']:.4f}, on {found['windows']} windows of 16" in out
        assert (found["seqlen"], found["text"]) == (16, [text])
        for folder, name in ((tiny_model_folder, "dense"), (tmp_path / "out", "pruned")):
            result = json.loads(run(capsys, "evaluate", folder, "--text", text, "--seqlen", 16, "--json")[1])
            assert found[name] == pytest.approx(result["perplexity"])
            assert found["windows"] == result["windows"]
        assert found["dense"] != found["pruned"]
        assert f"| pruned | {found['pruned']:.4f} |" in (tmp_path / "out" / "README.md").read_text()

    def test_the_text_is_read_before_anything_is_pruned(self, capsys, tmp_path, tiny_model_folder):
        (tmp_path / "short.txt").write_text("to be")
        status, _, err = prune(capsys, tiny_model_folder, tmp_path / "out", "--text", tmp_path / "short.txt")
        assert status == 1
        assert "less than one window of 16" in err
        assert "pruning" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]

    def test_one_that_is_no_number_is_recorded_as_none_and_loses_nothing(
        self, capsys, tmp_path, tiny_model_folder, text, monkeypatch
    ):
        values = iter([12.5, 100.0, None])

        def evaluate(*_, **__):
            if (value := next(values)) is None:
                raise NonFiniteError("The perplexity is inf")
            return value

        monkeypatch.setattr("statprune.perplexity.evaluate", evaluate)
        status, out, err = prune(capsys, tiny_model_folder, tmp_path / "out", "--text", text)
        assert status == 0, err
        assert "perplexity no number, dense 12.5000" in out
        assert "Wanda's mask alone would give 100.0000: better than this recipe" in out
        found = verify(tmp_path / "out")["perplexity"]
        assert (found["dense"], found["wanda"], found["pruned"]) == (12.5, 100.0, None)

    def test_is_shown_beside_that_of_wandas_mask(self, capsys, tmp_path, tiny_model_folder, text):
        given = ["--text", text, "--calibration", text, "--pattern", "1:4", "--ignore", "*.down_proj", "--json"]
        paper = json.loads(prune(capsys, tiny_model_folder, tmp_path / "paper", *given, "--method", "paper")[1])
        wanda = json.loads(
            prune(capsys, tiny_model_folder, tmp_path / "wanda", *given, "--method", "wanda", "--schedule", "block")[1]
        )
        assert paper["perplexity"]["wanda"] == pytest.approx(wanda["perplexity"]["pruned"])
        assert paper["perplexity"]["pruned"] != paper["perplexity"]["wanda"]
        assert "wanda" not in wanda["perplexity"]
        assert paper["seconds"]["compare"] > 0
        assert "compare" not in wanda["seconds"]
        assert f"| Wanda's mask alone | {paper['perplexity']['wanda']:.4f} |" in (tmp_path / "paper" / "README.md").read_text()
        status, out, err = prune(capsys, tiny_model_folder, tmp_path / "out", *given[:-1], "--no-compare")
        assert status == 0, err
        assert "Wanda" not in out
        assert "wanda" not in verify(tmp_path / "out")["perplexity"]

    @pytest.mark.parametrize(
        ("pruned", "wanda", "expected"),
        [
            (14.0, 15.0, "Wanda's mask alone would give 15.0000\n"),
            (15.0, 15.0, "Wanda's mask alone would give 15.0000\n"),
            (15.5, 15.0, "Wanda's mask alone would give 15.0000: better than this recipe, on this text. Try --method wanda"),
            (15.5, None, ""),
        ],
    )
    def test_says_where_wandas_mask_would_be_better(self, capsys, pruned, wanda, expected):
        report = PruningReport(Recipe().to_dict(), "walk")
        report.perplexity = {"dense": 9.0, "pruned": pruned, "wanda": wanda, "windows": 2, "seqlen": 16, "text": ["a.txt"]}
        display.show_report(report, "out")
        out = capsys.readouterr().out
        assert expected in out
        assert ("Wanda" in out, "better than" in out) == (wanda is not None, "better than" in expected)


class TestZerosOfASparseFolder:
    def test_are_counted_by_layer_with_the_recorded_recipe(self, capsys, tmp_path, tiny_model_folder, text):
        options = ["--calibration", text, "--pattern", "1:4", "--method", "wanda", "--ignore", "*.down_proj"]
        assert prune(capsys, tiny_model_folder, tmp_path / "out", *options)[0] == 0
        status, out, err = run(capsys, "inspect", tmp_path / "out")
        assert status == 0, err
        assert "│ model.layers.*.mlp.up_proj │ 1 │ 75.00 % │ 1:4 │" in out
        assert "│ model.layers.*.mlp.down_proj │ 1 │ 0.00 % │ - │" in out
        assert "1,344 zeros in 7,104 weights of linear layers, 18.92 %; pruning.json: wanda at 1:4, schedule walk" in out
        data = json.loads(run(capsys, "inspect", tmp_path / "out", "--json")[1])
        layers = {layer["name"]: layer for layer in data["layers"]}
        assert layers["model.layers.0.mlp.up_proj"] == {
            "name": "model.layers.0.mlp.up_proj", "shape": [32, 16], "zeros": 384, "pattern": "1:4", "sparsity": 0.75,
        }  # fmt: skip
        assert (data["zeros"], data["weights"], data["recorded"]) == (
            1344,
            7104,
            "wanda at 1:4, schedule walk, allocation uniform",
        )

    @pytest.mark.parametrize(
        ("zero_at", "pattern"), [(slice(0, None, 2), "2:4"), (slice(0, 8), None), ([0, 1, 2, 3, 8, 9, 10, 11], "4:8")]
    )
    def test_need_no_record(self, capsys, tmp_path, tiny_model_folder, zero_at, pattern):
        folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        for name in tensors:
            if name.endswith("_proj.weight"):
                tensors[name][:, zero_at] = 0.0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        status, out, err = run(capsys, "inspect", folder)
        assert status == 0, err
        assert f"model.layers.*.mlp.up_proj │ 1 │ 50.00 % │ {pattern or '-'} │" in out
        assert "there is no pruning.json" in out

    def test_layers_that_differ_have_rows_of_their_own(self, capsys):
        from statprune.zeros import Zeros

        zeros = [Zeros(f"layers.{index}.up", (4, 4), index, None) for index in (0, 8)]
        zeros += [Zeros(f"layers.{index}.down", (4, 4), 8, "2:4") for index in (0, 8)]
        display.show_zeros([*zeros, Zeros("gone", (4, 4), None, None)], None)
        rows = [
            [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
        ]
        assert rows == [
            ["layers.0.up", "1", "0.00 %", "-"],
            ["layers.8.up", "1", "50.00 %", "-"],
            ["layers.*.down", "2", "50.00 %", "2:4"],
            ["gone", "1", "not in the files", "-"],
        ]

    def test_are_not_looked_for_in_a_dense_folder(self, capsys, tiny_model_folder, monkeypatch):
        asked = []
        own = statprune.zeros.count_zeros
        monkeypatch.setattr(
            statprune.zeros, "count_zeros", lambda folder, sites: asked.append(len(sites)) or own(folder, sites)
        )
        status, out, err = run(capsys, "inspect", tiny_model_folder)
        assert (status, asked) == (0, [3]), err
        assert out.endswith("share one set of statistics.")

    def test_a_file_that_cannot_be_read_is_named(self, capsys, tmp_path, tiny_model_folder):
        folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
        (folder / "model.safetensors").write_bytes(b"no")
        status, _, err = run(capsys, "inspect", folder)
        assert status == 1
        assert "model.safetensors cannot be read" in err


def look_at_values(monkeypatch):
    """Control flow that depends on values, which no graph can hold."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: own(mlp, x) if float(x.abs().max()) < 1e9 else x)


class TestDryRun:
    def test_shows_what_would_be_done_and_touches_nothing(self, capsys, tmp_path, tiny_model_folder):
        # There is no tokenizer and there are no weights, so none is read.
        (tmp_path / "model").mkdir()
        shutil.copy(f"{tiny_model_folder}/config.json", tmp_path / "model")
        options = ["--dry-run", "--pattern", "1:4", "--ignore", "*.down_proj", "--criterion", "wanda", "--dtype", "bfloat16"]
        status, out, err = prune(capsys, tmp_path / "model", tmp_path / "out", *options, "--calibration", "missing.txt")
        assert status == 0, err
        assert "wanda at 1:4, schedule walk" in out
        assert "1,792 of 11,952 parameters (15.0 %) are in the weights to prune; 11.2 % of all will be zero" in out
        assert "ignored by the recipe" in out
        assert "method: wanda pattern: '1:4' schedule: walk" in out
        assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]

    def test_what_it_shows_is_a_recipe_file(self, capsys, tmp_path, tiny_model_folder):
        options = ["--output", str(tmp_path / "out"), "--dry-run", "--criterion", "auto:minutes=5", "--pattern", "50%"]
        assert main(["prune", tiny_model_folder, *options]) == 0
        shown = capsys.readouterr().out
        (tmp_path / "search.yaml").write_text(shown[shown.index("method:") : shown.index("A dry run")])
        assert read(f"--recipe {tmp_path}/search.yaml") == Search("50%", 5.0)

    def test_an_output_that_exists_is_refused_here_already(self, capsys, tmp_path):
        status, _, err = run(capsys, "prune", "no-such-model", "--output", tmp_path, "--dry-run")
        assert (status, "exists" in err) == (1, True)

    def test_weights_are_read_where_a_model_without_them_cannot_even_be_run(
        self, capsys, tmp_path, tiny_model_folder, monkeypatch
    ):
        look_at_values(monkeypatch)
        status, out, err = prune(capsys, tiny_model_folder, tmp_path / "out", "--dry-run")
        assert status == 0, err
        assert "torch.export cannot trace" in out
        assert "2,304 of 11,952 parameters" in out
        assert not (tmp_path / "out").exists()


def read(words):
    """The recipe or search that these options ask for."""
    return parse(shlex.split(f"prune MODEL --output out {words}")).given["recipe"].read()


class TestRecipeOptions:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("", Recipe()),
            ("--criterion wanda", Recipe("wanda")),
            ("--compensation least-squares", Recipe("optimal-brain+least-squares")),
            ("--compensation energy:column least-squares", Recipe("optimal-brain+energy:column+least-squares")),
            ("--method best --pattern 50%", Recipe("best", "50%")),
            ("--method paper --target dense:share=0.5", Recipe("paper", target="dense:share=0.5")),
            ('--target \'{"name": "dense", "damping": 0.1}\' --targets x', Recipe(target="dense:damping=0.1", targets=("x",))),
            ("--method auto:gradients=false", Search(gradients=False)),
            ("--criterion ria --compensation none", Recipe("ria")),
            ("--criterion auto", Search()),
            ("--method auto:minutes=5 --pattern 50% --ignore '*.0.*'", Search("50%", 5.0, ignore=("*.0.*",))),
            ('--criterion \'{"name": "cvr", "alpha": 0}\'', Recipe("cvr:alpha=0")),
            ('--pattern \'{"name": "unstructured", "sparsity": 0.25}\'', Recipe(pattern="25%")),
            ("--allocation owl:spread=0.1 --pattern 50%", Recipe(pattern="50%", allocation="owl:spread=0.1")),
            ("--targets '*.mlp.*' x --on_indivisible skip", Recipe(targets=("*.mlp.*", "x"), on_indivisible="skip")),
        ],
    )
    def test_alone(self, words, expected):
        assert read(words) == expected

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("", Recipe("ria+energy:column", "1:4", "block", ignore=("*.0.*",))),
            ("--pattern 50%", Recipe("ria+energy:column", "50%", "block", ignore=("*.0.*",))),
            ("--method wanda", Recipe("wanda", "1:4", "block", ignore=("*.0.*",))),
            ("--criterion cvr", Recipe("cvr+energy:column", "1:4", "block", ignore=("*.0.*",))),
            ("--compensation least-squares", Recipe("ria+least-squares", "1:4", "block", ignore=("*.0.*",))),
            ("--ignore x --schedule walk", Recipe("ria+energy:column", "1:4", "walk", ignore=("x",))),
            ("--method auto:minutes=5", Search("1:4", 5.0, ignore=("*.0.*",))),
            ("--criterion auto --pattern 50%", Search("50%", ignore=("*.0.*",))),
            ("--method best --pattern 50%", Recipe("best", "50%", ignore=("*.0.*",))),
            ("--method best --schedule block", Recipe("best", "1:4", "block", ignore=("*.0.*",))),
        ],
    )
    def test_win_over_a_file(self, tmp_path, words, expected):
        recipe = Recipe("ria+energy:column", "1:4", "block", ignore=("*.0.*",))
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert read(f"--recipe {tmp_path}/recipe.yaml {words}") == expected

    def test_a_file_can_ask_for_a_search_and_an_option_for_a_method(self, tmp_path):
        (tmp_path / "search.yaml").write_text("method: auto:minutes=5\npattern: 50%\n")
        assert read(f"--recipe {tmp_path}/search.yaml") == Search("50%", 5.0)
        assert read(f"--recipe {tmp_path}/search.yaml --method wanda") == Recipe("wanda", "50%")

    def test_what_a_preset_of_a_file_leaves_open_depends_on_the_options(self, tmp_path, monkeypatch):
        monkeypatch.setitem(PRESETS, "fast", Preset("Fast.", "wanda", "block", "dense", unstructured_allocation="owl"))
        (tmp_path / "recipe.yaml").write_text("method: fast\nignore: [a]\n")
        for words, expected in (
            ("", Recipe("wanda", "2:4", "block", ignore=("a",), target="dense")),
            ("--pattern 50%", Recipe("wanda", "50%", "block", ignore=("a",), allocation="owl", target="dense")),
            ("--pattern 50% --target pruned", Recipe("wanda", "50%", "block", ignore=("a",), allocation="owl")),
            ("--method wanda --pattern 50%", Recipe("wanda", "50%", ignore=("a",))),
        ):
            assert read(f"--recipe {tmp_path}/recipe.yaml {words}") == expected

    @pytest.mark.parametrize(
        "words", ["--method auto --schedule block", "--method best --compensation energy", "--method best+energy",
                  "--method auto --target dense", "--method wanda --criterion cvr", "--criterion wandaa"],
    )  # fmt: skip
    def test_what_cannot_be_together_is_refused(self, words):
        with pytest.raises(RecipeError):
            read(words)


class TestModelAnywhere:
    @pytest.mark.parametrize(
        "words",
        [
            "MODEL --text a.txt b.txt --seqlen 64",
            "--text a.txt b.txt MODEL --seqlen 64",
            "--seqlen 64 --text a.txt b.txt MODEL",
            "--text a.txt b.txt --seqlen 64 MODEL",
            "--text a.txt b.txt --seqlen=64 -- MODEL",
        ],
    )
    def test_of_one_option_with_several_words(self, words):
        function, given, _ = parse(["evaluate", *words.split()])
        assert function is COMMANDS["evaluate"]
        assert (given["model"].model, given["text"], given["windows"].seqlen) == ("MODEL", ["a.txt", "b.txt"], 64)

    def test_the_name_of_an_experiment_too_even_behind_numbers(self):
        given = parse(["experiment", "--output", "out", "--model", "A", "--sizes", "1", "2", "calibration"])[1]
        assert (given["name"], given["model"], given["sizes"]) == ("calibration", ["A"], [1, 2])

    def test_of_several_options_the_folder_of_a_model_decides(self, tiny_model_folder):
        words = ["compare", "--text", "a", "b", "--calibration", "c", tiny_model_folder]
        given = parse(words)[1]
        assert (given["model"].model, given["text"], given["calibration"].calibration) == (tiny_model_folder, ["a", "b"], ["c"])

    @pytest.mark.parametrize(
        ("words", "missing"),
        [
            ("evaluate --text MODEL", "MODEL"),
            ("compare --text a b --calibration c MODEL", "MODEL"),
            ("compare", "MODEL, --text, --calibration"),
        ],
    )
    def test_what_cannot_be_told_is_a_usage_error_that_names_it(self, capsys, words, missing):
        with pytest.raises(SystemExit) as exit_:
            parse(words.split())
        assert exit_.value.code == 2
        printed = capsys.readouterr().err.splitlines()
        assert printed[0].startswith(f"usage: statprune {words.split()[0]} MODEL --text TEXT ")
        assert printed[-1] == f"error: the following arguments are required: {missing}"

    def test_it_can_stand_in_a_file_of_options(self, tmp_path):
        (tmp_path / "options.yaml").write_text("model: MODEL\nbatch_size: 3\n")
        given = parse(["evaluate", "--config", str(tmp_path / "options.yaml"), "--text", "a.txt", "b.txt"])[1]
        assert (given["model"].model, given["text"], given["windows"].batch_size) == ("MODEL", ["a.txt", "b.txt"], 3)

    @pytest.mark.parametrize("name", ["--batch-size", "--batch_size", "--batch"])
    def test_dashes_and_underscores(self, name):
        assert parse(["evaluate", "MODEL", "--text", "a.txt", name, "3"])[1]["windows"].batch_size == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seqlen", "65"], "--seqlen 65 is longer than the model's context: expected at most 64"),
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--pattern", "2:3"], "does not divide its width of 16"),
        (["--pattern", "5:4"], "expected keep <= of"),
        (["--pattern", "120%"], "a number from 0 to 1, but not 1"),
        (["--criterion", "wandaa"], "Did you mean 'wanda'?"),
        (["--targets", "*.mpl.*"], "matches no weight of this model"),
        (["--calibration", "missing.txt"], "missing.txt cannot be read"),
        (["--recipe", "missing.yaml"], "missing.yaml cannot be read"),
        (["--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_bad_options_are_explained_and_nothing_is_written(capsys, tmp_path, tiny_model_folder, options, message):
    status, _, err = prune(capsys, tiny_model_folder, tmp_path / "out", *options)
    assert status == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_before_the_model_is_loaded(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    status, _, err = prune(capsys, "no-such-model", tmp_path / "out")
    assert status == 1
    assert "out exists" in err


def test_a_tokenizer_of_another_model_is_refused(capsys, tmp_path, tiny_model_folder, text):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    status, _, err = prune(capsys, folder, tmp_path / "out", "--calibration", text)
    assert status == 1
    assert "this tokenizer belongs to another model" in err
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_named_and_nothing_is_written(capsys, tmp_path, tiny_model_folder, text):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, _, err = prune(capsys, folder, tmp_path / "out", "--calibration", text)
    assert status == 1
    assert "NaN or infinity in the parameter model.layers.0.mlp.up_proj.weight" in err
    assert not (tmp_path / "out").exists()


def test_evaluate_prints_the_perplexity_and_the_protocol(capsys, tiny_model_folder, text):
    status, out, _ = run(capsys, "evaluate", tiny_model_folder, "--text", text, "--seqlen", 16, "--json")
    result = json.loads(out)
    assert status == 0
    from statprune.data import evaluation_windows

    model = load_model(tiny_model_folder)
    windows = evaluation_windows([text], tokenizer=load_tokenizer(tiny_model_folder), model=model, seqlen=16)
    assert result["perplexity"] == pytest.approx(evaluate(model, windows))
    assert (result["windows"], result["seqlen"], result["dtype"]) == (len(windows), 16, "float32")
    assert "perplexity" in run(capsys, "evaluate", tiny_model_folder, "--text", text, "--seqlen", 16)[1]


def test_inspect_needs_a_configuration_and_no_weights(capsys, tmp_path, tiny_model_folder):
    shutil.copy(f"{tiny_model_folder}/config.json", tmp_path)
    status, out, _ = run(capsys, "inspect", tmp_path, "--json")
    data = json.loads(out)
    assert status == 0
    assert [len(group) for group in data["groups"]] == [3, 1, 2, 1]
    assert {one["reason"] for one in data["left_out"]} == {"embedding", "feeds the output"}
    assert "7 linear layers in 4 input groups" in run(capsys, "inspect", tmp_path)[1]


def test_inspect_needs_no_architecture_in_the_configuration(capsys, tmp_path, tiny_model_folder):
    config = json.loads(Path(tiny_model_folder, "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = run(capsys, "inspect", tmp_path, "--json")
    assert status == 0, err
    assert [len(group) for group in json.loads(out)["groups"]] == [3, 1, 2, 1]


def test_inspect_knows_how_many_zeros_there_will_be(capsys, tmp_path, tiny_model_folder):
    shutil.copy(f"{tiny_model_folder}/config.json", tmp_path)
    status, out, err = run(capsys, "inspect", tmp_path, "--method", "wanda", "--pattern", "70%", "--json")
    assert status == 0, err
    # 70 % of 256, 128 and 512, rounded down in each layer: q and o, k and v, gate, up and down.
    assert json.loads(out)["zeros"] == 2 * 179 + 2 * 89 + 3 * 358


def test_inspect_shows_what_a_recipe_would_prune_and_leave_dense_and_the_sizes_to_expect(capsys, tmp_path, tiny_model_folder):
    shutil.copy(f"{tiny_model_folder}/config.json", tmp_path)
    (tmp_path / "recipe.yaml").write_text("method: wanda\nignore: ['*.down_proj']\n")
    options = ["--recipe", tmp_path / "recipe.yaml", "--pattern", "1:4"]
    status, out, err = run(capsys, "inspect", tmp_path, *options, "--json")
    assert status == 0, err
    data = json.loads(out)
    assert data["recipe"] == Recipe("wanda", "1:4", ignore=("*.down_proj",)).to_dict()
    # q and o 16 x 16, k and v 8 x 16, gate and up 32 x 16; of all: down_proj, two times 300 x 16, three norms of 16.
    assert data["parameters_to_prune"] == 2 * 256 + 2 * 128 + 2 * 512
    assert data["zeros"] == data["parameters_to_prune"] * 3 // 4
    assert data["parameters"] == data["parameters_to_prune"] + 512 + 2 * 4800 + 48
    assert data["bytes"] == 4 * data["parameters"]
    assert {one["name"]: one["reason"] for one in data["left_out"]}["model.layers.0.mlp.down_proj"] == "ignored by the recipe"
    status, out, _ = run(capsys, "inspect", tmp_path, *options)
    assert "wanda at 1:4" in out
    assert "1,792 of 11,952 parameters" in out


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("t5", {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 64}),
        ("vit", {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "image_size": 8, "patch_size": 4}),
        ("whisper", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                     "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64,
                     "max_source_positions": 8, "num_mel_bins": 4, "pad_token_id": 0, "decoder_start_token_id": 1,
                     "bos_token_id": 0, "eos_token_id": 0}),
    ],
)  # fmt: skip
def test_inspect_knows_no_families(capsys, tmp_path, model_type, settings):
    from transformers import CONFIG_MAPPING

    classes = {"t5": "T5ForConditionalGeneration", "vit": "ViTModel", "whisper": "WhisperForConditionalGeneration"}
    CONFIG_MAPPING[model_type](architectures=[classes[model_type]], **settings).save_pretrained(tmp_path)
    status, out, err = run(capsys, "inspect", tmp_path, "--json")
    assert status == 0, err
    assert len(json.loads(out)["groups"]) >= 3


def test_with_json_there_is_one_object_and_with_quiet_nothing(capsys, tmp_path, pruned, tiny_model_folder, text):
    measured = ["--calibration", text, "--text", text, "--seqlen", "16", "--samples", "4"]
    commands = [
        ["verify", pruned.folder], ["evaluate", tiny_model_folder, "--text", text, "--seqlen", "16"],
        ["prune", tiny_model_folder, "--output", tmp_path / "a", *measured],
        ["prune", tiny_model_folder, "--output", tmp_path / "b", "--seqlen", "16", "--dry-run"],
        ["compare", tiny_model_folder, *measured, "--methods", "wanda", "--patterns", "2:4"],
        ["benchmark", tiny_model_folder, "--seqlen", "16", "--samples", "2", "--rounds", "1"],
    ]  # fmt: skip
    for words in commands:
        assert main([*map(str, words), "--json", "--quiet"]) == 0
        printed = capsys.readouterr()
        assert isinstance(json.loads(printed.out), dict)
        assert printed.err == ""
    assert json.loads((tmp_path / "a" / "pruning.json").read_text())["sparsity"] == 0.5
    assert not (tmp_path / "b").exists()
    assert main(["evaluate", tiny_model_folder, "--text", text, "--seqlen", "16", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_verify_fails_with_the_first_broken_promise(capsys, tmp_path, pruned):
    folder = shutil.copytree(pruned.folder, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, _, err = run(capsys, "verify", folder)
    assert status == 1
    assert "model.layers.0.mlp.up_proj: number of zeros promised 256, found 0" in err


def test_compare_prints_a_markdown_table_and_leaves_the_model_alone(capsys, tiny_model_folder, text):
    options = ["--seqlen", 16, "--samples", 4, "--calibration", text, "--text", text]
    methods = ["--methods", "wanda", "cvr+energy", '{"label": "CVR 0", "criterion": {"name": "cvr", "alpha": 0}}']
    before = load_file(f"{tiny_model_folder}/model.safetensors")
    assert main([str(a) for a in ["compare", tiny_model_folder, *options, *methods, "--patterns", "50%", "2:4"]]) == 0
    printed = capsys.readouterr()
    lines = printed.out.strip().splitlines()
    assert lines[0].startswith("| perplexity (dense ")
    cells = [line for line in printed.err.splitlines() if line.startswith("· comparing: ")]
    assert [line.split(",")[0] for line in cells] == [f"· comparing: {done} of 6" for done in range(1, 7)]
    assert "left: wanda 50%: " in cells[0]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["wanda", "cvr+energy", "CVR 0"]
    assert lines[6].startswith("| KL from dense")
    assert [line.split("|")[1].strip() for line in lines[8:]] == ["wanda", "cvr+energy", "CVR 0"]
    assert sum(line.count("**") for line in lines[:5]) == 4
    after = load_file(f"{tiny_model_folder}/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_benchmark_measures_both_and_gives_their_ratio(capsys, tmp_path, tiny_model_folder):
    (tmp_path / "sparsegpt.py").write_text(THEIRS)
    options = ["--seqlen", 16, "--samples", 2, "--rounds", 2, "--methods", "wanda", "sparsegpt", "--patterns", "2:4"]
    options += ["--sparsegpt", tmp_path]
    before = load_file(f"{tiny_model_folder}/model.safetensors")
    status, out, _ = run(capsys, "benchmark", tiny_model_folder, *options, "--json")
    cost = json.loads(out)
    assert status == 0
    assert len(cost["walk"]) == len(cost["forward"]) == 2
    assert cost["ratio"] > 0
    pruning = cost["pruning"]
    assert [(row["label"], row["pattern"]) for row in pruning["rows"]] == [
        ("wanda", "2:4"), ("sparsegpt", "2:4"), ("SparseGPT's own code", "2:4"),
    ]  # fmt: skip
    assert all(row["pruning"] > 0 for row in pruning["rows"])
    assert pruning["copy"] > 0
    assert pruning["rows"][-1]["beside_theirs"] == 1
    after = load_file(f"{tiny_model_folder}/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, out, _ = run(capsys, "benchmark", tiny_model_folder, *options)
    assert "SparseGPT's own code" in out


THEIRS = """
import torch

class SparseGPT:
    def __init__(self, layer):
        self.layer, self.tokens = layer, 0

    def add_batch(self, inp, out):
        self.tokens += inp.shape[1]

    def fasterprune(self, sparsity, prunen=0, prunem=0):
        assert (sparsity, prunen, prunem, self.tokens) == (0.5, 2, 4, 32)
        torch.cuda.synchronize()
        self.layer.weight.data.zero_()
        print("done")
"""


def test_benchmark_says_what_is_wrong_with_others_code(capsys, tmp_path, tiny_model_folder):
    options = ["benchmark", tiny_model_folder, "--seqlen", 16, "--samples", 2, "--rounds", 1, "--sparsegpt", tmp_path]
    assert "has no sparsegpt.py" in run(capsys, *options)[2]
    (tmp_path / "sparsegpt.py").write_text("import nothing_of_this_name")
    assert "cannot be imported: ModuleNotFoundError" in run(capsys, *options)[2]
    (tmp_path / "sparsegpt.py").write_text("")
    assert "has no class SparseGPT" in run(capsys, *options)[2]
    (tmp_path / "sparsegpt.py").write_text(THEIRS.replace("2, 4, 32", "3, 4, 32"))
    status, _, err = run(capsys, *options, "--patterns", "2:4", "--methods", "wanda")
    assert status == 1
    assert "SparseGPT's own code failed: AssertionError" in err
    assert "needs no gradients" in run(capsys, *options, "--methods", "best")[2]


def test_quickstart_leaves_models_that_the_other_commands_take(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("statprune.experiments.quickstart.MAX_CHARACTERS", 30_000)
    monkeypatch.setattr("statprune.experiments.quickstart.SEQLEN", 32)
    monkeypatch.setattr("statprune.experiments.quickstart.METHODS", ("wanda", "paper", "default"))
    monkeypatch.setattr("statprune.experiments.quickstart.PATTERNS", ("2:4",))
    output = tmp_path / "quick"
    assert main(["quickstart", "--output", str(output), "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:] == [
        "wanda", "paper", "default",
    ]  # fmt: skip
    assert main(["verify", str(output / "sparse")]) == 0
    assert verify(output / "sparse")["recipe"] == Recipe().to_dict()
    assert main(["evaluate", str(output / "sparse"), "--text", str(output / "texts" / "held-out.txt"), "--seqlen", "32"]) == 0


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_a_command_has_its_long_description_its_examples_and_all_options(self, capsys, command):
        shown = help_of(capsys, command)
        assert "None" not in shown.replace("sparsity=None", "")
        flat = " ".join(shown.split())
        for paragraph in COMMANDS[command].__doc__.split("Args:")[0].split("\n\n"):
            assert " ".join(paragraph.split()) in flat
        _, heading, examples = shown.partition("\nexamples:\n")
        assert heading
        commands = [line.strip() for line in examples.partition("\n\n")[0].replace("\\\n", "").splitlines()]
        assert any(line.startswith(f"statprune {command}") for line in commands)
        for line in commands:
            program, *words = shlex.split(line)
            assert program == "statprune"
            parse(words)  # what an example shows is understood

    @pytest.mark.parametrize("command", COMMANDS)
    def test_shows_how_several_words_are_given(self, capsys, command, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        entries = help_of(capsys, command).split("\n  --")
        several = [entry for entry in entries if " ...]" in entry.splitlines()[0]]
        assert all("several" in entry and f" --{entry.split()[0]} " in " ".join(entry.split()) for entry in several)
        assert bool(several) == (command not in ("quickstart", "verify", "report", "push", "merge"))

    def test_names_what_the_registry_has(self, capsys, monkeypatch):
        def my_own(weight, moments, *, sharpness=3.5):
            """Keeps what I like.

            And more.
            """

        known = registry.known_criteria()
        monkeypatch.setattr(catalog, "entry_points", lambda group: [object()])  # of whatever name
        monkeypatch.setattr(registry, "known_criteria", lambda: {**known, "my-own": my_own})
        catalog.catalog.cache_clear()
        try:
            shown = " ".join(help_of(capsys, "prune").split())
        finally:
            catalog.catalog.cache_clear()
        assert "sparsegpt, my-own" in shown
        assert "my-own Keeps what I like. settings: sharpness=3.5" in shown
        for name in [*known, *registry.known_compensations(), *ALLOCATIONS, *PATTERNS, *TARGETS]:
            assert f" {name} " in shown, name

    @pytest.mark.parametrize("command", ["prune", "compare", "experiment"])
    def test_presets_come_first_with_a_sentence_and_what_they_stand_for(self, capsys, command, monkeypatch):
        monkeypatch.setenv("COLUMNS", "110")
        shown = help_of(capsys, command)
        titles = [line for line in shown.splitlines() if line in ("presets:", "criteria:", "compensations:")]
        assert titles == ["presets:", "criteria:", "compensations:"]
        listed = " ".join(shown.partition("\npresets:\n")[2].partition("\n\n")[0].split())
        for name, preset in PRESETS.items():
            assert f"{name} {preset.summary.replace('`', '')} {preset.method}, schedule {preset.schedule}" in listed
        assert "allocation uniform or, where the pattern is unstructured, curves" in listed

    def test_of_statprune_teaches_what_to_try_first(self, capsys):
        shown = help_of(capsys)
        lines = [line.strip() for line in shown.splitlines() if line.startswith("  statprune ")]
        assert lines[0] == "statprune quickstart"
        assert {line.split()[1] for line in lines} >= {"quickstart", "inspect", "prune", "verify", "evaluate"}


class TestProgress:
    def test_is_a_line_for_each_finished_tenth_with_times(self, capsys, monkeypatch):
        seconds = iter(range(0, 1000, 3))  # a step takes three seconds
        monkeypatch.setattr(console.time, "perf_counter", lambda: float(next(seconds)))
        with console.progress("walking") as progress:
            for done in range(1, 41):
                progress(done, 40, f"layer {done}")
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "· walking: 4 of 40, 0:12, about 1:48 left: layer 4"
        assert lines[-1] == "· walking: 40 of 40, 2:00, finished: layer 40"
        assert len(lines) == 10

    def test_is_a_line_for_each_step_where_steps_are_long(self, capsys):
        with console.progress("measuring", each=True) as progress:
            for done in range(26):
                progress(done, 25, "")
        assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
            f"· measuring: {done} of 25" for done in range(1, 26)
        ]

    def test_is_a_line_each_minute_too(self, capsys, monkeypatch):
        seconds = iter(range(0, 10000, 25))
        monkeypatch.setattr(console.time, "perf_counter", lambda: float(next(seconds)))
        with console.progress("walking") as progress:
            for done in range(1, 41):
                progress(done, 400, "")
        lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
        assert lines == [f"· walking: {done} of 400" for done in range(3, 41, 3)] + ["· walking: 40 of 400"]

    def test_preparations_do_not_count_for_what_is_left(self, capsys, monkeypatch):
        seconds = iter([0.0, 100.0, 102.0, 104.0])  # the first step ends after 100 s, the others take 2
        monkeypatch.setattr(console.time, "perf_counter", lambda: next(seconds))
        with console.progress("walking", each=True) as progress:
            for done in (1, 2, 3):
                progress(done, 10, "")
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(", ")[2] for line in lines] == ["about 15:00 left", "about 0:16 left", "about 0:14 left"]

    def test_begins_again_with_other_work(self, capsys):
        with console.progress("choosing and pruning") as progress:
            for total in (2, 3):
                for done in range(1, total + 1):
                    progress(done, total, "")
        assert len(capsys.readouterr().err.splitlines()) == 5

    @pytest.fixture
    def terminal(self, monkeypatch):
        shown = io.StringIO()
        monkeypatch.setattr(console, "notes", Console(file=shown, force_terminal=True, width=100))
        return shown

    def test_on_a_terminal_is_a_bar_that_appears_with_the_first_step(self, terminal):
        with console.progress("walking") as progress:
            progress(0, 40, "nothing")
            assert terminal.getvalue() == ""
            progress(4, 40, "a layer with a name that is as long as names of layers are in models of vision and of language")
        assert "4/40" in terminal.getvalue()
        assert "0/" not in terminal.getvalue().replace("40/", "")
        assert "a layer with a name" in terminal.getvalue()
        assert "…" in terminal.getvalue()

    def test_of_work_that_does_not_apply_is_nothing(self, terminal, capsys):
        with console.progress("walking"):
            pass
        assert terminal.getvalue() == ""
        assert capsys.readouterr().err == ""

    def test_of_others_is_not_shown_beside_ours_but_for_a_download(self, capsys):
        from huggingface_hub.utils import tqdm as download
        from tqdm.auto import tqdm
        from transformers.utils import logging

        def bars():
            for name, kind in (("one", tqdm), ("of transformers", logging.tqdm), ("of a download", download)):
                for _ in kind([1], desc=name, disable=False):
                    pass
            shown = capsys.readouterr().err
            return [name for name in ("one", "of transformers", "of a download") if f"{name}:" in shown]

        with console.only_own_bars():
            assert bars() == ["of a download"]
        assert bars() == ["one", "of transformers", "of a download"]


def test_a_wrong_option_is_a_usage_error_of_a_real_process():
    done = subprocess.run([sys.executable, "-m", "statprune", "prune", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "output" in done.stderr
