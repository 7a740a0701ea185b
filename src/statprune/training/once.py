"""One model is pruned once, in the middle of somebody's training: what every Trainer's callback does.

    before anything runs    take the place of the output, refuse what cannot be pruned or saved
    prune                   remember what was done, for checkpoints; a search chooses once
    hold                    pruned weights stay zero while an optimizer trains the others
    finish                  check the zeros, write the output; where that fails the trained weights are put elsewhere

What a Trainer calls its steps, where its batches come from and what it logs is the callbacks' own (`callback`, `trainer`).
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from statprune.agreement import refuse_what_runs_whole
from statprune.api import PruningPlan, plan, prune
from statprune.checkpoint import Reserved, check_model, refuse_existing, rescue, reserve, save
from statprune.errors import MaskError, NonFiniteError, RanksError, RecipeError, StatpruneError, TracingError
from statprune.how import How, read_how
from statprune.model.gradients import Loss
from statprune.model.inputs import ModelInputs, bind_batches
from statprune.model.kinds import is_causal
from statprune.model.layers import Layers, find_layers
from statprune.model.observe import ForwardContext
from statprune.model.sharded import gathered
from statprune.model.storage import is_sharded, refuse_unreadable, stored_parameters, total
from statprune.model.whole import stand_in
from statprune.progress import Say
from statprune.ranks import all_well, together
from statprune.recipe import Recipe, Search, scope_to_dict
from statprune.report import PruningReport
from statprune.training.masks import HeldMasks, remeasure

Then = Literal["stop", "finetune"]


class PruneOnce:
    """One pruning, from what was asked for to the folder that is written.

    Args:
        call: name of the callback, for messages.
        recipe: as for `statprune.prune`; so is `pattern`.
        pattern: in the place of that of `recipe`.
        output: folder for the pruned model, or None.
        then: `"stop"` or `"finetune"`.
        say: called with each step in words.

    Attributes:
        recipe: what was asked for.
        report: what the last run did, of a plan too; None before.
        landed: what was pruned in place, as plain data for checkpoints; None before.
        chosen: what a search has chosen (`recipe` and `chosen_by`, as plain data); None where none has run.
        masks: held while a training runs; else None.
        loss: for a loss-aware method, of the batches that are given next; None: that of a causal language model.

    Raises:
        RecipeError: as `read_how`, or another word for `then`.
    """

    def __init__(self, call: str, recipe: How | None, pattern: Any, output: str | None, then: str, say: Say) -> None:
        if then not in get_args(Then):
            raise RecipeError(f"{call}(then={then!r}): expected 'stop' or 'finetune'.")
        self.call, self.output, self.then, self.say = call, output, then, say
        self.recipe: Recipe | Search = read_how(recipe, pattern=pattern)
        self.report: PruningReport | None = None
        self.landed: dict[str, Any] | None = None
        self.chosen: dict[str, Any] | None = None
        self.masks: HeldMasks | None = None
        self.loss: Loss | None = None
        self._place: Reserved | None = None
        self._layers: Layers | None = None
        self._hooks: list[RemovableHandle] = []

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint: what was asked for, chosen and done. The zeros themselves are in the weights."""
        return copy.deepcopy({"landed": self.landed, "how": _fields(self.recipe), "chosen": self.chosen})

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.landed = copy.deepcopy(state["landed"])
        self.chosen = copy.deepcopy(state.get("chosen"))

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Take over what another callback left in a checkpoint, one that asked for the same.

        Raises:
            MaskError: it asked for another recipe, and the checkpoint's model is pruned by it; names both.
        """
        then = state.get("how")
        if then is None or _read(then) == self.recipe:
            self.load(state)
            return
        if state.get("landed") is None:
            return
        before = _read(then)
        old, new = (_fields(how) if how is not None else {} for how in (before, self.recipe))
        differing = [f"{key} {old.get(key)!r} then and {new[key]!r} now" for key in new if new[key] != old.get(key)]
        raise MaskError(
            f"{self.call}: the model of this checkpoint is pruned already, by another recipe: {'; '.join(differing)}. It "
            "would be pruned a second time. Resume with the recipe that the checkpoint was written with; to prune that "
            "model anew, load its weights only and begin a new training."
        )

    def refuse_training_zeros_away(self) -> None:
        """Raise MaskError where the model is pruned already, and would be trained without its mask held."""
        if self.landed is not None and self.then == "stop":
            raise MaskError(
                f'{self.call}(then="stop") has pruned this model already, after step {self.landed["global_step"]}: training '
                'would train its zeros away. Use then="finetune" to train on with the zeros held. To train densely from here '
                f"and prune again at the end, give the Trainer a new {self.call}, and load a checkpoint's weights only."
            )

    @contextlib.contextmanager
    def on_all_ranks(self, device: torch.device) -> Iterator[None]:
        """What fails inside on one rank, such as its loader or the writing of the output, is an error on all; see `together`.

        Every rank waits at the end for the others.

        Args:
            device: of this rank; what the ranks tell each other passes through it.

        Raises:
            RanksError: another rank failed; the message has its error.
        """
        with together(None, device, self.call):
            yield

    def reserve(self, *, is_first: bool) -> None:
        """Take the place of the output, before anything runs; on the first rank, and the others look.

        Raises:
            CheckpointError: it exists, or cannot be written.
        """
        if self.output is None or self._place is not None:
            return
        if is_first:
            self._place = reserve(self.output, say=self.say)
        else:
            refuse_existing(self.output)

    def refuse_target(self, target: nn.Module) -> None:
        """Raise SiteError or CheckpointError where this model cannot be pruned, or in the end not be saved."""
        refuse_unreadable(target)
        refuse_what_runs_whole(target, self.recipe, has_own_loss=not is_causal(target))
        if self._place is not None:
            check_model(stand_in(target) if is_sharded(target) else target, self._place)

    def plan(self, target: nn.Module, batches: list[ModelInputs], forward_context: ForwardContext) -> PruningPlan:
        """A pruned twin, with the model unchanged; errors as `statprune.plan`."""
        twin = plan(target, batches, **self._how(target, batches, forward_context))
        self.report = self._with_choice(twin.report)
        self._layers = twin.layers
        return twin

    def land(self, target: nn.Module, batches: list[ModelInputs], step: int, forward_context: ForwardContext) -> None:
        """Prune in place, and remember it; errors as `statprune.prune`."""
        report = prune(target, batches, **self._how(target, batches, forward_context))
        self._layers = None
        self._record(self._with_choice(report), step)

    def hold(self, target: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Keep the pruned weights at zero through every step of these optimizers, until `release`.

        Raises:
            MaskError: the recorded zeros are not there.
        """
        self.masks = HeldMasks(target, self.landed_report().sites)
        for optimizer in optimizers:
            self.masks.mask_optimizer_state(optimizer)
            # A hook of the optimizer: it follows each step of each optimizer, and no other; and it precedes whatever looks at
            # the weights (averages, checkpoints, the user's own hooks).
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def check_zeros(self, target: nn.Module) -> None:
        """Raise MaskError where what was pruned before is not, or in another model."""
        HeldMasks(target, self.landed_report().sites)

    def finish_holding(self, target: nn.Module, step: int) -> None:
        """The training has ended: check every zero, let the optimizers go, and record what the weights are now.

        Raises:
            MaskError: a pruned weight is not zero.
            NonFiniteError: the training left NaN or infinity.
        """
        assert self.masks is not None
        self.refuse_diverged(target)
        self.masks.check()
        self.release_hooks()
        self._record(remeasure(self.landed_report(), target), step)

    def refuse_diverged(self, target: nn.Module) -> None:
        """Raise NonFiniteError, naming it, for a parameter that a training left with NaN or infinity."""
        parameters = dict(target.named_parameters())
        for name, held in stored_parameters(target):
            if held.is_floating_point() and int(total((~torch.isfinite(held)).sum(), parameters[name])):
                raise NonFiniteError(
                    f"{self.call}: the training left NaN or infinity in the parameter {name}. Train with a lower learning rate "
                    "or clipped gradients, from a checkpoint that is finite."
                )

    @contextlib.contextmanager
    def keeping(self, target: nn.Module) -> Iterator[None]:
        """What was trained is not lost where something fails inside: the weights are put beside the output, and it is said.

        Around `on_all_ranks`: what fails inside of that on one rank fails on all, which then gather sharded weights.
        """
        try:
            yield
        except Exception as e:
            folder = self._rescued(target, e)
            if folder is None:
                raise
            kept = f"The trained weights are in {folder} (safetensors, not verified)."
            if isinstance(e, StatpruneError):
                raise type(e)(f"{e} {kept}") from e
            e.add_note(kept)
            self.say(kept)
            raise

    def save(self, target: nn.Module, *, tokenizer: Any, source: str) -> None:
        """Write the output, where one is asked for and this is the first rank; errors as `checkpoint.save`.

        On all ranks, inside of `on_all_ranks`. Sharded weights are gathered into the first rank's host memory.
        """
        all_well(None, "the saving")  # ranks that have met wait longer for each other, as writing a large model takes
        if self.output is None:
            return
        whole = gathered(target, is_wanted=self._place is not None)
        place, self._place = self._place, None
        if place is not None and whole is not None:
            report = self.landed_report()
            save(whole, report, place, tokenizer=tokenizer, protocol={"source": source, "batches": report.num_batches})

    def release(self) -> None:
        """Let optimizers, graph and the place of the output go."""
        self.release_hooks()
        self._layers = None
        if self._place is not None:
            self._place.release()
            self._place = None

    def release_hooks(self) -> None:
        """Let the optimizers go."""
        self.masks = None
        while self._hooks:
            self._hooks.pop().remove()

    def landed_report(self) -> PruningReport:
        """What was pruned in place."""
        assert self.landed is not None
        return PruningReport.from_dict(self.landed["report"])

    def _rescued(self, target: nn.Module, error: Exception) -> Path | None:
        """Where the weights were put, on the first rank; None on the others, and where nothing is to be written."""
        if self.output is None:
            return None
        try:
            whole = gathered(target, is_wanted=self._place is not None)
        except RanksError as e:
            error.add_note(f"The trained weights, which are sharded, could not be put together: {e}")
            return None
        if self._place is None or whole is None:
            return None
        return rescue(whole, self._place, error, report=self._landed_or_none())

    def _landed_or_none(self) -> PruningReport | None:
        return self.landed_report() if self.landed is not None else None

    def _record(self, report: PruningReport, step: int) -> None:
        self.report = report
        self.landed = {
            "recipe": report.recipe,
            "sparsity": report.sparsity,
            "energy_ratio": report.energy_ratio,
            "global_step": step,
            "report": report.to_dict(),
        }
        self.say(str(report))

    def _how(self, target: nn.Module, batches: list[ModelInputs], forward_context: ForwardContext) -> dict[str, Any]:
        """The arguments of `plan` and `prune` that say how."""
        layers = self._layers
        if layers is not None:
            try:  # what the first probe found saves the others the export, as long as it holds
                layers = find_layers(target, bind_batches(target, batches), traced=layers)
            except TracingError:
                layers = None
        return {
            "how": Recipe.from_dict(self.chosen["recipe"]) if self.chosen is not None else self.recipe,
            "traced": layers,
            "loss": self.loss,
            "say": self.say,
            "forward_context": forward_context,
        }

    def _with_choice(self, report: PruningReport) -> PruningReport:
        """Remember what a search has chosen, and say so in every report that follows."""
        if report.chosen_by is not None:
            self.chosen = copy.deepcopy({"recipe": report.recipe, "chosen_by": report.chosen_by})
        elif self.chosen is not None:
            report.chosen_by = copy.deepcopy(self.chosen["chosen_by"])
        return report

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self.masks is not None
        assert self.landed is not None
        self.masks.mask_weights(optimizer)
        self.masks.mask_optimizer_state(optimizer)
        self.landed["report"]["finetuning_steps"] += 1


def _read(how: Mapping[str, Any]) -> Recipe | Search | None:
    """What a checkpoint says was asked for; None where this version cannot read it."""
    try:
        return Search.from_dict(how) if "minutes" in how else Recipe.from_dict(how)
    except (RecipeError, TypeError):
        return None


def _fields(how: Recipe | Search) -> dict[str, Any]:
    """As people write them."""
    return {"method": how.method, **scope_to_dict(how)}
