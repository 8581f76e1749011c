"""A team of threads for lists of jobs that each take microseconds: a decode step is about 150 of them.

A job is the address of a compiled function and of its arguments, split into chunks that any thread may take. Each
thread has a range of them, which it takes in order, so that it reads memory from one end to the other; one that is done
takes the last of another's. Threads hand work over through those ranges in memory, so a hand-over costs nanoseconds
where a pool's costs tens of microseconds. The whole list is one parallel region of torch's own threads, the first of
which to come leads. It takes chunks as well and waits only for those that others have begun: a thread that is late
costs what it did not do.
"""

import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mambalm.ops.numba_support import CACHE, FAST, compiled_region, in_region

_I64 = ir.IntType(64)
# Words of the shared memory, those that change by the job a cache line apart: chunks done, the job; threads that have
# come, whether the list is done, the list, how many threads there are; the ranges of the threads, each a word.
_DONE, _FUNCTION, _ARGUMENTS = 0, 8, 9
_ARRIVED, _FINISHED, _TABLE, _JOBS, _THREADS = 16, 24, 25, 26, 27
_RANGES, _LINE = 32, 8
# A range: the next chunk in the lower half, the end in the upper.
_HALF = 1 << 32
_PAUSE = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "AMD64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),
}


@dataclass(frozen=True)
class Job:
    """A compiled function that reads and writes memory at fixed addresses.

    Attributes:
        function: made by ``job``.
        arguments: int64; addresses, sizes, and float64 by their bits.
        chunks: it is called with 0..chunks - 1, in any order, at the same time.
        owners: whatever the addresses point into, to keep it alive.
    """

    function: Any
    arguments: np.ndarray
    chunks: int
    owners: tuple[Any, ...]


def job(function: Callable[..., None]) -> Any:
    """Compile ``function(chunk, arguments)``, the arguments a pointer to int64, for a fixed address.

    An exception inside would be printed and forgotten: jobs raise none.
    """
    signature = types.void(types.int64, types.CPointer(types.int64))
    return cfunc(signature, nopython=True, cache=CACHE, fastmath=FAST, error_model="numpy")(function)


def make(function: Any, chunks: int, *arguments: torch.Tensor | np.ndarray | int | float | None) -> Job:
    """A job on tensors with contiguous rows and contiguous arrays (by address; None is 0), integers, and floats."""
    values = [_word(argument) for argument in arguments]
    return Job(function, np.array(values, np.int64), chunks, arguments)


def _word(argument: torch.Tensor | np.ndarray | int | float | None) -> int:
    if isinstance(argument, torch.Tensor):
        assert (argument[0] if argument.dim() > 1 else argument).is_contiguous()
        return argument.data_ptr()
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return int(argument.ctypes.data)
    if isinstance(argument, float):
        return int(np.float64(argument).view(np.int64))
    return 0 if argument is None else int(argument)


@intrinsic
def _pointer(context, address):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(nogil=True, inline="always")
def floats_at(address, size):  # type: ignore[no-untyped-def]
    """``size`` float32 at an address."""
    return carray(_pointer(address), (size,), np.float32)


@njit(nogil=True, inline="always")
def shorts_at(address, size):  # type: ignore[no-untyped-def]
    """``size`` int16 at an address."""
    return carray(_pointer(address), (size,), np.int16)


@njit(nogil=True, inline="always")
def words_at(address, size):  # type: ignore[no-untyped-def]
    """``size`` int32 at an address."""
    return carray(_pointer(address), (size,), np.int32)


@intrinsic
def float_of(context, word):  # type: ignore[no-untyped-def]
    """The float64 that was passed as an argument."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def _call(context, function, chunk, arguments):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _word_pointer(builder, address, index):  # type: ignore[no-untyped-def]
    return builder.inttoptr(builder.add(address, builder.mul(index, _I64(8))), _I64.as_pointer())


@intrinsic
def _read(context, shared, index):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_word_pointer(builder, *values), "acquire", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _write(context, shared, index, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        builder.store_atomic(values[2], _word_pointer(builder, *values[:2]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _add(context, shared, index, value):  # type: ignore[no-untyped-def]
    """Add to a word; the value before."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _word_pointer(builder, *values[:2]), values[2], "acq_rel")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _swap(context, shared, index, old, new):  # type: ignore[no-untyped-def]
    """Write ``new`` if the word is ``old``; whether it was."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        result = builder.cmpxchg(_word_pointer(builder, *values[:2]), values[2], values[3], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def _pause(context):  # type: ignore[no-untyped-def]
    """Tell the processor that this is a loop that waits."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        if platform.machine() in _PAUSE:
            name, constants = _PAUSE[platform.machine()]
            kinds = [ir.IntType(32)] * len(constants)
            hint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
            builder.call(hint, [kind(constant) for kind, constant in zip(kinds, constants, strict=True)])
        return context.get_dummy_value()

    return types.void(), generate


@njit(nogil=True, inline="always")
def _range_of(thread):  # type: ignore[no-untyped-def]
    return _RANGES + _LINE * thread


@njit(nogil=True)
def _take(shared, me, threads):  # type: ignore[no-untyped-def]
    """A chunk of the current job, or -1: the first of my range, else the last of another's.

    What is taken cannot be of a finished job: finishing takes all chunks.
    """
    for i in range(threads):
        place = _range_of((me + i) % threads)
        left = _read(shared, place)
        while left % _HALF < left // _HALF:
            if _swap(shared, place, left, left + 1 if i == 0 else left - _HALF):
                return left % _HALF if i == 0 else left // _HALF - 1
            left = _read(shared, place)
    return -1


@njit(nogil=True)
def _serve(shared, me, threads):  # type: ignore[no-untyped-def]
    """Work on whatever jobs come, until the list is done."""
    while not _read(shared, _FINISHED):
        chunk = _take(shared, me, threads)
        if chunk >= 0:
            _call(_read(shared, _FUNCTION), chunk, _read(shared, _ARGUMENTS))
            _add(shared, _DONE, 1)
        else:
            _pause()


@njit(nogil=True)
def _run(jobs, shared, threads):  # type: ignore[no-untyped-def]
    """All jobs (count, 3) one after the other: address of the function, of its arguments, chunks."""
    for i in range(jobs.shape[0]):
        function, arguments, chunks = jobs[i, 0], jobs[i, 1], jobs[i, 2]
        if chunks == 1:
            _call(function, 0, arguments)
            continue
        _write(shared, _FUNCTION, function)
        _write(shared, _ARGUMENTS, arguments)
        _write(shared, _DONE, 0)
        for thread in range(threads):
            begin, end = chunks * thread // threads, chunks * (thread + 1) // threads
            _write(shared, _range_of(thread), begin + _HALF * end)
        mine = 0
        chunk = _take(shared, 0, threads)
        while chunk >= 0:
            _call(function, chunk, arguments)
            mine += 1
            chunk = _take(shared, 0, threads)
        while _read(shared, _DONE) + mine < chunks:
            _pause()


@cfunc(types.void(types.int64), nopython=True, cache=CACHE)
def _work(shared):  # type: ignore[no-untyped-def]
    """What each thread does: the first to come leads, the others serve."""
    me, threads = _add(shared, _ARRIVED, 1), _read(shared, _THREADS)
    if me == 0:
        count = _read(shared, _JOBS)
        _run(carray(_pointer(_read(shared, _TABLE)), (count, 3), np.int64), shared, threads)
        _write(shared, _FINISHED, 1)
    else:
        _serve(shared, me, threads)


_WORK = compiled_region(_work.address)


class JobList:
    """Jobs that are run in order, again and again, on torch's number of threads."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = tuple(jobs)
        words = [(job.function.address, job.arguments.ctypes.data, job.chunks) for job in jobs]
        self._table = np.array(words, np.int64).reshape(-1, 3)

    def run(self, team: "Team") -> None:
        """Run all jobs; done when this returns. A team works for one caller at a time, the others wait."""
        with team.lock:
            team.run(self._table)


class Team:
    """The memory that the threads share which work on a list."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._threads = 0

    def run(self, table: np.ndarray) -> None:
        """Run the jobs (count, 3) of a list: address of the function, of its arguments, chunks."""
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._share(threads)
        words = self._shared
        words[_TABLE], words[_JOBS] = table.ctypes.data, len(table)
        words[_FINISHED] = words[_ARRIVED] = 0
        in_region(threads, _WORK, words.ctypes.data)

    def _share(self, threads: int) -> None:
        words = _RANGES + _LINE * threads
        shared = np.zeros(words + _LINE, np.int64)
        # The words must not share a cache line with each other: start on one.
        first = -shared.ctypes.data % 64 // 8
        self._threads, self._shared = threads, shared[first : first + words]
        self._shared[_THREADS] = threads
