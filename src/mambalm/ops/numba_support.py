"""What the numba kernels share: mathematics that LLVM vectorises, bfloat16 in and out, threads.

Errors, relative, against float64 over the whole range of float32 arguments that do not overflow: exp2 at most 1.72e-7
(1.7155e-7 over all arguments); softplus and sigmoid 2.5e-7, and for a negative x 1e-7 |x| more, by which its exponent
is rounded. tests/ops/test_numba_support.py measures them.
"""

import ctypes
import functools
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from mambalm.ops.backends import Call, SlowBackendWarning

f32 = np.float32
LOG2_E = f32(1.4426950408889634)

# Everything that keeps the value of a sum of products within rounding; no infinities or NaNs are assumed away.
FAST = {"contract", "nsz", "arcp"}


def _keeps_compiled() -> bool:
    """Whether numba finds a folder to keep compiled kernels in; without one it refuses to make any that are kept."""
    try:
        njit(cache=True)(_keeps_compiled)
    except RuntimeError:
        warnings.warn(
            "numba can write compiled kernels neither beside mambalm's files nor to the user's cache: they compile "
            "in every process; set NUMBA_CACHE_DIR to a folder that can be written to",
            SlowBackendWarning,
            stacklevel=2,
        )
        return False
    return True


CACHE = _keeps_compiled()
kernel = njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
# For functions that sum over channels: in any (fixed) order, which is what vectorises them. Never for those that call
# exp2, whose rounding by adding and subtracting a constant would be simplified away; and never inlined as numba code,
# because inlined code takes its caller's flags.
sums = njit(nogil=True, cache=CACHE, fastmath=FAST | {"reassoc"}, error_model="numpy")
inline = njit(nogil=True, fastmath=FAST, error_model="numpy", inline="always")


@intrinsic
def _bits(context, value):  # type: ignore[no-untyped-def]
    """A float32 as the int32 of the same bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _from_bits(context, value):  # type: ignore[no-untyped-def]
    """An int32 as the float32 of the same bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@inline
def exp2(x):  # type: ignore[no-untyped-def]
    """2^x: the whole part goes into the exponent by an integer addition, a polynomial takes the rest."""
    x = min(max(x, f32(-126.0)), f32(127.0))
    shifted = x + f32(12582912.0)  # 1.5 * 2^23: the low bits now hold x rounded
    r = x - (shifted - f32(12582912.0))
    p = f32(0.001326472731307149)
    p = p * r + f32(0.009671512991189957)
    p = p * r + f32(0.05550733581185341)
    p = p * r + f32(0.24022242426872253)
    p = p * r + f32(0.6931470036506653)
    p = p * r + f32(1.0)
    return _from_bits(_bits(p) + ((_bits(shifted) - np.int32(0x4B400000)) << np.int32(23)))


@inline
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x)."""
    return f32(1.0) / (f32(1.0) + exp2(-x * LOG2_E))


@inline
def softplus(x):  # type: ignore[no-untyped-def]
    """max(x, 0) + log1p(e^-|x|), the logarithm as a polynomial on [0, 1]."""
    y = exp2(-abs(x) * LOG2_E)
    p = f32(1.9866965936534606e-3)
    p = p * y + f32(-1.3187826565578388e-2)
    p = p * y + f32(4.1006573693958395e-2)
    p = p * y + f32(-8.188040923582843e-2)
    p = p * y + f32(1.2377995867871511e-1)
    p = p * y + f32(-1.6087623009295732e-1)
    p = p * y + f32(1.9885820285008451e-1)
    p = p * y + f32(-2.4986496459409926e-1)
    p = p * y + f32(3.3332497543526520e-1)
    p = p * y + f32(-4.9999979491391230e-1)
    p = p * y + f32(9.9999999915568230e-1)
    return max(x, f32(0.0)) + p * y


@inline
def part(array, start, width):  # type: ignore[no-untyped-def]
    """``width`` elements from ``start`` on.

    Indexed from 0 they vectorise; at ``start + i``, which might be negative for all that numba knows, they do not.
    """
    return array[start : start + width]


def widen(value):  # type: ignore[no-untyped-def]
    """An activation as float32: bfloat16 travels as the uint16 of its bits."""
    raise NotImplementedError("only inside kernels")


def narrow(array, value):  # type: ignore[no-untyped-def]
    """A float32 as an element of ``array``, rounded to nearest even for bfloat16."""
    raise NotImplementedError("only inside kernels")


@overload(widen, inline="always", jit_options={"fastmath": FAST})
def _widen(value):  # type: ignore[no-untyped-def]
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: _from_bits(np.int32(np.uint32(value) << np.uint32(16)))


@overload(narrow, inline="always", jit_options={"fastmath": FAST})
def _narrow(array, value):  # type: ignore[no-untyped-def]
    if isinstance(array.dtype, types.Float):
        return lambda array, value: value

    def rounded(array, value):  # type: ignore[no-untyped-def]
        bits = np.uint32(_bits(value))
        if value != value:
            return np.uint16(0x7FC0)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(call: Call) -> str | None:
    """Why the numba kernels cannot run a call; None if they can."""
    if call.device.type != "cpu":
        return f"it runs on a CPU, the tensors are on {call.device.type}"
    if call.dtype not in _DTYPES:
        return f"it computes in float32, the tensors are {call.dtype}"
    return None


def readable(*activations: Tensor | None) -> torch.dtype:
    """The dtype in which a kernel reads activations: bfloat16 if all of them are, else float32."""
    return torch.bfloat16 if all(t is None or t.dtype == torch.bfloat16 for t in activations) else torch.float32


def floats(tensor: Tensor | None, size: int = 0) -> np.ndarray:
    """A parameter or a state as contiguous float32; ``size`` zeros if it is None."""
    if tensor is None:
        return np.zeros(size, np.float32)
    # A copy: numpy fixes the size of the storage that it views, and FSDP2 resizes that of parameters.
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format).numpy()


def document_offsets(x: Tensor, cu_seqlens: Tensor | None) -> np.ndarray:
    """Where the documents of x (b, l, ...) begin in its flattened tokens, int64 (s + 1): the rows unless packed."""
    if cu_seqlens is None:
        return np.arange(x.shape[0] + 1, dtype=np.int64) * x.shape[1]
    return cu_seqlens.numpy().astype(np.int64)


def rows(tensor: Tensor) -> tuple[np.ndarray, int]:
    """A (..., d) tensor for a kernel: flat memory and the distance between rows; copied only if rows are irregular.

    Element (row, channel) is at row * distance + channel. bfloat16 arrives as uint16.
    """
    width = tensor.shape[-1]
    if tensor.numel() == 0:
        return memory(tensor.reshape(-1)), width
    if tensor.stride(-1) != 1 and width > 1:
        tensor = tensor.contiguous()
    try:
        flat = tensor.view(-1, width)
    except RuntimeError:
        flat = tensor.contiguous().view(-1, width)
    distance = flat.stride(0) if flat.shape[0] > 1 else width
    return memory(flat.as_strided(((flat.shape[0] - 1) * distance + width,), (1,))), distance


def memory(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as numpy: bfloat16 as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# GOMP_parallel(function, data, threads, flags): function(data) on each thread of a team.
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pool: tuple[int, int, ThreadPoolExecutor] | None = None


_home = os.getpid()


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """How torch's own OpenMP runtime, whichever it is linked with, starts a parallel region; None if it has no such."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        start: Any = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes, start.restype = (_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return start


def workers(count: int) -> ThreadPoolExecutor:
    """A pool of this process: threads do not outlive a fork, so a child makes its own."""
    global _pool
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < count:
        _pool = (os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="mambalm"))
    return _pool[2]


def pooled() -> str | None:
    """Why kernels run on the threads of a pool rather than on torch's; None if they do not."""
    if _openmp() is None:
        return "torch's OpenMP runtime has no GOMP_parallel"
    return None if os.getpid() == _home else "this process was forked"


def _on_threads(threads: int, work: Callable[[], None]) -> None:
    """``work`` on so many threads at once, the caller's among them; the first error of any is raised here."""
    errors: list[BaseException] = []

    def region(_: object) -> None:
        try:
            work()
        except BaseException as error:  # through OpenMP's frames none can pass
            errors.append(error)

    in_region(threads, _REGION(region))
    if errors:
        raise errors[0]


def compiled_region(address: int) -> Callable[..., None]:
    """What `in_region` takes, of a compiled function of one address."""
    return _REGION(address)


def in_region(threads: int, work: Callable[..., None], argument: int = 0) -> None:
    """``work(argument)`` on so many threads at once, the caller's among them.

    They are torch's own: behind a matrix product those spin for some milliseconds, and other threads would have to
    share the cores with them (docs/decisions/2026-11-27-cpu-prefill.md). A child that was forked has none of them, and
    OpenMP would wait for them for ever: it makes threads of its own.
    """
    start = _openmp()
    if start is not None and pooled() is None:
        start(work, argument, threads, 0)
        return
    others = [workers(threads - 1).submit(work, argument) for _ in range(threads - 1)]
    work(argument)
    for other in others:
        other.result()


def parallel(run: Callable[..., Any], jobs: int, work: int, arguments: Sequence[Any]) -> None:
    """``run(first, last, *arguments)`` over 0..jobs on torch's number of threads; the kernel holds no lock.

    ``work`` is the number of innermost updates: a small call stays on the caller's thread. Each job writes its own
    outputs, so the result does not depend on the number of threads.
    """
    threads = min(torch.get_num_threads(), jobs)
    if threads <= 1 or work < 100_000:
        run(0, jobs, *arguments)
        return
    pieces = min(jobs, 4 * threads)
    edges = [jobs * i // pieces for i in range(pieces + 1)]
    ranges = iter(list(itertools.pairwise(edges)))

    def drain() -> None:
        for first, last in ranges:
            run(first, last, *arguments)

    _on_threads(threads, drain)
