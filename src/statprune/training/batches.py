"""Batches of a Trainer's loaders: those to calibrate on, those of a validation, and the inputs of the model in them."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from statprune.errors import CalibrationError
from statprune.model.kinds import is_transformers_model


def calibration_source(trainer: Trainer, pl_module: LightningModule, given: Any) -> Iterator[Any]:
    """Batches to calibrate on: what was given, or else what the DataModule or the LightningModule has for it, or to train on.

    Raises:
        CalibrationError: there is none of these.
    """
    owners: tuple[Any, ...] = (getattr(trainer, "datamodule", None), pl_module)
    own_loader = next((owner.calibration_dataloader for owner in owners if hasattr(owner, "calibration_dataloader")), None)
    training_loader = next(
        (owner.train_dataloader for owner in owners if owner and is_overridden("train_dataloader", owner)), None
    )
    if given is not None:
        return iter(given)
    if own_loader is not None:
        return iter(own_loader())
    if trainer.train_dataloader is not None:
        return _fresh_iterator(trainer.train_dataloader)
    if training_loader is not None:
        return iter(training_loader())
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


def model_inputs(pl_module: LightningModule, target: nn.Module, batch: Any) -> Any:
    """The inputs of `target.forward` in a batch of this LightningModule's loaders: a dict, or a tuple."""
    if hasattr(pl_module, "calibration_inputs"):
        batch = pl_module.calibration_inputs(batch)
        return batch if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    parameters = [
        parameter
        for parameter in inspect.signature(target.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if isinstance(batch, Mapping):
        # A transformers model makes its decoder inputs of labels; another model would return its loss for them.
        known = {parameter.name for parameter in parameters} - (set() if is_transformers_model(target) else {"labels"})
        return {name: value for name, value in batch.items() if name in known}
    if isinstance(batch, Tensor):
        batch = (batch,)
    required = sum(parameter.default is parameter.empty for parameter in parameters)
    values = tuple(batch)[: max(1, required)]
    if is_transformers_model(target):
        return {"input_ids" if not values[0].is_floating_point() else target.main_input_name: values[0]}
    return values


def _fresh_iterator(loader: Any) -> Iterator[Any]:
    """An iterator of its own: a loader that keeps its workers has but one, which the training is reading."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    return iter(loader)
