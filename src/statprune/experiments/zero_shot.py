"""Zero-shot accuracy of a causal language model, with lm-evaluation-harness: `pip install 'statprune[zero-shot]'`.

A task is one of three, each perhaps with the metric to report, as in `hellaswag:acc_norm`:

    boolq            a task that comes with the harness, by name; its data set is fetched from the hub, or from the cache
    FOLDER/my.yaml   a task file in the harness' format, with data on this disk; paths in it start where the file stands
    next-line        made here from plain text: which of four lines comes next? Needs neither a connection nor a data set

A task file is data, and runs no code: tags such as `!function` are refused, and templates are rendered in jinja's sandbox.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call

from statprune.errors import ExperimentError, nearest
from statprune.experiments.grid import STANDARD_ERROR
from statprune.experiments.next_line import NEXT_LINE, write_next_line
from statprune.experiments.shared_context import sharing_contexts
from statprune.model.undisturbed import eval_mode, without_cache
from statprune.strict_yaml import load as load_yaml

TASKS = {
    "boolq": "acc", "rte": "acc", "hellaswag": "acc", "winogrande": "acc", "arc_easy": "acc", "arc_challenge": "acc",
    "openbookqa": "acc",
}  # fmt: skip
"""The paper's tasks, and the metric that is reported for each: plain accuracy for all, as in Wanda's table (Sun et al. 2024).
Papers that report `acc_norm` for HellaSwag, ARC and OpenBookQA have higher numbers for the same model."""

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""The harness' metrics that are shares of right answers, chosen by log-likelihood: these can be averaged over tasks."""

_SEED = 1234
_FILE_TYPES = ("arrow", "csv", "json", "parquet", "text")
_HARMLESS_KEYS = {
    "task", "task_alias", "tag", "metadata", "dataset_path", "dataset_name", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "description", "doc_to_text", "doc_to_choice", "doc_to_target",
    "target_delimiter", "fewshot_delimiter", "num_fewshot", "output_type", "metric_list", "should_decontaminate",
    "doc_to_decontamination_query",
}  # fmt: skip


class ZeroShot:
    """Tasks, loaded once, and scored for several models.

    Args:
        tasks: names, task files, `next-line`.
        limit: the first so many documents of each task; for `next-line`, the number of questions (default
            2,600, or as many as the text is enough for).
        text: text files that `next-line` is made from.
        seed: of the choice of those questions.

    Raises:
        ExperimentError: the harness is not installed, a task or metric does not exist, a task file asks for code, or a data
            set cannot be had.
        CalibrationError: a text file cannot be read.
    """

    def __init__(
        self, tasks: Sequence[str], *, limit: int | None = None, text: Sequence[str | Path] = (), seed: int = 0
    ) -> None:
        if not tasks or len({*tasks}) < len(tasks) or (limit is not None and limit < 1):
            raise ExperimentError(f"ZeroShot({[*tasks]}, limit={limit}): expected different tasks, and a limit of 1 or more.")
        self.limit = limit
        self._tasks: dict[str, Any] = {}
        self._metrics: list[tuple[str, str]] = []
        sources: dict[str, Any] = {}
        with _quiet_harness() as harness, tempfile.TemporaryDirectory() as folder:
            found = []
            for given in tasks:  # all of them, before the first data set is fetched, which can take long
                match = re.fullmatch(r"(.+):(\w+)", given)
                name, metric = match.groups() if match else (given, None)
                if name == NEXT_LINE:
                    name = write_next_line(text, limit, seed, folder)
                is_file = name.endswith((".yaml", ".yml"))
                source = _read_task(Path(name), folder) if is_file else _harness_file(name)
                task = source["task"] if isinstance(source, dict) else name
                if sources.setdefault(task, source) != source:
                    raise ExperimentError(f"Two tasks are called {task!r}: give that of {given} another name in the file.")
                found.append((given, task, metric or TASKS.get(task)))
            for given, task, metric in found:
                if task not in self._tasks:
                    self._tasks[task] = _load(harness, given, task, sources[task])
                self._metrics.append((task, _choose_metric(self._tasks[task], given, metric)))

    def digest(self) -> str:
        """16 hexadecimal digits that differ where tasks, versions, metrics, prompts or documents do."""
        digest = hashlib.sha256()
        with _quiet_harness():
            for name, metric in self._metrics:
                task = self._tasks[name]
                task.build_all_requests(limit=1)  # the first document's prompts stand for the templates
                prompts = [request.args for request in task.instances]
                for part in ((name, metric, str(task.VERSION)), prompts, *itertools.islice(task.eval_docs, self.limit)):
                    digest.update(json.dumps(part, default=str).encode())
        return digest.hexdigest()[:16]

    def __call__(
        self, model: nn.Module, tokenizer: Any, *, weights: Mapping[str, Tensor] | None = None, batch_size: int = 1
    ) -> dict[str, float]:
        """Accuracies in [0, 1], by `TASK METRIC`, and their mean as `average`; each with its `standard error`.

        The standard error of an accuracy p of n questions is `sqrt(p (1 - p) / (n - 1))`; a single one has none. That of the
        average takes tasks for independent.

        Prompts longer than the model's context lose their beginning, as always with the harness. Log-likelihoods are taken in
        float32 also of a model in lower precision, where the harness' own default lets long choices tie.

        Args:
            model: a causal language model of transformers; is left as it was.
            tokenizer: the model's, of transformers; is left as it was.
            weights: read in place of the model's own, by parameter name: a pruned twin's.
            batch_size: choices in one forward pass; those that follow one context are one pass by themselves.

        Raises:
            ExperimentError: a weight is called as no parameter of the model is.
        """
        if strangers := sorted((weights or {}).keys() - dict(model.named_parameters(remove_duplicate=False)).keys()):
            raise ExperimentError(f"The model has no parameter called {', '.join(strangers)}, of which weights were given.")
        with _quiet_harness() as harness, eval_mode(model), without_cache(model):
            language_model = sharing_contexts(harness.HFLM)(
                pretrained=_WithWeights(model, weights or {}),
                tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",
            )
            found = harness.evaluate(
                lm=language_model, task_dict={"tasks": self._tasks}, limit=self.limit, bootstrap_iters=0, log_samples=False
            )
        values, errors, of_task = {}, {}, dict.fromkeys(self._tasks, 0.0)
        for task, metric in self._metrics:
            name, number = f"{task} {metric}", found["n-samples"][task]["effective"]
            values[name] = next(float(value) for key, value in found["results"][task].items() if key.split(",")[0] == metric)
            errors[name] = math.sqrt(values[name] * (1 - values[name]) / (number - 1)) if number > 1 else math.nan
            of_task[task] += errors[name]  # two metrics of one task err alike
        values["average"] = sum(values.values()) / len(values)
        errors["average"] = math.hypot(*of_task.values()) / len(self._metrics)
        return {**values, **{f"{name} {STANDARD_ERROR}": error for name, error in errors.items() if math.isfinite(error)}}


class _WithWeights:
    """What the harness reads of a model. No nn.Module: it would call eval() and tie_weights(), and both change the model."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.config = model.config
        self.device = next(model.parameters()).device
        self.forward = model.forward  # for its signature
        self._model, self._weights = model, dict(weights)

    def __call__(self, tokens: Tensor, **others: Any) -> Any:
        return functional_call(self._model, self._weights, (tokens,), others)


@functools.cache
def _harness_files() -> dict[str, Path]:
    """Where the harness describes each task. Its own index of thirteen thousand files takes ten seconds to build."""
    key = re.compile(rb"^[\"']?task[\"']?:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
    root = Path(str(find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]
    found = [(key.search(path.read_bytes()), path) for path in sorted(root.rglob("*.yaml"), reverse=True)]
    return {match[1].decode(): path for match, path in found if match}


@functools.cache
def _harness_file(name: str) -> Path:
    if name not in _harness_files():
        raise ExperimentError(
            f"No task is called {name!r}.{nearest(name, [*_harness_files(), NEXT_LINE])} Expected the name of a single task of "
            f"the harness, a task file NAME.yaml, or {NEXT_LINE}."
        )
    return _harness_files()[name]


def _read_task(path: Path, folder: str) -> dict[str, Any]:
    """A task file's settings, none of which can run code; paths of data files start where the task file stands."""
    way_out = (
        "No code that comes with a task is run. Expected fields and templates; dataset_path: "
        f"{', '.join(_FILE_TYPES)} with dataset_kwargs: data_files, or OWNER/NAME on the hub; metrics {', '.join(ACCURACIES)}."
    )
    try:
        settings = load_yaml(path.read_text(encoding="utf-8"))
        name, source, options = settings["task"], settings["dataset_path"], dict(settings.get("dataset_kwargs") or {})
        # A metric that the harness does not know, it would look for among programs on the hub.
        metrics = [(metric["metric"], metric.get("hf_evaluate", False)) for metric in settings.get("metric_list") or ()]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as e:
        raise ExperimentError(
            f"The task file {path} cannot be read: {type(e).__name__}: {' '.join(str(e).split())}. {way_out}"
        ) from e
    refused = [str(key) for key in settings if key not in _HARMLESS_KEYS]
    if source not in _FILE_TYPES and (not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or source.endswith(".py")):
        refused.append(f"dataset_path: {source}")
    refused += ["dataset_kwargs: trust_remote_code"] if options.get("trust_remote_code") else []
    refused += [f"metric: {metric}" for metric, from_hub in metrics if metric not in ACCURACIES or from_hub]
    if refused or not isinstance(name, str):
        raise ExperimentError(f"The task file {path} has {', '.join(refused) or f'task: {name}'}. {way_out}")
    options["trust_remote_code"] = False
    if source in _FILE_TYPES:
        options |= {key: _beside(path, options[key]) for key in ("data_files", "data_dir") if key in options}
        # Without these, a copy of every file is left in the cache of `datasets`.
        options |= {"cache_dir": folder, "keep_in_memory": True}
    return {**settings, "dataset_kwargs": options}


def _beside(path: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {split: _beside(path, file) for split, file in files.items()}
    if isinstance(files, list):
        return [_beside(path, file) for file in files]
    return files if "://" in str(files) else str(path.parent.resolve() / str(files))


def _load(harness: Any, given: str, name: str, source: Path | dict[str, Any]) -> Any:
    if isinstance(source, Path):
        manager = harness.TaskManager(include_defaults=False, include_path=source.parent)
        settings = manager.task_index[name].cfg
    else:
        manager, settings = harness.TaskManager(include_defaults=False), source
    try:
        task = manager.load([name if isinstance(source, Path) else settings])["tasks"][name]
    except Exception as e:  # whatever the data set's reader, the network and the templates raise
        data = " ".join(str(settings[key]) for key in ("dataset_path", "dataset_name") if settings.get(key))
        files = (settings.get("dataset_kwargs") or {}).get("data_files", "no data_files")
        raise ExperimentError(
            f"The task {given} cannot be loaded: {type(e).__name__}: {e}. "
            + (f"It reads {data}: {files}." if data in _FILE_TYPES else f"It needs the data set {data!r}: a connection to the "
               "hub, or a copy in the cache of `datasets` (HF_HOME) from an earlier run. Without either, give a task file "
               f"NAME.yaml whose data is on this disk, or {NEXT_LINE}, which is made from plain text.")
        ) from e  # fmt: skip
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    return task


def _choose_metric(task: Any, given: str, metric: str | None) -> str:
    by_likelihood = task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood") and not getattr(task, "MULTIMODAL", False)
    known = [name for name in task.aggregation() if name in ACCURACIES and by_likelihood]
    if not known or (metric or known[0]) not in known:
        raise ExperimentError(f"The task {given} has the accuracies by log-likelihood {known}, and not {metric or 'one'}.")
    return metric or known[0]


@contextlib.contextmanager
def _quiet_harness() -> Iterator[SimpleNamespace]:
    """The harness: from fixed seeds, without logging, with progress bars only on a terminal, with templates that run no code.

    Random state, logging and the harness are afterwards as they were.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its dependencies say of each other when they are imported
            from jinja2.sandbox import SandboxedEnvironment
            from lm_eval import utils  # type: ignore[import-untyped]
            from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]
            from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
            from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
    except ImportError as e:
        raise ExperimentError(
            f"Zero-shot tasks need lm-evaluation-harness: {e}. Install it with pip install 'statprune[zero-shot]'."
        ) from e
    own, disabled = utils.env, logging.root.manager.disable
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (the state that the harness draws from)
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(nowhere),
    ):
        try:
            utils.env = SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline)
            utils.env.filters.update(own.filters)
            logging.disable(logging.WARNING)
            random.seed(_SEED)
            np.random.seed(_SEED)  # noqa: NPY002
            torch.default_generator.manual_seed(_SEED)
            if devices:
                torch.cuda.manual_seed_all(_SEED)
            yield SimpleNamespace(HFLM=HFLM, TaskManager=TaskManager, evaluate=evaluate)
        finally:
            utils.env = own
            logging.disable(disabled)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
