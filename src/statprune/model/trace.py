"""From a module to a `torch.fx` graph: `torch.export`, and transformers' own wrapper of it for its models."""

import contextlib
import inspect
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from statprune.errors import TracingError
from statprune.model.find import find_linear_layers
from statprune.model.inputs import LABELS, ModelInputs
from statprune.model.kinds import architecture, is_transformers_model
from statprune.model.sites import TracedModel
from statprune.model.undisturbed import eval_mode, without_cache


def trace(
    model: nn.Module,
    example: ModelInputs,
    dynamic_dims: Sequence[set[int]] | None = None,
    batches: Sequence[ModelInputs] = (),
) -> TracedModel:
    """Export one forward pass and find its linear layers.

    Runs on fake tensors, so it costs seconds for a model of any size, and works on the meta device too.

    Args:
        model: any module that `torch.export` takes. Traced in eval mode and left in the modes it had.
        example: one forward pass's inputs.
        dynamic_dims: for each of `example.tensors()`, the dimensions whose size differs between batches.
        batches: what the graph is to run; it must hold for all of their shapes.

    Raises:
        TracingError: `torch.export` refused the model, or its graph does not hold for a batch; the message carries the reason.
    """
    with eval_mode(model), torch.no_grad(), without_cache(model), _named_inputs(model, example), _quiet():
        try:
            program = _export(model, example, dynamic_dims or [set() for _ in example.tensors()])
            graph_module = program.module()
        except Exception as e:  # whatever the model's own code, or a guard of torch.export, raises
            raise TracingError(f"torch.export cannot trace {type(model).__name__}: {_reason(e)}") from e
    assert isinstance(graph_module, torch.fx.GraphModule)
    _check_inputs(model, graph_module, example)
    check_guards(model, graph_module, batches)
    groups, left_out = find_linear_layers(model, graph_module)
    return TracedModel(graph_module, groups, left_out, architecture(model))


def _check_inputs(model: nn.Module, graph_module: torch.fx.GraphModule, example: ModelInputs) -> None:
    """Refuse a graph with other inputs: transformers' exporter computes some beforehand, such as the positions of images.

    Raises:
        TracingError: names both.
    """
    taken = [str(node.target) for node in _tensor_placeholders(graph_module)]
    given = [name for name, value in example.kwargs.items() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    is_same = all(name == own or name.startswith(f"{own}_") for name, own in zip(taken, given, strict=False))
    if len(taken) != len(example.tensors()) or not (is_same or example.args):
        raise TracingError(
            f"torch.export cannot trace {type(model).__name__} with the inputs that it has: the exporter makes "
            f"{', '.join(taken)} of {', '.join(given)}"
        )


def _tensor_placeholders(graph_module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    nodes = graph_module.graph.nodes
    return [node for node in nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]


def check_guards(model: nn.Module, graph_module: torch.fx.GraphModule, batches: Sequence[ModelInputs]) -> None:
    """Refuse a graph that does not hold for the shapes of all batches.

    Raises:
        TracingError: names the first such batch, and why.
    """
    for number, batch in enumerate(batches):
        if broken := _broken_guard(graph_module, batch):
            raise TracingError(
                f"torch.export cannot trace {type(model).__name__} for the shapes of calibration batch {number}: {broken}"
            )


def check_traced(model: nn.Module, traced: TracedModel, batches: Sequence[ModelInputs]) -> None:
    """Refuse a graph from earlier that is not this model's, or not for these inputs.

    The model may be another instance than the one that was traced: what makes a graph is the same where the classes, their
    plain attributes, the configurations and the parameters' shapes, dtypes and ties are.

    Raises:
        TracingError: the graph is of another architecture, has other inputs, or does not hold for the shapes of a batch.
    """
    if traced.architecture != architecture(model):
        raise TracingError(
            f"The graph is that of another model than this {type(model).__name__}: expected one that was traced from a model "
            "of the same class, configuration, shapes, dtype and device."
        )
    names = [str(node.target) for node in _tensor_placeholders(traced.graph_module)]
    first = batches[0]
    given = [name for name, value in first.kwargs.items() if isinstance(value, Tensor)]
    if len(first.tensors()) != len(names) or not set(given) <= set(names):
        raise TracingError(
            f"The graph of {type(model).__name__} was traced with the inputs {', '.join(names)}, and the calibration batches "
            f"have {', '.join(given) or len(first.tensors())}: expected the same."
        )
    check_guards(model, traced.graph_module, batches)


def _export(model: nn.Module, example: ModelInputs, dynamic_dims: Sequence[set[int]]) -> torch.export.ExportedProgram:
    dims = iter(dynamic_dims)

    def shape_of(leaf: Any) -> dict[int, Any] | None:
        # DYNAMIC and not AUTO: a size that the model turns into a constant must be an error here, not a wrong graph.
        return dict.fromkeys(next(dims), torch.export.Dim.DYNAMIC) or None if isinstance(leaf, Tensor) else None

    is_dynamic = any(dynamic_dims)
    shapes = tree_map(shape_of, dict(zip(_argument_names(example), [*example.args, *example.kwargs.values()], strict=True)))
    has_transformers = any(is_transformers_model(module) for module in model.modules())
    if not has_transformers or example.args or any(name in LABELS for name in example.kwargs):
        return torch.export.export(
            model, example.args, example.kwargs, strict=False, dynamic_shapes=shapes if is_dynamic else None
        )

    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    config = DynamoConfig(dynamic=is_dynamic, dynamic_shapes=shapes if is_dynamic else None)
    exported: Any = DynamoExporter().export(model, dict(example.kwargs), config=config)  # type: ignore[arg-type]
    # transformers 5.17 returns the program itself, later versions a wrapper around it.
    program: torch.export.ExportedProgram = getattr(exported, "program", exported)
    return program


def _argument_names(example: ModelInputs) -> list[str]:
    return [*(f"arg_{index}" for index in range(len(example.args))), *example.kwargs]


@contextlib.contextmanager
def _named_inputs(model: nn.Module, example: ModelInputs) -> Iterator[None]:
    """Inside, `forward` has one parameter for each input: torch.export has no shapes for what goes into `**kwargs`."""
    before = vars(model).get("forward")
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    kinds = [inspect.Parameter.POSITIONAL_ONLY] * len(example.args) + [inspect.Parameter.KEYWORD_ONLY] * len(example.kwargs)
    parameters = [inspect.Parameter(name, kind) for name, kind in zip(_argument_names(example), kinds, strict=True)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        # The exporter of transformers leaves an attribute behind too.
        vars(model).pop("forward", None)
        if before is not None:
            model.forward = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines about untested version pairs, and no dump of half a graph where torch.export raises: we report that."""
    levels = {logging.getLogger("transformers.exporters"): logging.ERROR, logging.getLogger("torch"): logging.CRITICAL}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def _broken_guard(graph_module: torch.fx.GraphModule, batch: ModelInputs) -> str | None:
    """What the tracer took for granted about sizes (such as a length that 4 divides) and this batch breaks."""
    guards = getattr(graph_module, "_guards_fn", None)
    if guards is None:
        return None
    tensors = iter(batch.tensors())
    values = [node.meta.get("val") for node in graph_module.graph.nodes if node.op == "placeholder"]
    try:
        guards(*(next(tensors) if isinstance(value, Tensor) else value for value in values))
    except AssertionError as e:
        return _reason(e)[:200]
    return None


def _reason(error: Exception) -> str:
    """The line of the error that says why: the first, or the second where the first only announces it."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    is_preface = len(lines) > 1 and "Constraints violated" in lines[0]
    line = lines[1].split(". ")[0] if is_preface else "".join(lines[:1])
    return f"{type(error).__name__}: {line}".rstrip(".")
