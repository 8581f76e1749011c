"""The normalisation on a CPU, by numba: each token is read once and written once."""

import numpy as np
import torch
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.numba_support import floats, parallel, readable, rows, unsupported
from mambalm.ops.rms_norm import _numba_kernels as kernels


def supports(call: Call) -> str | None:
    """float32, bfloat16 and float16 on a CPU."""
    return unsupported(call)


def _readable(tensor: Tensor | None) -> tuple[np.ndarray, int]:
    """A tensor in a dtype that the kernels read, see ``rows``; a stand-in if it is None."""
    return rows(torch.empty(0, 1) if tensor is None else tensor.to(readable(tensor)))


def _weight(weight: Tensor | None, d: int) -> np.ndarray:
    return np.ones(d, np.float32) if weight is None else floats(weight)


def forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    group_size: int,
    stream_dtype: torch.dtype,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """y (..., d) in x's dtype, and x + residual (..., d) in ``stream_dtype``, empty without a residual or ``keep``."""
    if residual is not None and stream_dtype == torch.float16:
        # No kernel rounds to it, and y is made of the rounded stream.
        stream = (x.float() + residual).to(stream_dtype)
        y, _ = forward(stream.float(), weight, None, None, eps, group_size, stream_dtype)
        return y.to(x.dtype), stream if keep else stream.new_empty(0)
    d = x.shape[-1]
    y = torch.empty(x.shape, dtype=readable(x))
    stream = torch.empty((0,) if residual is None else x.shape, dtype=stream_dtype)
    count = x.numel() // d
    inputs = (*_readable(x), _weight(weight, d), *_readable(gate), gate is not None)
    more = (*_readable(residual), residual is not None, np.float32(eps), group_size)
    outputs = (rows(y)[0], _readable(stream)[0])
    parallel(kernels.forward, -(-count // kernels.ROWS), x.numel(), (count, *inputs, *more, *outputs))
    return y.to(x.dtype), stream if keep else stream.new_empty(0)


def backward(
    dy: Tensor,
    dstream: Tensor | None,
    source: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    group_size: int,
    branch_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the ``source`` (x, or the residual stream), of weight and of gate, and the first of them once
    more in ``branch_dtype``, for what was added to the stream in that dtype."""
    d = source.shape[-1]
    count = source.numel() // d
    jobs = -(-count // kernels.ROWS)
    dsource = torch.empty(source.shape)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=readable(gate))
    shares = torch.zeros(jobs, d)
    inputs = (*_readable(dy), *_readable(dstream), dstream is not None, *_readable(source), _weight(weight, d))
    more = (*_readable(gate), gate is not None, np.float32(eps), group_size)
    outputs = (rows(dsource)[0], shares.numpy(), _readable(dgate)[0])
    parallel(kernels.backward, jobs, 3 * source.numel(), (count, *inputs, *more, *outputs))
    dbranch = None if branch_dtype is None else dsource.to(branch_dtype)
    return dsource, None if weight is None else shares.sum(0), dgate, dbranch
