"""Many twins from one walk: the statistics of the dense model are the same for every recipe with schedule one-shot."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from statprune.engine import undisturbed
from statprune.errors import SiteError
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import bind_batches
from statprune.model.sites import InputGroup, TracedModel
from statprune.model.walk import ForwardContext, walk
from statprune.recipe import Recipe
from statprune.selection import select

MAX_TWIN_BYTES = 4 << 30
"""Of pruned weights that are held at once; more candidates than fit are pruned in several walks."""

MAX_STATISTICS_BYTES = 4 << 30
"""Of Grams that are held at once; the walk is repeated for the groups that do not fit."""


@dataclass
class Twin:
    """One recipe's pruned weights."""

    recipe: Recipe
    weights: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name, as `PruningPlan.weights`."""

    seconds: float = 0.0
    """Of pruning alone."""


KeepGoing = Callable[[float, Sequence[float]], int]
"""Called after each group with the fraction of the weights that is done, and each twin's seconds so far; returns how many of
the twins, from the first on, to go on with."""


def plan_together(
    model: nn.Module,
    batches: Sequence[Any],
    recipes: Sequence[Recipe],
    traced: TracedModel,
    *,
    forward_context: ForwardContext,
    keep_going: KeepGoing = lambda fraction, seconds: len(seconds),
) -> list[Twin]:
    """What `plan` gives for each of these recipes, for the price of one pass over the batches.

    Args:
        model: stays as it is.
        batches: calibration data, as for `plan`.
        recipes: with schedule `one-shot`, the same pattern and the same targets.
        traced: the model's graph.
        forward_context: entered around model code.
        keep_going: may drop twins from the end, where they take too long.

    Raises:
        StatpruneError: as `plan`.
    """
    inputs = bind_batches(model, batches)
    twins = [Twin(recipe) for recipe in recipes]
    pruners = [recipe.pruner() for recipe in recipes]
    needs = Statistic.most(*(pruner.needs for pruner in pruners))
    with undisturbed(model):
        groups = select(traced.groups, traced.left_out, recipes[0]).groups
        num_weights = sum(_num_weights(group) for group in groups)
        done = 0

        def prune_group(group: InputGroup, moments: InputMoments) -> None:
            nonlocal done
            for site in group.sites:
                weight = site.view(model.get_parameter(site.parameter).detach())
                for twin, pruner in zip(twins, pruners, strict=False):
                    started = time.perf_counter()
                    try:
                        twin.weights[site.parameter] = site.view(pruner(weight, moments).weight).contiguous()
                    except ValueError as e:
                        raise SiteError(f"{site.name}, with {twin.recipe.method}: {e}") from e
                    twin.seconds += time.perf_counter() - started
            done += _num_weights(group)
            del twins[keep_going(done / num_weights, [twin.seconds for twin in twins]) :]

        for part in _parts(groups, MAX_STATISTICS_BYTES if needs is Statistic.GRAM else None):
            walk(
                traced, part, inputs, prune_group,
                schedule="one-shot", needs=needs, replaced={}, forward_context=forward_context,
            )  # fmt: skip
    return twins


def twins_at_once(model: nn.Module, traced: TracedModel, recipe: Recipe) -> int:
    """How many twins `MAX_TWIN_BYTES` hold: at least one."""
    sites = select(traced.groups, traced.left_out, recipe).sites
    num_bytes = sum(site.shape[0] * site.shape[1] * model.get_parameter(site.parameter).element_size() for site in sites)
    return max(1, MAX_TWIN_BYTES // num_bytes)


def _num_weights(group: InputGroup) -> int:
    return sum(site.shape[0] * site.shape[1] for site in group.sites)


def _parts(groups: Sequence[InputGroup], max_bytes: int | None) -> Iterator[list[InputGroup]]:
    """The groups in order, in parts whose Grams (float32) fit; one that is larger by itself is a part."""
    part: list[InputGroup] = []
    held = 0
    for group in groups:
        num_bytes = 4 * group.in_features**2
        if part and max_bytes is not None and held + num_bytes > max_bytes:
            yield part
            part, held = [], 0
        part.append(group)
        held += num_bytes
    yield part
