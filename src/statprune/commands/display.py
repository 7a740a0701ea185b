"""What each command shows of what it did: tables and words for people, and the same as plain data."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from rich.markup import escape
from rich.table import Table

from statprune.commands.console import console, show_text
from statprune.model.schedule import BLOCK_BY_HOOKS

if TYPE_CHECKING:
    from statprune.recipe import Recipe, Search
    from statprune.report import PruningReport
    from statprune.selection import Selection
    from statprune.zeros import Recorded, Zeros


def show_plan(model: Any, selection: "Selection", how: "Recipe | Search", reason: str | None) -> None:
    """What will be pruned, what stays dense and why, and what to expect of the result; and why there is no graph, if so."""
    from statprune.recipe import Recipe

    title = f"{how.method} at {how.pattern}"
    if isinstance(how, Recipe):
        title += f", schedule {how.schedule}, allocation {how.allocation}, target {how.target}"
    _show_sites(title, selection)
    if reason is not None:
        console.tell(f"[yellow]{escape(reason)}[/]")
    size = expected(model, selection, how)
    console.tell(
        f"{size['parameters_to_prune']:,} of {size['parameters']:,} parameters "
        f"({100 * size['parameters_to_prune'] / size['parameters']:.1f} %) are in the weights to prune; "
        f"{100 * size['zeros'] / size['parameters']:.1f} % of all will be zero. "
        f"The file stays as large as it is, {size['bytes'] / 1e6:,.1f} MB: zeros are stored, which every runtime can read. "
        "A dense runtime is not faster for them either.\n"
    )


def expected(model: Any, selection: "Selection", how: "Recipe | Search") -> dict[str, int]:
    """Sizes of the result: parameters, those in the weights to prune, zeros, bytes of weights.

    The zeros are exact but for an allocation, which rounds the whole model in the place of each layer.
    """
    from statprune.recipe import Recipe

    pattern = how.build_pattern()
    allocated = getattr(how.build_allocation(), "sparsity", None) if isinstance(how, Recipe) else None
    to_prune = sum(site.num_weights for site in selection.sites)
    zeros = sum(site.num_matrices * pattern.pruned_of(*site.matrix) for site in selection.sites)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_to_prune": to_prune,
        "zeros": zeros if allocated is None else round(allocated * to_prune),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    }


def plan_data(model: Any, selection: "Selection", how: "Recipe | Search") -> dict[str, Any]:
    """`show_plan` as data."""
    return {"recipe": how.to_dict(), **expected(model, selection, how), **survey_data(selection)}


def show_dry_run(how: "Recipe | Search") -> None:
    """The end of a dry run: the recipe, as the file that --recipe takes."""
    from statprune.recipe import Recipe

    text = (
        how.to_yaml() if isinstance(how, Recipe) else yaml.safe_dump({"method": how.method, **how.to_dict()}, sort_keys=False)
    )
    show_text(f"{text}\nA dry run: nothing was calibrated, nothing was written.")


def show_survey(model: str, selection: "Selection") -> None:
    """The tables of `statprune inspect`."""
    _show_sites(model, selection)
    console.tell(
        f"{len(selection.sites)} linear layers in {len(selection.groups)} input groups: layers that read the same tensor share "
        "one set of statistics."
    )


def survey_data(selection: "Selection") -> dict[str, Any]:
    """`show_survey` as data."""
    return {
        "groups": [
            [{"name": s.name, "parameter": s.parameter, "shape": s.shape, "stored": s.layout} for s in group.sites]
            for group in selection.groups
        ],
        "left_out": [{"name": one.name, "shape": one.shape, "reason": one.reason} for one in selection.left_out],
    }


def show_zeros(zeros: "Sequence[Zeros]", recorded: "Recorded | None") -> None:
    """What a sparse folder has, below `show_survey`: a row for each kind of layer, or each layer where they differ."""
    kinds: dict[str, set[tuple[str, str]]] = {}
    for one in zeros:
        kinds.setdefault(_without_numbers([one.name])[0], set()).add(_share_and_pattern(one))
    rows: dict[str, tuple[str, str]] = {}
    counts: dict[str, int] = {}
    for one in zeros:
        kind = _without_numbers([one.name])[0]
        name = kind if len(kinds[kind]) == 1 else one.name
        rows[name] = _share_and_pattern(one)
        counts[name] = counts.get(name, 0) + 1
    table = Table(header_style="bold")
    for column in ("zeros", "layers", "share", "N:M"):
        table.add_column(column, justify="left" if column == "zeros" else "right")
    for name, (share, pattern) in rows.items():
        table.add_row(escape(name), str(counts[name]), share, pattern)
    console.print(table)
    data = zeros_data(zeros, recorded)
    told = f"{data['zeros']:,} zeros in {data['weights']:,} weights of linear layers, {100 * data['sparsity']:.2f} %"
    source = f"pruning.json: {recorded.recipe}" if recorded else "there is no pruning.json that says how they came there"
    console.tell(f"{told}; {escape(source)}")


def _share_and_pattern(one: "Zeros") -> tuple[str, str]:
    return ("not in the files" if one.sparsity is None else f"{100 * one.sparsity:.2f} %"), one.pattern or "-"


def zeros_data(zeros: "Sequence[Zeros]", recorded: "Recorded | None") -> dict[str, Any]:
    """`show_zeros` as data."""
    counted = [one for one in zeros if one.zeros is not None]
    num_zeros, num_weights = sum(one.zeros or 0 for one in counted), sum(math.prod(one.shape) for one in counted)
    return {
        "zeros": num_zeros, "weights": num_weights, "sparsity": num_zeros / max(1, num_weights),
        "layers": [one.to_dict() for one in zeros], "recorded": None if recorded is None else recorded.recipe,
    }  # fmt: skip


def _show_sites(title: str, selection: "Selection") -> None:
    table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for column in ("prune", "out x in", "layers"):
        table.add_column(column, justify="left" if column == "prune" else "right")
    groups = [(_without_numbers([site.name for site in g.sites]), [site.shape for site in g.sites]) for g in selection.groups]
    for names, shapes in _distinct(groups):
        table.add_section()
        count = groups.count((names, shapes))
        for name, shape in zip(names, shapes, strict=True):
            table.add_row(escape(name), " x ".join(map(str, shape)), str(count))
    console.print(table)
    if selection.left_out:
        table = Table(header_style="bold")
        for column in ("stays dense", "shape", "layers", "why"):
            table.add_column(column, justify="right" if column in ("shape", "layers") else "left")
        rows = [(_without_numbers([one.name])[0], one.shape, one.reason) for one in selection.left_out]
        for name, shape, reason in _distinct(rows):
            table.add_row(escape(name), " x ".join(map(str, shape)), str(rows.count((name, shape, reason))), escape(reason))
        console.print(table)


def _without_numbers(names: Sequence[str]) -> list[str]:
    """Layer numbers as `*`: what differs in nothing else is one row."""
    return [re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names]


def _distinct(rows: Sequence[Any]) -> list[Any]:
    return [row for index, row in enumerate(rows) if row not in rows[:index]]


def show_report(report: "PruningReport", output: str) -> None:
    """The end of `statprune prune`."""
    from statprune.recipe import Recipe

    if report.chosen_by is not None:
        recipe = Recipe.from_dict(report.recipe)
        console.tell(
            f"chosen by auto: [bold]{escape(recipe.method)}[/], schedule {recipe.schedule}, of "
            f"{report.chosen_by['measurements']} measurements"
        )
    for name, what in _steps(report).items():
        if name in report.seconds:
            console.tell(f"{what:<68}{report.seconds[name]:8.1f} s")
    console.tell(
        f"\n{report.num_weights:,} weights, {100 * report.sparsity:.2f} % of them zero; "
        f"energy {100 * report.energy_ratio:.1f} % of dense; {report.num_tokens:,} calibration tokens\n"
        + (f"{report.few_tokens}\n" if report.few_tokens else "")
        + f"{_perplexities(report.perplexity)}"
        f"[bold green]saved and verified:[/] {escape(output)}; report.html there is to look at"
    )


def _perplexities(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return ""
    dense, pruned = ("no number" if measured[key] is None else f"{measured[key]:.4f}" for key in ("dense", "pruned"))
    return (
        f"perplexity [bold]{pruned}[/], dense {dense}, on {measured['windows']} windows of {measured['seqlen']} tokens of "
        f"{escape(', '.join(measured['text']))}\n{_beside_wanda(measured)}"
    )


def _beside_wanda(measured: Mapping[str, Any]) -> str:
    """What Wanda's mask would have left, where that was measured and is a number."""
    if measured.get("wanda") is None:
        return ""
    text = f"Wanda's mask alone would give {measured['wanda']:.4f}"
    if measured["pruned"] is not None and measured["pruned"] <= measured["wanda"]:
        return f"[dim]{text}[/]\n"
    return (
        f"[bold yellow]{text}: better than this recipe[/], on this text. Try --method wanda --schedule block, or let "
        "'statprune tune' choose.\n"
    )


def _steps(report: "PruningReport") -> dict[str, str]:
    """What took time, in order, by the name that the report has for it."""
    allocation = report.recipe["allocation"]["name"]
    times = {"block": "twice, block by block", BLOCK_BY_HOOKS: "block by block"}.get(report.schedule, "once")
    runner = "dense model with hooks" if report.fallback_reason else "graph"
    if report.schedule == BLOCK_BY_HOOKS:
        runner = "model with hooks"
    return {
        "tune": "candidates tried out on the calibration windows",
        "trace": "export to a graph, in vain" if report.fallback_reason else "export to a graph",
        **({"allocate": f"allocation: {allocation}, measured on the dense model"} if allocation != "uniform" else {}),
        "compare": "Wanda's mask to compare with, pruned and measured",
        "gradients": "gradients of the loss at the layers' outputs, of the dense model",
        "check": "first batch through the dense model, before any change",
        "walk": f"walk: the calibration set through the {runner}, {times}",
        "prune": "scores, masks and compensation",
        "save": "save and verify",
    }


def show_evaluation(result: dict[str, Any]) -> None:
    """The end of `statprune evaluate`."""
    console.print(f"perplexity [bold]{result['perplexity']:.4f}[/]")
    tokenizer = f"{result['tokenizer']} ({result['vocabulary']} tokens), " if "tokenizer" in result else ""
    console.tell(
        f"[dim]{result['windows']} windows of {result['seqlen']} tokens, {result['dtype']}, {tokenizer}"
        f"{escape(', '.join(result['text']))}[/]"
    )


def show_verified(folder: str, record: dict[str, Any]) -> None:
    """The end of `statprune verify`."""
    console.tell(
        f"[bold green]verified:[/] {escape(folder)}: {len(record['sites'])} weights, "
        f"{100 * record['sparsity']:.2f} % zeros, every promise of pruning.json holds\n"
        f"[dim]SHA-256 of the record, to publish: {record['digest']}[/]"
    )


def show_pushed(folder: str, address: str) -> None:
    """The end of `statprune push`."""
    console.tell(f"[bold green]verified and uploaded:[/] {escape(folder)} to {escape(address)}")


def show_layers(folder: str, record: dict[str, Any]) -> None:
    """The tables of `statprune report`: one for each stack of blocks, a row for each kind of layer."""
    from statprune.page.panels import panels

    console.print(f"[bold]{escape(folder)}[/]: medians over the layers of a kind; the error is the output's", soft_wrap=True)
    for panel in panels(record["sites"]):
        table = Table(title=escape(panel.title), title_justify="left", title_style="bold", header_style="bold")
        for column in ("pruned", "layers", "zeros %", "error %", "worst %", "energy %"):
            table.add_column(column, justify="left" if column == "pruned" else "right", overflow="fold")
        for kind, cells in panel.rows:
            layers = [layer for cell in cells for layer in layers_data({"sites": cell})["layers"]]
            errors = [100 * layer["output_error"] for layer in layers if layer["output_error"] is not None]
            middle, worst = (f"{statistics.median(errors):.2f}", f"{max(errors):.2f}") if errors else ("-", "-")
            zeros, energy = (statistics.median(100 * layer[key] for layer in layers) for key in ("sparsity", "energy_ratio"))
            table.add_row(escape(kind), str(len(layers)), f"{zeros:.2f}", middle, worst, f"{energy:.1f}")
        console.print(table)
        if panel.num_more:
            console.print(f"[dim]and {panel.num_more} more kinds of layer; --json has them all[/]", soft_wrap=True)


def layers_data(record: dict[str, Any]) -> dict[str, Any]:
    """`show_layers` as data, of each layer."""
    layers = [
        {
            "name": site["name"], "shape": site["shape"], "sparsity": site["sparsity"],
            "output_error": site.get("output_error"),
            "energy_ratio": site["energy_after"] / max(1e-300, site["energy_before"]),
        }
        for site in record["sites"]
    ]  # fmt: skip
    kept = {key: record.get(key) for key in ("sparsity", "energy_ratio", "perplexity", "left_out", "seconds", "memory")}
    return {**kept, "layers": layers}


def show_page(path: str) -> None:
    """The end of `statprune report`."""
    console.tell(f"[bold green]to look at:[/] {escape(path)}")


def verified_data(folder: str, record: dict[str, Any]) -> dict[str, Any]:
    """`show_verified` as data."""
    kept = ("sparsity", "energy_ratio", "recipe", "files", "digest")
    return {"folder": folder, "verified": True, "weights": len(record["sites"]), **{key: record[key] for key in kept}}


def show_merged(before: "PruningReport", after: "PruningReport", output: str) -> None:
    """The end of `statprune merge`."""
    console.tell(
        f"{_num_changed(before, after)} of {len(after.sites)} pruned weights have changed; "
        f"zeros: {100 * before.sparsity:.2f} % before, {100 * after.sparsity:.2f} % now; "
        f"energy: {100 * before.energy_ratio:.1f} % of dense before, {100 * after.energy_ratio:.1f} % now\n"
        f"[bold green]saved and verified:[/] {escape(output)}"
    )


def merged_data(before: "PruningReport", after: "PruningReport", output: str) -> dict[str, Any]:
    """`show_merged` as data."""
    return {
        "output": output, "weights": len(after.sites), "changed": _num_changed(before, after),
        "sparsity": {"before": before.sparsity, "now": after.sparsity},
        "energy_ratio": {"before": before.energy_ratio, "now": after.energy_ratio},
    }  # fmt: skip


def _num_changed(before: "PruningReport", after: "PruningReport") -> int:
    return sum(old.energy_after != new.energy_after for old, new in zip(before.sites, after.sites, strict=True))
