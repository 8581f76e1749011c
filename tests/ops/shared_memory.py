"""Whether what threads do in shared memory is in an order that barriers see to, however it went this time.

Vector clocks (Lamport 1978; Fidge 1988; Mattern 1989): each task counts its own time and knows how far it has seen the
others come. Copies and asynchronous products are tasks of their own, which begin when they are asked for and are done
when a barrier or a wait says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

PATIENCE = 30  # seconds


class Task:
    """Who works by itself, a thread or what the hardware does for one: its time, how far it has seen others come."""

    def __init__(self, seen: Mapping[Task, int]) -> None:
        self.time, self.seen = 1, dict(seen)
        self.fenced = 0  # up to here copies and products see what it stores
        self.copies: list[Any] = []  # that read for it, and may not be done
        self.products: list[Any] = []

    def look(self, seen: Mapping[Task, int]) -> None:
        for task, at in seen.items():
            self.seen[task] = max(self.seen.get(task, 0), at)

    def has_seen(self, task: Task, at: int) -> bool:
        return task is self or self.seen.get(task, 0) >= at

    def show(self) -> dict[Task, int]:
        """What another sees of all up to here."""
        self.time += 1
        return {**self.seen, self: self.time - 1}

    def fence(self) -> None:
        self.fenced = self.time
        self.time += 1


class Running(threading.local):
    """The task of this thread."""

    task = Task({})


RUNNING = Running()


def helper() -> Task:
    """The hardware at work for this thread's task."""
    return Task(RUNNING.task.show())


class Row:
    """A row of shared memory: who wrote it last and who used it since, each at which of its times."""

    lock = threading.Lock()

    def __init__(self) -> None:
        self.written: dict[Task, int] = {}
        self.used: dict[Task, int] = {}
        self.stored: dict[Task, int] = {}
        self.copied = False

    def read(self, by: Task) -> None:
        with self.lock:
            assert self.written, "shared memory is read that nothing was written to"
            if by is not RUNNING.task:
                unfenced = [task for task, at in self.stored.items() if by.has_seen(task, at) and task.fenced < at]
                assert not unfenced, "shared memory is copied or multiplied without a fence after it was stored"
            self._use(by)

    def store(self, by: Task) -> None:
        """What was copied in may be changed by all that use it, each in the same way."""
        with self.lock:
            self._use(by) if self.copied else self._write(by)
            self.stored[by] = by.time

    def copy(self, by: Task) -> None:
        with self.lock:
            self._write(by)
            self.stored, self.copied = {}, True

    def _use(self, by: Task) -> None:
        assert all(by.has_seen(*done) for done in self.written.items()), "shared memory is used before it is written"
        self.used[by] = by.time

    def _write(self, by: Task) -> None:
        done = self.written | self.used
        assert all(by.has_seen(*once) for once in done.items()), "shared memory is written while it is in use"
        self.written, self.used = {by: by.time}, {}


class Barrier:
    """Counts arrivals and bytes of a phase; the phase after it begins when both are complete."""

    broken = threading.Event()  # a task has failed: none waits any longer

    def __init__(self) -> None:
        self.changed, self.count, self.missing, self.bytes, self.phase = threading.Condition(), 0, 0, 0, 0
        self.arrived = Task({})  # has seen what all that arrived had seen
        self.shown: dict[Task, int] = {}  # of complete phases

    def less(self, arrivals: int, size: int, by: Task | None = None) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes -= size
            self.arrived.look((by or RUNNING.task).show())
            assert self.missing >= 0, "more arrive at a barrier than it counts"
            assert self.bytes >= 0, "more is copied than a barrier expects"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing, self.shown = self.phase ^ 1, self.count, dict(self.arrived.seen)
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        patience = time.monotonic() + PATIENCE
        with self.changed:
            while self.phase == int(parity):
                assert not self.broken.is_set(), "another task has failed"
                assert time.monotonic() < patience, "a barrier was waited for in vain"
                self.changed.wait(0.1)
            RUNNING.task.look(self.shown)


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]
