"""The other commands about one model: evaluate, inspect, verify, report, push, merge."""

from typing import TYPE_CHECKING, Any

from statprune.commands import console, display, processes
from statprune.commands.options import (
    ModelOptions,
    RecipeOptions,
    WindowOptions,
)
from statprune.commands.pruning import look
from statprune.commands.streamed import evaluate_streamed, wants_stream

if TYPE_CHECKING:
    pass


def evaluate(
    model: ModelOptions, text: list[str], windows: WindowOptions, stream: bool = False, memory: str | None = None
) -> dict[str, Any]:
    """Perplexity of a causal language model on text.

    The text is joined, tokenized whole and cut into windows that do not overlap; the last partial one is dropped (the field's
    WikiText-2 protocol). Perplexities at different --seqlen do not compare, nor do those of different tokenizers.

    Args:
        text: Text files, joined by blank lines (several: --text a.txt b.txt); a token file (FILE.safetensors:KEY); or
            wikitext2, from the hub.
        stream: Read the weights from their files, block by block; by itself where they do not fit.
        memory: How much memory the weights may take, such as 20GB, before they are streamed. Default: what is free.

    Examples:
        statprune evaluate MODEL --text held-out.txt
        statprune evaluate --text a.txt b.txt MODEL --seqlen 512 --batch-size 4 --json
    """
    from statprune.perplexity import evaluate as evaluate_model
    from statprune.versions import versions

    if wants_stream(model, windows, stream, memory):
        opened, tokens, perplexity = evaluate_streamed(model, windows, text)
    else:
        opened = model.open(windows)
        tokens = opened.held_out(text)
        with console.progress("evaluating") as progress:
            perplexity = evaluate_model(
                opened.model, processes.share_of(tokens), batch_size=windows.batch_size, progress=progress
            )
    tokenizer = opened.tokenizer_for(text)
    result = {
        "perplexity": perplexity, "windows": len(tokens), "seqlen": opened.seqlen, "text": text, "model": model.model,
        **({"tokenizer": type(tokenizer).__name__, "vocabulary": len(tokenizer)} if tokenizer is not None else {}),
        **opened.place,
        "versions": versions(),
    }  # fmt: skip
    display.show_evaluation(result)
    return result


def inspect(model: str, recipe: RecipeOptions, revision: str | None = None) -> dict[str, Any]:
    """What could be pruned: linear layers, the input groups that share statistics, ties, and what is left out and why.

    With any option of a recipe, what that recipe would prune and leave dense, and the sizes to expect. Works on a
    configuration alone; no model is loaded.

    Of a sparse folder also the zeros of each layer, whether they are 2:4 or 4:8, and the recipe that pruning.json has for it.
    Zeros are counted from the files, one weight at a time; 'statprune verify' recomputes what else was promised.

    Args:
        model: Folder or hub name of the model; config.json is enough.

    Examples:
        statprune inspect MODEL
        statprune inspect MODEL --pattern 50% --ignore '*.down_proj' '*.0.*'
        statprune inspect MODEL --recipe recipe.yaml --json
        statprune inspect sparse
    """
    from statprune.model.inputs import example_inputs
    from statprune.recipe import Recipe
    from statprune.selection import select
    from statprune.zeros import count_zeros, looks_sparse, read_recorded

    how = recipe.read() if recipe.given() else Recipe(pattern="0%")
    empty, layers = look(model, "auto", lambda found: [example_inputs(found)], revision)
    selection = select(layers.groups, layers.left_out, how)
    if recipe.given():
        display.show_plan(empty, selection, how, layers.reason)
        return display.plan_data(empty, selection, how)
    display.show_survey(model, selection)
    sites = [site for group in layers.groups for site in group.sites]
    recorded = read_recorded(model)
    if recorded is None and not looks_sparse(model, sites):
        return display.survey_data(selection)
    with console.progress("counting zeros") as progress:
        zeros = count_zeros(model, sites, recorded, progress=progress)
    display.show_zeros(zeros, recorded)
    return {**display.survey_data(selection), **display.zeros_data(zeros, recorded)}


def verify(folder: str, digest: str | None = None) -> dict[str, Any]:
    """Recompute every promise of a folder's pruning.json from the files on disk.

    Stops at the first one that is broken, with status 1. Recomputed are, for each weight, shape, zeros, pattern and energy; and
    the digest of each file. The folder holds nothing else. Prints the digest of the record, which can be published.

    Args:
        folder: What 'statprune prune' wrote.
        digest: The record's SHA-256 digest as its author has published it, to compare with.

    Examples:
        statprune verify sparse
        statprune verify sparse --digest 5ef5a4a2ef1bfd0a7b2ab0db3b10b4a1b2c3d4e5f60718293a4b5c6d7e8f9012
    """
    from statprune.verification import verify as verify_folder

    with console.progress("verifying") as progress:
        record = verify_folder(folder, progress, digest=digest)
    display.show_verified(folder, record)
    return display.verified_data(folder, record)


def report(folder: str, output: str | None = None) -> dict[str, Any]:
    """Show what was done to a model: its layers in a table, and report.html, the page to look at, made anew.

    The page is one file that needs no network. It is made from pruning.json and the weights, and 'statprune prune' has put one
    beside them.

    Args:
        folder: What 'statprune prune' wrote.
        output: File to write the page to; must not exist. Default: report.html in the folder, where that is one of the files
            that pruning.json has the digest of.

    Examples:
        statprune report sparse
        statprune report sparse --output somewhere.html
        statprune report sparse --json --quiet
    """
    from pathlib import Path

    from statprune.page import write_page
    from statprune.record import read_record

    record = read_record(Path(folder))
    display.show_layers(folder, record)
    page = write_page(record, folder, output)
    display.show_page(str(page))
    return {"folder": folder, "page": str(page), **display.layers_data(record)}


def push(folder: str, repository: str, private: bool = False) -> dict[str, Any]:
    """Verify a folder that statprune wrote, and upload it to the hub.

    Uploaded are exactly the files that pruning.json names, and itself; nothing is where a promise is broken. Log in first, with
    'hf auth login'.

    Args:
        folder: What 'statprune prune' wrote.
        repository: USER/NAME on the hub; made where it does not exist.
        private: Make the repository a private one.

    Examples:
        statprune push sparse USER/NAME --private
    """
    from statprune.hub import push as push_folder

    address = push_folder(folder, repository, private=private or None, say=console.say)
    display.show_pushed(folder, address)
    return {"folder": folder, "repository": repository, "address": address}


def merge(model: str, adapter: str, output: str, overwrite: bool = False, max_shard_size: str | None = None) -> dict[str, Any]:
    """Merge a LoRA adapter into a pruned model with its zeros kept, and save the result, verified.

    Only weights that are not zero are changed. During its training the adapter acted everywhere, so the result is not quite the
    model that was trained: measure it.

    Args:
        model: Folder that 'statprune prune' wrote, the one that the adapter was trained on.
        adapter: Folder that the adapter was saved to with save_pretrained (safetensors only).
        output: Folder to write; must not exist, but for --overwrite.
        overwrite: Replace an output that statprune wrote, when the new one is verified.
        max_shard_size: Of one file of weights, such as 5GB. Default: 50GB, as transformers has it.

    Examples:
        statprune merge sparse ADAPTER --output sparse-tuned
    """
    import statprune.checkpoint as checkpoint
    from statprune.loading import load_model
    from statprune.report import PruningReport
    from statprune.training.lora import check_adapter_folder, load_adapter, merge_adapters
    from statprune.training.masks import remeasure

    check_adapter_folder(adapter)
    checkpoint.check_shard_size(max_shard_size)
    with checkpoint.reserve(output, overwrite=overwrite, source=model, say=console.say) as place:
        with console.progress("verifying") as progress:
            record = checkpoint.verify(model, progress)
        before = PruningReport.from_dict(record)
        console.say(f"loading {model}, and merging {adapter}")
        sparse = load_model(model)
        checkpoint.check_model(sparse, place)
        merged = merge_adapters(load_adapter(sparse, adapter), before)
        after = remeasure(before, merged)
        protocol = {**record["protocol"], "merged_adapters": [*record["protocol"].get("merged_adapters", ()), adapter]}
        console.say(f"saving to {place.output}, and verifying what was written")
        checkpoint.save(merged, after, place, protocol=protocol, source=model, max_shard_size=max_shard_size)
    display.show_merged(before, after, output)
    return display.merged_data(before, after, output)
