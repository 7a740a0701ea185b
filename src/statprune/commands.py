"""What each subcommand of `statprune` does: a function each, thin over the library; its arguments are the options."""

from collections.abc import Callable
from typing import Any, Literal

from statprune import display
from statprune.errors import RecipeError
from statprune.opening import DType, open_causal
from statprune.recipe import Schedule


def prune(
    model: str,
    output: str,
    recipe: str | None = None,
    criterion: dict[str, Any] | str | None = None,
    pattern: dict[str, Any] | str | None = None,
    compensation: dict[str, Any] | str | None = None,
    schedule: Schedule | None = None,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    on_indivisible: Literal["error", "skip"] | None = None,
    calibration: list[str] | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: DType = "auto",
) -> None:
    """Prune a causal language model and save it, verified.

    Args:
        model: Folder or hub name of the model (safetensors only).
        output: Folder to write; must not exist.
        recipe: YAML file with a whole recipe, instead of the options below.
        criterion: magnitude, wanda, cvr, or a mapping such as '{"name": "cvr", "alpha": 0.5}'. Default: cvr.
        pattern: '50%' for half of the weights anywhere, '2:4' for two of every four, or a mapping. Default: 2:4.
        compensation: none, energy, or a mapping such as '{"name": "energy", "clamp": [0.5, 2.0]}'. Default: energy.
        schedule: walk: each layer is calibrated on the pruned layers before it; one-shot: on the dense model. Default: walk.
        targets: Globs on layer names to prune, such as '*.mlp.*'. Default: all but the output layer and tied weights.
        ignore: Globs on layer names to leave dense.
        on_indivisible: Refuse (error) or leave dense (skip) layers whose width an N:M pattern does not divide. Default: error.
        calibration: Text files, a token file (FILE.safetensors:KEY), a data set's name such as c4, or 'generated' for the
            model's own samples, which needs no data. Default: generated.
        samples: Calibration windows.
        seqlen: Tokens in each window. Default: 2048, or the model's context if that is shorter.
        batch_size: Windows in one forward pass.
        seed: Of the choice of windows.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: To compute in and to save as; auto takes the checkpoint's.
    """
    import statprune.checkpoint as checkpoint
    from statprune.compress import prune as prune_model

    chosen = _recipe(
        recipe,
        criterion=criterion, pattern=pattern, compensation=compensation, schedule=schedule,
        targets=targets, ignore=ignore, on_indivisible=on_indivisible,
    )  # fmt: skip
    checkpoint.refuse_existing(output)
    loaded, seqlen = open_causal(model, dtype, device, seqlen, samples=samples, batch_size=batch_size)
    tokenizer = checkpoint.load_tokenizer(model)
    display.show_plan(loaded, _survey(loaded, chosen), chosen)
    sources = calibration or ["generated"]
    windows = _calibration(loaded, tokenizer, sources, samples, seqlen, seed)
    with display.progress("pruning") as progress:
        report = prune_model(loaded, windows.split(batch_size), chosen, progress=progress)
    protocol = {
        "model": model, "calibration": sources, "samples": samples, "seqlen": seqlen, "seed": seed,
        "batch_size": batch_size, "dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device),
    }  # fmt: skip
    with display.timed(report.seconds, "save"):
        checkpoint.save(loaded, report, output, tokenizer=tokenizer, protocol=protocol)
    display.show_report(report, output)


def evaluate(
    model: str,
    text: list[str],
    seqlen: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: DType = "auto",
    json: bool = False,
) -> None:
    """Perplexity of a causal language model on text: joined, tokenized whole, cut into windows (the WikiText-2 protocol).

    Args:
        model: Folder or hub name of the model (safetensors only).
        text: Text files, joined by blank lines; or a token file (FILE.safetensors:KEY).
        seqlen: Tokens in each window; the last partial window is dropped. Perplexities at different lengths do not compare.
            Default: 2048, or the model's context if that is shorter.
        batch_size: Windows in one forward pass.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: To compute in; auto takes the checkpoint's.
        json: Print one JSON object instead of a table.
    """
    import statprune.checkpoint as checkpoint
    from statprune.data import evaluation_windows
    from statprune.perplexity import evaluate as evaluate_model
    from statprune.report import versions

    loaded, seqlen = open_causal(model, dtype, device, seqlen, batch_size=batch_size)
    tokenizer = checkpoint.load_tokenizer(model)
    windows = evaluation_windows(text, tokenizer=tokenizer, model=loaded, seqlen=seqlen)
    with display.progress("evaluating") as progress:
        perplexity = evaluate_model(
            loaded, windows, batch_size=batch_size, progress=lambda done, total: progress(done, total, "windows")
        )
    result = {
        "perplexity": perplexity, "windows": len(windows), "seqlen": seqlen, "text": text, "model": model,
        "tokenizer": type(tokenizer).__name__, "vocabulary": len(tokenizer),
        "dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device), "versions": versions(),
    }  # fmt: skip
    display.show_json(result) if json else display.show_evaluation(result)


def inspect(model: str, json: bool = False) -> None:
    """What could be pruned: linear layers, the input groups that share statistics, ties, and what is left out and why.

    Works on a configuration alone; no weights are loaded (meta device).

    Args:
        model: Folder or hub name of the model; config.json is enough.
        json: Print one JSON object instead of tables.
    """
    import torch

    import statprune.checkpoint as checkpoint
    from statprune.recipe import Recipe

    config = checkpoint.load_config(model)
    with torch.device("meta"):
        empty = checkpoint.model_class(config)._from_config(config)
    survey = _survey(empty, Recipe(pattern="0%"))
    display.show_json(display.survey_data(survey)) if json else display.show_survey(model, survey)


def verify(folder: str) -> None:
    """Recompute every promise of a folder's pruning.json from the files on disk; exit with 1 on the first broken one.

    Args:
        folder: What `statprune prune` wrote.
    """
    from statprune.checkpoint import verify as verify_folder

    with display.progress("verifying") as progress:
        record = verify_folder(folder, progress)
    display.show_verified(folder, record)


def compare(
    model: str,
    calibration: list[str],
    text: list[str],
    methods: list[dict[str, Any] | str] | None = None,
    patterns: list[str] | None = None,
    schedule: Schedule = "walk",
    samples: int = 128,
    seqlen: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: DType = "auto",
    json: bool = False,
) -> None:
    """Perplexity of methods x patterns on one model; nothing is saved.

    Args:
        model: Folder or hub name of the model (safetensors only).
        calibration: Where to calibrate: text files, a token file (FILE.safetensors:KEY), a data set's name, or 'generated'.
        text: Where to measure: text files, or a token file. Keep it apart from the calibration text.
        methods: Names such as wanda cvr+energy, or mappings with label, criterion and compensation.
            Default: magnitude, wanda and cvr, each without and with energy.
        patterns: Such as 50% 2:4. Default: 50%, 4:8 and 2:4.
        schedule: walk or one-shot.
        samples: Calibration windows.
        seqlen: Tokens in each window. Default: 2048, or the model's context if that is shorter.
        batch_size: Windows in one forward pass.
        seed: Of the choice of windows.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: To compute in; auto takes the checkpoint's.
        json: Print one JSON object with every cell instead of a Markdown table.
    """
    import dataclasses

    import statprune.checkpoint as checkpoint
    import statprune.compare as comparison
    from statprune.data import evaluation_windows

    loaded, seqlen = open_causal(model, dtype, device, seqlen, samples=samples, batch_size=batch_size)
    tokenizer = checkpoint.load_tokenizer(model)
    windows = _calibration(loaded, tokenizer, calibration, samples, seqlen, seed)
    held_out = evaluation_windows(text, tokenizer=tokenizer, model=loaded, seqlen=seqlen)
    with display.progress("comparing") as progress:
        cells = comparison.compare(
            loaded, windows, held_out,
            methods=methods or comparison.METHODS, patterns=patterns or comparison.PATTERNS,
            schedule=schedule, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    if json:
        display.show_json({"seqlen": seqlen, "samples": samples, "cells": [dataclasses.asdict(cell) for cell in cells]})
    else:
        print(comparison.markdown_table(cells))


def benchmark(
    model: str,
    calibration: list[str] | None = None,
    samples: int = 24,
    seqlen: int | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    seed: int = 0,
    device: str = "auto",
    dtype: DType = "auto",
    json: bool = False,
) -> None:
    """What the walk costs beside a plain forward pass over the same batches, in turns on this machine.

    Args:
        model: Folder or hub name of the model (safetensors only).
        calibration: Text files, a token file, a data set's name, or 'generated'. Default: random tokens, which cost the same.
        samples: Windows.
        seqlen: Tokens in each window. Default: 2048, or the model's context if that is shorter.
        batch_size: Windows in one forward pass.
        rounds: How many times to measure both.
        seed: Of the choice of windows.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: To compute in; auto takes the checkpoint's.
        json: Print one JSON object instead of text.
    """
    import torch

    import statprune.checkpoint as checkpoint
    from statprune.benchmark import measure_walk

    loaded, seqlen = open_causal(model, dtype, device, seqlen, samples=samples, batch_size=batch_size, rounds=rounds)
    if calibration is None:
        generator = torch.Generator().manual_seed(seed)
        windows = torch.randint(loaded.config.get_text_config().vocab_size, (samples, seqlen), generator=generator)
    else:
        windows = _calibration(loaded, checkpoint.load_tokenizer(model), calibration, samples, seqlen, seed)
    with display.progress("measuring") as progress:
        cost = measure_walk(
            loaded, windows.split(batch_size), rounds=rounds, progress=lambda done, total: progress(done, total, "rounds")
        )
    display.show_walk_cost(cost, windows.numel(), as_json=json)


def quickstart(output: str = "statprune-quickstart", steps: int = 400, seed: int = 0) -> None:
    """Train a small LLaMA on Python's own source, prune it, and compare methods. Needs no network and no file.

    Args:
        output: Folder to write: a dense and a pruned model, and the texts, for the other commands.
        steps: Training steps; the default takes about a minute on two cores.
        seed: Of the initial weights and of the windows.
    """
    from statprune.compare import markdown_table
    from statprune.quickstart import quickstart as run

    cells = run(output, steps=steps, seed=seed, say=display.say)
    print(markdown_table(cells))
    display.show_next_steps(output)


def _recipe(path: str | None, **options: Any) -> Any:
    from statprune.recipe import Recipe

    given = {key: value for key, value in options.items() if value is not None}
    if path is None:
        return Recipe(**given)
    if given:
        raise RecipeError(
            f"--recipe {path} and --{', --'.join(given)} were both given: expected a recipe file or single options."
        )
    return Recipe.from_yaml(path)


def _survey(model: Any, recipe: Any) -> Any:
    from statprune.survey import survey

    return survey(model, recipe)


def _calibration(model: Any, tokenizer: Any, sources: list[str], samples: int, seqlen: int, seed: int) -> Any:
    from statprune.data import calibration_windows

    with display.progress("calibration windows") as progress:
        return calibration_windows(
            sources, tokenizer=tokenizer, model=model, samples=samples, seqlen=seqlen, seed=seed,
            progress=lambda done, total: progress(done, total, "windows"),
        )  # fmt: skip


COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "prune": prune,
    "evaluate": evaluate,
    "inspect": inspect,
    "verify": verify,
    "compare": compare,
    "benchmark": benchmark,
}
