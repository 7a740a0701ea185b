"""The commands that compare: methods, costs, the paper's experiments, and the demonstration."""

from typing import Any, Literal

from statprune.commands import display
from statprune.commands.options import calibrate
from statprune.errors import ExperimentError
from statprune.loading import DType, load_tokenizer, open_causal
from statprune.recipe import Schedule


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
        methods: Names such as wanda cvr+energy cvr:alpha=0.25+energy:column, or mappings with label and method.
            Default: magnitude, wanda and cvr, each without and with energy.
        patterns: Such as 50% 2:4. Default: 50%, 4:8 and 2:4.
        schedule: walk, block or one-shot.
        samples: Calibration windows.
        seqlen: Tokens in each window. Default: 2048, or the model's context if that is shorter.
        batch_size: Windows in one forward pass.
        seed: Of the choice of windows.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: To compute in; auto takes the checkpoint's.
        json: Print one JSON object with every cell instead of a Markdown table.
    """
    import dataclasses

    import statprune.experiments.compare as comparison
    from statprune.data import evaluation_windows

    loaded, seqlen = open_causal(model, dtype, device, seqlen, samples=samples, batch_size=batch_size)
    tokenizer = load_tokenizer(model)
    windows = calibrate(loaded, tokenizer, calibration, samples, seqlen, seed)
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


def tune(
    model: str,
    output: str,
    calibration: list[str],
    pattern: dict[str, Any] | str = "2:4",
    minutes: float = 10.0,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    on_indivisible: Literal["error", "skip"] = "error",
    samples: int = 128,
    seqlen: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: DType = "auto",
    json: bool = False,
) -> None:
    """Choose the recipe for a model and a pattern: try methods on half of the calibration text, score them on the other half.

    Every second window is held out. Many methods are pruned from one pass over the dense model and scored on a part of the
    held-out half; the best go on with settings and schedules of their own, on more of it; the best of those measured on all of
    it is chosen. wanda, cvr+energy and sparsegpt are always among them, so the choice is never worse there. Nothing is pruned:
    the recipe is for 'statprune prune MODEL --recipe OUTPUT/recipe.yaml'. An interrupted run goes on where it stopped.

    Args:
        model: Folder or hub name of the model (safetensors only).
        output: Folder for recipe.yaml, tried.csv, tried.md and trials.jsonl (a line for each measurement). One that is there is
            gone on with, if the model, the calibration and the settings are the same; more --minutes try more.
        calibration: Text files, a token file (FILE.safetensors:KEY), a data set's name, or 'generated'. The score is on this
            text too, so with 'generated' it is on the model's own samples.
        pattern: '50%' for half of the weights anywhere, '2:4' for two of every four, or a mapping.
        minutes: How long it may take, without loading the model. The three baselines are measured whatever it says.
        targets: Globs on layer names to prune, such as '*.mlp.*'. Default: all but the output layer and tied weights.
        ignore: Globs on layer names to leave dense.
        on_indivisible: Refuse (error) or leave dense (skip) layers whose width an N:M pattern does not divide.
        samples: Calibration windows, for both halves together.
        seqlen: Tokens in each window. Default: 2048, or the model's context if that is shorter.
        batch_size: Windows in one forward pass.
        seed: Of the choice of windows.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: To compute in; auto takes the checkpoint's.
        json: Print one JSON object with everything that was tried instead of a table.
    """
    from statprune.tuning.tune import tune as tune_model

    loaded, seqlen = open_causal(model, dtype, device, seqlen, samples=samples, batch_size=batch_size)
    windows = calibrate(loaded, load_tokenizer(model), calibration, samples, seqlen, seed)
    with display.progress("seconds of the budget") as progress:
        tuned = tune_model(
            loaded, windows.split(batch_size), pattern=pattern, minutes=minutes, output=output,
            targets=targets, ignore=ignore or (), on_indivisible=on_indivisible, progress=progress, say=display.say,
        )  # fmt: skip
    if json:
        trials = [trial.row() for trial in tuned.trials]
        display.show_json({"recipe": tuned.recipe.to_dict(), "trials": trials, **tuned.record()})
    else:
        display.show_tuned(tuned, model, output)


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

    from statprune.experiments.walk_cost import measure_walk

    loaded, seqlen = open_causal(model, dtype, device, seqlen, samples=samples, batch_size=batch_size, rounds=rounds)
    if calibration is None:
        generator = torch.Generator().manual_seed(seed)
        windows = torch.randint(loaded.config.get_text_config().vocab_size, (samples, seqlen), generator=generator)
    else:
        windows = calibrate(loaded, load_tokenizer(model), calibration, samples, seqlen, seed)
    with display.progress("measuring") as progress:
        cost = measure_walk(loaded, windows.split(batch_size), rounds=rounds, progress=progress)
    display.show_walk_cost(cost, windows.numel(), as_json=json)


def experiment(
    name: str,
    output: str,
    model: list[str] | None = None,
    methods: list[dict[str, Any] | str] | None = None,
    patterns: list[str] | None = None,
    schedule: Schedule | None = None,
    calibration: list[str] | None = None,
    text: list[str] | None = None,
    windows: int | None = None,
    samples: int | None = None,
    sizes: list[int] | None = None,
    seeds: list[int] | None = None,
    tasks: list[str] | None = None,
    questions: int | None = None,
    rounds: int | None = None,
    seqlen: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: DType | None = None,
) -> None:
    """Repeat an experiment of the paper, or all of them, on any models: tables, a picture, and every number in one file.

    What is not given is the paper's: configs/paper/NAME.yaml holds the settings, and is installed with the command. A run
    that was interrupted goes on where it stopped.

    Args:
        name: perplexity, zero-shot, runtime, sparsity, calibration or ablation; or all, which are these. And correction, which
            is not in the paper: better corrections, what they gain and what they cost.
        output: Folder for cells.jsonl (a line for each measurement), NAME.csv, NAME.md and NAME.png. One that is there is
            gone on with, if its protocol and versions are the same.
        model: Folders or hub names (safetensors only). Default: the paper's models.
        methods: Names such as wanda sparsegpt+energy cvr:alpha=0.25+energy:column, or mappings with label and method.
        patterns: Such as 50% 4:8 2:4.
        schedule: walk, block or one-shot. Default: block, the protocol of Wanda and SparseGPT.
        calibration: Text files, a token file (FILE.safetensors:KEY), a data set's name, or 'generated'. Default: c4.
        text: Where to measure: text files, a token file, or wikitext2 from the hub. Default: wikitext2.
        windows: At most this many windows of the text, for a quick look. Default: all.
        samples: Calibration sequences. Default: 128.
        sizes: Of the experiment calibration: several numbers of calibration sequences.
        seeds: Of the choice of calibration sequences.
        tasks: Of zero-shot: names of lm-evaluation-harness, perhaps with a metric (hellaswag:acc_norm); task files (FILE.yaml);
            or next-line, which is made from --text and needs no data set.
        questions: Of zero-shot: at most this many of each task. Default: all.
        rounds: Of runtime: how often each time is taken; the median counts. Default: 5.
        seqlen: Tokens in each window. Default: 2048, or the model's context if that is shorter.
        batch_size: Windows in one forward pass.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: To compute in; auto takes the checkpoint's.
    """
    given = {key: value for key, value in locals().items() if key not in ("name", "output")}
    from statprune.experiments.definition import OWNER, PAPER, Experiment
    from statprune.experiments.run import run

    if name == "all":
        own = {one: {key: value for key, value in given.items() if OWNER.get(key, one) == one} for one in PAPER}
        experiments = [Experiment.load(one, settings) for one, settings in own.items()]
    else:
        experiments = [Experiment.load(name, given)]
    with display.progress(name) as progress:
        outcome = run(experiments, output, progress=progress, say=display.say)
    for title, table in outcome.tables.items():
        print(f"\n## {title}\n\n{table}")
    display.say(f"tables, pictures and every measurement are in {output}")
    if outcome.failures:
        raise ExperimentError("\n  ".join([f"{len(outcome.failures)} failed:", *outcome.failures]))


def quickstart(output: str = "statprune-quickstart", steps: int = 400, seed: int = 0) -> None:
    """Train a small LLaMA on Python's own source, prune it, and compare methods. Needs no network and no file.

    Args:
        output: Folder to write: a dense and a pruned model, and the texts, for the other commands.
        steps: Training steps; the default takes about a minute on two cores.
        seed: Of the initial weights and of the windows.
    """
    from statprune.experiments.compare import markdown_table
    from statprune.experiments.quickstart import quickstart as run

    cells = run(output, steps=steps, seed=seed, say=display.say)
    print(markdown_table(cells))
    display.show_next_steps(output)
