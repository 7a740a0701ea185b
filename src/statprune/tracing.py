"""From a module to a `torch.fx` graph: `torch.export`, and transformers' own wrapper of it for its models."""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from statprune.batches import ModelInputs, is_transformers_model
from statprune.errors import TracingError
from statprune.sites import TracedModel, find_linear_layers


def trace(model: nn.Module, example: ModelInputs, dynamic_dims: Sequence[set[int]] | None = None) -> TracedModel:
    """Export one forward pass and find its linear layers.

    Runs on fake tensors, so it costs seconds for a model of any size, and works on the meta device too.

    Args:
        model: any module that `torch.export` takes. Traced in eval mode and left in the modes it had.
        example: one forward pass's inputs.
        dynamic_dims: for each of `example.leaves()`, the dimensions whose size differs between batches.

    Raises:
        TracingError: `torch.export` refused the model; the message carries its reason.
    """
    with eval_mode(model), torch.no_grad():
        try:
            program = _export(model, example, dynamic_dims or [set() for _ in example.leaves()])
        except Exception as e:  # whatever the model's own code, or a guard of torch.export, raises
            raise TracingError(f"torch.export cannot trace {type(model).__name__}: {_first_line(e)}") from e
        # The graph also runs at sizes that torch.export did not see; its guards would refuse a batch of one.
        graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, torch.fx.GraphModule)
    return find_linear_layers(model, graph_module)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and afterwards exactly the modes there were (some submodules may be frozen)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _export(model: nn.Module, example: ModelInputs, dynamic_dims: Sequence[set[int]]) -> torch.export.ExportedProgram:
    # DYNAMIC and not AUTO: a size that the model turns into a constant must be an error here, not a wrong graph.
    shapes = [dict.fromkeys(dims, torch.export.Dim.DYNAMIC) or None for dims in dynamic_dims]
    by_name: dict[str, Any] = dict(zip(example.kwargs, shapes[len(example.args) :], strict=True))
    is_dynamic = any(dynamic_dims)
    if not is_transformers_model(model):
        if example.args:  # a forward that takes *args, which torch.export sees as one argument
            parameters = inspect.signature(model.forward).parameters.values()
            by_name[next(p.name for p in parameters if p.kind is p.VAR_POSITIONAL)] = tuple(shapes[: len(example.args)])
        return torch.export.export(
            model, example.args, example.kwargs, strict=False, dynamic_shapes=by_name if is_dynamic else None
        )

    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    flags = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    config = DynamoConfig(dynamic=is_dynamic, dynamic_shapes=by_name if is_dynamic else None)
    with _quiet("transformers.exporters"):
        exported: Any = DynamoExporter().export(model, {**example.kwargs, **flags}, config=config)  # type: ignore[arg-type]
    # transformers 5.17 returns the program itself, later versions a wrapper around it.
    program: torch.export.ExportedProgram = getattr(exported, "program", exported)
    return program


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """The exporter warns about untested version pairs on every call; a trace that fails raises anyway."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
