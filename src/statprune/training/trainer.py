"""PruningCallback: prune the model of a transformers `Trainer`, after its training or before it.

    then="stop"       train end: calibrate on the trained weights, prune in place, write the output
    then="finetune"   train begin: calibrate and prune in place     from then on: pruned weights are held at zero
                      train end: check the zeros, write the output

The core is that of the Lightning callback (`once`); here is what a transformers `Trainer` calls, and when.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed, nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from statprune.errors import CalibrationError, SiteError
from statprune.how import How
from statprune.model.inputs import ModelInputs, read_inputs
from statprune.model.kinds import unwrapped
from statprune.model.observe import ForwardContext
from statprune.model.storage import refuse_sharded
from statprune.report import PruningReport
from statprune.training.batches import draw
from statprune.training.masks import remeasure
from statprune.training.once import PruneOnce, Then

_log = logging.getLogger("statprune")


class PruningCallback(TrainerCallback, ExportableState):
    """Prune the model of a transformers `Trainer`.

    Args:
        recipe: how to prune, as for `statprune.prune`. None: the paper's method at 2:4.
        pattern: in the place of that of `recipe`, such as `"50%"` or `"2:4"`.
        module: attribute path of the module to prune. Default: the Trainer's model.
        calibration: batches to calibrate on, as `statprune.prune` takes them. Default: the Trainer's training data. With
            several ranks each takes every so many-th batch, unless the loader has a `DistributedSampler`.
        calibration_batches: how many batches of it, at most, on all ranks together.
        output: folder for the pruned model, written and verified when the training ends. Its place is taken when the training
            begins. Where pruning or saving fails then, the trained weights are put beside it, and the error says where.
        then: what follows the pruning. `"stop"`: nothing, so the dense model is trained and pruned at the end. `"finetune"`: it
            is pruned first, and what is left is trained with the pruned weights held at exactly zero.

    A callback prunes once. Training from a checkpoint that was written with the mask held goes on with that mask, which comes
    back from the zeros of the weights.

    Once the model is pruned, each line of the Trainer's log has `pruned_sparsity` and `pruned_energy_ratio` of the weights as
    they are then, and what `evaluate` returns has them too. Callbacks that report elsewhere stand before this one in a Trainer,
    and see lines without.

    Attributes:
        report: what was done, or None.

    Raises:
        SiteError: the weights are sharded, by FSDP, DeepSpeed or tensor parallelism.
        MaskError: zeros that were recorded are no longer there, or would be trained away; or a checkpoint's model was pruned by
            another recipe.
        CalibrationError: no calibration data, or none for some rank; or no such module.
        CheckpointError: the output exists or cannot be written, or the model is none that can be saved.
        NonFiniteError: the training left NaN or infinity in a weight.
        RanksError: another rank failed; the message has its error.
        StatpruneError: as `prune`.
    """

    def __init__(
        self,
        recipe: How | None = None,
        pattern: str | None = None,
        module: str | None = None,
        calibration: Any = None,
        calibration_batches: int = 128,
        output: str | None = None,
        then: Then = "stop",
    ) -> None:
        super().__init__()
        self._once = PruneOnce("PruningCallback", recipe, pattern, output, then, _say)
        self.module = module
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self._hooks: list[Any] = []

    @property
    def report(self) -> PruningReport | None:
        """What was done."""
        return self._once.report

    @property
    def landed(self) -> dict[str, Any] | None:
        """What was pruned in place, as a checkpoint holds it; None before."""
        return self._once.landed

    @property
    def from_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds of this callback; setting it takes that over."""
        return self._once.state()

    @from_checkpoint.setter
    def from_checkpoint(self, state: Mapping[str, Any]) -> None:
        self._once.load(state)

    def state(self) -> dict[str, Any]:
        """For a checkpoint's `trainer_state.json`: plain data, in the form that transformers asks for."""
        state = self._once.state()
        settings = {
            "recipe": state["how"], "module": self.module, "calibration_batches": self.calibration_batches,
            "output": self._once.output, "then": self._once.then,
        }  # fmt: skip
        return {"args": settings, "attributes": {"from_checkpoint": state}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse sharded weights before anything runs."""
        _refuse_sharding(args, kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot be; to fine-tune, prune in place unless that was done before, and hold the mask from here on."""
        self._release()  # of a training that ended early, of which a callback does not hear
        _refuse_sharding(args, kwargs["model"])
        with self._once.on_all_ranks(args.device):
            target = self._target(kwargs["model"])
            self._read_checkpoint(state)
            self._once.refuse_training_zeros_away()
            self._once.reserve(is_first=state.is_world_process_zero)
            self._once.refuse_target(target)
            if self._once.then != "finetune":
                return
            if self.landed is None:
                self._land(args, state, target, kwargs.get("train_dataloader"))
            self._once.hold(target, [_plain(kwargs["optimizer"])])
        assert self._once.masks is not None
        # As they come, so that clipping, which precedes `on_pre_optimizer_step`, sees the kept weights only.
        self._hooks = self._once.masks.mask_new_gradients()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask the gradients once more: those of other ranks were added to them."""
        if self._once.masks is not None:
            self._once.masks.mask_gradients()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate on the trained weights and prune in place; or check that every zero is there. Write the output."""
        target = self._target(kwargs["model"])
        with self._once.keeping(target), self._once.on_all_ranks(args.device):
            if self._once.masks is not None:
                self._once.finish_holding(target, state.global_step)
            else:
                self._once.refuse_diverged(target)
                self._land(args, state, target, kwargs.get("train_dataloader"))
        with self._once.on_all_ranks(args.device):
            self._once.save(target, tokenizer=kwargs.get("processing_class"), source="transformers Trainer callback")
        self._release()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add to a line of the log, unless it is one of a training step, how sparse the weights are now."""
        logs = kwargs.get("logs")
        if self.landed is None or logs is None or "loss" in logs:
            return
        report = remeasure(self._once.landed_report(), self._target(kwargs["model"]))
        now = {"pruned_sparsity": report.sparsity, "pruned_energy_ratio": report.energy_ratio}
        logs.update(now)
        if state.log_history:
            state.log_history[-1].update(now)

    def _land(self, args: Any, state: Any, target: nn.Module, train_dataloader: Any) -> None:
        source, is_dealt_out = self.calibration, None
        if source is None:
            source, is_dealt_out = _training_data(train_dataloader)
        with isolate_rng(), _own_forward(target):
            drawn = draw(
                source, self.calibration_batches,
                rank=args.process_index, num_ranks=args.world_size, is_dealt_out=is_dealt_out,
            )  # fmt: skip
            batches: list[ModelInputs] = [read_inputs(target, batch, index) for index, batch in enumerate(drawn)]
            self._once.land(target, batches, state.global_step, _precision(args, target))

    def _read_checkpoint(self, state: Any) -> None:
        """Take over what a checkpoint's state has of this callback; a new training's has what the callback had already."""
        name = type(self).__name__
        # A checkpoint that was written without this callback has no place for it, and the next one would not be written.
        stored = state.stateful_callbacks.setdefault(name, self.state())
        for one in stored if isinstance(stored, list) else [stored]:
            if one["args"]["module"] == self.module:
                self._once.take_over(one["attributes"]["from_checkpoint"])

    def _target(self, model: nn.Module) -> nn.Module:
        model = unwrapped(model)[0]
        if self.module is None:
            return model
        try:
            return unwrapped(model.get_submodule(self.module))[0]
        except AttributeError as e:
            raise CalibrationError(
                f"PruningCallback(module={self.module!r}): {type(model).__name__} has no such module; it has "
                f"{', '.join(name for name, _ in model.named_children())}."
            ) from e

    def _release(self) -> None:
        self._once.release()
        while self._hooks:
            self._hooks.pop().remove()


def _say(text: str) -> None:
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
        _log.info("PruningCallback: %s", text)


def _refuse_sharding(args: Any, model: nn.Module) -> None:
    for kind, names in {
        "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED"),
        "FSDP": ("fsdp", "ACCELERATE_USE_FSDP"),
    }.items():
        if getattr(args, names[0], None) or os.environ.get(names[1], "false").lower() in ("true", "1"):
            raise SiteError(
                f"PruningCallback under {kind}, which shards weights, and only whole ones can be pruned. Use one device, or "
                "DDP."
            )
    refuse_sharded(model)


def _training_data(loader: Any) -> tuple[Any, bool]:
    """(the training's loader without the state that accelerate keeps of it, whether each rank has batches of its own)."""
    if loader is None:
        raise CalibrationError("PruningCallback has no calibration data: give it `calibration=`, or the Trainer training data.")
    return getattr(loader, "base_dataloader", loader), type(loader).__name__ != "DataLoaderDispatcher"


def _plain(optimizer: Any) -> Optimizer:
    """The optimizer of torch inside accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    plain: Optimizer = optimizer
    return plain


def _precision(args: Any, target: nn.Module) -> ForwardContext:
    """The autocast that the Trainer runs its model in."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if dtype is None:
        return contextlib.nullcontext
    device = next(target.parameters()).device.type
    return lambda: torch.autocast(device, dtype=dtype)


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Inside, without what accelerate puts around `forward` in mixed precision: it hides the arguments from the export."""
    wrapped, original = vars(model).get("forward"), getattr(model, "_original_forward", None)
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
