"""StatisticalPruning: prune a LightningModule from a Trainer.

    trainer.validate   epoch start: measure the dense model, calibrate, prune in place
                       the loop: measures the pruned model           epoch end: log            weights stay pruned
                       what this callback has pruned before is only measured, after a check that its zeros are there
    trainer.fit        every validation is a probe: calibrate and prune a twin, measure both, log, forget the twin
                       train end: calibrate and prune in place
    trainer.fit with   train start: calibrate and prune in place     from then on: pruned weights are held at zero
    then="finetune"    every validation: measures the sparse model   train end: check the zeros, write the output

A probe never touches the training weights, the modes, or the random state: EarlyStopping, schedulers, averaging callbacks
and checkpoints see the training run that they would have seen without it.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from statprune.api import plan, prune
from statprune.checkpoint import refuse_existing, save
from statprune.errors import CalibrationError, CheckpointError, MaskError, RecipeError, SiteError, TracingError
from statprune.how import read_how
from statprune.model.inputs import bind_batches
from statprune.model.kinds import is_transformers_model
from statprune.model.layers import Layers, find_layers
from statprune.model.weights import refuse_sharded
from statprune.recipe import Recipe, Search
from statprune.report import PruningReport
from statprune.training.batches import calibration_source, model_inputs, validation_batches
from statprune.training.masks import HeldMasks, remeasure
from statprune.training.measurement import Measurement

Then = Literal["stop", "finetune"]

Keys = Mapping[str, str | float | Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | None]
"""Of a recipe, in a mapping. Texts come first: what jsonargparse takes for `Any` it reads as YAML once more, and a quoted "2:4"
would be a number after all."""


class StatisticalPruning(Callback):
    """Prune the model of a LightningModule.

    Args:
        recipe: how to prune, as for `statprune.prune`: a `Recipe`, a method's short name such as `"cvr+energy"`, a mapping of a
            recipe's keys, or a `Search` (`"auto"`). None: the paper's method at 2:4. A search chooses once, at the first probe
            or when pruning, by trying candidates out on the calibration batches, and the choice is then kept.
        pattern: in the place of that of `recipe`, such as `"50%"` or `"2:4"`.
        module: attribute path of the module to prune, such as `"model"`. Default: the transformers model that the
            LightningModule holds, or else the LightningModule itself, called as `forward` is.
        calibration: batches to calibrate on, such as a DataLoader. Default: `calibration_dataloader()` of the DataModule or
            the LightningModule, or else the training data. Never the validation data: its perplexity would be flattered.
        calibration_batches: how many batches of it, at most.
        probe: whether to measure a pruned twin at every validation of `fit`; with `then="finetune"`, the sparse model itself.
        output: folder for the pruned model (transformers models only), written and verified when the weights have landed;
            with `then="finetune"`, when `fit` ends.
        then: what follows the pruning. `"stop"`: nothing, so `fit` trains the dense model and prunes it at the end.
            `"finetune"`: `fit` prunes at the start and trains what is left, with the pruned weights held at exactly zero.

    A callback prunes once. What it has pruned, in `validate`, in `fit` or before the checkpoint that they start from, another
    `validate` measures, and `fit` with `then="finetune"` trains on; both check that the recorded zeros are there. `fit` with
    `then="stop"` refuses: it would train the zeros away. To train densely from there and prune again at the end, give the
    Trainer a new callback, and another model a callback of its own.

    A batch becomes the inputs of `forward` like this: a dict by the names that `forward` knows, a tuple by position as far
    as `forward` requires arguments (so `(x, y)` gives `x`), a tensor as it is. A LightningModule that needs something else
    defines `calibration_inputs(batch)`.

    Logged at the end of each validation, and so known to `ModelCheckpoint(monitor=...)`:
    `dense_perplexity` and `pruned_perplexity` where the model predicts tokens or classes (from `labels`, or the second of
    a tuple), `pruned_output_error` (relative, root mean square; twins only), `pruned_sparsity` and `pruned_energy_ratio`
    (over the pruned weights).

    Attributes:
        report: what the last run did, or None.

    Raises:
        SiteError: the weights are sharded, by FSDP, DeepSpeed or tensor parallelism.
        MaskError: zeros that were recorded are no longer there, or `fit` would train them away.
        CalibrationError: no calibration data, or no such module.
        CheckpointError: the output exists, or the model is none that can be saved.
        StatpruneError: as `prune`.
    """

    def __init__(
        self,
        recipe: str | Keys | Recipe | Search | None = None,
        pattern: str | float | None = None,  # a number is what YAML makes of 2:4 without quotes: refused, and said why
        module: str | None = None,
        calibration: Any = None,
        calibration_batches: int = 128,
        probe: bool = True,
        output: str | None = None,
        then: Then = "stop",
    ) -> None:
        super().__init__()
        if then not in get_args(Then):
            raise RecipeError(f"StatisticalPruning(then={then!r}): expected 'stop' or 'finetune'.")
        self.recipe = read_how(recipe, pattern=pattern)
        self.module = module
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self.probe = probe
        self.output = output
        self.then = then
        self.report: PruningReport | None = None
        self.landed: dict[str, Any] | None = None
        self._batches: list[Any] | None = None
        self._chosen: PruningReport | None = None
        self._layers: Layers | None = None
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
        """Refuse sharded weights, and an output that exists, before anything runs."""
        if stage not in ("fit", "validate"):
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            raise SiteError(
                f"StatisticalPruning under {type(trainer.strategy).__name__}: this strategy may shard weights, and only whole "
                'ones can be pruned. Use one device, or strategy="ddp".'
            )
        refuse_sharded(pl_module)
        if stage == "fit":
            self._refuse_output_that_exists()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be pruned, now that the model is configured and a checkpoint is read."""
        self._refuse_target(self._target(pl_module))
        if self.landed is not None and self.then == "stop":
            raise MaskError(
                f'StatisticalPruning(then="stop") has pruned this model already, after step {self.landed["global_step"]}: fit '
                'would train its zeros away. Use then="finetune" to train on with the zeros held. To train densely from here '
                "and prune again at the end, give the Trainer a new StatisticalPruning, and load a checkpoint's weights only."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate; in `validate` prune in place, in `fit` a twin. What is sparse already is only measured."""
        self._measuring = None
        in_place = _is_validate(trainer)
        if trainer.sanity_checking or not (self.probe or in_place):
            return
        target = self._target(pl_module)
        if in_place:
            self._refuse_target(target)
        if self.landed is not None:
            if in_place:
                HeldMasks(target, self._landed_report().sites)  # refuses weights that grew back since, and other models
            self._measuring = Measurement(pl_module, target, trainer)
            return
        if in_place and self.then == "stop":
            self._refuse_output_that_exists()
        measuring = Measurement(pl_module, target, trainer)
        self._measuring = measuring
        with isolate_rng():
            batches = self._calibration_inputs(trainer, pl_module, target)
            if in_place:
                for batch in validation_batches(trainer):
                    measuring.add(batch, dense=True)
                self._land(trainer, pl_module, batches)
            else:
                measuring.twin = plan(target, batches, **self._how(trainer, target, batches))
                self.report = self._with_choice(measuring.twin.report)
                self._layers = measuring.twin.layers

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the pruned model, and in a probe the dense one, on this batch."""
        if self._measuring is None:
            return
        with isolate_rng():
            self._measuring.add(batch, dense=self._measuring.twin is not None, pruned=True)
        if self._measuring.twin is None and batch_idx == dataloader_idx == 0:
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
        if self.landed is None:
            with isolate_rng():
                self._land(trainer, pl_module, self._calibration_inputs(trainer, pl_module, target))
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
                batches = self._calibration_inputs(trainer, pl_module, self._target(pl_module))
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
        """Let the optimizers and the graph go."""
        self._release()
        self._layers = None

    def _release(self) -> None:
        self._masks = None
        while self._hooks:
            self._hooks.pop().remove()

    def _land(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any]) -> None:
        target = self._target(pl_module)
        report = prune(target, batches, **self._how(trainer, target, batches))
        self._layers = None
        self._record(trainer, self._with_choice(report))
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

    def _how(self, trainer: Trainer, target: nn.Module, batches: list[Any]) -> dict[str, Any]:
        """The arguments of `plan` and `prune` that say how."""
        layers = self._layers
        if layers is not None:
            try:  # what the first probe found saves the others the export, as long as it holds
                layers = find_layers(target, bind_batches(target, batches), traced=layers)
            except TracingError:
                layers = None
        return {
            "how": Recipe.from_dict(self._chosen.recipe) if self._chosen is not None else self.recipe,
            "traced": layers,
            "say": lambda text: rank_zero_info(f"StatisticalPruning: {text}"),
            "forward_context": trainer.precision_plugin.val_step_context,
        }

    def _with_choice(self, report: PruningReport) -> PruningReport:
        """Remember what a search has chosen, and say so in every report that follows."""
        if report.chosen_by is not None:
            self._chosen = report
        elif self._chosen is not None:
            report.chosen_by = self._chosen.chosen_by
        return report

    def _target(self, pl_module: LightningModule) -> nn.Module:
        if self.module is not None:
            try:
                return _uncompiled(pl_module.get_submodule(self.module))
            except AttributeError as e:
                raise CalibrationError(
                    f"StatisticalPruning(module={self.module!r}): {type(pl_module).__name__} has no such module; "
                    f"it has {', '.join(name for name, _ in pl_module.named_children())}."
                ) from e
        held = [child for child in map(_uncompiled, pl_module.children()) if is_transformers_model(child)]
        chosen: nn.Module = held[0] if len(held) == 1 else pl_module
        return chosen

    def _refuse_target(self, target: nn.Module) -> None:
        refuse_sharded(target)
        if self.output is not None and not is_transformers_model(target):
            raise CheckpointError(
                f"StatisticalPruning(output={self.output!r}): {type(target).__name__} is no transformers model, and only those "
                "are written as a folder. Leave `output` out and save a checkpoint, or name the model with `module`."
            )

    def _refuse_output_that_exists(self) -> None:
        if self.output is not None:
            refuse_existing(self.output)

    def _calibration_inputs(self, trainer: Trainer, pl_module: LightningModule, target: nn.Module) -> list[Any]:
        """The calibration batches as inputs; the same ones at every probe."""
        if self._batches is None:
            source = calibration_source(trainer, pl_module, self.calibration)
            batches = [batch for _, batch in zip(range(self.calibration_batches), source, strict=False)]
            self._batches = [model_inputs(pl_module, target, batch) for batch in batches]
        return self._batches


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, with the same parameters; one that is not compiled as it is."""
    while isinstance(original := getattr(module, "_orig_mod", None), nn.Module):
        module = original
    return module


def _is_validate(trainer: Trainer) -> bool:
    """Whether this is `trainer.validate`; `trainer.validating` is also true while `fit` validates."""
    return bool(trainer.state.fn == TrainerFn.VALIDATING)
