"""Training that goes on after pruning: the pruned weights stay exactly zero, whatever the optimizer does.

    backward           gradients      zero where pruned: clipping norms and moments see the kept weights only
    optimizer step     weights        zero where pruned: weight decay, or an orthogonalized update, may have moved them
                       state          zero where pruned: moments from before the pruning would go on pushing

A mask is not stored anywhere: a weight is pruned where it is zero. So the mask comes back from any checkpoint of the model, and
the number of zeros, which is recorded, tells whether it is the right one.

Of sharded weights (FSDP2) each rank holds the mask of its own part, and the zeros of all parts are counted together.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from statprune.errors import MaskError
from statprune.methods.counting import energy_sq
from statprune.model.storage import local, reshard_, total
from statprune.model.weights import hold_
from statprune.report import PruningReport, SiteReport


class HeldMasks:
    """Keep masks of a model's pruned weights, each in its parameter's own layout (True = kept), of what this rank holds of it.

    Args:
        model: holds the pruned weights, where they will be trained.
        sites: the weights to hold, and how many zeros each of them has at least. A weight may have more: a kept one that has
            become exactly zero cannot be told from a pruned one, and is held as well.

    Raises:
        MaskError: a weight has fewer zeros than recorded, or does not exist.
    """

    def __init__(self, model: nn.Module, sites: Iterable[SiteReport]) -> None:
        reshard_(model)
        self.sites = tuple(sites)
        self._parameter_of: dict[str, nn.Parameter] = {}
        self._keep_of: dict[nn.Parameter, Tensor] = {}
        for site in self.sites:
            try:
                parameter = model.get_parameter(site.parameter)
            except AttributeError as e:
                raise absent(site, model) from e
            keep = keep_mask(site, parameter)
            self._parameter_of[site.name] = parameter
            self._keep_of[parameter] = keep

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, where there are gradients."""
        for parameter, keep in self._keep_of.items():
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(~keep, 0)

    def mask_new_gradients(self) -> list[RemovableHandle]:
        """Zero the gradients of pruned weights as backward passes accumulate them, until the handles are removed."""

        def mask(parameter: Tensor) -> None:
            assert parameter.grad is not None
            assert isinstance(parameter, nn.Parameter)
            local(parameter.grad).masked_fill_(~self._keep_of[parameter], 0)

        trained = [parameter for parameter in self._keep_of if parameter.requires_grad]
        return [parameter.register_post_accumulate_grad_hook(mask) for parameter in trained]

    def mask_weights(self, optimizer: Optimizer) -> None:
        """Zero the pruned weights that this optimizer has just stepped."""
        for parameter in _parameters_of(optimizer):
            if parameter in self._keep_of:
                hold_(parameter, self._keep_of[parameter])

    @torch.no_grad()
    def mask_optimizer_state(self, optimizer: Optimizer) -> None:
        """Zero, at pruned places, every floating-point tensor of the optimizer's state that has the weight's shape.

        Those are moments, whatever the optimizer calls them. Integer state holds codes (8-bit optimizers), of which 0
        is not the number zero; it is left alone.
        """
        for parameter in _parameters_of(optimizer):
            if parameter not in self._keep_of:
                continue
            keep = self._keep_of[parameter]
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.is_floating_point() and (held := local(value)).shape == keep.shape:
                    held.masked_fill_(~keep.to(held.device), 0)

    def check(self) -> None:
        """Raise MaskError, naming the first weight, where a pruned one is not exactly zero."""
        for name, parameter in self._parameter_of.items():
            regrown = int(total((local(parameter)[~self._keep_of[parameter]] != 0).sum(), parameter))
            if regrown:
                raise MaskError(
                    f"{name}: {regrown:,} pruned weights are not zero after the training, though they were after every "
                    "optimizer step. Something else wrote to them, such as an average of weights that began before the pruning."
                )


def keep_mask(site: SiteReport, parameter: Tensor) -> Tensor:
    """Where a pruned weight is not zero: bool, of the shape of what this rank holds of the parameter.

    Raises:
        MaskError: it has fewer zeros than recorded, on all ranks together where it is sharded.
    """
    keep = local(parameter) != 0
    if (num_zeros := int(total((~keep).sum(), parameter))) < site.num_zeros:
        raise MaskError(
            f"{site.name} has {num_zeros:,} zeros, but {site.num_zeros:,} were recorded when it was pruned: weights grew "
            "back, or this is another model. Go on from a checkpoint that was saved with the mask held, or prune this "
            "model anew (in a Trainer: with a new StatisticalPruning)."
        )
    return keep


def absent(site: SiteReport, model: nn.Module) -> MaskError:
    """The error for a pruned weight that the model does not have."""
    return MaskError(f"{type(model).__name__} has no parameter {site.parameter}, which was pruned. Is this another model?")


def remeasure(report: PruningReport, model: nn.Module) -> PruningReport:
    """The same report with the zeros and the energy that the weights have now.

    A weight that has changed has no output error any more: it was measured on the weight that pruning left. Where weights are
    sharded, every rank has to call it.
    """
    reshard_(model)
    sites = []
    for site in report.sites:
        parameter = model.get_parameter(site.parameter)
        weight = local(parameter)
        num_zeros = total((weight == 0).sum(), parameter)
        energy = total(torch.tensor(energy_sq(weight), dtype=torch.float64, device=weight.device), parameter)
        now = replace(site, num_zeros=int(num_zeros), energy_after=float(energy))
        sites.append(now if now == site else replace(now, output_error=None))
    return replace(report, sites=sites)


def _parameters_of(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
