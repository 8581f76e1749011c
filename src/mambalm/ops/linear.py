"""The product of a Linear on a CPU, by whichever of torch's ways is the fast one on this processor.

torch multiplies float32 matrices by a BLAS such as MKL, which does not use all that some processors have; oneDNN, which
torch brings as well, does (AVX-512 on AMD: 2.3 times as fast). It multiplies bfloat16 matrices by oneDNN, which is slow
where the processor has no instructions for them. One measurement per process and dtype decides between two ways. The
choice must not vary from run to run, since rounding does with it: the first is taken unless the other is far ahead, and
one thread multiplies, since several wait for each other on cores that others use.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import differentiable, is_plain, needs_grad

# How much faster the second way must be, what is multiplied to see it, and how often.
_FAR_AHEAD = 1.5
_ROWS, _INPUTS, _OUTPUTS = 128, 512, 512
_ROUNDS = 15
MEASURED = f"{_ROWS} x {_INPUTS} by {_INPUTS} x {_OUTPUTS}"

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k), weight (n, k), bias (n) -> x weightᵀ + bias (..., n), in x's dtype, differentiable.

    As ``torch.nn.functional.linear``, which it calls wherever there is no choice to make: on other devices, in other
    dtypes, under autocast, for what torch traces, and for gradients in bfloat16.
    """
    if x.device.type != "cpu" or not _has_choice(x, weight, bias):
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _differentiable(x, weight, bias) if x.dtype == torch.float32 else F.linear(x, weight, bias)
    return _run(x, weight, bias)


def _has_choice(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not is_plain(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == weight.dtype and x.numel() > 0 and bool(_ways(x.dtype))


@functools.cache
def _ways(dtype: torch.dtype) -> dict[str, Way]:
    """The ways to multiply in a dtype, by what ``mambalm doctor`` calls them."""
    if dtype == torch.float32:
        return {"oneDNN": _onednn, "BLAS": F.linear} if _has_onednn(dtype) else {}
    if dtype == torch.bfloat16:
        return {"bfloat16": _onednn if _has_onednn(dtype) else F.linear, "float32": _in_float32}
    return {}


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in a dtype here: without AVX-512 it does not in bfloat16, and says so when called."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        with torch.no_grad():
            _onednn(torch.zeros(2, 16, dtype=dtype), torch.zeros(16, 16, dtype=dtype), None)
    except RuntimeError:
        return False
    return True


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(t: Tensor) -> Tensor:
    """``t``, copied if it is a part of wider rows: transposed, such would be multiplied element by element."""
    return t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous()


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@functools.cache
def measured(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of one thread for a small product by each way, the best of a few in turn; empty without a choice."""
    with _measuring:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _measure(dtype)
        finally:
            torch.set_num_threads(threads)


# The number of threads is the process's: a second caller would take the one thread of the first for it, for good.
_measuring = threading.RLock()


def _measure(dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, _INPUTS, generator=generator).to(dtype) for n in (_ROWS, _OUTPUTS))
    times: dict[str, list[float]] = {name: [] for name in _ways(dtype)}
    for _ in range(1 + _ROUNDS):
        for name, way in _ways(dtype).items():
            start = time.perf_counter()
            with torch.no_grad():
                way(x, weight, None)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: min(found[1:]) for name, found in times.items()}


@functools.cache
def chosen(dtype: torch.dtype) -> str:
    """The name of the way that products in ``dtype`` take on this CPU; "" where there is no choice."""
    if not _ways(dtype):
        return ""
    (first, its_time), (second, other_time) = measured(dtype).items()
    return second if _FAR_AHEAD * other_time < its_time else first


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _ways(x.dtype)[chosen(x.dtype)](x, weight, bias)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    rows = dy.reshape(-1, dy.shape[-1])
    dx = linear(dy, weight.T) if wants_x else None
    dweight = linear(rows.T, x.reshape(-1, x.shape[-1]).T) if wants_weight else None
    return dx, dweight, rows.sum(0) if wants_bias else None


_differentiable = differentiable(_run, F.linear, _setup_context, _backward).apply
