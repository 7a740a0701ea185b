"""StatisticalPruning: prune a LightningModule from a Trainer.

    trainer.validate   epoch start: measure the dense model, calibrate, prune in place
                       the loop: measures the pruned model           epoch end: log            weights stay pruned
    trainer.fit        every validation is a probe: calibrate and prune a twin, measure both, log, forget the twin
                       train end: calibrate and prune in place
    trainer.fit with   train start: calibrate and prune in place     from then on: pruned weights are held at zero
    then="finetune"    every validation: measures the sparse model   train end: check the zeros, write the output

A probe never touches the training weights, the modes, or the random state: EarlyStopping, schedulers, averaging callbacks
and checkpoints see the training run that they would have seen without it.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from statprune.api import Choice, choose, plan, prune
from statprune.checkpoint import refuse_existing, save
from statprune.errors import CalibrationError, MaskError, RecipeError
from statprune.model.inputs import is_transformers_model
from statprune.recipe import Recipe
from statprune.report import PruningReport
from statprune.training.masks import HeldMasks, refuse_sharded, remeasure
from statprune.training.measurement import Measurement, model_inputs

Then = Literal["stop", "finetune"]


class StatisticalPruning(Callback):
    """Prune the model of a LightningModule.

    Args:
        recipe: how to prune; the default is the paper's method at 2:4. Where it is `auto`, it is chosen once, at the
            first probe or when pruning, by trying candidates out on the calibration batches, and then kept.
        module: attribute path of the module to prune, such as `"model"`. Default: the transformers model that the
            LightningModule holds, or else the LightningModule itself, called as `forward` is.
        dataloader: calibration batches. Default: `calibration_dataloader()` of the DataModule or the LightningModule, or
            else the training data. Never the validation data: its perplexity would be flattered.
        calibration_batches: how many batches of it, at most.
        probe: whether to measure a pruned twin at every validation of `fit`; with `then="finetune"`, the sparse model itself.
        output: folder for the pruned model (transformers models only), written and verified when the weights have landed;
            with `then="finetune"`, when `fit` ends.
        then: what follows the pruning. `"stop"`: nothing, so `fit` trains the dense model and prunes it at the end.
            `"finetune"`: `fit` prunes at the start and trains what is left, with the pruned weights held at exactly zero. A
            model that this callback has pruned already, in `validate` or before the checkpoint that `fit` resumes from, is
            not pruned again.

    A batch becomes the inputs of `forward` like this: a dict by the names that `forward` knows, a tuple by position as far
    as `forward` requires arguments (so `(x, y)` gives `x`), a tensor as it is. A LightningModule that needs something else
    defines `calibration_inputs(batch)`.

    Logged at the end of each validation, and so known to `ModelCheckpoint(monitor=...)`:
    `dense_perplexity` and `pruned_perplexity` where the model predicts tokens or classes (from `labels`, or the second of
    a tuple), `pruned_output_error` (relative, root mean square; twins only), `pruned_sparsity` and `pruned_energy_ratio`
    (over the pruned weights).

    Attributes:
        report: what the last run did, or None.
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        module: str | None = None,
        dataloader: Any = None,
        calibration_batches: int = 128,
        probe: bool = True,
        output: str | None = None,
        then: Then = "stop",
    ) -> None:
        super().__init__()
        if then not in get_args(Then):
            raise RecipeError(f"StatisticalPruning(then={then!r}): expected 'stop' or 'finetune'.")
        self.recipe = recipe or Recipe()
        self.module = module
        self.dataloader = dataloader
        self.calibration_batches = calibration_batches
        self.probe = probe
        self.output = output
        self.then = then
        self.report: PruningReport | None = None
        self.landed: dict[str, Any] | None = None
        self._batches: list[Any] | None = None
        self._choice: Choice | None = None
        self._measuring: Measurement | None = None
        self._masks: HeldMasks | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        """One state for each combination of recipe and module, so that several can run side by side."""
        return str(self._generate_state_key(recipe=self.recipe.to_dict(), module=self.module))

    def state_dict(self) -> dict[str, Any]:
        """Whether the weights were pruned, and the report; the zeros themselves are in the weights."""
        return {"landed": copy.deepcopy(self.landed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the report over."""
        self.landed = copy.deepcopy(state_dict["landed"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an output that exists, and sharded weights to fine-tune, before anything runs."""
        if self.output is not None:
            refuse_existing(self.output)
        if self.then == "finetune" and isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            raise MaskError(
                f'StatisticalPruning(then="finetune") under {type(trainer.strategy).__name__}: masks are held on whole '
                'weights, and this strategy may shard them. Use one device, or strategy="ddp".'
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate; in `validate` prune in place, in `fit` a twin. What is sparse already is only measured."""
        self._measuring = None
        in_place = _is_validate(trainer)
        if trainer.sanity_checking or not (self.probe or in_place):
            return
        target = self._target(pl_module)
        measuring = Measurement(pl_module, target, trainer)
        self._measuring = measuring
        if self.then == "finetune" and self.landed is not None:
            if in_place:
                HeldMasks(target, self._landed_report().sites)  # pruned before: refuse weights that grew back since
            return
        with isolate_rng():
            batches = self._calibration(trainer, pl_module, target)
            if in_place:
                for batch in _validation_batches(trainer):
                    measuring.add(batch, dense=True)
                self._land(trainer, pl_module, batches)
            else:
                choice = self._chosen(trainer, target, batches)
                measuring.twin = plan(target, batches, choice.recipe, forward_context=trainer.precision_plugin.val_step_context)
                self.report = choice.sign(measuring.twin.report)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the pruned model, and in a probe the dense one, on this batch."""
        if self._measuring is None:
            return
        with isolate_rng():
            self._measuring.add(batch, dense=self._measuring.twin is not None, pruned=True)
        if self.then == "finetune" and batch_idx == dataloader_idx == 0:
            # Here and not when the epoch ends: an averaging callback may put its weights in place for these batches only.
            self.report = remeasure(self._landed_report(), self._measuring.target)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and let the twin go."""
        if self._measuring is None or self.report is None:
            return
        values = {
            **self._measuring.values(),
            "pruned_sparsity": self.report.sparsity,
            "pruned_energy_ratio": self.report.energy_ratio,
        }
        for name, value in values.items():
            # Every rank has the same value: sums were reduced, and ranks prune alike. Averaging them keeps it.
            pl_module.log(name, torch.tensor(value, dtype=torch.float32, device=pl_module.device), sync_dist=True)
        self._measuring = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """To fine-tune: prune in place, unless that was done before, and hold the mask from here on."""
        if self.then != "finetune":
            return
        target = self._target(pl_module)
        refuse_sharded(target)
        if self.landed is None:
            with isolate_rng():
                self._land(trainer, pl_module, self._calibration(trainer, pl_module, target))
        self._masks = HeldMasks(target, self._landed_report().sites)
        for optimizer in trainer.optimizers:
            self._masks.mask_optimizer_state(optimizer)
            # A hook of the optimizer and not `on_train_batch_end`: it follows each step of each optimizer, manual ones too, and
            # no other step; and it precedes whatever looks at the weights (averages, checkpoints, the module's own hooks).
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization the module may clip before it steps, so gradients are masked as they come."""
        if self._masks is not None and not pl_module.automatic_optimization:
            self._masks.mask_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients; Lightning clips after this."""
        if self._masks is not None:
            self._masks.mask_gradients()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self._masks is not None
        assert self.landed is not None
        self._masks.mask_weights(optimizer)
        self._masks.mask_optimizer_state(optimizer)
        self.landed["report"]["finetuning_steps"] += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate on the trained weights and prune in place; or, after fine-tuning, check that every zero is there."""
        if self._masks is None:
            with isolate_rng():
                batches = self._calibration(trainer, pl_module, self._target(pl_module))
                self._land(trainer, pl_module, batches)
            return
        self._masks.check()
        self._release()
        self._record(trainer, remeasure(self._landed_report(), self._target(pl_module)))
        self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the optimizers go."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizers go."""
        self._release()

    def _release(self) -> None:
        self._masks = None
        while self._hooks:
            self._hooks.pop().remove()

    def _land(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any]) -> None:
        target = self._target(pl_module)
        choice = self._chosen(trainer, target, batches)
        report = prune(target, batches, choice.recipe, forward_context=trainer.precision_plugin.val_step_context)
        self._record(trainer, choice.sign(report))
        if self.then == "stop":
            self._save(trainer, pl_module)

    def _landed_report(self) -> PruningReport:
        assert self.landed is not None
        return PruningReport.from_dict(self.landed["report"])

    def _record(self, trainer: Trainer, report: PruningReport) -> None:
        self.report = report
        self.landed = {
            "recipe": report.recipe,
            "sparsity": report.sparsity,
            "energy_ratio": report.energy_ratio,
            "global_step": trainer.global_step,
            "report": report.to_dict(),
        }
        rank_zero_info(f"StatisticalPruning: {report}")

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the output, where one is asked for; every rank waits until it is written."""
        if self.output is not None and self.report is not None and trainer.is_global_zero:
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            protocol = {"source": "Lightning callback", "batches": self.report.num_batches}
            save(self._target(pl_module), self.report, self.output, tokenizer=tokenizer, protocol=protocol)
        trainer.strategy.barrier()

    def _chosen(self, trainer: Trainer, target: nn.Module, batches: list[Any]) -> Choice:
        """The recipe with a method: the same one at every probe."""
        if self._choice is None:
            self._choice = choose(target, batches, self.recipe, forward_context=trainer.precision_plugin.val_step_context)
        return self._choice

    def _target(self, pl_module: LightningModule) -> nn.Module:
        if self.module is not None:
            try:
                named: nn.Module = pl_module.get_submodule(self.module)
                return named
            except AttributeError as e:
                raise CalibrationError(
                    f"StatisticalPruning(module={self.module!r}): {type(pl_module).__name__} has no such module; "
                    f"it has {', '.join(name for name, _ in pl_module.named_children())}."
                ) from e
        held = [child for child in pl_module.children() if is_transformers_model(child)]
        chosen: nn.Module = held[0] if len(held) == 1 else pl_module
        return chosen

    def _calibration(self, trainer: Trainer, pl_module: LightningModule, target: nn.Module) -> list[Any]:
        """The calibration batches as inputs; the same ones at every probe."""
        if self._batches is None:
            source = self._calibration_source(trainer, pl_module)
            batches = [batch for _, batch in zip(range(self.calibration_batches), source, strict=False)]
            self._batches = [model_inputs(pl_module, target, batch) for batch in batches]
        return self._batches

    def _calibration_source(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
        owners: tuple[Any, ...] = (getattr(trainer, "datamodule", None), pl_module)
        own_loader = next((owner.calibration_dataloader for owner in owners if hasattr(owner, "calibration_dataloader")), None)
        training_loader = next(
            (owner.train_dataloader for owner in owners if owner and is_overridden("train_dataloader", owner)), None
        )
        if self.dataloader is not None:
            return iter(self.dataloader)
        if own_loader is not None:
            return iter(own_loader())
        if trainer.train_dataloader is not None:
            return _fresh_iterator(trainer.train_dataloader)
        if training_loader is not None:
            return iter(training_loader())
        raise CalibrationError(
            "StatisticalPruning has no calibration data: give it a `dataloader`, define `calibration_dataloader` in the "
            "DataModule or the LightningModule, or have training data. It does not take the validation data by itself."
        )


def _fresh_iterator(loader: Any) -> Iterator[Any]:
    """An iterator of its own: a loader that keeps its workers has but one, which the training is reading."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    return iter(loader)


def _is_validate(trainer: Trainer) -> bool:
    """Whether this is `trainer.validate`; `trainer.validating` is also true while `fit` validates."""
    return bool(trainer.state.fn == TrainerFn.VALIDATING)


def _validation_batches(trainer: Trainer) -> Iterator[Any]:
    """What the loop is about to run: every loader's batches up to its limit, on this rank."""
    loaders = trainer.val_dataloaders
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    for loader, limit in zip(loaders, trainer.num_val_batches, strict=True):
        for index, batch in enumerate(loader):
            if index >= limit:
                break
            yield batch
