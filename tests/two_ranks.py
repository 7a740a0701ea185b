"""Two processes that stay, each a rank of a gloo group: what tests of several ranks run in.

Starting a process and importing torch, transformers and Lightning takes longer than any of these tests. A pair is started
once, by the fixture `two_ranks`; each call gets a process group of its own.
"""

import itertools
import multiprocessing
import os
import pickle
import re
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import distributed

from exports import shared_trace
from statprune.model import layers

WORLD_SIZE = 2
STARTUP, CALL = 600.0, 300.0
"""Seconds for both to start, and for a call: many times what it takes where nothing else runs on the machine."""

COLLECTIVE = timedelta(seconds=120)
"""How long a rank waits for the other one in a collective."""


class RankDied(Exception):
    """A process ended, or was ended because it took too long, instead of answering."""


def _serve(rank: int, connection: Connection, port: int) -> None:
    """Call what is sent, in a fresh process group each time, until the other end is closed."""
    torch.set_num_threads(1)
    # As torchrun does, so that a Lightning Trainer takes this process for one of its ranks and starts no others.
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    os.environ.update({name: str(value) for name, value in names.items()}, TORCHELASTIC_RUN_ID="tests")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # not used: there is a process group already
    layers.trace = shared_trace  # type: ignore[assignment]
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    connection.send_bytes(pickle.dumps("ready"))
    for call in itertools.count():
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps(_call(rank, distributed.PrefixStore(str(call), store), *pickle.loads(request)))
        except Exception as e:
            answer = _failed(e)
        connection.send_bytes(answer)


def _call(rank: int, store: Any, function: Callable[..., Any], arguments: tuple[Any, ...], filters: list[Any]) -> Any:
    # Not after a call: a rank that is ready first would take the group away from under the other one.
    if distributed.is_initialized():
        distributed.destroy_process_group()
    torch.manual_seed(0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=COLLECTIVE)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, message, category, module, line in filters:
            texts = [re.escape(text) if isinstance(text, str) else text.pattern if text else "" for text in (message, module)]
            warnings.filterwarnings(action, texts[0], category, texts[1], line, append=True)
        return function(rank, *arguments)


def _failed(error: Exception) -> bytes:
    error.add_note("On a rank:\n" + "".join(traceback.format_exception(error)))
    try:
        answer = pickle.dumps(error)
        pickle.loads(answer)  # an exception whose constructor takes other arguments can be written and not read
    except Exception:
        answer = pickle.dumps(RuntimeError("\n".join([repr(error), *error.__notes__])))
    return answer


class TwoRanks:
    """A pair of processes; started when something is first called, and again after one of them died."""

    def __init__(self) -> None:
        self._running: list[tuple[Any, Connection]] = []
        self._store: Any = None

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = CALL) -> list[Any]:
        """`function(rank, *arguments)` on both ranks, with the random seed and the warnings of the test that calls.

        Args:
            function: of a module; it is imported by name where it runs.
            arguments: what pickle takes.
            timeout: seconds, for both together, once they have started.

        Returns:
            What the first and the second rank returned.

        Raises:
            Exception: whatever was raised on a rank, with that rank's traceback as a note.
            RankDied: a process ended, or took too long.
        """
        outcomes = self.outcomes(function, *arguments, timeout=timeout)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def outcomes(self, function: Callable[..., Any], *arguments: Any, timeout: float = CALL) -> list[Any]:
        """As a call, with the exception in place of what a rank would have returned."""
        if not self._running:
            self._start()
        request = pickle.dumps((function, arguments, warnings.filters))
        for _, connection in self._running:
            connection.send_bytes(request)
        return self._answers(timeout)

    def _answers(self, timeout: float) -> list[Any]:
        """What both say; RankDied in the place of what one does not say."""
        deadline = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        died: RankDied | None = None
        while len(answers) < WORLD_SIZE and not died:
            waiting = {self._running[rank][1]: rank for rank in range(WORLD_SIZE) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                died = RankDied(f"rank {min(waiting.values())} has not come to an end")
            for connection in ready:
                rank = waiting[connection]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = self._running[rank][0]
                    process.join()
                    died = RankDied(f"rank {rank} ended with {process.exitcode}")
        if died:  # the other one would wait for it, and answer the next call
            self.stop()
        return [answers.get(rank, died) for rank in range(WORLD_SIZE)]

    def _start(self) -> None:
        self._store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # Not a fork: what runs here has threads and a random state of its own.
        spawn = multiprocessing.get_context("spawn")
        for rank in range(WORLD_SIZE):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, there, self._store.port), daemon=True)
            process.start()
            there.close()  # so that its end is the end
            self._running.append((process, here))
        for said in self._answers(STARTUP):
            if isinstance(said, Exception):
                raise said

    def stop(self) -> None:
        """End both processes."""
        for process, connection in self._running:
            connection.close()
            process.kill()
            process.join()
        self._running, self._store = [], None
