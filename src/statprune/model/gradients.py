"""Gradients: what the loss makes of each output of a linear layer, from one backward pass of the dense model.

For each layer, G = mean over tokens of g g^T, with g the gradient of the loss, summed over tokens, with respect to the layer's
output. Gradients go through values alone: no parameter gets one, so the backward pass costs as much as a forward pass.

A layer is recognised by its weight when a product with it runs, whatever module it is called from, so any callable that runs
the model and gives a scalar is a loss: the next-token loss of a causal language model, or the training step of a
LightningModule.
"""

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from statprune.errors import CalibrationError, NonFiniteError, SiteError, first_line
from statprune.methods.symmetric import add_upper_, mirror_
from statprune.model.inputs import ModelInputs
from statprune.model.kinds import is_causal, predictions_of
from statprune.model.observe import ForwardContext
from statprune.model.sites import LinearSite
from statprune.progress import Progress, silent
from statprune.ranks import ProcessGroup, sum_over_ranks

Loss = Callable[[nn.Module, ModelInputs, int], Tensor]
"""`(model, inputs, index)` to the loss of a batch, summed over its tokens: a scalar that depends on the model's weights. The
batch's number in the calibration set is for losses that need more than a model's inputs, such as labels."""

TOKENS = 6144
"""As many of the calibration set's first tokens make the gradients, in whole batches: more changed little on SmolLM2."""

_IN_MEMORY = 2**32
"""Bytes of all Grams together above which they lie in a file that is mapped into memory, and the system pages."""


@dataclass(frozen=True)
class Curvature:
    """What the gradients of each layer's output are."""

    sums: dict[str, Tensor]
    """By parameter name: [out, out], float32, sum of g g^T over tokens."""

    num_tokens: int

    def gram(self, parameter: str) -> Tensor:
        """[out, out], float32: G."""
        return self.sums[parameter] / self.num_tokens

    def diagonal(self, parameter: str) -> Tensor:
        """[out], float32: the mean squared gradient of each output."""
        return self.sums[parameter].diagonal() / self.num_tokens


def next_token_loss(model: nn.Module, inputs: ModelInputs, index: int = 0) -> Tensor:
    """The cross-entropy of each next token of `input_ids`, padding left out, summed; in float32.

    Raises:
        CalibrationError: the model is no causal language model, or its inputs are no tokens.
    """
    refuse_unless_causal(model, inputs)
    logits = predictions_of(model(*inputs.args, **inputs.kwargs))
    assert logits is not None
    return loss_of_logits(logits, inputs)


def refuse_unless_causal(model: nn.Module, inputs: ModelInputs) -> None:
    """Raise CalibrationError where the model or its inputs have no next-token loss."""
    if not is_causal(model) or not isinstance(inputs.kwargs.get("input_ids"), Tensor):
        raise CalibrationError(
            f"loss-aware: {type(model).__name__} is no causal language model that is given `input_ids`, so its loss is not "
            "known. Give prune and plan a `loss`, a function (model, inputs, index) -> scalar; StatisticalPruning "
            "takes the LightningModule's."
        )


def loss_of_logits(logits: Tensor, inputs: ModelInputs) -> Tensor:
    """`next_token_loss`, of the logits [batch, length, vocabulary] that a causal model gave for these inputs."""
    tokens: Tensor = inputs.kwargs["input_ids"]
    labels = tokens[..., 1:]
    mask = inputs.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        labels = labels.masked_fill(mask[..., 1:] == 0, -100)
    return nn.functional.cross_entropy(
        logits[..., :-1, :].float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def output_grams(
    model: nn.Module,
    sites: Sequence[LinearSite],
    batches: Sequence[ModelInputs],
    *,
    loss: Loss | None = None,
    tokens: int = TOKENS,
    process_group: ProcessGroup = None,
    progress: Progress = silent,
    forward_context: ForwardContext = contextlib.nullcontext,
) -> Curvature:
    """G of each site, from the first batches of the calibration set.

    Args:
        model: dense; left as it was, without gradients. Its mode is as `undisturbed` makes it.
        sites: of the model.
        batches: on the model's device.
        loss: of a batch; by default `next_token_loss`.
        tokens: batches are taken until they hold as many, at least one.
        process_group: of the ranks whose sums are added up, each with batches of its own.
        progress: called after each batch.
        forward_context: entered around model code.

    Raises:
        CalibrationError: there is no loss, or it depends on no layer's output.
        SiteError: a layer does not run as a product that is known, so that it has no gradient.
        NonFiniteError: NaN or infinity in a gradient.
    """
    loss = loss or next_token_loss
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    chosen = first_batches(batches, tokens)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        grams = Grams(sites, device)
        capture = _Capture(model, sites, grams)
        for number, batch in enumerate(chosen):
            with forward_context():
                try:
                    with capture:
                        total = loss(model, ModelInputs(*tree_map(ordinary, (batch.args, batch.kwargs))), number)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as e:
                    raise CalibrationError(f"loss-aware: the loss of calibration batch {number}: {first_line(e)}.") from e
            refuse_unless_scalar(total, number)
            total.backward()  # type: ignore[no-untyped-call]
            progress(number + 1, len(chosen), "gradients")
    return grams.total(chosen, process_group)


class Grams:
    """g g^T of each site's output, added up over batches."""

    def __init__(self, sites: Sequence[LinearSite], device: torch.device) -> None:
        self._sites, self._device = sites, device
        self._sums = _zeros(sites, device)
        self._seen: set[str] = set()

    def watch(self, site: LinearSite, result: Tensor) -> None:
        """Add what the next backward pass gives for this result of a product with the site's weight.

        Args:
            site: one of them.
            result: [..., out]; another shape is no output of the layer, and passed over.
        """
        if result.shape[-1] == site.shape[0]:
            if not result.requires_grad:
                result.requires_grad_()  # the first layers: nothing before them needs a gradient
            result.register_hook(lambda gradient: self._add(site, gradient))

    @torch.no_grad()
    def _add(self, site: LinearSite, gradient: Tensor) -> None:
        self._seen.add(site.parameter)
        rows_TO = gradient.reshape(-1, gradient.shape[-1])
        total = self._sums[site.parameter]
        if total.device == rows_TO.device:
            add_upper_(total, rows_TO)
        else:
            part = torch.zeros_like(total, device=rows_TO.device)
            add_upper_(part, rows_TO)
            total += part.to(total.device)

    def total(self, batches: Sequence[ModelInputs], process_group: ProcessGroup) -> Curvature:
        """Over the ranks too, each of which ran batches of its own.

        Raises:
            SiteError: no gradient came to a layer.
            NonFiniteError: NaN or infinity in one.
        """
        for total in self._sums.values():
            mirror_(total)
        num_tokens = torch.tensor([sum(map(_num_tokens, batches))], device=self._device)
        sum_over_ranks([num_tokens, *self._sums.values()], process_group, "the gradients")
        if missing := [site.name for site in self._sites if site.parameter not in self._seen]:
            raise SiteError(
                f"loss-aware: no gradient reached {missing[0]}{f' and {len(missing) - 1} others' if missing[1:] else ''}. "
                "Leave such layers dense with `ignore`, or use least-squares. Nothing was changed."
            )
        for site in self._sites:
            if not bool(torch.isfinite(self._sums[site.parameter].diagonal()).all()):
                raise NonFiniteError(
                    f"loss-aware: NaN or infinity in the gradient at the output of {site.name}. In float16, try bfloat16 or "
                    "float32. Nothing was changed."
                )
        return Curvature(self._sums, int(num_tokens))


def refuse_unless_scalar(loss: Any, batch: int) -> None:
    """Raise CalibrationError where a batch's loss is nothing to take gradients of."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise CalibrationError(
            f"loss-aware: the loss of calibration batch {batch} is {_describe(loss)}: expected a scalar tensor that depends on "
            "the model's layers."
        )


class _Capture(TorchFunctionMode):
    """Watches each product with a site's weight, where it runs."""

    def __init__(self, model: nn.Module, sites: Sequence[LinearSite], grams: Grams) -> None:
        super().__init__()
        self.grams = grams
        # A transpose of a weight is another tensor on the same memory.
        self.site_of = {model.get_parameter(site.parameter).untyped_storage().data_ptr(): site for site in sites}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and isinstance(result, Tensor):
            site = next(filter(None, map(self._site, (*args, *(kwargs or {}).values()))), None)
            if site is not None:
                self.grams.watch(site, result)
        return result

    def _site(self, argument: Any) -> LinearSite | None:
        if not isinstance(argument, Tensor) or argument.ndim != 2:
            return None
        site = self.site_of.get(argument.untyped_storage().data_ptr())
        return site if site is not None and argument.numel() == site.shape[0] * site.shape[1] else None


_PRODUCTS = {
    nn.functional.linear, torch.addmm, torch.Tensor.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.mm, torch.Tensor.mm,
}  # fmt: skip


def first_batches(batches: Sequence[ModelInputs], tokens: int) -> list[ModelInputs]:
    """Those that make the gradients: the first that hold as many tokens, at least one."""
    chosen: list[ModelInputs] = []
    for batch in batches:
        if sum(map(_num_tokens, chosen)) >= tokens:
            break
        chosen.append(batch)
    return chosen


def _num_tokens(batch: ModelInputs) -> int:
    """Positions of the first input that has any; rows where it has no more than those."""
    first = batch.kwargs.get("input_ids", batch.tensors()[0])
    return int(first.numel() if not first.is_floating_point() else first.numel() // max(1, first.shape[-1]))


def ordinary(value: Any) -> Any:
    """A copy of a tensor that was made in inference mode, which takes part in no gradient; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, which would take memory for one more model and half of the time again."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def bytes_of_grams(sites: Sequence[LinearSite]) -> int:
    """Of all of them, in memory; none where they lie in a file."""
    size = sum(4 * site.shape[0] ** 2 for site in sites)
    return size if size <= _IN_MEMORY else 0


def _zeros(sites: Sequence[LinearSite], device: torch.device) -> dict[str, Tensor]:
    sizes = [site.shape[0] ** 2 for site in sites]
    if 4 * sum(sizes) <= _IN_MEMORY:
        return {site.parameter: torch.zeros(site.shape[0], site.shape[0], device=device) for site in sites}
    folder = tempfile.TemporaryDirectory(prefix="statprune-gradients-")
    flat = torch.from_file(str(Path(folder.name) / "grams"), shared=True, size=sum(sizes))  # zeros, and none of them in memory
    weakref.finalize(flat.untyped_storage(), folder.cleanup)
    return {
        site.parameter: part.view(site.shape[0], site.shape[0]) for site, part in zip(sites, flat.split(sizes), strict=True)
    }


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}" + ("" if value.requires_grad else " without a gradient")
    return f"a {type(value).__name__}"
