"""Dense and pruned quality over one validation epoch of a Trainer."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call

from statprune.api import PruningPlan
from statprune.model.kinds import is_causal, predictions_of
from statprune.model.sharded import swapped
from statprune.model.storage import is_sharded
from statprune.model.undisturbed import eval_mode, without_cache
from statprune.perplexity import Perplexity
from statprune.ranks import collective, sum_over_ranks
from statprune.training.loaders import model_inputs


class Measurement:
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
        inputs = model_inputs(self.pl_module, self.target, batch)
        args, kwargs = inputs.args, inputs.kwargs
        results = {}
        with eval_mode(self.target), without_cache(self.target), self.trainer.precision_plugin.val_step_context():
            if dense:
                results["dense"] = predictions_of(self.target(*args, **kwargs))
            if pruned:
                results["pruned"] = predictions_of(self._run_pruned(args, kwargs))
        for name, predictions in results.items():
            if predictions is not None and (scored := self._scored(predictions, kwargs, batch)) is not None:
                metric = self.perplexities.setdefault(f"{name}_perplexity", Perplexity().to(device))
                metric.update(scored[0], scored[1].to(device))
        if len(results) == 2 and results["dense"] is not None and results["pruned"] is not None:
            dense_values, difference = results["dense"].double(), (results["pruned"].double() - results["dense"].double())
            self.error_sq += torch.stack([difference.square().sum(), dense_values.square().sum()])

    def _run_pruned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the twin makes of inputs, or where there is none the model, which is pruned."""
        if self.twin is None:
            return self.target(*args, **kwargs)
        if not is_sharded(self.target):
            return functional_call(self.target, self.twin.weights, args, kwargs)
        with swapped(self.target, self.twin.weights):
            return self.target(*args, **kwargs)

    def values(self) -> dict[str, float]:
        """What was measured, over all ranks."""
        values = {}
        for name, metric in self.perplexities.items():
            with collective(None, f"the {name}"):  # torchmetrics adds up
                values[name] = float(metric.compute())
        if self.twin is not None:
            sum_over_ranks([total := self.error_sq.clone()], what="the error of the output")
            difference, dense = total.tolist()
            if dense:
                values["pruned_output_error"] = (difference / dense) ** 0.5
        return values

    def _scored(self, predictions: Tensor, inputs: Mapping[str, Any], batch: Any) -> tuple[Tensor, Tensor] | None:
        """(logits, targets) where the model predicts tokens or classes that the batch knows; None where it does not."""
        target = batch.get("labels") if isinstance(batch, Mapping) else None
        if target is None and isinstance(batch, tuple | list) and len(batch) > 1:
            target = batch[1]
        if is_causal(self.target):
            tokens = target.to(predictions.device) if isinstance(target, Tensor) else inputs.get("input_ids")
            if not isinstance(tokens, Tensor) or tokens.shape != predictions.shape[:-1]:
                return None
            mask = inputs.get("attention_mask")
            padding = torch.zeros_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device) == 0
            return predictions[:, :-1], tokens.long().masked_fill(padding, -100)[:, 1:]
        if isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == predictions.shape[:-1]:
            return predictions, target
        return None
