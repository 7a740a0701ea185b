"""StatisticalPruning: prune a LightningModule from a Trainer.

    trainer.validate   epoch start: measure the dense model, calibrate, prune in place
                       the loop: measures the pruned model           epoch end: log            weights stay pruned
    trainer.fit        every validation is a probe: calibrate and prune a twin, measure both, log, forget the twin
                       train end: calibrate and prune in place

A probe never touches the training weights, the modes, or the random state: EarlyStopping, schedulers, averaging callbacks
and checkpoints see the training run that they would have seen without it.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call

from statprune.auto import Choice, choose
from statprune.batches import is_transformers_model
from statprune.checkpoint import refuse_existing, save
from statprune.compress import PruningPlan, plan, prune
from statprune.errors import CalibrationError
from statprune.perplexity import Perplexity
from statprune.recipe import Recipe
from statprune.report import PruningReport
from statprune.tracing import eval_mode


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
        probe: whether to measure a pruned twin at every validation of `fit`.
        output: folder for the pruned model (transformers models only), written and verified when the weights have landed.

    A batch becomes the inputs of `forward` like this: a dict by the names that `forward` knows, a tuple by position as far
    as `forward` requires arguments (so `(x, y)` gives `x`), a tensor as it is. A LightningModule that needs something else
    defines `calibration_inputs(batch)`.

    Logged at the end of each validation, and so known to `ModelCheckpoint(monitor=...)`:
    `dense_perplexity` and `pruned_perplexity` where the model predicts tokens or classes (from `labels`, or the second of
    a tuple), `pruned_output_error` (relative, root mean square; probes only), `pruned_sparsity` and `pruned_energy_ratio`
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
    ) -> None:
        super().__init__()
        self.recipe = recipe or Recipe()
        self.module = module
        self.dataloader = dataloader
        self.calibration_batches = calibration_batches
        self.probe = probe
        self.output = output
        self.report: PruningReport | None = None
        self.landed: dict[str, Any] | None = None
        self._batches: list[Any] | None = None
        self._choice: Choice | None = None
        self._measuring: _Measurement | None = None

    @property
    def state_key(self) -> str:
        """One state for each combination of recipe and module, so that several can run side by side."""
        return str(self._generate_state_key(recipe=self.recipe.to_dict(), module=self.module))

    def state_dict(self) -> dict[str, Any]:
        """Whether the weights were pruned, and a summary; the zeros themselves are in the weights."""
        return {"landed": self.landed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the summary over."""
        self.landed = state_dict["landed"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an output that exists before anything runs."""
        if self.output is not None:
            refuse_existing(self.output)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate; in `validate` prune in place, in `fit` a twin."""
        self._measuring = None
        in_place = _is_validate(trainer)
        if trainer.sanity_checking or not (self.probe or in_place):
            return
        target = self._target(pl_module)
        measuring = _Measurement(pl_module, target, trainer)
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
        self._measuring = measuring

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the pruned model, and in a probe the dense one, on this batch."""
        if self._measuring is not None:
            with isolate_rng():
                self._measuring.add(batch, dense=not _is_validate(trainer), pruned=True)

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate on the trained weights and prune in place."""
        with isolate_rng():
            self._land(trainer, pl_module, self._calibration(trainer, pl_module, self._target(pl_module)))

    def _land(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any]) -> None:
        target = self._target(pl_module)
        choice = self._chosen(trainer, target, batches)
        report = prune(target, batches, choice.recipe, forward_context=trainer.precision_plugin.val_step_context)
        self.report = choice.sign(report)
        self.landed = {
            "recipe": self.report.recipe,
            "sparsity": self.report.sparsity,
            "energy_ratio": self.report.energy_ratio,
            "global_step": trainer.global_step,
        }
        rank_zero_info(f"StatisticalPruning: {self.report}")
        if self.output is not None and trainer.is_global_zero:
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            protocol = {"source": "Lightning callback", "batches": len(batches)}
            save(target, self.report, self.output, tokenizer=tokenizer, protocol=protocol)
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
            return iter(trainer.train_dataloader)
        if training_loader is not None:
            return iter(training_loader())
        raise CalibrationError(
            "StatisticalPruning has no calibration data: give it a `dataloader`, define `calibration_dataloader` in the "
            "DataModule or the LightningModule, or have training data. It does not take the validation data by itself."
        )


class _Measurement:
    """Dense and pruned quality over one validation epoch."""

    def __init__(self, pl_module: LightningModule, target: nn.Module, trainer: Trainer) -> None:
        self.pl_module, self.target, self.trainer = pl_module, target, trainer
        self.twin: PruningPlan | None = None
        self.perplexities: dict[str, Perplexity] = {}
        self.error_sq = torch.zeros(2, dtype=torch.float64, device=pl_module.device)

    @torch.no_grad()
    def add(self, batch: Any, *, dense: bool = False, pruned: bool = False) -> None:
        """Run the model on a validation batch, dense, pruned or both."""
        device = self.pl_module.device
        inputs = move_data_to_device(model_inputs(self.pl_module, self.target, batch), device)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
        results = {}
        with eval_mode(self.target), self.trainer.precision_plugin.val_step_context():
            if dense:
                results["dense"] = _predictions(self.target(*args, **kwargs))
            if pruned:
                weights = self.twin.weights if self.twin is not None else {}
                results["pruned"] = _predictions(functional_call(self.target, weights, args, kwargs))
        for name, predictions in results.items():
            if predictions is not None and (scored := self._scored(predictions, inputs, batch)) is not None:
                metric = self.perplexities.setdefault(f"{name}_perplexity", Perplexity().to(device))
                metric.update(scored[0], scored[1].to(device))
        if len(results) == 2 and results["dense"] is not None and results["pruned"] is not None:
            dense_values, difference = results["dense"].double(), (results["pruned"].double() - results["dense"].double())
            self.error_sq += torch.stack([difference.square().sum(), dense_values.square().sum()])

    def values(self) -> dict[str, float]:
        """What was measured, over all ranks."""
        values = {name: float(metric.compute()) for name, metric in self.perplexities.items()}
        if self.twin is not None:
            difference, dense = self.trainer.strategy.reduce(self.error_sq, reduce_op="sum").tolist()
            if dense:
                values["pruned_output_error"] = (difference / dense) ** 0.5
        return values

    def _scored(self, predictions: Tensor, inputs: Any, batch: Any) -> tuple[Tensor, Tensor] | None:
        """(logits, targets) where the model predicts tokens or classes that the batch knows; None where it does not."""
        target = batch.get("labels") if isinstance(batch, Mapping) else None
        if target is None and isinstance(batch, tuple | list) and len(batch) > 1:
            target = batch[1]
        if _is_causal(self.target) and isinstance(inputs, dict):
            tokens = target if isinstance(target, Tensor) else inputs.get("input_ids")
            if not isinstance(tokens, Tensor) or tokens.shape != predictions.shape[:-1]:
                return None
            mask = inputs.get("attention_mask")
            padding = torch.zeros_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device) == 0
            return predictions[:, :-1], tokens.long().masked_fill(padding, -100)[:, 1:]
        if isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == predictions.shape[:-1]:
            return predictions, target
        return None


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


def _predictions(output: Any) -> Tensor | None:
    """The tensor that a model predicts with: its logits, its only tensor, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits", next(iter(output.values()), None))
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    return logits if isinstance(logits, Tensor) else None


def _is_validate(trainer: Trainer) -> bool:
    """Whether this is `trainer.validate`; `trainer.validating` is also true while `fit` validates."""
    return bool(trainer.state.fn == TrainerFn.VALIDATING)


def _is_causal(model: nn.Module) -> bool:
    """Whether logits at a position are for the next token."""
    if not is_transformers_model(model):
        return False
    return bool(model.can_generate() and not model.config.is_encoder_decoder)  # type: ignore[operator,union-attr]


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
