"""Many twins from one walk: the statistics of the dense model are the same for every recipe with schedule one-shot."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from statprune.clock import timed
from statprune.errors import SiteError
from statprune.methods.experts import by_matrix
from statprune.methods.statistics import Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.layers import Layers
from statprune.model.observe import ForwardContext
from statprune.model.sites import InputGroup
from statprune.model.undisturbed import undisturbed
from statprune.model.weights import Twin as TwinWeights
from statprune.ranks import ProcessGroup
from statprune.recipe import Recipe
from statprune.selection import select

MAX_TWIN_BYTES = 4 << 30
"""Of pruned weights that are held at once; more candidates than fit are pruned in several walks."""

MAX_STATISTICS_BYTES = 4 << 30
"""Of Grams that are held at once; the walk is repeated for the groups that do not fit."""


@dataclass
class Candidate:
    """One recipe's pruned weights."""

    recipe: Recipe
    weights: TwinWeights
    seconds: dict[str, float] = field(default_factory=lambda: {"prune": 0.0})
    """`prune`, of pruning alone; a search adds `score`."""


KeepGoing = Callable[[float, Sequence[float]], int]
"""Called after each group with the fraction of the weights that is done, and each twin's seconds so far; returns how many of
the twins, from the first on, to go on with."""


def plan_together(
    layers: Layers,
    inputs: Sequence[ModelInputs],
    recipes: Sequence[Recipe],
    *,
    forward_context: ForwardContext,
    process_group: ProcessGroup = None,
    keep_going: KeepGoing = lambda fraction, seconds: len(seconds),
) -> list[Candidate]:
    """What `plan` gives for each of these recipes, for the price of one pass over the inputs.

    Args:
        layers: of the model, which stays as it is.
        inputs: calibration data.
        recipes: with schedule `one-shot`, the same pattern and the same targets.
        forward_context: entered around model code.
        process_group: of the ranks that prune together.
        keep_going: may drop candidates from the end, where they take too long.

    Raises:
        StatpruneError: as `plan`.
    """
    candidates = [Candidate(recipe, TwinWeights(layers.model)) for recipe in recipes]
    pruners = [recipe.pruner() for recipe in recipes]
    needs = Statistic.MOMENTS
    for pruner in pruners:
        needs |= pruner.needs
    groups = select(layers.groups, layers.left_out, recipes[0]).groups
    num_weights, done = sum(_num_weights(group) for group in groups), 0
    with undisturbed(layers.model):
        for part in _parts(groups, MAX_STATISTICS_BYTES if Statistic.GRAM in needs else None):
            for group, moments in layers.observe(
                part, inputs, schedule="one-shot", needs=needs, process_group=process_group, forward_context=forward_context
            ):
                for site in group.sites:
                    for candidate, pruner in zip(candidates, pruners, strict=False):
                        weight = site.view(candidate.weights.get(site.parameter).detach())
                        with timed(candidate.seconds, "prune"):
                            try:
                                candidate.weights.put(site, by_matrix(pruner, weight, moments))
                            except ValueError as e:
                                raise SiteError(f"{site.name}, with {candidate.recipe.method}: {e}") from e
                done += _num_weights(group)
                del candidates[keep_going(done / num_weights, [one.seconds["prune"] for one in candidates]) :]
    return candidates


def twins_at_once(layers: Layers, recipe: Recipe) -> int:
    """How many twins `MAX_TWIN_BYTES` hold: at least one."""
    sites, model = select(layers.groups, layers.left_out, recipe).sites, layers.model
    num_bytes = sum(site.num_weights * model.get_parameter(site.parameter).element_size() for site in sites)
    return max(1, MAX_TWIN_BYTES // num_bytes)


def _num_weights(group: InputGroup) -> int:
    return sum(site.num_weights for site in group.sites)


def _parts(groups: Sequence[InputGroup], max_bytes: int | None) -> Iterator[list[InputGroup]]:
    """The groups in order, in parts whose Grams (float32) fit; one that is larger by itself is a part."""
    part: list[InputGroup] = []
    held = 0
    for group in groups:
        num_bytes = 4 * group.sites[0].num_matrices * group.in_features**2
        if part and max_bytes is not None and held + num_bytes > max_bytes:
            yield part
            part, held = [], 0
        part.append(group)
        held += num_bytes
    yield part
