"""What TensorBoard shows of a pruning: histograms of the kept weights, and sparsity and output error layer by layer.

Both are small whatever the model: histograms are of a sample, and a figure has one bar a layer. Other loggers get scalars.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.fabric.loggers import TensorBoardLogger
from torch import Tensor

from statprune.model.storage import local
from statprune.report import PruningReport

MOST_KINDS = 12
"""Histograms; a model with more kinds of layers gets one of all together."""

MOST_VALUES = 500_000
"""Weights that are looked at, of all layers together."""

MOST_NAMES = 48
"""Layers whose names fit below a figure."""


def draw_report(loggers: Iterable[Any], report: PruningReport, weight_of: Callable[[str], Tensor], *, step: int) -> None:
    """Give every TensorBoard logger among these the pictures; nothing happens where there is none.

    Args:
        loggers: a Trainer's. Call it on the first rank only.
        report: of what was pruned.
        weight_of: a parameter's pruned weight by its name in the report, [any shape]; of a sharded one, this rank's part.
        step: of the training.
    """
    boards = [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
    if not boards or not report.sites:
        return
    kept = kept_weights(report, weight_of)
    for board in boards:
        for kind, values in kept.items():
            board.experiment.add_histogram(f"pruned_kept_weights/{kind}", values, step)
        if (figure := layer_figure(report)) is not None:
            board.experiment.add_figure("pruned_layers", figure, step)


def kept_weights(report: PruningReport, weight_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """A sample of the weights that are not zero, by kind of layer such as `q_proj`: float32 on the CPU, [values] each."""
    kinds = {site.parameter: _kind(site.name) for site in report.sites}
    if len(set(kinds.values())) > MOST_KINDS:
        kinds = dict.fromkeys(kinds, "all layers")
    found: dict[str, list[Tensor]] = {}
    for parameter, kind in kinds.items():
        weight = local(weight_of(parameter))
        # Odd, so that it does not meet the same place of each 2:4 group again and again.
        stride = (weight.numel() * len(kinds) // MOST_VALUES) | 1
        values = weight.reshape(-1)[::stride]
        found.setdefault(kind, []).append(values[values != 0].float().cpu())
    joined = {kind: torch.cat(values) for kind, values in found.items()}
    return {kind: values for kind, values in joined.items() if len(values) and bool(torch.isfinite(values).all())}


def layer_figure(report: PruningReport) -> Any | None:
    """A matplotlib figure with a bar for each layer: its sparsity, and below its output error where that is known.

    None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    errors = [getattr(site, "output_error", None) for site in report.sites]
    panels: list[tuple[str, list[Any]]] = [("sparsity [%]", [100 * site.sparsity for site in report.sites])]
    if any(error is not None for error in errors):
        panels.append(("relative output error [%]", [None if error is None else 100 * error for error in errors]))
    names = [site.name for site in report.sites]
    figure = Figure(figsize=(min(16.0, max(6.0, 0.25 * len(names))), 2.2 * len(panels) + 1.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (label, values) in zip(axes, panels, strict=True):
        axis.bar(range(len(names)), [0 if value is None else value for value in values], color="#4269d0")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    if len(names) <= MOST_NAMES:
        axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    else:
        axes[-1].set_xlabel("layers, in the order in which they run")
    return figure


def _kind(name: str) -> str:
    """The last word of a layer's name, with the numbers behind it: `q_proj`, `mlp.0`."""
    parts = name.split(".")
    start = next((index for index in reversed(range(len(parts))) if not parts[index].isdigit()), 0)
    return ".".join(parts[start:])
