"""Probes: batches on which the model's predictions with some weights replaced are compared with the dense model's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from statprune.allocation.dense import DenseModel
from statprune.divergence import total_divergence
from statprune.errors import CalibrationError, NonFiniteError
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import is_causal, predictions_of
from statprune.model.sites import LinearSite
from statprune.ranks import sum_over_ranks


class Probes:
    """Measures what pruning one layer alone does to the model's predictions, layer after layer.

    A causal language model: the divergence of its next-token distribution from the dense model's, per token. Any other: the
    energy of the output's error over the energy of the dense output. The dense model's predictions on the probe batches are
    kept: batch x length x vocabulary numbers for each.
    """

    def __init__(self, dense: DenseModel, batches: Sequence[ModelInputs], allocation: str) -> None:
        """Run the dense model on the batches.

        Args:
            dense: the model.
            batches: of this rank; none, where the others have them all.
            allocation: its name, for messages.

        Raises:
            CalibrationError: the model returns no tensor.
        """
        self.dense, self.batches, self.allocation = dense, batches, allocation
        self.is_language = is_causal(dense.layers.model)
        self._expected = [self._predict(batch, {}) for batch in batches]
        self._names: list[str] = []
        self._losses: list[Tensor] = []
        """[2], float64, for each layer: numerator and denominator of a mean over tokens or outputs."""

    def measure(self, site: LinearSite, weight: Tensor) -> None:
        """Run the probe batches with another weight [out, in] of this layer."""
        replaced = {site.parameter: site.view(weight).contiguous()}
        found = [self._compare(number, batch, replaced) for number, batch in enumerate(self.batches)]
        nothing = torch.zeros(2, dtype=torch.float64, device=self.dense.device)
        self._losses.append(torch.stack(found).sum(0) if found else nothing)
        self._names.append(site.name)

    def increases(self) -> Tensor:
        """[layers], float64: what each layer's pruning costs, over all ranks; in the order in which they were measured.

        Raises:
            CalibrationError: there is nothing to measure on in the probe batches.
            NonFiniteError: a loss is NaN or infinite; names the layer.
        """
        totals = torch.stack(self._losses)
        sum_over_ranks([totals], self.dense.process_group, "the losses of the probes")
        totals = totals.cpu()
        if not bool(totals[0, 1] > 0):
            raise CalibrationError(
                f"Allocation '{self.allocation}': on the probe batches the model's output is 0 everywhere, or all padding. "
                "Expected other batches first, or more `probes`. Nothing was changed."
            )
        losses = totals[:, 0] / totals[:, 1]
        for name, loss in zip(self._names, losses, strict=True):
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"Allocation '{self.allocation}': the loss on the probe batches is {float(loss)} with {name} pruned. In "
                    "float16, try bfloat16 or float32. Nothing was changed."
                )
        return losses

    def _compare(self, number: int, batch: ModelInputs, weights: dict[str, Tensor]) -> Tensor:
        expected, predicted = self._expected[number], self._predict(batch, weights)
        mask = batch.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == predicted.shape[:-1]:
            expected, predicted = (values[mask != 0] for values in (expected, predicted))
        if self.is_language:
            num_tokens = predicted.numel() // predicted.shape[-1]
            return torch.stack([total_divergence(expected, predicted), torch.tensor(num_tokens).to(predicted.device).double()])
        expected = expected.double()
        return torch.stack([(predicted.double() - expected).square().sum(), expected.square().sum()])

    def _predict(self, batch: ModelInputs, weights: dict[str, Tensor]) -> Tensor:
        with self.dense.forward_context():
            found = predictions_of(functional_call(self.dense.layers.model, weights, batch.args, batch.kwargs))
        if found is None:
            raise CalibrationError(
                f"Allocation '{self.allocation}': {type(self.dense.layers.model).__name__} returns no tensor to compare. Use "
                "'owl', which looks at weights and inputs alone. Nothing was changed."
            )
        return found
