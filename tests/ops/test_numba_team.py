"""The team of threads: every chunk once, in the order of the jobs, whoever takes it."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mambalm.ops import numba_team
from mambalm.ops.numba_team import JobList, Team, float_of, job, make, words_at


@job
def count(chunk, a):  # type: ignore[no-untyped-def]
    """Add to counter ``chunk`` (a[0], of a[1]) the sum over the counters before (a[2]) of the job before, plus a[3]."""
    before, now = words_at(a[2], a[1]), words_at(a[0], a[1])
    total = np.int32(float_of(a[3]))
    for value in before:
        total += value
    now[chunk] += total


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def chain(chunks: int, length: int) -> tuple[JobList, np.ndarray]:
    """Jobs of which each reads all that the one before wrote."""
    counters = np.zeros((length + 1, chunks), np.int32)
    jobs = [make(count, chunks, counters[i + 1], chunks, counters[i], 1.0) for i in range(length)]
    return JobList(jobs), counters


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_jobs_wait_for_each_other(threads: int, chunks: int) -> None:
    jobs, counters = chain(chunks, 10)
    team = Team()
    for turn in range(1, 4):
        jobs.run(team)
        assert counters[1].tolist() == [turn] * chunks
        counters[2:] = 0
    jobs.run(team)
    expected = [4]
    while len(expected) < 10:
        expected.append(chunks * expected[-1] + 1)
    assert counters[1:, 0].tolist() == expected
    assert (counters[1:] == counters[1:, :1]).all()


def _child(queue: multiprocessing.Queue[list[int]]) -> None:
    torch.set_num_threads(2)
    jobs, counters = chain(3, 5)
    jobs.run(Team())
    queue.put(counters[1:, 0].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_child_has_threads_of_its_own(threads: int) -> None:
    chain(3, 5)[0].run(Team())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) == [1, 4, 13, 40, 121]
    child.join()


def test_threads_that_come_after_the_end_find_it_done() -> None:
    team = Team()
    jobs, counters = chain(3, 4)
    jobs.run(team)
    numba_team._WORK(team._shared.ctypes.data)
    assert counters[1].tolist() == [1, 1, 1]


def test_two_callers_of_one_team(threads: int) -> None:
    team = Team()
    both = [chain(3, 20) for _ in range(2)]

    def call(jobs: JobList) -> None:
        for _ in range(50):
            jobs.run(team)

    callers = [threading.Thread(target=call, args=(jobs,)) for jobs, _ in both]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all((counters[1] == 50).all() for _, counters in both)


def test_a_thread_takes_its_range_in_order_and_the_ends_of_others() -> None:
    words = np.zeros(numba_team._RANGES + 2 * numba_team._LINE, np.int64)
    for thread, (begin, end) in enumerate([(0, 3), (3, 6)]):
        words[numba_team._RANGES + numba_team._LINE * thread] = begin + numba_team._HALF * end
    callers = [0, 1, 0, 1, 1, 1, 0, 1, 0]
    taken = [numba_team._take(words.ctypes.data, me, 2) for me in callers]
    assert taken == [0, 3, 1, 4, 5, 2, -1, -1, -1]
