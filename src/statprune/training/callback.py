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

import ast
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from statprune.errors import CalibrationError
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import is_causal, is_transformers_model, unwrapped
from statprune.model.storage import refuse_unreadable
from statprune.recipe import Recipe, Search
from statprune.report import PruningReport
from statprune.training.batches import draw
from statprune.training.figures import draw_report
from statprune.training.loaders import calibration_source, model_inputs, validation_batches
from statprune.training.losses import training_loss
from statprune.training.masks import remeasure
from statprune.training.measurement import Measurement
from statprune.training.once import PruneOnce, Then
from statprune.training.strategies import refuse_outer_shards, refuse_strategy

Keys = Mapping[str, str | float | Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | None]
"""Of a recipe, in a mapping. Texts come first: what jsonargparse takes for `Any` it reads as YAML once more, and a quoted "2:4"
would be a number after all."""


class StatisticalPruning(Callback):
    """Prune the model of a LightningModule.

    Args:
        recipe: how to prune, as for `statprune.prune`: a `Recipe`, a method's short name such as `"best"`, a mapping of a
            recipe's keys, or a `Search` (`"auto"`). None: the default at 2:4. A search chooses once, at the first probe
            or when pruning, by trying candidates out on the calibration batches, and the choice is then kept.
        pattern: in the place of that of `recipe`, such as `"50%"` or `"2:4"`.
        module: attribute path of the module to prune, such as `"model"`. Default: the transformers model that the
            LightningModule holds, or else the LightningModule itself, called as `forward` is.
        calibration: batches to calibrate on, such as a DataLoader. Default: `calibration_dataloader()` of the DataModule or
            the LightningModule, or else the training data. Never the validation data: its perplexity would be flattered.
            With several ranks each takes every so many-th batch, unless the loader has a `DistributedSampler`.
        calibration_batches: how many batches of it, at most, on all ranks together.
        probe: whether to measure a pruned twin at every validation of `fit`; with `then="finetune"`, the sparse model itself.
        output: folder for the pruned model, written and verified when the weights have landed; with `then="finetune"`, when
            `fit` ends. Its place is taken before anything runs. Where pruning or saving fails after a training, the trained
            weights are put beside it, and the error says where.
        then: what follows the pruning. `"stop"`: nothing, so `fit` trains the dense model and prunes it at the end.
            `"finetune"`: `fit` prunes at the start and trains what is left, with the pruned weights held at exactly zero.

    A callback prunes once. What it has pruned, in `validate`, in `fit` or before the checkpoint that they start from, another
    `validate` measures, and `fit` with `then="finetune"` trains on; both check that the recorded zeros are there. `fit` with
    `then="stop"` refuses: it would train the zeros away. To train densely from there and prune again at the end, give the
    Trainer a new callback, and another model a callback of its own.

    A batch may be whatever `statprune.prune` takes: a dict by the names that `forward` knows, a tuple by position as far
    as `forward` requires arguments (so `(x, y)` gives `x`), a tensor as it is. A LightningModule that needs something else
    defines `calibration_inputs(batch)`.

    Logged at the end of each validation, and so known to `ModelCheckpoint(monitor=...)`:
    `dense_perplexity` and `pruned_perplexity` where the model predicts tokens or classes (from `labels`, or the second of
    a tuple), `pruned_output_error` (relative, root mean square; twins only), `pruned_sparsity` and `pruned_energy_ratio`
    (over the pruned weights). TensorBoard also gets histograms of the kept weights and a figure by layer, once per probe and
    when the weights have landed.

    Attributes:
        report: what the last run did, or None.

    Raises:
        SiteError: the weights are sharded by FSDP1, DeepSpeed or tensor parallelism, or by FSDP2 around more than the module
            that is pruned; or sharded, and what the recipe asks for needs them whole.
        MaskError: zeros that were recorded are no longer there, or `fit` would train them away; or a checkpoint's model was
            pruned by another recipe.
        CalibrationError: no calibration data, or none for some rank; or no such module.
        CheckpointError: the output exists or cannot be written, or the model is none that can be saved.
        NonFiniteError: the training left NaN or infinity in a weight.
        RanksError: another rank failed; the message has its error.
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
        self._once = PruneOnce("StatisticalPruning", recipe, pattern, output, then, _say)
        self.module = module
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self.probe = probe
        self._batches: list[ModelInputs] | None = None
        self._measuring: Measurement | None = None

    @property
    def recipe(self) -> Recipe | Search:
        """What was asked for."""
        return self._once.recipe

    @property
    def output(self) -> str | None:
        """The folder to write."""
        return self._once.output

    @property
    def then(self) -> str:
        """What follows the pruning."""
        return self._once.then

    @property
    def report(self) -> PruningReport | None:
        """What the last run did."""
        return self._once.report

    @property
    def landed(self) -> dict[str, Any] | None:
        """What was pruned in place, as a checkpoint holds it; None before."""
        return self._once.landed

    @property
    def state_key(self) -> str:
        """One state for each combination of recipe and module, so that several can run side by side."""
        return str(self._generate_state_key(recipe=self.recipe.to_dict(), module=self.module))

    def state_dict(self) -> dict[str, Any]:
        """What was asked for, what a search has chosen, and the report of what was pruned; the zeros are in the weights."""
        return self._once.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the choice and the report over."""
        self._once.load(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose model was pruned by another recipe: the state is there, and under another key."""
        states = checkpoint.get("callbacks", {})
        if (states.get(self.state_key) or {}).get("landed") is not None:
            return  # Lightning hands it over
        others = {one.state_key for one in trainer.callbacks if isinstance(one, StatisticalPruning)}
        for key, state in states.items():
            asked = _asked_for(key)
            if asked is None or key in others or not self._is_target(pl_module, asked.get("module")):
                continue
            self._once.take_over({"how": asked.get("recipe"), **state})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights sharded otherwise than by FSDP2, and an output that cannot be written, before anything runs."""
        if stage not in ("fit", "validate"):
            return
        refuse_strategy(trainer.strategy)
        refuse_unreadable(pl_module)
        if stage == "fit" and self.output is not None:
            with self._together(trainer):
                self._once.reserve(is_first=trainer.is_global_zero)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be pruned or saved, now that the model is configured and a checkpoint is read."""
        with self._together(trainer):
            self._refuse_target(pl_module, self._target(pl_module))
            self._once.refuse_training_zeros_away()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate; in `validate` prune in place, in `fit` a twin. What is sparse already is only measured."""
        self._measuring = None
        in_place = _is_validate(trainer)
        if trainer.sanity_checking or not (self.probe or in_place):
            return
        with self._together(trainer):
            self._begin_measuring(trainer, pl_module, in_place)

    def _begin_measuring(self, trainer: Trainer, pl_module: LightningModule, in_place: bool) -> None:
        target = self._target(pl_module)
        self._measuring = measuring = Measurement(pl_module, target, trainer)
        if self.landed is not None:
            if in_place:
                self._once.check_zeros(target)  # refuses weights that grew back since, and other models
            return
        if in_place:
            if self.then == "stop":
                self._once.reserve(is_first=trainer.is_global_zero)
            self._refuse_target(pl_module, target)
        with isolate_rng():
            batches = self._calibration_inputs(trainer, pl_module, target)
            if in_place:
                for batch in validation_batches(trainer):
                    measuring.add(batch, dense=True)
                self._land(trainer, target, batches)
                if self.then == "stop":
                    self._save(trainer, target)
            else:
                measuring.twin = self._once.plan(target, batches, trainer.precision_plugin.val_step_context)
                self._draw(trainer, measuring.twin.weights.__getitem__)

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
            self._once.report = remeasure(self._once.landed_report(), self._measuring.target)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and let the twin go."""
        if self._measuring is None or self.report is None:
            return
        with self._together(trainer):
            measured = self._measuring.values()
        values = {
            **measured,
            "pruned_sparsity": self.report.sparsity,
            "pruned_energy_ratio": self.report.energy_ratio,
        }
        for name, value in values.items():
            # Every rank has the same value: sums were reduced, and ranks prune alike. Averaging them keeps it.
            pl_module.log(name, torch.tensor(value, dtype=torch.float32, device=pl_module.device), sync_dist=True)
        self._measuring = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """To fine-tune: prune in place, unless that was done before, and hold the mask from here on."""
        with self._together(trainer):
            self._once.refuse_training_zeros_away()  # again: some strategies read the checkpoint after `on_fit_start`
            if self.then != "finetune":
                return
            target = self._target(pl_module)
            if self.landed is None:
                with isolate_rng():
                    self._land(trainer, target, self._calibration_inputs(trainer, pl_module, target))
            self._once.hold(target, trainer.optimizers)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization the module may clip before it steps, so gradients are masked as they come."""
        if self._once.masks is not None and not pl_module.automatic_optimization:
            self._once.masks.mask_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients; Lightning clips after this."""
        if self._once.masks is not None:
            self._once.masks.mask_gradients()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate on the trained weights and prune in place; or, after fine-tuning, check that every zero is there."""
        target = self._target(pl_module)
        with self._once.keeping(target), self._together(trainer):
            if self._once.masks is not None:
                self._once.finish_holding(target, trainer.global_step)
            else:
                self._once.refuse_diverged(target)
                with isolate_rng():
                    self._land(trainer, target, self._calibration_inputs(trainer, pl_module, target))
        with self._together(trainer):
            self._save(trainer, target)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the optimizers and the place of the output go."""
        self._once.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizers, the graph and the place of the output go."""
        self._once.release()

    def _together(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Around what can fail on one rank."""
        # The model itself is moved to it only after `setup`.
        return self._once.on_all_ranks(trainer.strategy.root_device)

    def _land(self, trainer: Trainer, target: nn.Module, batches: list[ModelInputs]) -> None:
        self._once.land(target, batches, trainer.global_step, trainer.precision_plugin.val_step_context)
        self._draw(trainer, target.get_parameter)

    def _save(self, trainer: Trainer, target: nn.Module) -> None:
        """Write the output, where one is asked for."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        self._once.save(target, tokenizer=tokenizer, source="Lightning callback")

    def _draw(self, trainer: Trainer, weight_of: Callable[[str], Tensor]) -> None:
        assert self.report is not None
        if trainer.is_global_zero:
            draw_report(trainer.loggers, self.report, weight_of, step=trainer.global_step)

    def _target(self, pl_module: LightningModule) -> nn.Module:
        try:
            return _find(pl_module, self.module)
        except AttributeError as e:
            raise CalibrationError(
                f"StatisticalPruning(module={self.module!r}): {type(pl_module).__name__} has no such module; "
                f"it has {', '.join(name for name, _ in pl_module.named_children())}."
            ) from e

    def _refuse_target(self, pl_module: LightningModule, target: nn.Module) -> None:
        refuse_outer_shards(pl_module, target)
        self._once.refuse_target(target)

    def _is_target(self, pl_module: LightningModule, module: str | None) -> bool:
        """Whether this path, too, names what is pruned here."""
        try:
            return _find(pl_module, module) is self._target(pl_module)
        except AttributeError:
            return False

    def _calibration_inputs(self, trainer: Trainer, pl_module: LightningModule, target: nn.Module) -> list[ModelInputs]:
        """This rank's calibration batches as inputs; the same ones at every probe."""
        if self._batches is None:
            source, is_dealt_out = calibration_source(trainer, pl_module, self.calibration)
            drawn = draw(
                source, self.calibration_batches,
                rank=trainer.global_rank, num_ranks=trainer.world_size, is_dealt_out=is_dealt_out,
            )  # fmt: skip
            self._batches = [model_inputs(pl_module, target, batch) for batch in drawn]
            if not is_causal(target):
                self._once.loss = training_loss(trainer, pl_module, drawn)
        return self._batches


def _say(text: str) -> None:
    rank_zero_info(f"StatisticalPruning: {text}")


def _find(pl_module: LightningModule, module: str | None) -> nn.Module:
    """What a path names, or else the transformers model that a LightningModule holds, or else itself; without its wrappers."""
    if module is not None:
        return unwrapped(pl_module.get_submodule(module))[0]
    children = [unwrapped(child)[0] for child in pl_module.children()]
    held = [child for child in children if is_transformers_model(child)]
    chosen: nn.Module = held[0] if len(held) == 1 else pl_module
    return chosen


def _asked_for(key: object) -> dict[str, Any] | None:
    """`recipe` and `module` in a `state_key` of this callback; None in any other key."""
    name, brace, rest = str(key).partition("{")
    if name.rpartition(".")[2] != StatisticalPruning.__name__ or not brace:
        return None
    try:
        asked = ast.literal_eval(brace + rest)
    except (ValueError, SyntaxError):
        return None
    return asked if isinstance(asked, dict) else None


def _is_validate(trainer: Trainer) -> bool:
    """Whether this is `trainer.validate`; `trainer.validating` is also true while `fit` validates."""
    return bool(trainer.state.fn == TrainerFn.VALIDATING)
