"""The commands about one model: prune, evaluate, inspect, verify, merge."""

from typing import Any, Literal

from statprune.commands import display
from statprune.commands.options import calibrate, read_recipe, survey_model
from statprune.loading import DType, load_config, load_model, load_tokenizer, model_class, open_causal
from statprune.recipe import Schedule


def prune(
    model: str,
    output: str,
    recipe: str | None = None,
    method: str | None = None,
    criterion: dict[str, Any] | str | None = None,
    pattern: dict[str, Any] | str | None = None,
    compensation: dict[str, Any] | list[dict[str, Any] | str] | str | None = None,
    schedule: Schedule | None = None,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    on_indivisible: Literal["error", "skip"] | None = None,
    allocation: dict[str, Any] | str | None = None,
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
        method: A short name in place of --criterion and --compensation, such as wanda, cvr+energy, sparsegpt,
            cvr:alpha=0.25+energy:column, cvr+least-squares:steps=15, or auto.
        criterion: magnitude, wanda, ria, z-pruner, cvr, sparsegpt, or a mapping such as '{"name": "cvr", "alpha": 0.5}'; or
            auto (auto:minutes=5), which tries methods out on the calibration windows first, see 'statprune tune'. Default: cvr.
        pattern: '50%' for half of the weights anywhere, '2:4' for two of every four, or a mapping. Default: 2:4.
        compensation: none, energy, activation-energy, least-squares, or a mapping such as
            '{"name": "energy", "clamp": [0.5, 2.0]}', or a list of several. Default: energy.
        schedule: walk: each layer is calibrated on all pruned layers before it; block: on the pruned blocks before its own, as
            Wanda and SparseGPT publish it; one-shot: on the dense model. Default: walk.
        targets: Globs on layer names to prune, such as '*.mlp.*'. Default: all but the output layer and tied weights.
        ignore: Globs on layer names to leave dense.
        on_indivisible: Refuse (error) or leave dense (skip) layers whose width an N:M pattern does not divide. Default: error.
        allocation: uniform: every layer equally sparse; owl: blocks with more outliers keep more; sensitivity: by the measured
            harm of pruning each layer, which takes a forward pass for each. With settings such as owl:spread=0.1; with an
            N:M pattern owl:sparsity=0.4, and some layers stay dense. Default: uniform.
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
    from statprune.api import choose
    from statprune.engine import prune as prune_model

    chosen = read_recipe(
        recipe,
        method=method, criterion=criterion, pattern=pattern, compensation=compensation, schedule=schedule,
        targets=targets, ignore=ignore, on_indivisible=on_indivisible, allocation=allocation,
    )  # fmt: skip
    checkpoint.refuse_existing(output)
    loaded, seqlen = open_causal(model, dtype, device, seqlen, samples=samples, batch_size=batch_size)
    tokenizer = load_tokenizer(model)
    display.show_plan(loaded, survey_model(loaded, chosen), chosen)
    sources = calibration or ["generated"]
    windows = calibrate(loaded, tokenizer, sources, samples, seqlen, seed)
    batches = list(windows.split(batch_size))
    with display.progress("choosing: seconds of the budget") as progress:
        choice = choose(loaded, batches, chosen, progress=progress, say=display.say)
    with display.progress("pruning") as progress:
        report = choice.sign(prune_model(loaded, batches, choice.recipe, progress=progress))
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
    from statprune.data import evaluation_windows
    from statprune.perplexity import evaluate as evaluate_model
    from statprune.report import versions

    loaded, seqlen = open_causal(model, dtype, device, seqlen, batch_size=batch_size)
    tokenizer = load_tokenizer(model)
    windows = evaluation_windows(text, tokenizer=tokenizer, model=loaded, seqlen=seqlen)
    with display.progress("evaluating") as progress:
        perplexity = evaluate_model(loaded, windows, batch_size=batch_size, progress=progress)
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

    from statprune.recipe import Recipe

    config = load_config(model)
    with torch.device("meta"):
        empty = model_class(config)._from_config(config)
    survey = survey_model(empty, Recipe(pattern="0%"))
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


def merge(model: str, adapter: str, output: str) -> None:
    """Merge a LoRA adapter into a pruned model, only where its weights are not zero, and save the result, verified.

    Args:
        model: Folder that `statprune prune` wrote, the one that the adapter was trained on.
        adapter: Folder that the adapter was saved to with save_pretrained (safetensors only).
        output: Folder to write; must not exist.
    """
    from pathlib import Path

    import statprune.checkpoint as checkpoint
    from statprune.report import PruningReport
    from statprune.training.lora import check_adapter_folder, load_adapter, merge_adapters
    from statprune.training.masks import remeasure

    checkpoint.refuse_existing(output)
    check_adapter_folder(adapter)
    with display.progress("verifying") as progress:
        record = checkpoint.verify(model, progress)
    before = PruningReport.from_dict(record)
    merged = merge_adapters(load_adapter(load_model(model), adapter), before)
    after = remeasure(before, merged)
    has_tokenizer = (Path(model) / "tokenizer_config.json").is_file()
    protocol = {**record["protocol"], "merged_adapters": [*record["protocol"].get("merged_adapters", ()), adapter]}
    checkpoint.save(merged, after, output, tokenizer=load_tokenizer(model) if has_tokenizer else None, protocol=protocol)
    display.show_merged(before, after, output)
