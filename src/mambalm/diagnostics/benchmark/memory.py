"""The longest prompt that a model can read under a cap on memory: at once, in chunks, and token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mambalm.diagnostics.benchmark.measuring import Memory, attempt, clock, release
from mambalm.diagnostics.benchmark.subjects import Run, Subject

MODES = ("parallel", "chunked", "token by token")


def require_mode(mode: str) -> None:
    """Refuse what is none of `MODES`.

    Raises:
        ValueError: it is none.
    """
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r}; choose one of {', '.join(MODES)}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop doubling the prompt.

    Attributes:
        bytes: the cap on memory, weights included.
        shortest, longest: the first prompt and the last, powers of two.
        seconds: for a mode.
        chunk_size: tokens that are read at once in the chunked mode; None: the subject's.
        steps: what is read token by token of a prompt whose whole would not fit the time; the rest is read in chunks.

    Raises:
        ValueError: a length that is no power of two.
    """

    bytes: int
    shortest: int = 2**10
    longest: int = 2**20
    seconds: float = 120.0
    chunk_size: int | None = None
    steps: int = 256

    def __post_init__(self) -> None:
        for name in ("shortest", "longest"):
            if (length := getattr(self, name)) < 1 or length & (length - 1):
                raise ValueError(f"{name} is {length}; it must be a power of two")


def measure_memory(subject: Subject, mode: str, limits: Limits) -> dict[str, Any]:
    """Double the prompt until something stops it.

    Returns:
        "longest", the power of two that was read last (0 for none), "stopped_by" ("memory", "time" or "longest asked
        for"), and a row per length: its peak of memory and its seconds. A row that is "sampled" was read token by token
        at its end only.

    Raises:
        ValueError: the mode is unknown, or the model cannot read in chunks.
    """
    require_mode(mode)
    if mode == "chunked" and not subject.reads_in_chunks:
        return {"mode": mode, "refused": "transformers' recurrent models forget their state between chunks"}
    search = _Search(subject, mode, limits)
    result = search()
    search.run = None
    release(subject.device)
    return result


class _Search:
    """The doubling; `run` is what has been read so far, which the next length of all but the parallel mode goes on."""

    def __init__(self, subject: Subject, mode: str, limits: Limits) -> None:
        self._subject, self._mode, self._limits = subject, mode, limits
        self._memory = Memory(subject.device)
        self._probe: Callable[[int], dict[str, Any]] = {
            "parallel": self._parallel,
            "chunked": self._chunked,
            "token by token": self._token_by_token,
        }[mode]
        self._chunk_size = limits.chunk_size or subject.chunk_size
        self._began = clock(subject.device)
        self._seconds_per_step = 0.0
        self.run: Run | None = None

    def __call__(self) -> dict[str, Any]:
        limits, device = self._limits, self._subject.device
        rows: list[dict[str, Any]] = []
        length, stopped = limits.shortest, "longest asked for"
        with self._memory.capped(limits.bytes):
            while length <= limits.longest:
                if self._left() < self._expected(rows):
                    stopped = "time"
                    break
                row = attempt(lambda at=length: self._timed(at), device)  # type: ignore[misc]
                if row is None or row["peak_bytes"] > limits.bytes:
                    stopped = "memory"
                    break
                rows.append(row)
                length *= 2
        longest = rows[-1]["length"] if rows else 0
        return {"mode": self._mode, "longest": longest, "stopped_by": stopped, "lengths": rows}

    def _expected(self, rows: list[dict[str, Any]]) -> float:
        """Seconds of the next length at least: twice those of the last, unless from now on it is sampled."""
        last = rows[-1] if rows else {"seconds": 0.0}
        return 0.0 if last.get("sampled") is False else 2 * last["seconds"]

    def _left(self) -> float:
        return self._limits.seconds - (clock(self._subject.device) - self._began)

    def _timed(self, length: int) -> dict[str, Any]:
        release(self._subject.device)
        self._memory.reset()
        began = clock(self._subject.device)
        row = self._probe(length)
        seconds = clock(self._subject.device) - began
        return {"length": length, "seconds": round(seconds, 4), "peak_bytes": self._memory.peak(), **row}

    def _parallel(self, length: int) -> dict[str, Any]:
        self._subject.begin(1).read(length)
        return {}

    def _chunked(self, length: int) -> dict[str, Any]:
        self.run = self.run or self._subject.begin(1)
        self.run.read(length - self.run.position, self._chunk_size)
        read_here = length // 2 if length > self._limits.shortest else length
        return {"chunk_size": self._chunk_size, "read_here": read_here}

    def _token_by_token(self, length: int) -> dict[str, Any]:
        self.run = self.run or self._subject.begin(1)
        if not self.run.position:
            self.run.read(1)
            for _ in range(2):  # the first compiles and captures
                self._write(min(8, length // 4))
        count = length - self.run.position
        sampled = count > self._limits.steps and self._seconds_per_step * count > self._left() / 8
        if sampled:
            if not self._subject.reads_in_chunks:
                return {}
            count = self._limits.steps
            self.run.read(length - count - self.run.position, self._chunk_size)
            self._memory.reset()
        self._write(count)
        return {"sampled": sampled, "steps": count, "ms_per_step": round(1000 * self._seconds_per_step, 4)}

    def _write(self, count: int) -> None:
        """So many steps, and what one of them takes."""
        assert self.run is not None, "a run was begun"
        began = clock(self._subject.device)
        for _ in self.run.write(count):
            pass
        if count:
            self._seconds_per_step = (clock(self._subject.device) - began) / count
