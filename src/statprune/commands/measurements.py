"""The commands that compare: methods, costs, the paper's experiments, and the demonstration."""

import dataclasses
import shlex
from typing import Any, Literal

from statprune.commands import console, display_measured
from statprune.commands.options import (
    RANDOM_TOKENS,
    CalibrationOptions,
    DType,
    LayerOptions,
    ModelOptions,
    WindowOptions,
    words,
)
from statprune.errors import ExperimentError
from statprune.model.schedule import Schedule


def compare(
    model: ModelOptions,
    text: list[str],
    calibration: CalibrationOptions,
    methods: list[dict[str, Any] | str] | None = None,
    patterns: list[str] | None = None,
    schedule: Schedule = "walk",
) -> dict[str, Any]:
    """Perplexity of methods x patterns on one model, as a Markdown table; nothing is saved.

    Args:
        text: Where to measure: text files (several: --text a.txt b.txt), or a token file. Keep it apart from the calibration
            text.
        methods: Presets, or criteria and compensations (several: --methods best paper wanda cvr:alpha=0.25+energy:column), or
            mappings with label and method. Default: magnitude, wanda, sparsegpt, paper and default.
        patterns: How sparse (several: --patterns 50% 2:4). Default: 50%, 4:8 and 2:4.
        schedule: walk, block or one-shot; presets have their own.

    Examples:
        statprune compare MODEL --calibration train.txt --text held-out.txt
        statprune compare MODEL --calibration c4 --text held-out.txt --methods wanda paper best --patterns 2:4
    """
    import statprune.experiments.compare as comparison
    from statprune.how import labelled
    from statprune.recipe import Search

    opened = model.open(calibration)
    how = [labelled(method)[1] for method in methods or ()]
    windows = calibration.windows(opened, halves=any(isinstance(one, Search) for one in how))
    held_out = opened.held_out(text)
    console.say("measuring the dense model, and exporting it to a graph")
    with console.progress("comparing", each=True) as progress:
        cells = comparison.compare(
            opened.model, windows, held_out,
            methods=methods or comparison.METHODS, patterns=patterns or comparison.PATTERNS,
            schedule=schedule, batch_size=calibration.batch_size, progress=progress,
        )  # fmt: skip
    console.show_text(comparison.markdown_table(cells))
    return {"seqlen": opened.seqlen, "samples": calibration.samples, "cells": [dataclasses.asdict(cell) for cell in cells]}


def tune(
    model: ModelOptions,
    output: str,
    calibration: CalibrationOptions,
    layers: LayerOptions,
    minutes: float = 10.0,
    no_gradients: bool = False,
) -> dict[str, Any]:
    """Choose the recipe for a model and a pattern: try methods on half of the calibration text, score them on the other half.

    The text is cut in alternate blocks before windows are drawn, so that no token is in both halves. Many methods are pruned
    from one pass over the dense model and scored on a part of the held-out half; the best go on with settings and schedules of
    their own, on more of it; the best of those measured on all of it is chosen. best, paper, wanda and sparsegpt are always
    among them, so the choice is never worse there. Nothing is pruned: the recipe is for
    'statprune prune MODEL --recipe OUTPUT/recipe.yaml'. An interrupted run goes on where it stopped.

    The score is on the calibration text too, so with 'generated' it is on the model's own samples.

    Args:
        output: Folder for recipe.yaml, tried.csv, tried.md and trials.jsonl (a line for each measurement). One that is there is
            gone on with, if the model, the calibration and the settings are the same; more --minutes try more.
        minutes: How long it may take, without loading the model. The baselines are measured whatever it says.
        no_gradients: Try nothing that takes the dense model backward, which takes memory; best is then no baseline.

    Examples:
        statprune tune MODEL --output tuned --calibration train.txt --pattern 2:4 --minutes 10
        statprune prune MODEL --recipe tuned/recipe.yaml --calibration train.txt --output sparse
    """
    from statprune.recipe import Search
    from statprune.tuning.tune import tune as tune_model

    search = Search.from_dict({"minutes": minutes, "gradients": not no_gradients, **layers.given()})
    opened = model.open(calibration)
    windows = calibration.windows(opened, halves=True)
    console.say("exporting the model to a graph")
    with console.progress("seconds of the budget") as progress:
        tuned = tune_model(
            opened.model, windows.split(calibration.batch_size), output=output, progress=progress, say=console.say,
            **dataclasses.asdict(search),
        )  # fmt: skip
    following = ["--recipe", f"{output}/recipe.yaml", "--output", "sparse"]
    display_measured.show_tuned(
        tuned, shlex.join(["statprune", "prune", model.model, *following, *words(calibration), *words(model)])
    )
    return {"recipe": tuned.recipe.to_dict(), "trials": [trial.row() for trial in tuned.trials], **tuned.record()}


def benchmark(
    model: ModelOptions,
    calibration: CalibrationOptions = RANDOM_TOKENS,
    rounds: int = 5,
    methods: list[dict[str, Any] | str] | None = None,
    patterns: list[str] | None = None,
    sparsegpt: str | None = None,
) -> dict[str, Any]:
    """What the walk costs beside a plain forward pass over the same batches, and what pruning costs beside a copy.

    All on this machine, in turns. Pruning is timed on the model's first block, in nanoseconds for each of its weights; the
    floor is a copy of them. Without --calibration the tokens are random, which costs the same.

    Args:
        rounds: How many times to measure each.
        methods: Presets, or criteria and compensations (several: --methods wanda paper), or mappings with label and method;
            none that needs gradients. Default: wanda, paper, sparsegpt and default.
        patterns: How sparse (several: --patterns 50% 2:4). Default: 50% and 2:4.
        sparsegpt: A checkout of SparseGPT's own code (github.com/IST-DASLab/sparsegpt), to run it beside ours.

    Examples:
        statprune benchmark MODEL
        statprune benchmark MODEL --samples 24 --seqlen 512 --batch-size 4 --dtype float32
        statprune benchmark MODEL --methods paper sparsegpt --patterns 2:4 --sparsegpt ../sparsegpt
    """
    from statprune.experiments import block_cost
    from statprune.experiments.walk_cost import export, measure_walk

    opened = model.open(calibration, rounds=rounds)
    batches = list(calibration.windows(opened).split(calibration.batch_size))
    num_tokens = sum(batch.numel() for batch in batches)
    console.say("exporting the model to a graph")
    layers, inputs, seconds = export(opened.model, batches)
    with console.progress("walking", each=True) as progress:
        walk = measure_walk(layers, inputs, seconds, rounds=rounds, progress=progress)
    with console.progress("pruning", each=True) as progress:
        blocks = block_cost.measure_blocks(
            layers, inputs, methods=methods or block_cost.METHODS, patterns=patterns or block_cost.PATTERNS,
            rounds=rounds, sparsegpt=sparsegpt, progress=progress,
        )  # fmt: skip
    display_measured.show_walk_cost(walk, num_tokens)
    display_measured.show_block_costs(blocks)
    return {**display_measured.walk_cost_data(walk, num_tokens), "pruning": blocks.to_dict()}


def accelerate(
    model: ModelOptions,
    tokens: list[int],
    compiled: bool = False,
    speedup: float = 1.05,
    tolerance: float | None = None,
    quantize: Literal["float8"] | None = None,
) -> dict[str, Any]:
    """Whether the 2:4 layers of a model run faster on this GPU's sparse kernels, which of them, and how much.

    One layer of each shape is measured, dense and with each sparse kernel that torch has, at each number of tokens; then the
    whole model, which has to give the same predictions. It takes an NVIDIA GPU of compute capability 8.0 or later, and weights
    in float16 or bfloat16. Nothing is saved: weights are packed when a model is loaded. What this measures does in Python

        model = statprune.load("sparse", device="cuda")
        statprune.accelerate(model, tokens=[1, 64, 2048])

    and where nothing is faster, nothing is changed.

    Args:
        tokens: Numbers of tokens in a forward pass, batch times length, at all of which a layer has to be faster (several:
            --tokens 1 64 2048). 1 is what generating a text does for each token; 2048 is reading a long one.
        compiled: Measure what torch.compile makes of layers and model. Without, a packed weight costs some Python for each
            call, which few tokens do not make up for.
        speedup: How many times faster than dense a layer has to be at every number of tokens.
        tolerance: How far predictions may be off, relative to the norm of the dense model's. Default: 0.01 in float16, 0.05 in
            bfloat16, 0.25 with --quantize.
        quantize: Round weights and inputs to float8 besides, with torchao on a Hopper GPU. 2:4 has to be faster than float8
            without it, too.

    Examples:
        statprune accelerate sparse --tokens 2048 --dtype bfloat16
        statprune accelerate sparse --tokens 1 64 2048 --dtype float16 --compiled --json
    """
    import statprune.acceleration.accelerate as acceleration
    from statprune.versions import versions

    acceleration.check(tokens, speedup, tolerance)
    acceleration.check_device(model.device)
    if quantize is not None:
        acceleration.quantized(quantize)
    opened = model.open(WindowOptions())
    with console.progress("measuring", each=True) as progress:
        report = acceleration.accelerate(
            opened.model,
            tokens,
            compiled=compiled,
            speedup=speedup,
            tolerance=tolerance,
            quantize=quantize,
            progress=progress,
        ).report
    display_measured.show_acceleration(model.model, opened.place["dtype"], report)
    return {**report.to_dict(), "model": model.model, **opened.place, "device": report.device, "versions": versions()}


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
) -> dict[str, Any]:
    """Repeat an experiment of the paper, or all experiments, on any models: tables, pictures, and every number in one file.

    What is not given is the paper's: configs/paper/NAME.yaml holds the settings, and is installed with the command. A run
    that was interrupted goes on where it stopped.

    Args:
        name: perplexity, zero-shot, runtime, sparsity, calibration or ablation, which are the paper's; correction and frontier,
            which are not: better corrections, and the best there is, what they lose and cost beside SparseGPT; or all of these.
        output: Folder for cells.jsonl (a line for each measurement), NAME.csv, NAME.md and NAME.png. One that is there is
            gone on with, if its protocol and versions are the same.
        model: Folders or hub names (safetensors only; several: --model FOLDER OTHER). Default: the paper's models.
        methods: Presets, or criteria and compensations (several: --methods best paper sparsegpt+energy), or mappings with label
            and method.
        patterns: How sparse (several: --patterns 50% 4:8 2:4).
        schedule: walk, block or one-shot; presets have their own. Default: block, the protocol of Wanda and SparseGPT.
        text: Where to measure: text files (several: --text a.txt b.txt), a token file, or wikitext2 from the hub. Default:
            wikitext2.
        windows: At most this many windows of the text, for a quick look. Default: all.
        samples: Calibration sequences. Default: 128.
        sizes: Of the experiment calibration: numbers of calibration sequences (several: --sizes 32 128).
        seeds: Of the choice of calibration sequences (several: --seeds 0 1 2).
        tasks: Of zero-shot: names of lm-evaluation-harness, perhaps with a metric (hellaswag:acc_norm); task files (FILE.yaml);
            or next-line, which is made from --text and needs no data set (several: --tasks boolq next-line).
        questions: Of zero-shot: at most this many of each task. Default: all; of next-line 2600, so that its standard error is
            below one point.
        rounds: Of runtime: how often each time is taken; the median counts. Default: 5.

    Examples:
        statprune experiment perplexity --output results --model MODEL --calibration train.txt --text held-out.txt
        statprune experiment all --output results --model MODEL OTHER --windows 20
        statprune experiment zero-shot --output results --model MODEL --tasks next-line --text held-out.txt
    """
    given = {key: value for key, value in locals().items() if key not in ("name", "output")}
    from statprune.experiments.definition import load_experiments
    from statprune.experiments.run import run

    experiments = load_experiments(name, given)
    with console.progress(name, each=True) as progress:
        outcome = run(experiments, output, progress=progress, say=console.say)
    for title, table in outcome.tables.items():
        console.show_text(f"\n## {title}\n\n{table}")
    if outcome.contents:
        console.say(f"{outcome.contents} are in {output}")
    if outcome.failures:
        raise ExperimentError("\n  ".join([f"{len(outcome.failures)} failed:", *outcome.failures]))
    return {"output": output, "tables": outcome.tables, "pictures": outcome.pictures}


def quickstart(output: str = "statprune-quickstart", steps: int = 400, seed: int = 0) -> dict[str, Any]:
    """Train a small LLaMA on Python's own source, prune it, and compare methods. Needs no network and no file.

    It takes under three minutes on two cores, and leaves a dense and a pruned model and the texts for the other commands.

    Args:
        output: Folder to write; must not exist.
        steps: Training steps; the default takes about a minute on two cores.
        seed: Of the initial weights and of the windows.

    Examples:
        statprune quickstart
        statprune quickstart --output demo --steps 1000
    """
    from statprune.experiments.compare import markdown_table
    from statprune.experiments.quickstart import quickstart as run

    with console.progress("training and comparing") as progress:
        cells = run(output, steps=steps, seed=seed, progress=progress, say=console.say)
    console.show_text(markdown_table(cells))
    display_measured.show_next_steps(output)
    return {"output": output, "cells": [dataclasses.asdict(cell) for cell in cells]}
