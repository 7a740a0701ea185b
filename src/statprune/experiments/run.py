"""Run experiments: for each model, cell after cell, each written when it is finished; what is in the file is not run again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statprune.api import PruningPlan, plan
from statprune.configuration import load_config
from statprune.data import calibration_windows, evaluation_windows, needs_tokenizer
from statprune.divergence import evaluate_beside
from statprune.errors import ExperimentError, StatpruneError, number_of
from statprune.experiments.cost import Cost, measured
from statprune.experiments.definition import Cell, Experiment
from statprune.experiments.plots import PICTURED, plot
from statprune.experiments.published import Published
from statprune.experiments.runtime import measure_block
from statprune.experiments.tables import markdown, write_csv
from statprune.experiments.zero_shot import ZeroShot
from statprune.loading import choose_device, fingerprint, load_causal, load_tokenizer, window_length
from statprune.model.inputs import bind_batches
from statprune.model.layers import Layers, find_layers
from statprune.perplexity import evaluate
from statprune.progress import Progress, Say, silent, unsaid
from statprune.recipe import Recipe, Search
from statprune.results import Result, ResultsFile, alone_in, digest
from statprune.versions import versions

CELLS = "cells.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What a run of experiments gave."""

    tables: dict[str, str]
    """Markdown, by experiment."""

    pictures: list[str]
    """The experiments that have one."""

    failures: list[str]
    """One line for each cell, model or experiment that failed."""

    @property
    def contents(self) -> str:
        """What the output folder holds, in words; empty where nothing was measured."""
        if not self.tables:
            return ""
        return f"tables{', pictures' if self.pictures else ''} and every measurement"


def run(
    experiments: Sequence[Experiment],
    output: str | Path,
    *,
    progress: Progress = silent,
    say: Say = unsaid,
) -> Outcome:
    """Measure every cell that is not in the output folder yet, and write tables and pictures of all.

    Args:
        experiments: of one protocol (see `Experiment.protocol`). Each model is loaded once for all of them.
        output: a folder; gets `cells.jsonl`, and for each experiment of which anything was measured NAME.csv, NAME.md and,
            where there is one and matplotlib is installed, NAME.png.
        progress: called before each cell, with how many are done and what is next, and at the end.
        say: called with each new result in words, and where there will be no pictures.

    Returns:
        The tables, and what failed; a cell that fails is recorded, and the rest goes on.

    Raises:
        ResultsError: the folder holds results of another protocol or other versions; or another run is at work in it.
        ExperimentError: the experiments have several protocols.
    """
    with alone_in(output):
        return _run(experiments, Path(output), progress, say)


def _run(experiments: Sequence[Experiment], output: Path, progress: Progress, say: Say) -> Outcome:
    file = ResultsFile(output / CELLS, _common_protocol(experiments), versions(), say)
    if not (has_pictures := find_spec("matplotlib") is not None) and any(one.name in PICTURED for one in experiments):
        say(
            "there will be tables and no pictures, which need matplotlib: pip install 'statprune[experiments]'. With it, the "
            "same command draws them from what is measured."
        )
    failures: list[str] = []
    tasks = _open_tasks(experiments, failures)
    ready = [experiment for experiment in experiments if experiment.measure != "zero-shot" or tasks is not None]
    models = list(dict.fromkeys(model for experiment in ready for model in experiment.model))
    jobs = [
        (model, experiment, cell)
        for model in models
        for experiment in ready
        if model in experiment.model
        for cell in experiment.cells()
    ]
    found: dict[str, list[Result]] = {experiment.name: [] for experiment in ready}
    bench: _Bench | None = None
    unusable: set[str] = set()
    finished = ""
    for done, (model, experiment, cell) in enumerate(jobs):
        title = f"{experiment.name}: {_short(model, models)}: {' '.join(_words(cell))}"
        progress(done, len(jobs), finished)
        finished = title
        if model in unusable:
            continue
        if bench is None or bench.path != model:
            try:
                bench = None  # before the next model comes into memory
                bench = _Bench(model, _short(model, models), experiment)
            except Exception as e:  # whatever loading it raises: the next model may do
                unusable.add(model)
                failures.append(f"{model}: {_reason(e)}")
                continue
        result, is_new = bench.result(cell, experiment, tasks, file)
        found[experiment.name].append(result)
        if result.error is not None:
            failures.append(f"{title}: {result.error}")
        elif is_new:
            say(f"{title}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in result.values.items()))
    progress(len(jobs), len(jobs), finished)
    shown = {name: results for name, results in found.items() if any(result.error is None for result in results)}
    tables: dict[str, str] = {name: _write(name, results, output) for name, results in shown.items()}
    pictured = [name for name in shown if has_pictures and name in PICTURED]
    return Outcome(tables, [name for name in pictured if _draw(name, shown[name], output, say)], failures)


def _common_protocol(experiments: Sequence[Experiment]) -> dict[str, Any]:
    protocol = experiments[0].protocol()
    if any(experiment.protocol() != protocol for experiment in experiments):
        raise ExperimentError(
            "These experiments have several protocols, and one output folder holds one: give --calibration, --text, --windows, "
            "--seqlen, --batch-size, --dtype and --device for all, or run them one by one into folders of their own."
        )
    device = torch.device(choose_device(experiments[0].device))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {**protocol, "hardware": hardware}


def _open_tasks(experiments: Sequence[Experiment], failures: list[str]) -> ZeroShot | None:
    for experiment in experiments:
        if experiment.measure == "zero-shot":
            try:
                return ZeroShot(experiment.tasks or [], limit=experiment.questions, text=experiment.text)
            except StatpruneError as e:
                failures.append(f"{experiment.name}: {e}")
    return None


class _Bench:
    """One model, and what its cells share: the evaluation windows, calibration windows and the traced graph."""

    def __init__(self, path: str, name: str, experiment: Experiment) -> None:
        self.path, self.name, self.experiment = path, name, experiment
        config = load_config(path)
        self.seqlen = window_length(config, experiment.seqlen)
        self.model = load_causal(path, experiment.dtype, experiment.device)
        self.fingerprint = fingerprint(path, config)
        self._windows: dict[Any, Tensor] = {}
        self._layers: dict[Any, Layers] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """Read when a text is tokenized."""
        return load_tokenizer(self.path)

    def result(self, cell: Cell, experiment: Experiment, tasks: ZeroShot | None, file: ResultsFile) -> tuple[Result, bool]:
        """The cell's result, and whether it was measured now; a failure is a result with an error."""
        result = Result(
            cell.measure, self.name, cell.label, cell.pattern, cell.samples, cell.seed,
            recipe=cell.how.to_dict() if cell.how else {}, details={"model": self.fingerprint, "seqlen": self.seqlen},
        )  # fmt: skip
        try:
            result.details.update(self._data_details(cell, experiment, tasks))
            if (known := file.get(result.key)) is not None:
                return replace(known, label=cell.label), False
            with measured(self.model.device) as cost:
                values, peak_memory, chosen = self._measure(cell, experiment, tasks)
            peak_memory = cost.peak_memory if peak_memory is None else peak_memory
            result = replace(result, values=values, seconds=cost.seconds, peak_memory=peak_memory, chosen=chosen)
        except Exception as e:  # whatever a method, a model or a task raises: it is this cell's result, and the grid goes on
            result = replace(result, error=_reason(e))
        file.add(result)
        return result, True

    def _data_details(self, cell: Cell, experiment: Experiment, tasks: ZeroShot | None) -> dict[str, Any]:
        """What the tokens and the tasks are, so that a text that has changed since gives another cell."""
        details: dict[str, Any] = {}
        if (windows := self._calibration(cell)) is not None:
            details["calibration_tokens"] = digest({"tokens": windows})
        if cell.measure == "perplexity":
            details["evaluation_tokens"] = digest({"tokens": self._evaluation()})
            if cell.how is not None:
                details["beside"] = "dense"  # cells from before this was measured lack what the tables show
        elif cell.measure == "runtime":
            details["rounds"] = experiment.rounds
        elif tasks is not None:
            details["tasks"] = f"{tasks.digest()} in lm-eval {version('lm-eval')}, with standard errors"
        return details

    def _measure(
        self, cell: Cell, experiment: Experiment, tasks: ZeroShot | None
    ) -> tuple[dict[str, float], int | None, str | None]:
        """The values, the peak memory where it is not that of the whole cell, and what `auto` chose."""
        batch_size = experiment.batch_size
        windows = self._calibration(cell)
        if windows is None:
            windows = torch.zeros(batch_size, self.seqlen, dtype=torch.int64)  # any tokens do, to find the layers
        batches = windows.split(batch_size)
        if cell.measure == "runtime":
            assert isinstance(cell.how, Recipe)
            inputs = bind_batches(self.model, batches)
            return *measure_block(self._find_layers(batches), inputs, cell.how, rounds=experiment.rounds), None
        twin, cost = PruningPlan(), Cost()
        if cell.how is not None:
            layers = self._find_layers(batches)
            with measured(self.model.device) as cost:
                twin = plan(self.model, batches, cell.how, traced=layers)
        chosen = _described(Recipe.from_dict(twin.report.recipe)) if twin.report.chosen_by else None
        if cell.measure == "zero-shot":
            assert tasks is not None
            values = tasks(self.model, self.tokenizer, weights=twin.weights, batch_size=batch_size)
        elif cell.how is None:
            values = {"perplexity": evaluate(self.model, self._evaluation(), batch_size=batch_size)}
        else:
            found = evaluate_beside(self.model, self._evaluation(), batch_size=batch_size, weights=twin.weights)
            values = {"perplexity": found.perplexity, "divergence": found.divergence, "loss": found.loss}
            if found.standard_error is not None:
                values["loss standard error"] = found.standard_error
            values["pruning seconds"] = cost.seconds
        return values, cost.peak_memory, chosen

    def _find_layers(self, batches: Sequence[Tensor]) -> Layers:
        """Exported once for all cells whose batches have the same shapes."""
        shapes = tuple(dict.fromkeys(tuple(batch.shape) for batch in batches))
        if shapes not in self._layers:
            self._layers[shapes] = find_layers(self.model, bind_batches(self.model, batches))
        return self._layers[shapes]

    def _tokenizer_for(self, sources: Sequence[str]) -> Any:
        return self.tokenizer if needs_tokenizer(sources) else None

    def _calibration(self, cell: Cell) -> Tensor | None:
        """The cell's windows; None where it needs none. A search gets halves that share no token."""
        if cell.samples is None or cell.seed is None:
            return None
        sources = self.experiment.calibration
        key = cell.samples, cell.seed, isinstance(cell.how, Search)
        if key not in self._windows:
            self._windows[key] = calibration_windows(
                sources, tokenizer=self._tokenizer_for(sources), model=self.model,
                samples=cell.samples, seqlen=self.seqlen, seed=cell.seed, halves=isinstance(cell.how, Search),
            )  # fmt: skip
        return self._windows[key]

    def _evaluation(self) -> Tensor:
        if "evaluation" not in self._windows:
            sources = self.experiment.text
            self._windows["evaluation"] = evaluation_windows(
                sources, tokenizer=self._tokenizer_for(sources), model=self.model, seqlen=self.seqlen,
                windows=self.experiment.windows,
            )  # fmt: skip
        return self._windows["evaluation"]


def _write(experiment: str, results: Sequence[Result], output: Path) -> str:
    write_csv(results, output / f"{experiment}.csv")
    table = markdown(experiment, results, Published.load())
    (output / f"{experiment}.md").write_text(table + "\n", encoding="utf-8")
    return table


def _draw(experiment: str, results: Sequence[Result], output: Path, say: Say) -> bool:
    """Whether there was anything to draw."""
    try:
        plot(experiment, results, output / f"{experiment}.png")
    except ExperimentError as e:
        say(f"{experiment}: no picture: {e}")
        return False
    return True


def _described(recipe: Recipe) -> str:
    return f"{recipe.method} ({recipe.conditions})"


def _short(model: str, models: Sequence[str]) -> str:
    """The last part of a folder's or hub name, or the whole where two models share it."""
    last = [Path(other).resolve().name if Path(other).is_dir() else other.rpartition("/")[2] for other in models]
    name = last[models.index(model)]
    return name if last.count(name) == 1 else model


def _words(cell: Cell) -> list[str]:
    samples = f"{number_of(cell.samples, 'sequence')}, seed {cell.seed}" if cell.samples is not None else ""
    return [word for word in (cell.label, cell.pattern, samples) if word]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, StatpruneError) else f"{type(error).__name__}: {text}"
