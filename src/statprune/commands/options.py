"""Options that several commands share, each documented once, under its field; `cli` makes the command line out of them.

A `$name` in a text stands for a list that the registry has, such as `$criteria`. Nothing here is imported before it is used
that imports torch: a help and a wrong option do without.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from statprune.commands import console, processes
from statprune.errors import CalibrationError
from statprune.model.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from statprune.how import How
    from statprune.recipe import Recipe, Search

DType = Literal["auto", "float32", "bfloat16", "float16"]

MOST = 10_000_000
"""Of samples, of tokens in a window, of windows in a forward pass: more is a slip of the hand, and fills the memory."""


@dataclass(frozen=True)
class Opened:
    """A causal language model, and what goes with it."""

    model: Any
    path: str
    revision: str | None

    seqlen: int
    """Tokens in a window."""

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model, read when a text is tokenized; ModelError where there is none."""
        from statprune.loading import load_tokenizer

        return load_tokenizer(self.path, self.revision)

    def tokenizer_for(self, sources: Sequence[str]) -> Any:
        """The tokenizer, or None where the sources are tokens already: samples of the model, or a token file."""
        from statprune.data import needs_tokenizer

        return self.tokenizer if needs_tokenizer(sources) else None

    @property
    def place(self) -> dict[str, str]:
        """The dtype, the device and, of a model of the hub, the commit, for the record."""
        commit = self.model.config._commit_hash
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."), "device": str(self.model.device),
            **({"revision": commit} if commit is not None else {}),
        }  # fmt: skip

    def held_out(self, text: list[str]) -> "Tensor":
        """Windows [windows, seqlen] to measure a perplexity on; CalibrationError where the text gives none."""
        from statprune.data import evaluation_windows

        return evaluation_windows(text, tokenizer=self.tokenizer_for(text), model=self.model, seqlen=self.seqlen)


def check_positive(**numbers: int) -> None:
    """Raise CalibrationError for an option below 1."""
    for name, number in numbers.items():
        _check(name, number, 1, MOST)


def _check(name: str, number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most:,}"
        raise CalibrationError(f"--{name.replace('_', '-')} {number}: expected {bound}.")


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """windows"""

    seqlen: int | None = None
    """Tokens in each window. Default: 2048, or the model's context if that is shorter."""

    batch_size: int = 1
    """Windows in one forward pass."""

    def check(self) -> None:
        """Raise CalibrationError for a number that cannot be, before a model is looked for."""
        if self.seqlen is not None:
            _check("seqlen", self.seqlen, 2, MOST)  # a token is predicted from those before it
        _check("batch_size", self.batch_size, 1, MOST)

    def check_size(self, seqlen: int) -> None:
        """Raise CalibrationError for windows of so many tokens that cannot be."""
        from statprune.data import check_size

        check_size(1, seqlen, 0)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """the model"""

    model: str
    """Folder or hub name of the model (safetensors only)."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    dtype: DType = "auto"
    """To compute in, and to save as; auto takes the checkpoint's."""

    revision: str | None = None
    """Branch, tag or commit of a model of the hub. Default: its main branch."""

    def open(self, windows: WindowOptions, **numbers: int) -> Opened:
        """The model, without its tokenizer; other options that must be at least 1 by name. Errors: `check`, `load_causal`."""
        from statprune.loading import load_causal

        seqlen = self.check(windows, **numbers)
        console.say(f"loading {self.model}")
        return Opened(load_causal(self.model, self.dtype, self.device, self.revision), self.model, self.revision, seqlen)

    def check(self, windows: WindowOptions, **numbers: int) -> int:
        """The tokens in a window, and what `open` checks before it reads weights.

        Raises:
            CalibrationError: a number that cannot be, or windows that are longer than the model's context.
            ModelError: there is no such model.
        """
        from statprune.configuration import load_config
        from statprune.loading import window_length

        windows.check()
        check_positive(**numbers)
        seqlen = window_length(load_config(self.model, self.revision), windows.seqlen)
        windows.check_size(seqlen)
        return seqlen


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(WindowOptions):
    """calibration"""

    calibration: list[str] | None
    """Text files (several: --calibration a.txt b.txt), a token file (FILE.safetensors:KEY), a data set's name such as c4, or
    'generated' for the model's own samples, which needs no data."""

    samples: int = 128
    """Calibration windows."""

    seed: int = 0
    """Of the choice of windows."""

    def check(self) -> None:
        """Raise CalibrationError for a number that cannot be, before a model is looked for."""
        super().check()
        _check("samples", self.samples, 1, MOST)
        _check("seed", self.seed, -(2**63), 2**63 - 1)

    def check_size(self, seqlen: int) -> None:
        """Raise CalibrationError for windows of so many tokens that cannot be."""
        from statprune.data import check_size

        check_size(self.samples, seqlen, self.seed)

    def windows(self, opened: Opened, *, halves: bool = False) -> "Tensor":
        """Windows [samples, seqlen], with a progress bar; random tokens where there is no `calibration`.

        Args:
            opened: the model.
            halves: for a search, which holds every second one out (see `calibration_windows`).

        Raises:
            CalibrationError: they cannot be had.
        """
        import torch

        from statprune.data import calibration_windows

        if self.calibration is None:
            generator = torch.Generator().manual_seed(self.seed)
            vocabulary = opened.model.config.get_text_config().vocab_size
            return torch.randint(vocabulary, (self.samples, opened.seqlen), generator=generator)
        with console.progress("calibration windows") as progress:
            return calibration_windows(
                self.calibration, tokenizer=opened.tokenizer_for(self.calibration), model=opened.model,
                samples=self.samples, seqlen=opened.seqlen, seed=self.seed, halves=halves, progress=progress,
            )  # fmt: skip

    def places(self, opened: Opened, *, halves: bool = False) -> dict[str, str]:
        """How a text's windows are drawn, for the record; empty where there is no text. Arguments and errors: `windows`."""
        from statprune.data import how_drawn

        sources = self.calibration or ["generated"]
        drawn = how_drawn(sources, opened.tokenizer_for(sources), halves=halves)
        return {} if drawn is None else {"places": drawn}

    def batches(self, opened: Opened, *, halves: bool = False) -> "list[Tensor]":
        """This process's windows in batches; arguments and errors as for `windows`."""
        from statprune.ranks import send_around

        # Drawn once, whatever it takes, and the same in all processes.
        windows = self.windows(opened, halves=halves) if processes.place().is_first else self._blank(opened.seqlen)
        send_around([(0, windows)], None, "the calibration windows")
        return self._own(windows, halves)

    def blank_batches(self, seqlen: int, *, halves: bool = False) -> "list[Tensor]":
        """Tokens in the shapes that `batches` will have: enough to find the layers, before there is any data."""
        return self._own(self._blank(seqlen), halves)

    def _blank(self, seqlen: int) -> "Tensor":
        import torch

        return torch.zeros(self.samples, seqlen, dtype=torch.int64)

    def _own(self, windows: "Tensor", halves: bool) -> "list[Tensor]":
        return list(processes.share_of(windows, halves=halves).split(self.batch_size))


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """which layers, and how sparse"""

    pattern: dict[str, Any] | str | None = None
    """'50%' for half of the weights anywhere, '2:4' for two of every four, or a mapping of one of $patterns. Default: 2:4."""

    targets: list[str] | None = None
    """Globs on layer names to prune (several: --targets '*.mlp.*' '*.q_proj'). Default: all but the output layer and tied
    weights."""

    ignore: list[str] | None = None
    """Globs on layer names to leave dense (several: --ignore '*.0.*' '*.down_proj')."""

    on_indivisible: Literal["error", "skip"] | None = None
    """Refuse (error) or leave dense (skip) layers whose width an N:M pattern does not divide. Default: error."""

    def given(self) -> dict[str, Any]:
        """What was given, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(LayerOptions):
    """the recipe"""

    recipe: str | None = None
    """YAML file with a recipe; other options win over what stands in it."""

    method: str | None = None
    """A preset: $presets. Or a criterion and compensations in one word, such as wanda, cvr+energy,
    cvr:alpha=0.25+energy:column or optimal-brain+least-squares:steps=15; or auto (auto:minutes=5), which tries methods out on
    the calibration windows first, see 'statprune tune'. Default: default."""

    criterion: dict[str, Any] | str | None = None
    """Which weights to keep: $criteria; or auto. With settings as in cvr:alpha=0.25, or as a mapping. Given alone, nothing is
    compensated."""

    compensation: list[dict[str, Any] | str] | None = None
    """What is done with the kept weights: $compensations (several, one after the other:
    --compensation least-squares energy:column). Given alone, it goes with optimal-brain."""

    schedule: Schedule | None = None
    """walk: each layer is calibrated on all pruned layers before it; block: on the pruned blocks before its own, as Wanda and
    SparseGPT publish it; one-shot: on the dense model. Default: the preset's, or walk."""

    allocation: dict[str, Any] | str | None = None
    """How the sparsity is shared out: $allocations. With settings as in owl:spread=0.1; with an N:M pattern
    owl:sparsity=0.4, and some layers stay dense. Default: the preset's, or uniform."""

    target: dict[str, Any] | str | None = None
    """What each layer is to give: $targets. With settings as in dense:share=0.5. Default: the preset's, or pruned."""

    def read(self) -> "Recipe | Search":
        """What the options ask for; they win over the recipe file.

        Raises:
            RecipeError: the file cannot be read, or a name or a value does not exist.
        """
        from statprune.how import read_how, read_yaml
        from statprune.recipe import AUTO, Search, load_yaml

        given = {key: value for key, value in self.given().items() if key != "recipe"}
        if self.recipe is None:
            return read_how(**given)
        found = read_yaml(self.recipe)
        # What the file says, as it stands there: what a preset leaves open may depend on the options.
        how: How = found if isinstance(found, Search) else load_yaml(self.recipe, dict)
        if str(self.method or self.criterion).partition(":")[0] == AUTO:
            # Of the file, what a search does not look for itself.
            how = {field.name: getattr(found, field.name) for field in fields(LayerOptions)}
        return read_how(how, **given)


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """what is printed"""

    json: bool = False
    """Print one JSON object and nothing else; progress goes to standard error. An error is {"error": ..., "kind": ...}."""

    quiet: bool = False
    """Print errors and nothing else; with --json the object too."""


def words(options: CalibrationOptions | ModelOptions) -> list[str]:
    """What was given of them as words of a command line, without what stands by its position."""
    given = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "model"}
    usual = {field.name: field.default for field in fields(options)}
    return [
        word
        for name, value in given.items()
        if value is not None and value != usual[name]
        for word in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value]))
    ]


MODEL_SAMPLES = CalibrationOptions(calibration=["generated"])
RANDOM_TOKENS = CalibrationOptions(calibration=None, samples=24)
