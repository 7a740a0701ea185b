"""Batches of a Lightning Trainer's loaders: to calibrate on, or of a validation; and the inputs of the model in them."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from statprune.errors import CalibrationError
from statprune.model.inputs import ModelInputs, read_inputs


def calibration_source(trainer: Trainer, pl_module: LightningModule, given: Any) -> tuple[Any, bool | None]:
    """(batches to calibrate on, whether each rank has its own already), for `draw`.

    It is what was given, or else what the DataModule or the LightningModule has for it, or to train on.

    Raises:
        CalibrationError: there is none of these.
    """
    owners: tuple[Any, ...] = (getattr(trainer, "datamodule", None), pl_module)
    own_loader = next((owner.calibration_dataloader for owner in owners if hasattr(owner, "calibration_dataloader")), None)
    training_loader = next(
        (owner.train_dataloader for owner in owners if owner and is_overridden("train_dataloader", owner)), None
    )
    if given is not None:
        return given, None
    if own_loader is not None:
        return own_loader(), None
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader, True  # as the training does: Lightning gave it a sampler for that
    if training_loader is not None:
        return training_loader(), None
    raise CalibrationError(
        "StatisticalPruning has no calibration data: give it `calibration=`, define `calibration_dataloader` in the "
        "DataModule or the LightningModule, or have training data. It does not take the validation data by itself."
    )


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """What the loop is about to run: every loader's batches up to its limit, on this rank."""
    loaders = trainer.val_dataloaders
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    for loader, limit in zip(loaders, trainer.num_val_batches, strict=True):
        for index, batch in enumerate(loader):
            if index >= limit:
                break
            yield batch


def model_inputs(pl_module: LightningModule, target: nn.Module, batch: Any) -> ModelInputs:
    """The inputs of `target.forward` in a batch of this LightningModule's loaders, on the model's device."""
    if not hasattr(pl_module, "calibration_inputs"):
        return read_inputs(target, batch, has_targets=True)
    given = pl_module.calibration_inputs(batch)
    if isinstance(given, Mapping):
        return read_inputs(target, ModelInputs((), dict(given)))
    return read_inputs(target, ModelInputs(tuple(given) if isinstance(given, tuple | list) else (given,), {}))
