"""Whatever comes in, out comes success or an error of ours; never another exception, and never a changed model.

Some hundred cases always, 10,000 with `pytest -m slow tests/test_fuzz.py`. They are the same in every run; FUZZ=random in the
environment draws new ones.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import warnings

import pytest
import torch
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import statprune
from statprune.commands import COMMANDS, endings
from statprune.commands.cli import main
from statprune.configuration import load_config
from statprune.errors import StatpruneError
from statprune.how import read_how, read_yaml
from statprune.methods.bounds import Count, bounds_in
from statprune.methods.budget import ALLOCATIONS
from statprune.methods.compensations import COMPENSATIONS
from statprune.methods.criteria import CRITERIA
from statprune.methods.registry import PRUNERS, kind_of, settings_of
from statprune.methods.target import TARGETS
from statprune.presets import PRESETS
from statprune.recipe import Recipe
from tiny_models import changed, llama, snapshot, tokens


def cases(count, **strategies):
    """A test of so many cases."""
    chosen = settings(
        max_examples=count, deadline=None, derandomize=os.environ.get("FUZZ") != "random", database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda check: chosen(given(**strategies)(check))


# --- what is drawn ------------------------------------------------------------------------------------------------------

TOKENS = [
    "1e400", "-1", "0", "1e-400", ".inf", ".nan", "true", "null", "~", "&a", "*a", "<<", "!!python/object:os.system", "!!int",
    "!!timestamp", "2001-99-99", "9" * 30, "2:4", "9:9", "[", "]", "{", "}", ":", "+", "=", ",", "%", "'", '"', "#", "|", "-",
    "\n", " ", "\t", "\x00", "é", "٣", "=[", "1_0", "0x1f", "- ", "? ", "...", "---",
]  # fmt: skip


@st.composite
def mutated(draw, texts, tokens=TOKENS):
    """A text with up to three changes: something inserted, cut out, repeated, or a letter replaced."""
    text = draw(texts)
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 6)))
        kind = draw(st.sampled_from(["insert", "cut", "repeat", "replace"]))
        put = {"insert": draw(st.sampled_from(tokens)), "cut": "", "repeat": text[start:end] * 2, "replace": "x"}[kind]
        text = text[:start] + put + text[start if kind == "insert" else end :]
    return text


def within(bounds, kind):
    """A value of a setting."""
    low, high = bounds.low, bounds.high
    if isinstance(bounds, Count):
        return st.sampled_from(sorted({low, min(low + 1, high), min(8, high), min(40, high)}))
    numbers = st.floats(low, high).filter(lambda value: value not in bounds.without)
    return st.lists(numbers, min_size=2, max_size=2).map(sorted) if kind is tuple else numbers


def parts(known):
    """Mappings with a name and some of its settings, all of them in bounds."""

    def settings_in_bounds(name):
        entry = known[name]
        optional = {key: within(bounds, kind_of(entry, key)) for key, bounds in bounds_in(entry).items()}
        switches = {key: st.booleans() for key in settings_of(entry) if kind_of(entry, key) is bool}
        return st.fixed_dictionaries({"name": st.just(name)}, optional={**optional, **switches})

    return st.sampled_from(sorted(known)).flatmap(settings_in_bounds)


PATTERNS = st.one_of(
    st.sampled_from(["2:4", "4:8", "1:2", "4:4", "0%", "50%", "50%:rank_over=layer", "99.9%"]),
    st.floats(0, 0.999).map(lambda share: {"name": "unstructured", "sparsity": share}),
)
RECIPES = st.fixed_dictionaries(
    {"criterion": parts({**CRITERIA, **PRUNERS}), "pattern": PATTERNS},
    optional={
        "compensation": st.lists(parts(COMPENSATIONS), max_size=2),
        "schedule": st.sampled_from(["walk", "block", "one-shot"]),
        "allocation": parts(ALLOCATIONS),
        "target": parts(TARGETS),
        "targets": st.sampled_from([None, ["*.mlp.*"], ["*"], ["nothing"]]),
        "ignore": st.sampled_from([[], ["*.q_proj"], ["*"]]),
        "on_indivisible": st.sampled_from(["error", "skip"]),
    },
)
METHODS = [
    "wanda", "cvr+energy", "cvr:alpha=0.25,eps=1e-6+energy:column", "sparsegpt:block_size=8,damping=0.1+energy:clamp=[0.5, 2]",
    "cvr+least-squares:steps=15,tolerance=1e-3", "ria:exponent=1+activation-energy:row", "auto:minutes=5", "optimal-brain",
    "z-pruner+none", "magnitude", "best", "fast", "paper", "default", "auto:gradients=false,minutes=5",
]  # fmt: skip
ONE_VALUE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(TOKENS),
    st.sampled_from([10**400, -(10**4000), 124, 1e308, -0.0, 5e-324, b"x", ("a",), {"a"}, 1j]),
)  # fmt: skip
ANYTHING = st.recursive(
    ONE_VALUE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    "method",
    "criterion",
    "compensation",
    "pattern",
    "schedule",
    "targets",
    "ignore",
    "on_indivisible",
    "allocation",
    "target",
    "x",
]


@st.composite
def wild(draw):
    """A recipe in which a key, or a setting of a part, has any value whatever."""
    data = dict(draw(RECIPES))
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(KEYS))
        part = data.get(key)
        if isinstance(part, dict) and draw(st.booleans()):
            data[key] = {**part, draw(st.sampled_from([*part, "name", "x"])): draw(ANYTHING)}
        else:
            data[key] = draw(ANYTHING)
    return data


# --- recipes ------------------------------------------------------------------------------------------------------------


def is_understood_or_refused(how, **others):
    try:
        found = read_how(how, **others)
    except StatpruneError as e:
        message = str(e)
    else:
        event("understood")
        data = found.to_dict()
        json.dumps(data, allow_nan=False)
        assert type(found).from_dict(data) == found
        return
    event("refused")
    assert 0 < len(message) < 12_000


def recipes_as_texts(method, pattern, target):
    is_understood_or_refused(method, pattern=pattern, target=target)


def recipes_as_mappings(data):
    is_understood_or_refused(data)


TEXTS = {
    "method": mutated(st.sampled_from(METHODS)),
    "pattern": st.none() | mutated(st.sampled_from(["2:4", "50%", "50%:rank_over=row"])),
    "target": st.none() | mutated(st.sampled_from(["pruned", "dense", "dense:share=0.5,damping=0.1"])),
}
MAPPINGS = {"data": wild() | RECIPES | ANYTHING}

test_recipes_as_texts = cases(50, **TEXTS)(recipes_as_texts)
test_recipes_as_mappings = cases(50, **MAPPINGS)(recipes_as_mappings)
test_many_recipes_as_texts = pytest.mark.slow(cases(2500, **TEXTS)(recipes_as_texts))
test_many_recipes_as_mappings = pytest.mark.slow(cases(2000, **MAPPINGS)(recipes_as_mappings))


# --- YAML ---------------------------------------------------------------------------------------------------------------


@functools.cache
def yaml_texts():
    recipes = [
        Recipe(),
        Recipe("best", "50%"),
        Recipe("cvr:alpha=1+energy:eps=1e-7", "50%", targets=("*.mlp.*",), allocation="owl:spread=0.1"),
    ]
    return [text for one in recipes for text in (one.to_yaml(), yaml.safe_dump(one.to_dict(), sort_keys=False))]


def yaml_files(content, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with contextlib.suppress(StatpruneError):
        read_yaml(path).to_dict()
        event("understood")


YAML = {
    "content": st.one_of(
        mutated(st.deferred(lambda: st.sampled_from(yaml_texts()))).map(str.encode),
        st.lists(st.sampled_from([*TOKENS, *KEYS, "a", ": "]), max_size=20).map("".join).map(str.encode),
        st.binary(max_size=40),
        wild().map(lambda data: json.dumps(data, default=str, skipkeys=True).encode() if _is_short(data) else b""),
    )
}


def _is_short(data):
    try:
        return len(repr(data)) < 4000
    except ValueError:  # whole numbers too long to write
        return False


test_yaml_files = cases(60, **YAML)(yaml_files)
test_many_yaml_files = pytest.mark.slow(cases(2500, **YAML)(yaml_files))


# --- recipes that are carried out ---------------------------------------------------------------------------------------


def recipes_on_a_model(data, scale, seed):
    try:
        recipe = Recipe.from_dict(data)
    except StatpruneError:
        return
    model = llama()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(10.0**scale)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = statprune.prune(model, [tokens(2, 8)], recipe)
        except StatpruneError as e:
            message = f"{type(e).__name__}: {e}"
        else:
            message = None
    if message is not None:
        # In the model itself, in the middle of it, there is one case that cannot be seen before; the message says so.
        assert changed(model, before) == set() or "Reload the model" in message
        event(f"refused: {message.split(':')[0]}{', halfway' if changed(model, before) else ''}")
        return
    event("pruned")
    weights, pattern = dict(model.named_parameters()), recipe.build_pattern()
    assert changed(model, before) <= {site.parameter for site in report.sites}
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    if recipe.allocation == "uniform" and recipe.criterion["name"] != "sparsegpt":
        assert all(pattern.holds(weights[site.parameter]) for site in report.sites)
    for site in report.sites:
        assert int((weights[site.parameter] == 0).sum()) >= site.num_pruned


APPLIED = {
    "data": RECIPES | st.fixed_dictionaries({"method": st.sampled_from(sorted(PRESETS)), "pattern": PATTERNS}),
    "scale": st.sampled_from([0, 0, 0, -30, -8, 4, 9, 17]),
    "seed": st.integers(0, 9),
}

test_recipes_on_a_model = cases(40, **APPLIED)(recipes_on_a_model)
test_many_recipes_on_a_model = pytest.mark.slow(cases(1000, **APPLIED)(recipes_on_a_model))


# --- command lines ------------------------------------------------------------------------------------------------------

STUBBED = ("quickstart", "compare", "tune", "experiment", "benchmark", "merge", "push")
"""Commands that take long, or leave the machine: their options are read, and they are not run."""

LINES = [
    "prune tiny --output out --samples 2 --seqlen 8 --pattern 2:4 --method cvr+energy --json",
    "prune tiny --output out --samples 2 --seqlen 8 --criterion wanda --compensation energy:column --ignore *.q_proj",
    "prune tiny --output out --samples 2 --seqlen 8 --recipe recipe.yaml --text text.txt --calibration text.txt",
    "prune tiny --output out --dry-run --allocation owl:spread=0.1 --pattern 50% --schedule one-shot --targets *.mlp.* *",
    "prune --config options.yaml --output out --max-shard-size 1MB --dtype float32 --device cpu --batch-size 1 --seed 3",
    "evaluate tiny --text text.txt --seqlen 8 --batch-size 64",
    "evaluate --text text.txt tiny --seqlen 8 --batch-size 32 --json --dtype bfloat16",
    "prune tiny --output out --samples 2 --seqlen 8 --method best --pattern 50% --target dense:share=0.5 --text text.txt",
    "prune tiny --output out --samples 2 --seqlen 8 --method paper --text text.txt --no-compare",
    "inspect tiny --pattern 4:8 --json",
    "inspect sparse --quiet",
    "verify sparse --json",
    "verify sparse --digest " + "0" * 64,
    "report sparse --output page.html",
    "push sparse me/mine --private",
    "merge sparse adapter --output out",
    "compare tiny --methods wanda best paper --patterns 2:4 50% --text text.txt --calibration text.txt --samples 2 --seqlen 8",
    "tune tiny --output out --minutes 0.01 --calibration text.txt --samples 4 --seqlen 8 --pattern 2:4 --no-gradients",
    "experiment perplexity --model tiny --output out --patterns 2:4 --samples 2 --seeds 0 1",
    "benchmark tiny --samples 2 --seqlen 8 --rounds 1",
    "quickstart --output out --steps 3",
    "--version",
    "--help",
    "prune --help",
]
WORDS = [
    *["--json", "--quiet", "--pattern", "2:4", "4:4", "1e400", "-1", "0", "99999999999999999999", "", "--", "-", "--help", "é"],
    *["--samples", "--seed", "--config", "options.yaml", "--recipe", "--text", "tiny", "sparse", "nowhere", "text.txt", "out"],
    *["best", "paper:alpha=1", "fast+energy", "--target", "dense", "dense:share=nan", "--no-compare", "--method"],
    *["cvr:alpha=1e999", "auto", "auto:minutes=1e9", "[a, b]", "['energy', 'least-squares']", "{name: cvr}", "{", "*a", "nan"],
    *[
        "--dtype",
        "float8",
        "--device",
        "meta",
        "--targets",
        "[",
        "--overwrite",
        "--revision",
        "main",
        "--x",
        "--output=",
        "\x00",
    ],
]


@st.composite
def command_lines(draw):
    words = draw(st.sampled_from(LINES)).split()
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(words)))
        kind = draw(st.sampled_from(["insert", "cut", "replace", "mutate", "swap"]))
        if kind == "insert" or at == len(words):
            words.insert(at, draw(st.sampled_from(WORDS)))
        elif kind == "cut":
            del words[at]
        elif kind == "replace":
            words[at] = draw(st.sampled_from(WORDS))
        elif kind == "mutate":
            words[at] = draw(mutated(st.just(words[at])))
        else:
            other = draw(st.integers(0, len(words) - 1))
            words[at], words[other] = words[other], words[at]
    return words


class Fault(Exception):
    """What no user should see."""


def strictly(error):
    if isinstance(error, StatpruneError | OSError):
        return f"{error}"
    raise Fault(f"{type(error).__name__}: {error}") from error


def stub(function):
    """The command, which reads its recipe and does nothing more."""

    @functools.wraps(function)
    def command(**given):
        for value in given.values():
            if hasattr(value, "read"):
                value.read()
        return {}

    return command


def small(function):
    """The command, where it has not much to do."""

    @functools.wraps(function)
    def command(**given):
        many = [getattr(value, name) for value in given.values() for name in ("samples", "batch_size") if hasattr(value, name)]
        recipe = given.get("recipe")
        is_search = "auto" in str(recipe and (recipe.method, recipe.criterion))
        return {} if is_search or any(isinstance(number, int) and number > 64 for number in many) else function(**given)

    return command


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model_folder):
    """tiny: a model; sparse: what `prune` made of it; text.txt, recipe.yaml, options.yaml."""
    place = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_model_folder, place / "tiny")
    (place / "text.txt").write_text("to be or not to be, that is the question\n" * 20)
    (place / "recipe.yaml").write_text(Recipe("wanda+energy").to_yaml())
    (place / "options.yaml").write_text("model: tiny\npattern: '4:8'\nsamples: 2\nseqlen: 8\n")
    with contextlib.chdir(place), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert main(["prune", "tiny", "--output", "sparse", "--samples", "2", "--seqlen", "8", "--quiet"]) == 0
    return place


@pytest.fixture
def strict(monkeypatch):
    """The command shows no error but ours, and runs nothing that takes long."""
    monkeypatch.setattr(endings, "explain", strictly)
    for name, function in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, name, (stub if name in STUBBED else small)(function))


def run(words):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            return main(words), said.getvalue()
        except SystemExit as e:
            return e.code or 0, said.getvalue()


def content(folder):
    """A digest of each file of a folder."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()
    }


INPUTS = ("tiny", "sparse", "text.txt", "recipe.yaml", "options.yaml", "changed")


def clear(place):
    """What a case has left, removed."""
    for path in place.iterdir():
        if path.name not in INPUTS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def command_line(words, folders, strict):
    before = content(folders)
    with contextlib.chdir(folders):
        status, said = run(words)
    left = content(folders)
    event(f"{words[0] if words and words[0] in COMMANDS else 'no command'}: {status}")
    assert status in (0, 1, 2)
    assert "Traceback" not in said
    # Whatever was written stands beside what was there, and an error leaves nothing.
    new = left.keys() - before.keys()
    assert {path: digest for path, digest in left.items() if path not in new} == before
    assert status == 0 or not new
    clear(folders)


COMMAND_LINES = {"words": command_lines()}

test_command_lines = cases(60, **COMMAND_LINES)(command_line)
test_many_command_lines = pytest.mark.slow(cases(1500, **COMMAND_LINES)(command_line))


# --- folders ------------------------------------------------------------------------------------------------------------

SMALL_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.floats(), st.text(max_size=8),
    st.sampled_from(["LlamaForCausalLM", "GPT2LMHeadModel", "llama", "clip", "../x", "/etc/passwd", "float99", [], {}, [1]]),
)  # fmt: skip


@st.composite
def tampering(draw):
    """(file number, kind, numbers and values to do it with)"""
    kinds = ["flip", "truncate", "delete", "add", "json", "json", "json", "empty", "swap"]
    return draw(st.integers(0, 20)), draw(st.sampled_from(kinds)), draw(st.integers(0, 10**6)), draw(SMALL_VALUES)


def tamper(folder, number, kind, at, value):
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        return
    path = files[number % len(files)]
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "add":
        names = ["adapter_config.json", "pytorch_model.bin", "x.safetensors", "modeling_x.py", "model.safetensors.index.json"]
        (folder / names[at % len(names)]).write_bytes(json.dumps(value).encode())
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(data[: at % (len(data) + 1)])
    elif kind == "swap":
        path.write_bytes(files[at % len(files)].read_bytes())
    elif kind == "json":
        texts = [file for file in files if file.suffix == ".json"]
        if texts:
            edit_json(texts[number % len(texts)], at, value)
    elif data:
        data[at % len(data)] ^= 1 << (at % 8)
        path.write_bytes(data)


def edit_json(path, at, value):
    """Another value in one place, or none."""
    try:
        data = json.loads(path.read_bytes())
    except ValueError:
        return
    here = data
    while isinstance(here, dict | list) and here:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = keys[at % len(keys)]
        at //= max(len(keys), 1)
        if not isinstance(here[key], dict | list) or at % 4 == 0:
            if value == "":
                del here[key]
            else:
                here[key] = value
            break
        here = here[key]
    path.write_text(json.dumps(data))


ACTIONS = {
    "load": lambda: statprune.load("changed"),
    "config": lambda: load_config("changed"),
    "verify": lambda: statprune.verify("changed"),
    "the verify command": "verify changed --json",
    "inspect": "inspect changed",
    "report": "report changed --output page.html",
    "evaluate": "evaluate changed --text text.txt --seqlen 8 --batch-size 64",
    "prune": "prune changed --output out --samples 1 --seqlen 8 --method wanda",
}


def opened(source, changes, action, folders, strict):
    clear(folders)
    changed_folder = folders / "changed"
    shutil.rmtree(changed_folder, ignore_errors=True)
    shutil.copytree(folders / source, changed_folder)
    for change in changes:
        tamper(changed_folder, *change)
    before, what = content(folders), ACTIONS[action]
    with contextlib.chdir(folders), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(what, str):
            status, said = run(what.split())
            assert status in (0, 1)
            assert "Traceback" not in said
        else:
            status = 0
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(StatpruneError):
                what()
                event("opened")
        event(f"{action} {source}: {status}")
        new = content(folders).keys() - before.keys()
        assert status == 0 or not new
        if status == 0 and action == "prune":
            statprune.verify("out")
    assert {path: digest for path, digest in content(folders).items() if path not in new} == before
    shutil.rmtree(changed_folder)
    clear(folders)


FOLDERS = {
    "source": st.sampled_from(["tiny", "sparse"]),
    "changes": st.lists(tampering(), min_size=1, max_size=2),
    "action": st.sampled_from(sorted(ACTIONS)),
}

test_folders = cases(30, **FOLDERS)(opened)
test_many_folders = pytest.mark.slow(cases(500, **FOLDERS)(opened))


def test_ten_thousand():
    """The slow tests together are as many as they say."""
    many = [test for name, test in globals().items() if name.startswith("test_many")]
    assert sum(test._hypothesis_internal_use_settings.max_examples for test in many) == 10_000
