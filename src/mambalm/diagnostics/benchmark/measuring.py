"""What every benchmark of a whole model measures with: memory and its cap, time, and where it was measured."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from mambalm.diagnostics.doctor import versions

_T = TypeVar("_T")
GIB = 2**30
# What torch and CUDA's libraries say where they raise no OutOfMemoryError.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Memory:
    """The memory of a device: on a GPU what torch has allocated there, on a CPU the process's resident set.

    On a CPU that is not Linux the peak is that since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def total(self) -> int:
        """Bytes that the device has."""
        if self._device.type == "cuda":
            return torch.cuda.get_device_properties(self._device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def reset(self) -> None:
        """Begin a new peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR_REFS.exists():
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")

    def peak(self) -> int:
        """Most bytes in use since `reset`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return 1024 * int(line.split()[1])
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @contextlib.contextmanager
    def capped(self, limit: int) -> Iterator[None]:
        """Let a GPU's allocations fail above so many bytes; on a CPU nothing fails, and the caller looks at the peak.

        Raises:
            ValueError: the device has too little for a cap to be reached safely.
        """
        # What passes a CPU's cap does pass it, by a doubling of the prompt at most.
        needed = limit if self._device.type == "cuda" else 2 * limit
        if needed > self.total:
            raise ValueError(
                f"a cap of {limit / GIB:.3g} GiB needs a {self._device.type} with {needed / GIB:.3g} GiB, and this one "
                f"has {self.total / GIB:.3g}: give a smaller --memory-gib"
            )
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.set_per_process_memory_fraction(limit / self.total, self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(function: Callable[[], _T], device: torch.device) -> _T | None:
    """The function's result, or None if memory did not suffice; then what it held is released."""
    try:
        return function()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
    # Behind the except clause, so that the traceback's frames hold nothing any more.
    release(device)
    return None


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Where and with what something is measured; `commit` is for a copy of mambalm without git."""
    cuda = device.type == "cuda"
    found = {name: version for name, version in versions().items() if version != "not installed"}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "versions": found,
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """What the processor is called, which Python knows on some systems only."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if names := [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]:
            return names[0]
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return told.stdout.strip() or "unknown"
    return "unknown"
