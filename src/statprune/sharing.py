"""Sharing the pruning: at a cut each rank prunes its share of the weights, and then every rank has all of them.

    rows of each      q q | k k | v v    o o       up up | gate gate    down down
    whole weights     q | k v            o | -     up | gate            down | -         where a row needs the others

A method says itself whether its rows need each other (`methods/rows`). Whole weights are bit for bit what one rank makes of
them. So are rows, as long as a matrix product gives a row the same whatever others it is computed with; where the library does
not, they differ in their last bits.

What follows from the statistics of a group alone is the same for all its rows: factors and inverses of its Gram are computed
together (`methods/triangles`).

A method without the Gram is not shared: what it takes to prune a weight is no more than what it takes to send it around.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from statprune.errors import NonFiniteError, SiteError
from statprune.methods.experts import ExpertMoments, by_matrix
from statprune.methods.finite import is_finite
from statprune.methods.pruner import PrunedWeight, WeightPruner
from statprune.methods.rows import Piece, Rows, Team, of_rows
from statprune.methods.statistics import InputMoments, Statistic
from statprune.methods.target import Target
from statprune.model.gradients import Curvature
from statprune.model.observe import Moments
from statprune.model.sites import LinearSite
from statprune.ranks import ProcessGroup, place, send_around, sum_over_ranks


@dataclass(frozen=True)
class Task:
    """One weight that is to be pruned."""

    site: LinearSite
    weight: Tensor
    """[..., out, in], dense."""
    pruner: WeightPruner
    target: Target
    moments: Moments | None
    """Of its inputs, over all ranks."""
    curvature: Curvature | None

    def cost(self) -> int:
        """About how much work it is beside others of its group."""
        out, width = self.site.matrix
        return self.weight.numel() * (out + width if Statistic.CURVATURE in self.pruner.needs else width)

    def of_rows(self, rows: Rows, team: Team) -> "Task | None":
        """The same for a stretch of rows; None where a row needs the others, and of a stack."""
        pruner = of_rows(self.pruner, rows)
        if pruner is None or isinstance(self.moments, ExpertMoments):
            return None
        moments = None if self.moments is None else self.moments.of_rows(self.site.parameter, rows, team)
        return replace(self, weight=self.weight[rows.first : rows.end], pruner=pruner, moments=moments)

    def prune(self) -> PrunedWeight:
        """The pruned weight, of the dense one's dtype.

        Raises:
            SiteError: the method cannot prune it.
            NonFiniteError: the method makes NaN or infinity of it.
        """
        try:
            pruned = by_matrix(self._prune, self.weight, self.moments)
        except ValueError as e:
            raise SiteError(f"{self.site.name}: {e}") from e
        if not is_finite(pruned.weight):
            raise NonFiniteError(
                f"{self.site.name}: the method makes NaN or infinity of its finite weights, which are {self.weight.dtype}. "
                "Take smaller settings, a wider dtype, or leave the layer dense with `ignore`."
            )
        return pruned

    def _prune(self, weight: Tensor, moments: InputMoments | None) -> PrunedWeight:
        """Of one matrix."""
        if moments is not None and self.curvature is not None:
            moments = moments.with_output_gram(self.curvature.gram(self.site.parameter))
        pruned = self.pruner(self.target(weight, moments, self.site.parameter), moments)
        return PrunedWeight(pruned.weight.to(weight.dtype), pruned.keep)  # a dense target is float32


def prune_shared(tasks: Sequence[Task], process_group: ProcessGroup = None) -> Iterator[tuple[Task, PrunedWeight]]:
    """Prune weights with the same statistics, each rank its share of the work, inside of `together`.

    Args:
        tasks: the same ones on every rank, in the same order.
        process_group: the ranks that share them.

    Yields:
        Each with what it was pruned to, in order: the same on every rank.

    Raises:
        SiteError, NonFiniteError: as `Task.prune`, on the rank whose share it is.
        RanksError: another rank failed.
    """
    rank, size = place(process_group)
    if size == 1 or not any(Statistic.GRAM in task.pruner.needs | task.target.needs for task in tasks):
        for task in tasks:
            yield task, task.prune()
        return
    stretches = [_of_rank(task, rank, size, process_group) for task in tasks]
    if all(stretch is not None for stretch in stretches):
        for task, stretch in zip(tasks, stretches, strict=True):
            assert stretch is not None
            yield task, _joined(task, stretch.prune(), size, process_group)
        return
    owners = deal([task.cost() for task in tasks], size)
    mine = [task.prune() if owner == rank else None for task, owner in zip(tasks, owners, strict=True)]
    for index, (task, owner) in enumerate(zip(tasks, owners, strict=True)):
        weight, keep = _room(task, mine[index])
        mine[index] = None
        send_around([(owner, weight), (owner, keep)], process_group, f"the pruned weight of {task.site.name}")
        yield task, PrunedWeight(weight, keep)


def deal(costs: Sequence[int], size: int) -> list[int]:
    """Whose each of some pieces of work is: from the largest on, each goes to the rank that has the least so far."""
    load, owners = [0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


def stretch_of(rank: int, size: int, count: int) -> tuple[int, int]:
    """(first, end) of a rank's rows, of so many; whole sixteens where there are enough, for the sake of matrix products."""
    step = 16 if count >= 16 * size else 1
    first, end = (count // step * place // size * step for place in (rank, rank + 1))
    return first, count if rank == size - 1 else end


@dataclass(frozen=True)
class _Ranks:
    """A team of processes."""

    name: str
    """Of the layer."""
    device: torch.device
    process_group: ProcessGroup

    def total(self, sums: Tensor) -> Tensor:
        """Over the rows of all ranks."""
        added = sums.clone()
        sum_over_ranks([added], self.process_group, f"a sum over the rows of {self.name}")
        return added

    def gather(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """All pieces, of one dtype."""
        rank, size = place(self.process_group)
        owners = deal([piece.cost for piece in pieces], size)
        # One tensor for each rank: a message takes its time however short it is.
        lots = [[piece for piece, owner in zip(pieces, owners, strict=True) if owner == one] for one in range(size)]
        sent = [
            torch.cat([piece.compute().flatten() for piece in lot])
            if lot and one == rank
            else torch.empty(sum(map(_numel, lot)), dtype=pieces[0].dtype, device=self.device)
            for one, lot in enumerate(lots)
        ]
        send_around(enumerate(sent), self.process_group, f"what the rows of {self.name} have in common")
        each = [iter(flat.split([_numel(piece) for piece in lot])) for flat, lot in zip(sent, lots, strict=True)]
        return [next(each[owner]).view(piece.shape) for piece, owner in zip(pieces, owners, strict=True)]


def _numel(piece: Piece) -> int:
    return math.prod(piece.shape)


def _of_rank(task: Task, rank: int, size: int, process_group: ProcessGroup) -> Task | None:
    out, width = task.site.matrix
    team = _Ranks(task.site.name, task.weight.device, process_group)
    return None if out < size else task.of_rows(Rows(*stretch_of(rank, size, out), (out, width)), team)


def _joined(task: Task, mine: PrunedWeight, size: int, process_group: ProcessGroup) -> PrunedWeight:
    """The whole weight, of every rank's rows."""
    weight, keep = _room(task, None)
    stretches = [slice(*stretch_of(rank, size, len(weight))) for rank in range(size)]
    own = stretches[place(process_group)[0]]
    weight[own], keep[own] = mine.weight, mine.keep
    pieces = [(rank, whole[stretch]) for rank, stretch in enumerate(stretches) for whole in (weight, keep)]
    send_around(pieces, process_group, f"the pruned rows of {task.site.name}")
    return PrunedWeight(weight, keep)


def _room(task: Task, pruned: PrunedWeight | None) -> tuple[Tensor, Tensor]:
    """Weight and mask [..., out, in], contiguous: those that are there, or room for them."""
    if pruned is not None:
        return pruned.weight.contiguous(), pruned.keep.contiguous()
    weight = torch.empty(task.weight.shape, dtype=task.weight.dtype, device=task.weight.device)
    return weight, torch.empty_like(weight, dtype=torch.bool)
