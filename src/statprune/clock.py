"""The clock of a run: named seconds that add up, and how high memory has gone by then."""

import contextlib
import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def timed(
    seconds: dict[str, float], name: str, memory: dict[str, int] | None = None, device: torch.device | None = None
) -> Iterator[None]:
    """Add the time inside to `seconds[name]`, also where it ends in an error.

    Args:
        seconds: by step.
        name: of the step.
        memory: by step, the peak memory at its end (`peak_memory`), where the system tells.
        device: where the work is done; the CPU by default.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        if memory is not None and (peak := peak_memory(device or torch.device("cpu"))) is not None:
            memory[name] = peak


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the highest point so far: what torch allocated on a GPU, or else this process's resident memory.

    Nothing is reset, so that what somebody else measures around this call stays true. None where the system does not tell:
    resident memory is known on Linux.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_memory("VmHWM")


def resident_memory(key: str) -> int | None:
    """Bytes of this process's main memory: `VmRSS` now, `VmHWM` at the highest point; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def give_back_memory() -> None:
    """Hand what was freed to the system, where the C library keeps it for later: pieces between others, in each thread."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc, or no C library to open
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or in main memory without swapping; None where the system does not tell."""
    if device.type == "cuda":
        try:
            return int(torch.cuda.mem_get_info(device)[0])
        except (RuntimeError, AssertionError):
            return None  # there is no such GPU, which whoever computes on it will say
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
