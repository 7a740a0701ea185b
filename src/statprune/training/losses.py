"""The loss of a LightningModule, for a loss-aware method, whose model may be any: its training step, run without logging."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from statprune.errors import CalibrationError
from statprune.model.gradients import Loss, ordinary
from statprune.model.inputs import ModelInputs

_LOGGING = ("log", "log_dict")


def training_loss(trainer: Trainer, pl_module: LightningModule, batches: Sequence[Any]) -> Loss:
    """What `training_step` makes of each of these batches.

    It is taken as it is, so where it is a mean over a batch, batches count alike. What the step logs is left out.

    Args:
        trainer: moves a batch to the device.
        pl_module: has the step.
        batches: as its loader gives them, in the order in which they calibrate.
    """

    def loss(model: nn.Module, inputs: ModelInputs, index: int) -> Tensor:
        batch = trainer.strategy.batch_to_device(tree_map(ordinary, batches[index]), pl_module.device)
        with _without_logging(pl_module):
            output = pl_module.training_step(batch, index)
        found = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(found, Tensor):
            raise CalibrationError(
                f"StatisticalPruning with a loss-aware method: {type(pl_module).__name__}.training_step gives "
                f"{type(output).__name__}: expected a loss, or a dict with one. Use a method without gradients."
            )
        return found

    return loss


@contextlib.contextmanager
def _without_logging(pl_module: LightningModule) -> Iterator[None]:
    """A step that runs in the middle of a validation would log a training loss there."""
    own = {name: vars(pl_module)[name] for name in _LOGGING if name in vars(pl_module)}
    vars(pl_module).update(dict.fromkeys(_LOGGING, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in _LOGGING:
            del vars(pl_module)[name]
        vars(pl_module).update(own)
