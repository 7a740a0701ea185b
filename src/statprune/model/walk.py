"""The walk: execute the graph segment by segment over all calibration batches, and stop at every cut.

    batch 0   ──embed──norm─┤ q k v ... attention ┤ o ... norm ┤ gate up ...
    batch 1   ──embed──norm─┤ q k v ... attention ┤ o ... norm ┤ gate up ...
                            cut                   cut          cut
                            prune q k v           prune o      prune gate, up

At a cut the statistics of the next input group are complete for the whole calibration set, and they already come from
the pruned layers before it: the walk hands them out, and goes on with what was pruned meanwhile. Every node runs once per
batch: sequential calibration for the price of one forward pass. Between cuts only the values that a later node reads are kept,
so what the walk holds does not grow with the depth.

The one-shot schedule is the same loop with a single segment: every group is observed on the dense model. The block schedule
is the published protocol of Wanda and SparseGPT: a block runs once dense, with all its groups observed and its values thrown
away (a rehearsal), is pruned, and runs again for the blocks behind it. `segments` draws all three.

With `Statistic.CROSS` there are two streams of values (`streams`) from the first pruned weight on: each step is taken with the
weights as they are, and with the dense ones, which are kept until nothing reads them any more.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Container, Sequence

import torch

from statprune.methods.statistics import Statistic
from statprune.model.inputs import ModelInputs
from statprune.model.observe import ForwardContext, Moments, Observations, complete
from statprune.model.offload import ON_DEVICE, Offload
from statprune.model.schedule import SEES_PRUNED, Schedule
from statprune.model.segments import Segment, plan_segments
from statprune.model.sites import InputGroup, TracedModel
from statprune.model.steps import Common, told
from statprune.model.streams import Environment, Executor, Stream, no_tokens, observe
from statprune.model.weights import Dense, Weights
from statprune.ranks import ProcessGroup


@torch.no_grad()
def walk(
    traced: TracedModel,
    groups: Sequence[InputGroup],
    batches: Sequence[ModelInputs],
    weights: Weights,
    *,
    schedule: Schedule = "walk",
    needs: Statistic = Statistic.MOMENTS,
    finished: Container[str] = (),
    process_group: ProcessGroup = None,
    forward_context: ForwardContext = contextlib.nullcontext,
    offload: Offload = ON_DEVICE,
) -> Observations:
    """Run all batches through the graph, and yield every group with its statistics where they are complete.

    Args:
        traced: the graph; it must have been traced with inputs of these names.
        groups: the groups to observe, in execution order; nodes that none of them needs never run.
        batches: on the model's device.
        weights: every parameter and buffer of the graph. What is put there between two groups is what the rest computes with.
        schedule: which pruned weights a group's statistics have seen; `Recipe.schedule` tells.
        needs: what to collect. `Statistic.CROSS` takes a second forward pass, and holds the values of both at a cut.
        finished: parameters that an earlier run has pruned already, and that `weights` gives so: where all that is pruned at a
            cut is among them, it is not observed again, and its statistics are None.
        process_group: of the ranks whose sums are added up.
        forward_context: entered around model code.
        offload: where the batches' values wait at a cut.

    Yields:
        (group, moments), in execution order; with schedule "block", a group's sites of another block come with that block.

    Raises:
        NonFiniteError: a group's input holds NaN or infinity; names the first such layer.
        CalibrationError: a batch looks up something that a table of the model does not have.
        TracingError: schedule "block" or `Statistic.CROSS`, and the model writes to a buffer, which would happen twice.
    """
    has_dense = Statistic.CROSS in needs and schedule in SEES_PRUNED
    # Where dense weights outlive their pruning, one-shot needs no statistics of all layers at once: each is pruned at its cut,
    # and the walk goes on with the dense one.
    goes_on_dense = schedule == "one-shot" and not weights.is_in_place
    segments = plan_segments(traced, groups, schedule="walk" if goes_on_dense else schedule, has_dense=has_dense)
    dense_weights = Dense(weights)
    executor = Executor(traced, dense_weights if goes_on_dense else weights)
    streams = [Stream(executor, [executor.bind(batch) for batch in batches])]  # pruned, and later dense
    device = next((tensor.device for tensor in batches[0].tensors()), torch.device("cpu"))
    common = Common(traced)
    moments: dict[str, Moments] = {}
    still_needed = Counter(group.name for segment in segments for group, _ in segment.prunes)
    done = [_is_finished(segment, finished) for segment in segments]
    wanted = {group.name for segment, is_done in zip(segments, done, strict=True) for group, _ in segment.prunes if not is_done}
    reads = [[name for name in segment.weights if name in weights] for segment in segments]
    for segment, is_done, names, following in zip(segments, done, reads, [*reads[1:], []], strict=True):
        has_two = len(streams) > 1
        weights.prepare(names, following)
        observed = [group for group in segment.groups if group.name in wanted]
        moments |= {group.name: no_tokens(group, needs, device, has_dense=has_two) for group in observed}
        has_purpose = not segment.is_rehearsal or bool(observed)
        with forward_context():
            for number, batch in enumerate(batches if segment.steps and has_purpose else ()):
                known = common.of(batch)
                current = _begin(streams, number, offload, is_rehearsal=segment.is_rehearsal)
                for index, step in enumerate(segment.steps):
                    with told(f"Calibration batch {number}", step):
                        if isinstance(step, InputGroup):
                            if step.name in wanted:
                                observe(step, batch, streams, current, moments[step.name])
                        else:
                            common.take(step, known, [stream.executor for stream in streams], current)
                    for dead, environment in itertools.product(segment.dies_after.get(index, ()), current):
                        environment.pop(dead, None)
                _end(streams, number, offload, current, is_rehearsal=segment.is_rehearsal)
        for dead, stream, number in itertools.product(segment.releases, streams, range(len(batches))):
            stream.values[number].pop(dead, None)
        common.drop(segment.releases if segment.is_rehearsal else itertools.chain.from_iterable(segment.dies_after.values()))
        to_prune = {name for _, part in segment.prunes for site in part.sites for name in (site.parameter, *site.aliases)}
        released = [name for name in segment.last_weights if name in weights]
        # What only ran goes before weights are pruned, which takes memory; in two streams, what was pruned before is read yet.
        ran = {name for name in released if name not in to_prune} if not has_dense else set()
        weights.release(name for name in released if name in ran)
        dense_weights.release(ran)
        for group in observed:  # all, before a weight changes
            complete(group, moments[group.name], process_group)
        for group, part in segment.prunes:
            if has_dense or goes_on_dense:
                for site in part.sites:
                    dense_weights.keep(site)
            yield part, None if is_done else moments[group.name]
            still_needed[group.name] -= 1
            if not still_needed[group.name]:
                moments.pop(group.name, None)
        weights.release(name for name in released if name not in ran)
        dense_weights.release(released)
        if has_dense and segment.prunes and not has_two:  # until now the two were the same
            _fork(streams, Executor(traced, dense_weights), offload)


def _begin(streams: Sequence[Stream], number: int, offload: Offload, *, is_rehearsal: bool) -> list[Environment]:
    """A batch's values in each stream to run a segment with; a rehearsal throws them away."""
    values = offload.back(number, [stream.values[number] for stream in streams])
    return [
        stream.executor.copy_of(environment) if is_rehearsal else environment
        for stream, environment in zip(streams, values, strict=True)
    ]


def _end(
    streams: Sequence[Stream], number: int, offload: Offload, current: Sequence[Environment], *, is_rehearsal: bool
) -> None:
    """A segment has run: nothing here refers to the values of a batch whose turn is over."""
    if is_rehearsal:
        for environment in current:
            environment.clear()
        return
    for stream, environment in zip(streams, offload.away(number, current), strict=True):
        stream.values[number] = environment


def _fork(streams: list[Stream], executor: Executor, offload: Offload) -> None:
    """Add a stream that goes on from where the first one is. What nobody writes to, both share."""
    first, values = streams[0], []
    for number, waiting in enumerate(first.values):
        (environment,) = offload.back(number, [waiting])
        first.values[number], copied = offload.away(number, [environment, executor.copy_of(environment)])
        values.append(copied)
    streams.append(Stream(executor, values))


def _is_finished(segment: Segment, finished: Container[str]) -> bool:
    """Whether everything is pruned already that is pruned after this segment."""
    return bool(segment.prunes) and all(site.parameter in finished for _, part in segment.prunes for site in part.sites)
