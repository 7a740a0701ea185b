"""What a command line means, how fast it explains itself, and how it ends; what the commands do is in test_cli."""

import ast
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import statprune
from statprune.commands import COMMANDS, console
from statprune.commands.cli import main, parse
from statprune.errors import StatpruneError
from statprune.methods.budget import ALLOCATIONS
from statprune.methods.catalog import Entry, catalog
from statprune.methods.patterns import PATTERNS
from statprune.methods.registry import known_compensations, known_criteria, settings_of, summary
from statprune.methods.target import TARGETS


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestWhatIsImported:
    def test_no_torch_for_helps_versions_completions_and_wrong_options(self):
        lines = [
            ["--help"], ["--version"], ["--print-completion", "bash"], *([command, "--help"] for command in COMMANDS), [],
            ["prune", "x"], ["evaluate", "x", "--text", "t", "--seqlen", "abc"], ["nothing"], ["prune", "--config", "missing"],
        ]  # fmt: skip
        code = """if True:
            import json, sys
            from statprune.__main__ import main
            for words in json.loads(sys.argv[1]):
                sys.argv[1:] = words
                try:
                    main()
                    raise AssertionError(words)
                except SystemExit as e:
                    print("status", e.code)
            print("imported", sorted({"torch", "lightning", "transformers", "statprune"} & sys.modules.keys()))
        """
        shown = python(code, json.dumps(lines)).splitlines()
        assert [line.split()[1] for line in shown if line.startswith("status ")] == ["0"] * (3 + len(COMMANDS)) + ["2"] * 5
        assert shown[-1] == "imported ['statprune']"

    def test_no_export_no_sympy_and_no_transformers_for_verify(self, tmp_path, saved):
        code = """if True:
            import sys, torch
            before = set(sys.modules)
            from statprune.__main__ import main
            sys.argv[1:] = ["verify", sys.argv[1]]
            assert main() == 0
            new = set(sys.modules) - before
            heavy = ("torch.export", "torch._export", "torch._dynamo", "sympy", "transformers", "lightning", "torchmetrics")
            print(sorted(name for name in new if name.startswith(heavy)))
        """
        assert python(code, saved).splitlines()[-1] == "[]"

    def test_nothing_for_import_statprune(self):
        code = "import sys, statprune; dir(statprune); print(*(n for n in sys.modules if n.startswith(('torch', 'statprune'))))"
        assert python(code).strip() == "statprune"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that verifies."""
    from tiny_models import llama, tokens

    model = llama()
    output = tmp_path_factory.mktemp("saved") / "out"
    statprune.save(model, statprune.prune(model, [tokens(2, 8)], "magnitude"), output)
    return str(output)


class TestThePackage:
    def test_all_names_are_there(self):
        names: dict[str, object] = {}
        exec("from statprune import *", names)
        assert {*statprune.__all__} <= names.keys()
        assert {*statprune.__all__} <= {*dir(statprune)}
        assert names["Recipe"] is statprune.Recipe

    def test_type_checkers_see_the_same(self):
        tree = ast.parse(inspect.getsource(statprune))
        block = next(node for node in tree.body if isinstance(node, ast.If))
        seen = {
            alias.asname or alias.name: f"{node.module.removeprefix('statprune.')}:{alias.name}"
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert seen == statprune._IMPORTED_AT_USE
        assert [*statprune.__all__] == sorted(seen, key=lambda name: (not name.isupper(), name[0].islower(), name))

    def test_no_module_has_the_name_of_a_function(self):
        # Importing the module would put it into the function's place.
        modules = {path.stem for path in Path(statprune.__file__).parent.iterdir()}
        assert not modules & {*statprune.__all__}

    def test_classes_can_be_pickled(self):
        assert pickle.loads(pickle.dumps(statprune.Recipe)) is statprune.Recipe
        assert pickle.loads(pickle.dumps(statprune.Recipe("wanda"))) == statprune.Recipe("wanda")

    def test_what_is_not_there_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'prnue'"):
            statprune.prnue  # noqa: B018


@pytest.mark.parametrize(
    ("title", "known"),
    [
        ("criteria", known_criteria()), ("compensations", known_compensations()), ("patterns", PATTERNS),
        ("allocations", ALLOCATIONS), ("targets", TARGETS),
    ],
)  # fmt: skip
def test_what_is_read_from_the_source_is_what_can_be_imported(title, known):
    imported = {name: Entry(summary(entry), settings_of(entry)) for name, entry in known.items()}
    assert catalog()[title] == imported
    assert [*catalog()[title]] == [*known]


def refused(capsys, *words):
    """The last line of what a command line that cannot be is told."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    *usage, tip, error = printed.err.splitlines()
    assert usage[0].startswith("usage: statprune")
    assert tip.startswith("tip: For details")
    return error.removeprefix("error: ")


class TestWrongOptions:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("prune M --output o --seqlen abc", "--seqlen abc: expected a whole number."),
            ("prune M --output o --samples 1.5", "--samples 1.5: expected a whole number."),
            ("prune M --output o --schedule walkk", "--schedule walkk: expected one of walk, block, one-shot."),
            ("tune M --output o --calibration c --minutes ten", "--minutes ten: expected a number."),
            ("experiment calibration --output o --sizes 1 x", "--sizes x: expected a whole number."),
            ("prune M --output o --patern 2:4", "unrecognized arguments: --patern 2:4. Did you mean '--pattern'?"),
            ("prun M", f"there is no command 'prun'. Did you mean 'prune'? The commands are {', '.join(COMMANDS)}."),
            ("", f"expected a command: {', '.join(COMMANDS)}."),
        ],
    )
    def test_are_explained_in_a_line(self, capsys, words, expected):
        assert refused(capsys, *words.split()) == expected

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--batch_size 0", "--batch-size 0: expected at least 1."),
            ("--seqlen 1", "--seqlen 1: expected at least 2."),
            ("--samples 99999999999999999999", "--samples 99999999999999999999: expected at most 10,000,000."),
            ("--seed 99999999999999999999", "--seed 99999999999999999999: expected at most 9,223,372,036,854,775,807."),
        ],
    )
    def test_numbers_are_refused_before_the_model_is_looked_for(self, capsys, tmp_path, words, expected):
        assert main(["prune", "no-such-model", "--output", str(tmp_path / "o"), *words.split()]) == 1
        assert capsys.readouterr().err == f"error: {expected}\n"

    def test_with_json_are_json_too(self, capsys):
        with pytest.raises(SystemExit):
            main(["verify", "--json", "--bogus"])
        assert json.loads(capsys.readouterr().out)["kind"] == "UsageError"


class TestLists:
    @pytest.mark.parametrize("word", ['["energy:column", "least-squares"]', "['energy:column', 'least-squares']"])
    @pytest.mark.parametrize("equals", [False, True])
    def test_are_words(self, word, equals):
        option = [f"--compensation={word}"] if equals else ["--compensation", word]
        assert parse(["prune", "M", "--output", "o", *option]).given["recipe"].compensation == [
            "energy:column",
            "least-squares",
        ]

    def test_of_numbers_and_mappings(self):
        assert parse(["experiment", "all", "--output", "o", "--sizes", "[1, 2]"]).given["sizes"] == [1, 2]
        methods = '[{"label": "A", "method": "wanda"}, "ria"]'
        given = parse(["compare", "M", "--text", "t", "--calibration", "c", "--methods", methods]).given
        assert given["methods"] == [{"label": "A", "method": "wanda"}, "ria"]

    def test_a_glob_is_none(self):
        assert parse(["prune", "M", "--output", "o", "--targets", "[ab]", "[ab]*"]).given["recipe"].targets == ["[ab]", "[ab]*"]


class TestFilesOfOptions:
    def given(self, tmp_path, text, *words):
        (tmp_path / "options.yaml").write_text(text)
        return parse(["prune", *words, "--config", str(tmp_path / "options.yaml")]).given

    def test_hold_any_option(self, tmp_path):
        given = self.given(
            tmp_path,
            "model: M\noutput: o\ndry-run: true\nbatch_size: 3\npattern: '2:4'\ncalibration: text.txt\n"
            "ignore: ['*.0.*', b]\ncriterion: {name: cvr, alpha: 1e-3}\nseed: null\ntargets: []\n",
        )
        assert (given["model"].model, given["output"], given["dry_run"]) == ("M", "o", True)
        assert (given["calibration"].calibration, given["calibration"].batch_size) == (["text.txt"], 3)
        assert given["calibration"].seed == 0
        assert (given["recipe"].pattern, given["recipe"].ignore, given["recipe"].targets) == ("2:4", ["*.0.*", "b"], None)
        assert given["recipe"].read() == statprune.Recipe("cvr:alpha=1e-3", "2:4", ignore=("*.0.*", "b"))

    @pytest.mark.parametrize(
        "model", [["--ignore", "x", "y", "M"], ["M", "--ignore", "x", "y"], ["--ignore", "x", "y", "--", "M"]]
    )
    def test_the_command_line_wins_wherever_it_stands(self, tmp_path, model):
        (tmp_path / "options.yaml").write_text("output: o\nignore: [z]\nsamples: 3\nmodel: N\n")
        given = parse(["prune", f"--config={tmp_path}/options.yaml", "--samples", "4", *model]).given
        names = [] if model[-2:] == ["y", "M"] else ["M"]
        assert given["model"].model == ("M" if names else "N")
        assert given["recipe"].ignore == (["x", "y"] if names else ["x", "y", "M"])
        assert given["calibration"].samples == 4

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("pattern: 2:4", "pattern: 124 is no text, but int to YAML: an unquoted 2:4 is the number 124 to YAML. Quote it"),
            ("targets: [a, 1]", "targets: 1 is no text"),
            ("samples: 2\nsamples: 4", "the key 'samples' is there twice"),
            ("criterion: {name: cvr, name: ria}", "the key 'name' is there twice"),
            ("patern: x", "there is no option 'patern'. Did you mean 'pattern'?"),
            ("seqlen: abc", "--seqlen abc: expected a whole number."),
            ("seqlen: [1, 2]", "seqlen: [1, 2]: expected a whole number, and not a list."),
            ("dry_run: maybe", "dry_run: maybe: expected true or false."),
            ("recipe: {pattern: x}", "recipe: {'pattern': 'x'}: expected a text."),
            ("- a", "holds list: expected options"),
            ("a: [", "cannot be read: "),
            ("a: " + "[" * 3000, "cannot be read: "),
            ("model: !!python/object:os.system {}", "cannot be read: "),
        ],
    )
    def test_what_cannot_be_is_explained_in_a_line(self, capsys, tmp_path, text, expected):
        (tmp_path / "options.yaml").write_text(text)
        assert expected in refused(capsys, "prune", "M", "--output", "o", "--config", tmp_path / "options.yaml")

    def test_one_that_is_not_there_is_named(self, capsys):
        assert "missing.yaml cannot be read" in refused(capsys, "prune", "M", "--output", "o", "--config", "missing.yaml")


@pytest.fixture
def verify_does(monkeypatch):
    """Puts something in the place of what `statprune verify` does."""

    def put(function):
        monkeypatch.setattr("statprune.commands.cli.COMMANDS", {**COMMANDS, "verify": lambda folder: function()})
        monkeypatch.setattr("statprune.commands.cli._arguments", lambda *_: {"folder": "x"})

    return put


def raising(error):
    def function():
        raise error

    return function


class TestEnds:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (StatpruneError("it is so"), "it is so"),
            (OSError(28, "No space left on device", "out"), "The system refused: [Errno 28] No space left on device: 'out'."),
            (MemoryError(), "Out of memory: MemoryError. Less is needed with a smaller --batch-size"),
            (torch.OutOfMemoryError("CUDA out of memory."), "Out of memory: CUDA out of memory."),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Out of memory: [enforce fail]"),
            (TypeError("no such\nargument"), "This is a bug in statprune, or in what it calls: TypeError: no such (at "),
            (KeyError("x"), "STATPRUNE_TRACEBACK=1"),
            (AssertionError(), "AssertionError (at "),
        ],
    )
    @pytest.mark.parametrize("as_json", [False, True])
    def test_any_error_is_a_line(self, capsys, verify_does, error, expected, as_json):
        verify_does(raising(error))
        assert main(["verify", "x", *(["--json"] if as_json else [])]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert expected in printed.err
        if as_json:
            told = json.loads(printed.out)
            assert told == {"error": printed.err.removeprefix("error: ").rstrip("\n"), "kind": type(error).__name__}
        else:
            assert printed.out == ""

    def test_the_traceback_can_be_had(self, capsys, verify_does, monkeypatch):
        monkeypatch.setenv("STATPRUNE_TRACEBACK", "1")
        verify_does(raising(TypeError("x")))
        assert main(["verify", "x"]) == 1
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("number", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
    )
    @pytest.mark.parametrize("swallowed", [False, True])
    def test_a_signal_is_a_word_and_its_status(self, capsys, verify_does, number, word, status, swallowed):
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}[number]
        found = signal.signal(number, usual)  # one that is ignored, as in a script's background, stays so

        def stop():
            try:
                os.kill(os.getpid(), number)
                time.sleep(30)
            except KeyboardInterrupt as e:
                if swallowed:  # as an extension module may do
                    raise ImportError("of some module") from e
                raise

        verify_does(stop)
        try:
            assert main(["verify", "x"]) == status
            assert capsys.readouterr().err == f"{word}\n"
            assert signal.getsignal(number) is usual
        finally:
            signal.signal(number, found)

    def test_while_it_saves_what_was_pruned_stays(self, capsys, tmp_path, tiny_model_folder, monkeypatch):
        saved = []

        def verify(folder):
            saved.append(list(tmp_path.iterdir()))
            raise KeyboardInterrupt

        words = ["prune", tiny_model_folder, "--output", str(tmp_path / "o"), "--samples", "2", "--seqlen", "8"]
        with monkeypatch.context() as patched:
            patched.setattr("statprune.checkpoint.verify", verify)
            assert main(words) == 130
        assert saved[0] == list(tmp_path.iterdir())  # the hidden folder
        error = capsys.readouterr().err
        assert error.endswith("interrupted\n")
        assert "the same command goes on with it" in error
        assert main(words) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["o"]
        assert "going on with" in capsys.readouterr().err

    def test_begun_anew_it_removes_what_was_done(self, tmp_path, tiny_model_folder, monkeypatch):
        def verify(folder):
            raise KeyboardInterrupt

        words = ["prune", tiny_model_folder, "--output", str(tmp_path / "o"), "--samples", "2", "--seqlen", "8"]
        with monkeypatch.context() as patched:
            patched.setattr("statprune.checkpoint.verify", verify)
            assert main(words) == 130
        assert main([*words, "--pattern", "4:8"]) == 1
        assert main([*words, "--pattern", "4:8", "--restart"]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["o"]

    @pytest.mark.parametrize(
        "module", ["jsonargparse", "torch", pytest.param("transformers.models.llama.modeling_llama", marks=pytest.mark.slow)]
    )
    def test_of_a_real_process_wherever_it_is(self, tmp_path, tiny_model_folder, module):
        code = """if True:
            import os, signal, sys
            signal.signal(signal.SIGINT, signal.default_int_handler)
            class Stop:
                def find_spec(self, name, path=None, target=None):
                    if name == sys.argv[-1]:
                        os.kill(os.getpid(), signal.SIGINT)
            sys.meta_path.insert(0, Stop())
            from statprune.__main__ import main
            sys.exit(main())
        """
        words = ["prune", tiny_model_folder, "--output", str(tmp_path / "o"), "--calibration", module]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr.splitlines()[-1] == "interrupted"
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_reader_that_goes_away_stops_no_work(self, tmp_path):
        code = """if True:
            import sys
            from statprune.commands import console
            for _ in range(2000):
                console.show_text("x" * 100)
            console.show_json({"a": 1})
            open(sys.argv[1], "w").close()
        """
        words = [sys.executable, "-c", code, str(tmp_path / "finished")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline().startswith("x")
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 0
        assert (tmp_path / "finished").exists()


class TestWhatIsPrinted:
    def does(self):
        console.say("working")
        warnings.warn("mind the\ngap", stacklevel=1)
        with console.progress("walking") as progress:
            progress(1, 1, "layer")
        console.console.print("[bold]done[/]")
        console.show_text("| a [bold] :smile: |")
        return {"value": float("nan"), "values": [1.5, float("inf")], "path": "ä"}

    @pytest.mark.parametrize(
        ("options", "out", "err"),
        [
            ([], "done\n| a [bold] :smile: |\n", ["· working", "warning: mind the gap", "· walking: 1 of 1, "]),
            (["--quiet"], "", []),
            (["--json"], None, ["· working", "warning: mind the gap", "· walking: 1 of 1, "]),
            (["--json", "--quiet"], None, []),
        ],
    )
    def test_is_what_the_options_say(self, capsys, verify_does, options, out, err):
        verify_does(self.does)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["verify", "x", *options]) == 0
        printed = capsys.readouterr()
        if out is None:
            assert json.loads(printed.out) == {"value": None, "values": [1.5, None], "path": "ä"}
        else:
            assert printed.out == out
        shown = printed.err.splitlines()
        assert len(shown) == len(err)
        assert all(line.startswith(expected) for line, expected in zip(shown, err, strict=True))

    def test_without_a_terminal_there_are_signs_of_life(self, capsys, verify_does, monkeypatch):
        monkeypatch.setattr(console, "LONGEST_SILENCE", 0.1)

        def does():
            console.say("loading")
            time.sleep(0.35)
            return {}

        verify_does(does)
        assert main(["verify", "x"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) in (3, 4)
        assert lines[1:] == ["· at work, 0:00 so far; the last was loading"] * (len(lines) - 1)
        assert main(["verify", "x", "--quiet"]) == 0
        assert capsys.readouterr().err == ""

    def test_every_command_can_be_asked_for_json_and_for_quiet(self):
        needed = {
            "compare": "M --text t --calibration c", "tune": "M --output o --calibration c", "experiment": "all --output o",
            "prune": "M --output o", "evaluate": "M --text t", "merge": "M A --output o", "quickstart": "", "push": "F R",
            "accelerate": "M --tokens 1",
        }  # fmt: skip
        for command in COMMANDS:
            show = parse([command, *needed.get(command, "M").split(), "--json", "--quiet"]).show
            assert (show.json, show.quiet) == (True, True), command

    def test_the_version(self, capsys):
        with pytest.raises(SystemExit):
            main(["--version"])
        found = statprune.versions.versions()
        expected = f"statprune {found['statprune']} (torch {found['torch']}, transformers {found['transformers']}, python "
        assert capsys.readouterr().out.startswith(expected)

    def test_completion(self, capsys, tmp_path):
        with pytest.raises(SystemExit):
            main(["--print-completion", "bash"])
        script = capsys.readouterr().out
        (tmp_path / "text.txt").touch()
        asked = [["statprune", "insp"], ["statprune", "prune", "--sched"], ["statprune", "prune", "--schedule", ""],
                 ["statprune", "prune", "--calibration", "te"]]  # fmt: skip
        for words in asked:
            script += f"""
                COMP_WORDS=({" ".join(word or "''" for word in words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()
                _shtab_statprune; echo "${{COMPREPLY[*]}}"
            """
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.splitlines() == ["inspect", "--schedule", "walk block one-shot", "text.txt"]

    @pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
    def test_a_help_fits_into_80_columns(self, capsys, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
