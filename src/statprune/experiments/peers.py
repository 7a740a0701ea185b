"""Code of other projects, from a folder that the user names, to be measured beside ours."""

import contextlib
import copy
import importlib.util
import io
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from statprune.errors import ExperimentError
from statprune.experiments.cost import measured
from statprune.experiments.runtime import first_block, module_of, show_inputs
from statprune.methods.patterns import NM, Unstructured
from statprune.model.inputs import ModelInputs
from statprune.model.layers import Layers
from statprune.recipe import Recipe


def load_sparsegpt(folder: str | Path) -> Any:
    """The class `SparseGPT` of a checkout of IST-DASLab/sparsegpt, or of what has its interface.

    Running it is running that folder's code.

    Raises:
        ExperimentError: it is not there, or cannot be imported.
    """
    path = Path(folder) / "sparsegpt.py"
    if not path.is_file():
        raise ExperimentError(f"{folder} has no sparsegpt.py: expected a checkout of github.com/IST-DASLab/sparsegpt.")
    spec = importlib.util.spec_from_file_location("their_sparsegpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # It imports a file that stands beside it.
    with mock.patch("sys.path", [str(path.parent.resolve()), *sys.path]):
        try:
            spec.loader.exec_module(module)
        except Exception as e:
            raise ExperimentError(f"{path} cannot be imported: {type(e).__name__}: {e}") from e
    if not hasattr(module, "SparseGPT"):
        raise ExperimentError(f"{path} has no class SparseGPT: expected a checkout of github.com/IST-DASLab/sparsegpt.")
    return module.SparseGPT


@torch.no_grad()
def measure_sparsegpt(
    theirs: Any, layers: Layers, inputs: Sequence[ModelInputs], recipe: Recipe, *, rounds: int
) -> dict[str, float]:
    """Time SparseGPT's own code on the first block of what a recipe prunes, with the recipe's pattern; no weight changes.

    Args:
        theirs: from `load_sparsegpt`.
        layers: of a model whose first block consists of linear modules.
        inputs: calibration data, on the model's device.
        recipe: says which layers, and how sparse.
        rounds: how often each time is taken.

    Returns:
        Seconds of `statistics`, `pruning` and their `total`, medians.

    Raises:
        ExperimentError: a layer is no module of its own, the pattern is one that their code does not have, or it fails.
    """
    pattern = recipe.build_pattern()
    if not isinstance(pattern, NM | Unstructured):
        raise ExperimentError(f"SparseGPT's own code has unstructured sparsity and N:M: expected one of them, not {pattern}.")
    # Theirs counts in an N:M pattern what goes.
    kept_of = {"prunen": pattern.of - pattern.keep, "prunem": pattern.of} if isinstance(pattern, NM) else {}
    model, block = layers.model, first_block(layers, recipe)
    device = next(model.parameters()).device
    times = []
    for _ in range(rounds):
        states = {group.name: [theirs(copy.deepcopy(module_of(model, site))) for site in group.sites] for group in block}

        def shower(own: list[Any]) -> Any:
            def show(rows: Tensor) -> None:
                for state in own:
                    state.add_batch(rows, None)

            return show

        with _as_on_a_cpu(device):
            try:
                seconds = show_inputs(model, block, inputs, {name: shower(own) for name, own in states.items()})
                with measured(device) as cost:
                    for own in states.values():
                        for state in own:
                            state.fasterprune(pattern.sparsity, **kept_of)
            except Exception as e:
                raise ExperimentError(f"SparseGPT's own code failed: {type(e).__name__}: {e}") from e
        times.append((seconds, cost.seconds))
    collected, pruned = (statistics.median(column) for column in zip(*times, strict=True))
    return {"statistics": collected, "pruning": pruned, "total": collected + pruned}


@contextlib.contextmanager
def _as_on_a_cpu(device: torch.device) -> Iterator[None]:
    """It prints, and waits for a GPU whether there is one or not."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if device.type != "cuda":
            stack.enter_context(mock.patch("torch.cuda.synchronize"))
        yield
