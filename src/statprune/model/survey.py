"""What could be pruned in a model, before any data is read: needs a configuration's worth of model, on any device."""

from typing import Any

import torch
from torch import Tensor, nn

from statprune.errors import TracingError
from statprune.model.inputs import bind_batches
from statprune.model.trace import trace
from statprune.recipe import Recipe
from statprune.selection import Selection, select

EXAMPLE_LENGTH = 8


def survey(model: nn.Module, recipe: Recipe) -> Selection:
    """Trace a transformers model with made-up inputs, and say what a recipe would prune and leave out.

    Args:
        model: a `PreTrainedModel`, on the meta device if need be.
        recipe: its `targets`, `ignore` and pattern decide.

    Raises:
        TracingError: the model cannot be exported.
        SiteError: as `select`.
    """
    (inputs,) = bind_batches(model, [example_inputs(model)])
    traced = trace(model, inputs)
    return select(traced.groups, traced.left_out, recipe)


def example_inputs(model: Any) -> dict[str, Tensor]:
    """Zeros of the right shapes for the inputs that a transformers model names as its main one.

    Raises:
        TracingError: the main input is of an unknown kind.
    """
    config = model.config
    tokens = torch.zeros(2, EXAMPLE_LENGTH, dtype=torch.int64)
    inputs: dict[str, Tensor] = {}
    vision = getattr(config, "vision_config", config)
    is_text_too = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if model.main_input_name == "input_ids" or is_text_too:
        inputs["input_ids"] = tokens
    if model.main_input_name == "pixel_values" or is_text_too:
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(2, getattr(vision, "num_channels", 3), height, width)
    if model.main_input_name == "input_features":
        inputs["input_features"] = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
    if not inputs:
        raise TracingError(
            f"{type(model).__name__} takes {model.main_input_name}, for which no example can be made up. "
            "Use statprune.plan(model, batches) in Python, with batches of its own inputs."
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs
