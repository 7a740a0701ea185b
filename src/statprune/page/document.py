"""The page: a record in, HTML out. What an older record does not have is left away, or said to be not known."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from statprune.errors import number_of
from statprune.grammar import write_pattern
from statprune.page.panels import Site, panels
from statprune.page.pictures import Around, Scale, bars, heat_map, overview, percent, zoom
from statprune.page.style import STYLE

MOST_ROWS = 300
"""Layers in the table of all."""

Record = Mapping[str, Any]

_STEPS = {
    "tune": "try out candidates",
    "trace": "export to a graph",
    "allocate": "share out the sparsity",
    "check": "first batch, before any change",
    "walk": "run the calibration set",
    "prune": "scores, masks, compensation",
    "save": "save and verify",
}


def render(record: Record, mask: Tensor | None = None) -> str:
    """The whole page.

    Args:
        record: what `pruning.json` holds, or a report's `to_dict()`.
        mask: of the layer that `pictured` names: [out, in], bool, True = kept; None where the weights are not at hand.
    """
    sections = [
        _perplexity(record),
        _layers(record),
        _picture(record, mask),
        _dense(record),
        _recipe(record),
        _costs(record),
        _every_layer(record),
    ]
    body = "".join(f"<section>{one}</section>\n" for one in sections if one)
    return (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(_name(record))}, sparse</title>\n<style>{STYLE}</style>\n"
        f"{_head(record)}\n<main>\n{body}</main>\n{_foot()}\n"
    )


def pictured(record: Record) -> Site | None:
    """The layer whose mask is shown: the one whose output is furthest off, or else the first; None where there is none."""
    sites: Sequence[Site] = record["sites"]
    return max(sites, key=lambda site: _error(site) or 0.0, default=None)


def _head(record: Record) -> str:
    sites = record["sites"]
    how = f"{_method(record)} at {_pattern(record)}"
    steps = record.get("finetuning_steps") or 0
    tuned = f" Then it was fine-tuned for {number_of(steps, 'step')}, with the zeros held." if steps else ""
    figures = [(f"{100 * record['sparsity']:.2f} %", "zeros", f"of {_weights(sites)} in {number_of(len(sites), 'layer')}")]
    dense, pruned = (_perplexities(record).get(name) for name in ("dense", "pruned"))
    if pruned is not None:
        change = f"{dense:.2f} dense, {100 * (pruned / dense - 1):+.1f} %" if dense else ""
        figures.append((f"{pruned:.2f}", "perplexity", change))
    if errors := _errors(sites):
        worst = f"median layer; {percent(max(errors))} % in the worst"
        figures.append((f"{percent(statistics.median(errors))} %", "output error", worst))
    figures.append((f"{100 * record['energy_ratio']:.1f} %", "energy", "of the dense sum of squared weights"))
    shown = "".join(f"<div><dt>{name}<dd>{value}<small>{escape(more)}</small></div>" for value, name, more in figures)
    return (
        f"<header><h1>{escape(_name(record))}, sparse</h1><p>Pruned with {escape(how)}.{tuned}</p>"
        f"<dl class=figures>{shown}</dl></header>"
    )


def _perplexity(record: Record) -> str:
    values = _perplexities(record)
    if not values:
        return ""
    found = record["perplexity"]
    windows = f"{_count(found.get('windows'))} windows" if found.get("windows") else "windows"
    protocol = [
        f"on {_words(found['text'])}" if found.get("text") else "",
        f"in {windows} of {_count(found['seqlen'])} tokens" if found.get("seqlen") else "",
    ]
    told = escape(" ".join(one for one in protocol if one))
    return (
        f"<h2>Perplexity</h2><p>Lower is better. {f'Measured {told}.' if told else ''}</p>"
        + bars([(name, value, f"{value:.4f}") for name, value in values.items()])
    )  # fmt: skip


def _layers(record: Record) -> str:
    sites = record["sites"]
    if not sites:
        return "<h2>Layers</h2><p>No layer was pruned.</p>"
    stacks = panels(sites)
    parts = ["<h2>Layers</h2>"]
    if errors := _errors(sites):
        scale = Scale(errors)
        worst = max(sites, key=lambda site: _error(site) or 0.0)
        missing = len(sites) - len(errors)
        unknown = f" Not known of {number_of(missing, 'layer')}." if missing else ""
        parts += [
            "<h3>Output error, %</h3><p class=note>How far each layer's output moved when it was pruned: the root mean square "
            "of the change, relative to the dense output, on a sample of the inputs that calibration gave it. Furthest off is "
            f"<code>{escape(worst['name'])}</code>, with {percent(_error(worst) or 0.0)} %."
            f"{unknown}</p>",
            *(heat_map(panel, _error, scale) for panel in stacks),
            scale.legend(),
        ]
    else:
        parts.append(f"<p class=note>Output errors: {_why_no_errors(record)}</p>")
    energies = Around([_energy(site) for site in sites])
    parts += [
        "<h3>Energy, % of dense</h3><p class=note>The sum of squared weights, after over before. Pruning takes it away; "
        "compensation may give it back, or more.</p>",
        *(heat_map(panel, _energy, energies) for panel in stacks),
        energies.legend(),
    ]
    shares = [site["sparsity"] for site in sites]
    if max(shares) - min(shares) < 0.0005:
        parts.append(f"<h3>Zeros</h3><p class=note>{100 * record['sparsity']:.2f} % in every layer.</p>")
    else:
        zeros = Scale(shares, low=min(shares))
        parts += ["<h3>Zeros, %</h3>", *(heat_map(panel, lambda site: site["sparsity"], zeros) for panel in stacks)]
        parts.append(zeros.legend())
    return "".join(parts)


def _why_no_errors(record: Record) -> str:
    if record.get("finetuning_steps"):
        return "the weights were trained after pruning, so what was measured then does not hold any more."
    if record.get("schedule") == "no statistics":
        return "not measured, as this method looks at weights alone and no calibration inputs were run."
    return "not measured."


def _picture(record: Record, mask: Tensor | None) -> str:
    site = pictured(record)
    if mask is None or site is None:
        return ""
    pattern = site.get("pattern") or record["recipe"]["pattern"]
    group = pattern.get("of") if isinstance(pattern, Mapping) and pattern.get("name") == "nm" else None
    rows, columns = (min(most, size) for most, size in zip((32, 64), mask.shape, strict=True))
    text = f"In each group of {group} neighbours at most {pattern['keep']} are kept. " if group else ""
    corner = (
        f"<figure>{zoom(mask, group)}<figcaption>The first {rows} outputs (down) and {columns} inputs (across), weight by "
        "weight. Coloured is kept, pale is zero.</figcaption></figure>"
    )
    tiles, legend = overview(mask)
    kept = float(mask.float().mean())
    whole = (
        f"<figure>{tiles}{legend}<figcaption>The whole matrix in tiles, by the share that each keeps.</figcaption></figure>"
        if tiles else ""
    )  # fmt: skip
    everywhere = "" if tiles else f"Every part of the matrix keeps the same share, {percent(kept)} %. "
    return (
        f"<h2>One mask</h2><p class=note><code>{escape(site['name'])}</code>, {mask.shape[0]:,} outputs by {mask.shape[1]:,} "
        f'inputs. {text}{everywhere}</p><div class="masks{"" if tiles else " one"}">{corner}{whole}</div>'
    )


def _dense(record: Record) -> str:
    groups: dict[tuple[str, str, str], int] = {}
    for one in record.get("left_out") or []:
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", one["name"]), " x ".join(map(str, one["shape"])), one["reason"])
        groups[key] = groups.get(key, 0) + 1
    if not groups:
        return "<h2>What stayed dense</h2><p class=note>Nothing with two or more dimensions.</p>"
    shown = list(groups.items())[:60]
    rows = [(f"<code>{escape(name)}</code>", escape(shape), str(count), escape(why)) for (name, shape, why), count in shown]
    more = f"<p class=note>and {len(groups) - len(shown)} more kinds, in pruning.json</p>" if len(groups) > len(shown) else ""
    return (
        "<h2>What stayed dense</h2>" + _table([("layer", ""), ("shape", "n wide"), ("layers", "n"), ("why", "")], rows) + more
    )


def _recipe(record: Record) -> str:
    protocol = record.get("protocol") or {}
    facts = [
        ("schedule", record.get("schedule")),
        ("calibration tokens", f"{record['num_tokens']:,}" if record.get("num_tokens") else None),
        *((key.replace("_", " "), value) for key, value in protocol.items()),
        ("module hooks", record.get("fallback_reason")),
    ]
    chosen = record.get("chosen_by")
    if isinstance(chosen, Mapping):
        facts.append(("chosen by", f"a search, of {chosen.get('measurements', 'several')} measurements"))
    text = yaml.safe_dump(dict(record["recipe"]), sort_keys=False).strip()
    return (
        "<h2>Recipe</h2><div class=two><div><p class=note>As a file, <code>statprune prune --recipe</code> takes it.</p>"
        f"<pre>{escape(text)}</pre></div><div><h3>Calibration</h3>{_facts(facts)}</div></div>"
    )


def _costs(record: Record) -> str:
    seconds, memory = record.get("seconds") or {}, record.get("memory") or {}
    names = [name for name in [*_STEPS, *(seconds.keys() - _STEPS.keys())] if name in seconds]
    names = [name for name in names if seconds[name] >= 0.05 or name != "allocate"]
    parts = []
    if names:
        total = sum(seconds[name] for name in names)
        parts.append(f"<h2>Time and memory</h2><p class=note>{_duration(total)} together, without loading and saving.</p>")
        parts.append(bars([(_STEPS.get(name, name), seconds[name], _duration(seconds[name])) for name in names]))
    if marks := [name for name in names if name in memory]:
        is_gpu = str((record.get("protocol") or {}).get("device", "")).startswith("cuda")
        what = "what torch allocated on the GPU" if is_gpu else "the process, or on a GPU what torch allocated there"
        parts.append(f"<h3>Peak memory by the end of each step</h3><p class=note>The highest point so far of {what}.</p>")
        ordered = sorted(marks, key=lambda name: memory[name])
        parts.append(bars([(_STEPS.get(name, name), memory[name], f"{memory[name] / 1e9:.2f} GB") for name in ordered]))
    versions = record.get("versions") or {}
    level = 3 if parts else 2
    parts.append(f"<h{level}>Versions</h{level}>{_facts(versions.items(), ' names')}" if versions else "")
    return "".join(parts)


def _every_layer(record: Record) -> str:
    sites = record["sites"]
    if not sites:
        return ""
    heads = [("layer", ""), ("shape", "n wide"), ("zeros, %", "n"), ("error, %", "n"), ("energy, %", "n")]
    rows = []
    for site in sites[:MOST_ROWS]:
        error = _error(site)
        numbers = [
            f"{100 * site['sparsity']:.2f}",
            "-" if error is None else f"{100 * error:.2f}",
            f"{100 * _energy(site):.1f}",
        ]
        rows.append((f"<code>{escape(site['name'])}</code>", " x ".join(map(str, site["shape"])), *numbers))
    more = len(sites) - len(rows)
    rest = f"<p class=note>and {number_of(more, 'more')}, in pruning.json</p>" if more > 0 else ""
    return (
        f"<h2>Every layer</h2><details><summary>{number_of(len(sites), 'layer')}, in the order in which they run</summary>"
        f"{_table(heads, rows)}{rest}</details>"
    )


def _foot() -> str:
    return (
        "<footer><p class=note>Made by statprune from <code>pruning.json</code> and the weights beside it. "
        "<code>statprune verify</code> recomputes zeros, pattern and energy of each layer from the files, and their digests; "
        "perplexities, output errors, time and memory were measured once and are quoted.</p></footer>"
    )


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are HTML, and each column has classes."""

    def classes(kind: str) -> str:
        return f' class="{kind}"' if kind else ""

    kinds = [kind for _, kind in heads]
    body = "".join(
        "<tr>" + "".join(f"<td{classes(kind)}>{cell}" for cell, kind in zip(row, kinds, strict=True)) for row in rows
    )
    return (
        "<div class=scroll><table class=rows><thead><tr>"
        f"{''.join(f'<th scope=col{classes(kind)}>{name}' for name, kind in heads)}</thead><tbody>{body}</tbody></table></div>"
    )


def _facts(facts: Iterable[tuple[str, Any]], kind: str = "") -> str:
    shown = "".join(f"<dt>{escape(str(key))}<dd>{escape(_words(value))}" for key, value in facts if value not in (None, "", []))
    return f'<dl class="facts{kind}">{shown}</dl>'


def _words(value: Any) -> str:
    return ", ".join(map(_last, value)) if isinstance(value, list | tuple) else _last(value)


def _last(value: Any) -> str:
    """A file's name without its folder, which is of somebody's machine; everything else as text."""
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text


def _name(record: Record) -> str:
    base, source = record.get("base") or {}, (record.get("protocol") or {}).get("model")
    return str(base.get("name") or (Path(source).name if isinstance(source, str) else base.get("class", "model")))


def _method(record: Record) -> str:
    recipe = record["recipe"]
    compensation = recipe.get("compensation") or []
    steps = [recipe.get("criterion"), *(compensation if isinstance(compensation, list) else [compensation])]
    names = [str(step.get("name")) if isinstance(step, Mapping) else str(step) for step in steps if step]
    return "+".join(name for name in names if name != "none") or "a method"


def _pattern(record: Record) -> str:
    pattern = record["recipe"].get("pattern")
    return write_pattern(dict(pattern)) if isinstance(pattern, Mapping) else str(pattern)


def _perplexities(record: Record) -> dict[str, float]:
    found = record.get("perplexity") or {}
    known = {name: found.get(name) for name in ("dense", "pruned")}
    return {name: value for name, value in known.items() if isinstance(value, int | float) and 0 < value < math.inf}


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _error(site: Site) -> float | None:
    found = site.get("output_error")
    return float(found) if found is not None else None


def _errors(sites: Sequence[Site]) -> list[float]:
    return [error for site in sites if (error := _error(site)) is not None]


def _energy(site: Site) -> float:
    return float(site["energy_after"] / max(1e-300, site["energy_before"]))


def _weights(sites: Sequence[Site]) -> str:
    count = sum(math.prod(site["shape"]) for site in sites)
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {unit} weights"
    return number_of(count, "weight")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
