"""What a streamed run will take of memory, before it begins: from the graph, the schedule and the shapes of the batches.

    base         what the process has already
    weights      of the segment that runs, of the next one, and dense ones that are kept
    values       of all batches, where they wait at a cut
    running      what one batch has besides, within a segment
    statistics   of the groups that are observed, and the Grams of the gradients
    workspace    of the pruner, for one weight

The segments are gone through as the walk goes through them (`walk`), and nothing is computed: tensors are counted by the memory
they lie in, so that views cost nothing. The highest moment is what is told: the parts have their own at different places.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from statprune.methods.experts import ExpertMoments
from statprune.methods.statistics import Statistic, bytes_to_add
from statprune.model.expected import Expected, Moment
from statprune.model.find import products
from statprune.model.gradients import bytes_of_grams
from statprune.model.inputs import ModelInputs
from statprune.model.nodes import storages_of
from statprune.model.offload import Place, outside
from statprune.model.recomputing import Recomputing
from statprune.model.schedule import SEES_PRUNED, Schedule, block_of
from statprune.model.segments import Segment, batch_independent, plan_segments
from statprune.model.sites import InputGroup, LinearSite, TracedModel
from statprune.model.streams import no_tokens


def expect(
    traced: TracedModel,
    groups: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    parameters: Mapping[str, nn.Parameter],
    *,
    schedule: Schedule,
    needs: Statistic,
    workspace: Callable[[LinearSite], int],
    values: Place = "device",
    base: int = 0,
) -> Expected:
    """What pruning a model takes whose weights are on disk.

    Args:
        traced: the graph.
        groups: to prune.
        batches: of the shapes that will run; their values are not read.
        parameters: under all of their names; they may be without values.
        schedule: which pruned weights statistics have seen.
        needs: what is collected. With none, nothing runs.
        workspace: bytes to prune one weight.
        values: where those of the batches wait; elsewhere than on the device one batch's are in memory.
        base: bytes that the process has, with the batches.
    """
    goes_on_dense = schedule == "one-shot"
    has_dense = Statistic.CROSS in needs and schedule in SEES_PRUNED
    weights = _Weights(parameters, keeps_dense=has_dense or goes_on_dense)
    curvature = 0
    if Statistic.CURVATURE in needs:
        curvature = bytes_of_grams([site for group in groups for site in group.sites])
    needs &= ~Statistic.CURVATURE
    if needs:
        segments = plan_segments(traced, groups, schedule="walk" if goes_on_dense else schedule, has_dense=has_dense)
        shapes = Counter(tuple(tuple(tensor.shape) for tensor in batch.tensors()) for batch in batches)
        batches_of = [_Values(traced, shape, count, is_away=values != "device") for shape, count in shapes.items()]
    else:  # nothing runs
        segments = [Segment(prunes=[(group, group)], weights=[site.parameter for site in group.sites]) for group in groups]
        batches_of = []
    moments: list[Moment] = []
    cuts: list[Moment] = []
    statistics: dict[str, int] = {}
    still_needed = Counter(group.name for segment in segments for group, _ in segment.prunes)
    has_two = False
    for index, segment in enumerate(segments):
        first, is_last = _first_pruned(segments[index:]), index + 1 == len(segments)
        where = first.name
        weights.prepare(segment, segments[index + 1 : index + 2])
        statistics |= {group.name: _statistics(group, needs, has_dense=has_two) for group in segment.groups}
        now = Moment(where, weights.total, statistics=sum(statistics.values()))
        block = block_of(first.sites[0].parameter)
        passes = [one.run(segment, needs, block, has_two=has_two, is_last=is_last) for one in batches_of]
        held, running = sum(one.held for one in passes), max((one.running for one in passes), default=0)
        moments.append(replace(now, values=held, running=running))
        if not segment.is_rehearsal and not is_last:
            cuts.append(Moment(where, values=sum(one.waiting for one in batches_of)))
        now = replace(now, values=sum(one.held for one in batches_of))
        for group, part in segment.prunes:
            for site in part.sites:
                now = replace(now, where=site.name, weights=weights.total, statistics=sum(statistics.values()))
                moments.append(replace(now, workspace=workspace(site)))
                weights.land(site)
            weights.end()
            still_needed[group.name] -= 1
            if not still_needed[group.name]:
                statistics.pop(group.name, None)
        weights.release(segment)
        has_two = has_two or (has_dense and bool(segment.prunes))
    peak = max(moments, key=lambda one: one.total)
    widest = max(cuts, key=lambda one: one.values, default=Moment(peak.where))
    peak = replace(peak, statistics=peak.statistics + curvature)
    done, again = (sum(one.count * getattr(one.recomputing, name) for one in batches_of) for name in ("done", "again"))
    narrowest = sum(one.narrowest * one.count for one in batches_of)
    return Expected(base, peak, widest, narrowest, values, again / done if done else 0.0)


def _first_pruned(segments: Sequence[Segment]) -> InputGroup:
    """The first group that is pruned from here on."""
    return next(part for segment in segments for _, part in segment.prunes)


def _statistics(group: InputGroup, needs: Statistic, *, has_dense: bool) -> int:
    """Bytes of a group's statistics, with their sample."""
    none_yet = no_tokens(group, needs, torch.device("meta"), has_dense=has_dense)
    parts = none_yet.parts if isinstance(none_yet, ExpertMoments) else [none_yet]
    tokens = sum(part.sample.size for part in parts if part.sample is not None)
    sums = sum(total.numel() * total.element_size() for total in none_yet.totals())
    return sums + tokens * group.in_features * _dtype(group).itemsize


def _dtype(group: InputGroup) -> torch.dtype:
    assert group.input_node is not None, "a group of a traced graph has a node"
    dtype: torch.dtype = group.input_node.meta["val"].dtype
    return dtype


class _Weights:
    """The parameters that are in memory."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, keeps_dense: bool) -> None:
        self._own = {name: id(parameter) for name, parameter in parameters.items()}
        self._bytes = {id(one): one.numel() * one.element_size() for one in parameters.values()}
        self._keeps_dense = keeps_dense
        self._resident: set[int] = set()
        self._dense: set[int] = set()
        """Kept as they were, beside what they were pruned to."""
        self._replaced: set[int] = set()
        """Dense ones that the group that is being pruned holds on to."""

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(self._bytes[own] for some in (self._resident, self._dense | self._replaced) for own in some)

    def prepare(self, segment: Segment, following: Iterable[Segment]) -> None:
        for one in (segment, *following):
            self._resident |= self._those(one.weights)

    def land(self, site: LinearSite) -> None:
        """The pruned one is there beside the dense one."""
        self._replaced.add(self._own[site.parameter])

    def end(self) -> None:
        """All of the group's sites have landed."""
        if self._keeps_dense:
            self._dense |= self._replaced
        self._replaced.clear()

    def release(self, segment: Segment) -> None:
        gone = self._those(segment.last_weights)
        self._resident -= gone
        self._dense -= gone

    def _those(self, names: Iterable[str]) -> set[int]:
        return {self._own[name] for name in names if name in self._own}


@dataclass(frozen=True)
class _Pass:
    """All batches of one shape through one segment, in bytes."""

    held: int
    """What waits in memory, before or behind the segment."""
    running: int
    """What one batch has besides at most, with what all batches have in common."""


class _Values:
    """The values of all batches of one shape, as far as the model has run.

    Args:
        traced: the graph.
        shape: of each of a batch's tensors.
        count: of batches.
        is_away: whether they wait elsewhere than in memory.
    """

    def __init__(self, traced: TracedModel, shape: tuple[tuple[int, ...], ...], count: int, *, is_away: bool) -> None:
        self.count, self.narrowest = count, 0
        """`narrowest`: the least that a batch has anywhere behind the first cut."""
        self.recomputing = Recomputing()
        self._is_away = is_away
        self._products = products(traced.graph_module, [site for group in traced.groups for site in group.sites])
        nodes = list(traced.graph_module.graph.nodes)
        self._sizes = _Sizes(nodes, shape)
        self._storages = {node: storages_of(node) for node in nodes}
        self._common = batch_independent(traced)
        self._outside = outside(traced)
        self._alive: dict[Node, list[int]] = {}
        self._readers: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        """By storage, of all streams."""
        self._shared: dict[int, int] = {}
        """By storage, of what the batches of this shape have in common."""

    @property
    def waiting(self) -> int:
        """Of all batches, with what they have in common."""
        return self.count * sum(self._bytes.values()) + sum(self._shared.values())

    @property
    def held(self) -> int:
        """Of it, in memory."""
        return sum(self._shared.values()) if self._is_away else self.waiting

    def run(self, segment: Segment, needs: Statistic, block: str, *, has_two: bool, is_last: bool) -> _Pass:
        """Take all batches through a segment, up to a cut of this block."""
        is_first = not self._alive
        kept = dict(self._alive), Counter(self._readers), dict(self._bytes)
        before = total = peak = sum(self._bytes.values())
        narrow: list[int] = []
        self.recomputing.enter(block)
        dropped: list[Node] = []  # with the segment
        for index, step in enumerate(segment.steps):
            multiplications = 0
            if isinstance(step, InputGroup):
                peak = max(peak, total + self._observing(step, needs, has_two=has_two))
            else:
                total += self._add(step, 2 if has_two else 1)
                peak = max(peak, total)
                multiplications += self._multiplications(step) * (2 if has_two else 1)
            for dead in segment.dies_after.get(index, ()):
                if dead not in self._common and not (segment.is_rehearsal and dead in kept[0]):
                    total -= self._drop(dead)
                elif not segment.is_rehearsal:
                    dropped.append(dead)
            narrow.append(total)
            if not segment.is_rehearsal:
                self.recomputing.step(total, multiplications)
        common = sum(self._shared.values())
        if segment.is_rehearsal:
            self._alive, self._readers, self._bytes = kept
        for dead in (*dropped, *segment.releases):
            self._drop(dead)
        if narrow and not is_first and not is_last:
            self.narrowest = min([*narrow, *([self.narrowest] if self.narrowest else [])])
        after = sum(self._bytes.values())
        if not segment.is_rehearsal and not is_last:
            self.recomputing.cut(after)
        if self._is_away:
            return _Pass(0, peak + common)
        high = max(before, after)
        return _Pass(self.count * high, max(0, peak - high) + common)

    def _multiplications(self, node: Node) -> int:
        """With weights."""
        site = self._products.get(node)
        return 0 if site is None else self._sizes.of(node.meta["val"].numel()) * site.shape[-1]

    def _add(self, node: Node, streams: int) -> int:
        """The bytes that a node's value takes anew."""
        added = 0
        self._alive[node] = keys = [key for key in self._storages[node] if key not in self._outside]
        for key in keys:
            self._readers[key] += 1
            if self._readers[key] == 1 and key not in self._shared:
                size = self._sizes.of(self._storages[node][key])
                if node in self._common:
                    self._shared[key] = size
                else:
                    self._bytes[key] = streams * size
                    added += streams * size
        return added

    def _drop(self, node: Node) -> int:
        """The bytes that are free without a node's value."""
        freed = 0
        for key in self._alive.pop(node, ()):
            self._readers[key] -= 1
            if not self._readers[key]:
                self._shared.pop(key, None)
                freed += self._bytes.pop(key, 0)
        return freed

    def _observing(self, group: InputGroup, needs: Statistic, *, has_two: bool) -> int:
        """Bytes that it takes to add one batch to a group's statistics (`InputMoments.add` and `add_dense`)."""
        assert group.input_node is not None, "a group of a traced graph has a node"
        elements = self._sizes.of(group.input_node.meta["val"].numel())
        narrow = 0 if _dtype(group) is torch.float32 else 4 * elements
        tokens = elements // group.in_features
        has_gram = bool((Statistic.GRAM | Statistic.CROSS) & needs)
        adding = bytes_to_add(tokens, group.in_features, _dtype(group), has_gram=has_gram)
        if not has_two:
            return adding
        targets = [4 * (tokens * site.shape[0] + site.shape[0] * site.shape[1]) for site in group.sites if site.residuals]
        return max(adding, 2 * narrow + sum(targets))


class _Sizes:
    """Sizes of the graph as numbers, for batches of one shape; one that depends on values counts as all tokens."""

    def __init__(self, nodes: Sequence[Node], shape: Sequence[Sequence[int]]) -> None:
        placeholders = [node for node in nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
        self._symbols: dict[Any, int] = {}
        for node, sizes in zip(placeholders, shape, strict=True):
            for symbol, size in zip(node.meta["val"].shape, sizes, strict=True):
                if isinstance(symbol, torch.SymInt) and symbol.node.expr.is_symbol:
                    self._symbols[symbol.node.expr] = size
        self._tokens = prod(shape[0][:2]) if shape else 1
        self._known: dict[Any, int] = {}

    def of(self, size: Any) -> int:
        """A size, which may be of symbols."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._known:
            found = expression.xreplace(self._symbols)
            self._known[expression] = int(found.xreplace(dict.fromkeys(found.free_symbols, self._tokens)))
        return self._known[expression]
