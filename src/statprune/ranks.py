"""Several processes with one model each: sums over ranks, the first rank's word, and one rank's failure told to all.

    with together(process_group, device, "statprune.prune"):
        ...                                  whatever fails in here on one rank is an error on all
        sum_over_ranks(tensors, ...)         the ranks tell each other how they are, then they add up

Before each collective inside of the block, and at its end, the ranks exchange a status: one all_reduce of three integers. A
rank that failed takes part in the next exchange with its failure, so that no other rank waits for it: the others raise what it
says. The exchange also says what the collective is about, so that ranks which do not do the same find out.

Every function takes the process group of the ranks that take part, None for all of them, and does nothing where there is one
process. All ranks of the group have to call.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from statprune.errors import RanksError, first_line

ProcessGroup = Any
"""A `torch.distributed.ProcessGroup`, or None for all ranks."""

PATIENCE = datetime.timedelta(minutes=5)
"""How long ranks wait for each other before work begins; some may still be reading their data."""

MAX_FAILURE = 4000
"""Characters of one rank's error that the others repeat."""

_LOWEST = torch.iinfo(torch.int64).min


def is_distributed(process_group: ProcessGroup = None) -> bool:
    """Whether several processes take part."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size(process_group) > 1


def place(process_group: ProcessGroup = None) -> tuple[int, int]:
    """(this process's rank in the group, how many there are); (0, 1) without `torch.distributed`."""
    if not is_distributed(process_group):
        return 0, 1
    return distributed.get_rank(process_group), distributed.get_world_size(process_group)


@contextlib.contextmanager
def together(process_group: ProcessGroup, device: torch.device, work: str) -> Iterator[None]:
    """Work that either every rank of the group does to its end, or none: what fails inside on one rank is an error on all.

    Inside of another `together` of the same group it only gives the work a name: the outermost one tells.

    Args:
        process_group: the ranks that take part.
        device: of the model; what the ranks tell each other passes through it.
        work: what is done, for the message: a call such as `statprune.prune`.

    Raises:
        Exception: this rank's own, whatever it is, once the others know.
        RanksError: another rank failed; the message has its error. Or a rank does not come, is gone, or does something else.
    """
    if not is_distributed(process_group):
        yield
        return
    outer = _conversation(process_group)
    if outer is not None:
        outer.work.append(work)
        try:
            yield
        finally:
            outer.work.pop()
        return
    conversation = _Conversation(_group(process_group), torch.device("cpu") if device.type == "meta" else device, [work])
    _CONVERSATIONS.append(conversation)
    try:
        try:
            yield
        except Exception as e:  # not a KeyboardInterrupt: that process ends, which the others see
            conversation.tell(e)
            raise
        conversation.exchange("the end")
    finally:
        _CONVERSATIONS.remove(conversation)


@dataclass(frozen=True)
class Common:
    """What has to be the same on every rank."""

    name: str
    """In the plural, for the message: `"recipes"`."""

    lines: Sequence[str]
    """All of it in words; the message shows the first line that differs."""

    way_out: str
    """What to do where it differs, as a sentence."""


def agree(process_group: ProcessGroup, common: Sequence[Common]) -> None:
    """Compare what has to be the same on every rank, inside of `together`.

    Raises:
        RanksError: it is not, on all ranks alike; names the first line that differs, and the ranks.
    """
    if not is_distributed(process_group):
        return
    conversation = _conversation(process_group)
    assert conversation is not None, "ranks agree inside of together()"
    conversation.exchange(f"the comparison of {', '.join(one.name for one in common)}", common=common)


def sum_over_ranks(tensors: Iterable[Tensor], process_group: ProcessGroup = None, what: str = "a sum") -> None:
    """Replace each tensor by its sum over the ranks, in place.

    Args:
        tensors: of the same number, shapes and dtypes on every rank.
        process_group: the ranks that take part.
        what: is added up, for the message.

    Raises:
        RanksError: another rank failed, is gone, or adds up something else.
    """
    if not is_distributed(process_group):
        return
    tensors = list(tensors)
    shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
    with collective(process_group, f"{what} of {shapes}"):
        for tensor in tensors:
            distributed.all_reduce(tensor, group=process_group)


def from_first_rank(value: float, device: torch.device, process_group: ProcessGroup = None) -> float:
    """The first rank's value, on every rank; errors as for `sum_over_ranks`."""
    if not is_distributed(process_group):
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    with collective(process_group, "the first rank's word"):
        distributed.broadcast(shared, group=process_group, group_src=0)
    return float(shared)


def send_around(tensors: Iterable[tuple[int, Tensor]], process_group: ProcessGroup = None, what: str = "a result") -> None:
    """Fill each tensor with that of one rank, in place; errors as for `sum_over_ranks`.

    Args:
        tensors: (the rank of the group that has it, contiguous), of the same shapes and dtypes on every rank.
        process_group: the ranks that take part.
        what: goes around, for the message.
    """
    if not is_distributed(process_group):
        return
    with collective(process_group, what):
        for owner, tensor in tensors:
            # As bytes: not every engine sends every dtype.
            distributed.broadcast(tensor.view(torch.uint8), group=process_group, group_src=owner)


def gather(value: Any, process_group: ProcessGroup = None, what: str = "what the ranks have to say") -> list[Any]:
    """Every rank's value, in the order of the ranks, inside of `together`.

    Args:
        value: plain data; what comes back has gone through JSON, in a single process too.
        process_group: the ranks that take part.
        what: is told, for the message.

    Raises:
        RanksError: as for `sum_over_ranks`.
    """
    texts = [json.dumps(value)]
    if is_distributed(process_group):
        with collective(process_group, what):
            conversation = _conversation(process_group)
            assert conversation is not None, "ranks tell each other inside of together()"
            texts = conversation.gather(texts[0])
    return [json.loads(text) for text in texts]


def share(count: int, available: int, device: torch.device, process_group: ProcessGroup = None) -> int:
    """How many this rank contributes where the ranks lay down one each in turns, until there are enough.

    Args:
        count: how many are wanted, on all ranks together.
        available: how many this rank has.
        device: of the model.
        process_group: the ranks that take part.

    Raises:
        RanksError: as for `sum_over_ranks`.
    """
    if not is_distributed(process_group):
        return min(count, available)
    have = torch.zeros(distributed.get_world_size(process_group), dtype=torch.int64, device=device)
    have[distributed.get_rank(process_group)] = available
    sum_over_ranks([have], process_group, "how many there are")
    turns = ((turn, rank) for rank, number in enumerate(have.tolist()) for turn in range(min(count, number)))
    return sum(rank == distributed.get_rank(process_group) for _, rank in sorted(turns)[:count])


def all_well(process_group: ProcessGroup, what: str) -> None:
    """Hear that no rank has failed until here, inside of `together`; errors as for `collective`."""
    with collective(process_group, what):
        pass


@contextlib.contextmanager
def collective(process_group: ProcessGroup, what: str) -> Iterator[None]:
    """Around calls of `torch.distributed`, by whoever: inside of `together` the ranks say first that all is well.

    Args:
        process_group: the ranks that take part.
        what: the calls are for, the same text on every rank.

    Raises:
        RanksError: another rank failed, is gone, or does something else.
    """
    if not is_distributed(process_group):
        yield
        return
    conversation = _conversation(process_group)
    if conversation is not None:
        conversation.exchange(what)
    else:
        conversation = _Conversation(_group(process_group), torch.device("cpu"), ["statprune"])
    with conversation.listening(what):
        yield


@dataclass
class _Conversation:
    """What the ranks of one group have told each other inside of one `together`."""

    group: Any
    device: torch.device
    work: list[str]
    """What is being done, the innermost name last."""

    has_met: bool = field(default=False, init=False)
    is_over: bool = field(default=False, init=False)
    """After a failure that all ranks know of, or when one cannot be reached."""

    def tell(self, error: Exception) -> None:
        """Let the others know that this rank failed. Never raises: the error is what this rank has to say."""
        if self.is_over:
            return
        try:
            self.exchange("", failure=f"{type(error).__name__}: {error}"[:MAX_FAILURE])
        except Exception as e:  # a device that broke, ranks that are gone
            error.add_note(f"The other ranks could not be told: {e}")

    def exchange(self, what: str, *, failure: str | None = None, common: Sequence[Common] = ()) -> None:
        """Hear from every rank whether it is well and about to do the same.

        Args:
            what: comes next, in words.
            failure: of this rank.
            common: has to be the same, too.

        Raises:
            RanksError: a rank failed, and this one did not; the ranks are about to do different things; one does not come.
        """
        if self.is_over:
            raise RanksError(f"{self.work[-1]}: the ranks parted after an error, and cannot go on with {_short(what)}.")
        text = json.dumps([what, [list(one.lines) for one in common]])
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        status = [0, place, -place] if failure is None else [1, _LOWEST, _LOWEST]
        with self.listening(what):
            heard = torch.tensor(status, device=self.device)
            waiting = distributed.all_reduce(heard, distributed.ReduceOp.MAX, group=self.group, async_op=True)
            waiting.wait() if self.has_met else waiting.wait(PATIENCE)
            failed, highest, lowest = heard.tolist()
            self.has_met = True
            if not failed and highest == -lowest:
                return
            self.is_over = True
            texts = self.gather((failure or "") if failed else text)
        if not failed:
            raise RanksError(f"{self.work[-1]}: {_difference(self._ranks(), texts, common)}")
        if failure is None:
            failed_ranks = ((rank, text) for rank, text in zip(self._ranks(), texts, strict=True) if text)
            told = (f"rank {rank} failed: {_sentence(text)}" for rank, text in failed_ranks)
            raise RanksError(f"{self.work[-1]}: {' '.join(told)}")

    @contextlib.contextmanager
    def listening(self, what: str) -> Iterator[None]:
        """An error of `torch.distributed` inside says in our words that another rank cannot be reached."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as e:
            if isinstance(e, RanksError):
                raise
            self.is_over = True
            seconds, rank, size = time.monotonic() - started, distributed.get_rank(), len(self._ranks())
            if re.search("timed out|timeout", str(e), re.IGNORECASE):
                message = f"rank {rank} waited {seconds:.0f} s for the others of {size}, and not all of them came"
                if self.has_met:
                    message += f" to {_short(what)}."
                else:
                    message += (
                        ". Expected every rank to call it, each with its own batches; to work on some ranks only, give "
                        "process_group=torch.distributed.new_group([their ranks])."
                    )
            else:
                cause = re.sub(r"^\[\S*\] ", "", first_line(e)).partition(". ")[0]  # without a line of gloo's source
                message = (
                    f"rank {rank} lost another one of {size} at {_short(what)}: {cause}. If a process has ended, its own "
                    "output says why."
                )
            raise RanksError(f"{self.work[-1]}: {message}") from e

    def _ranks(self) -> list[int]:
        return distributed.get_process_group_ranks(self.group)

    def gather(self, text: str) -> list[str]:
        """Every rank's text. Through tensors: all_gather_object would ask for a current device."""
        mine = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(mine)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in self._ranks()]
        distributed.all_gather(lengths, length, group=self.group)
        padded = mine.new_full((int(torch.cat(lengths).max()),), ord(" "))
        padded[: len(mine)] = mine
        texts = [torch.empty_like(padded) for _ in self._ranks()]
        distributed.all_gather(texts, padded, group=self.group)
        return [bytes(one.cpu().numpy()).decode().rstrip(" ") for one in texts]


_CONVERSATIONS: list[_Conversation] = []
"""Those that go on, one at most for each process group."""


def _difference(ranks: Sequence[int], texts: Sequence[str], common: Sequence[Common]) -> str:
    """What the ranks do not have in common, from the texts of what they are about to do."""
    (what, lines), *others = (json.loads(text) for text in texts)
    for rank, (what_there, _) in zip(ranks[1:], others, strict=True):
        if what_there != what:
            return (
                f"the ranks do not do the same: rank {ranks[0]} is at {_short(what)}, rank {rank} at {_short(what_there)}. "
                "Expected the same calls, with the same model and settings, on every rank."
            )
    return next(
        f"the {one.name} of the ranks differ: {here} on rank {ranks[0]}, {there} on rank {rank}. {one.way_out}"
        for one, mine in zip(common, lines, strict=True)
        for rank, (_, theirs) in zip(ranks[1:], others, strict=True)
        for here, there in itertools.zip_longest(mine, theirs[common.index(one)], fillvalue="nothing more")
        if here != there
    )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ".)")) else f"{text}."


def _short(what: str) -> str:
    return textwrap.shorten(what, 120, placeholder=" ...")


def _group(process_group: ProcessGroup) -> Any:
    return distributed.group.WORLD if process_group is None else process_group


def _conversation(process_group: ProcessGroup) -> _Conversation | None:
    group = _group(process_group)
    return next((one for one in _CONVERSATIONS if one.group is group), None)
