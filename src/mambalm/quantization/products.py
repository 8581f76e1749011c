"""Linear layers as jobs: y = W x + bias for a few float32 vectors x, the weight as it lies in memory; and unpacking."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mambalm.ops.numba_support import memory, parallel
from mambalm.ops.numba_team import Job, make
from mambalm.quantization import _numba_kernels as kernels
from mambalm.quantization.layout import GROUP, MULTIPLE, ROWS, Packed

# Bytes of weights that a thread takes at once: enough to hide the taking, few enough to share a small weight.
_CHUNK_BYTES = 48 * 1024
# For one vector, and for up to COLUMNS of them.
_PLAIN = {
    torch.float32: (kernels.float32, kernels.float32_columns),
    torch.bfloat16: (kernels.bfloat16, kernels.bfloat16_columns),
}
_PACKED = {8: (kernels.int8, kernels.int8_columns), 4: (kernels.int4, kernels.int4_columns)}


def refuses(weight: Tensor) -> str | None:
    """Why no job reads a weight (out, in) that is not packed; None if one does."""
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if weight.dtype not in _PLAIN:
        return f"it is {weight.dtype}"
    if weight.shape[1] % kernels.LANES or not weight.is_contiguous():
        return f"it is not contiguous, or has no multiple of {kernels.LANES} columns"
    return None


def plain(weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor, *, added: bool = False) -> list[Job]:
    """y (b, out) = x (b, in) weightᵀ (out, in) + bias, or added to y; all float32, weight float32 or bfloat16."""
    weight = weight.detach()
    out, size = weight.shape
    one = torch.ones(kernels.COLUMNS)
    matrix = (weight, size * weight.itemsize, None, 0)
    per_chunk = max(1, _CHUNK_BYTES // (size * weight.itemsize))
    return [
        _product(_PLAIN[weight.dtype], matrix, (rows, _distance(rows), None, 0, one), target, bias, added, sizes)
        for rows, target in _groups(x, y)
        for sizes in [(out, size // kernels.LANES, per_chunk, math.ceil(out / per_chunk))]
    ]


def packed(weight: Packed, bias: Tensor | None, x: Tensor, y: Tensor, *, added: bool = False) -> list[Job]:
    """The same for a packed weight."""
    blocks, turns = weight.values.shape[:2]
    padded = turns * MULTIPLE[weight.bits]
    row, scale = turns * weight.values[0, 0, 0].nbytes, turns * weight.scales[0, 0, 0].nbytes
    per_chunk = max(1, _CHUNK_BYTES // (ROWS * row))
    sizes = (weight.out_features, turns, per_chunk, math.ceil(blocks / per_chunk))
    jobs = []
    for rows, target in _groups(x, y):
        count = len(rows)
        rounded, factor = torch.zeros(count, padded, dtype=torch.int16), torch.zeros(count)
        offset = torch.zeros(count, padded // GROUP, kernels.LANES, dtype=torch.int32) if weight.bits == 4 else None
        inputs = (rows, weight.in_features, rounded, padded, factor, offset, _distance(rows))
        jobs.append(make(kernels.prepare, count, *inputs))
        columns = (rounded, 2 * padded, offset, 0 if offset is None else offset[0].nbytes, factor)
        matrix = (weight.values, row, weight.scales, scale)
        jobs.append(_product(_PACKED[weight.bits], matrix, columns, target, bias, added, sizes))
    return jobs


def _groups(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    assert x.dim() == y.dim() == 2, "jobs would read past the end"
    for first in range(0, len(x), kernels.COLUMNS):
        yield x[first : first + kernels.COLUMNS], y[first : first + kernels.COLUMNS]


def _distance(x: Tensor) -> int:
    """Bytes between rows."""
    return x.stride(0) * x.itemsize


def unpack(weight: Packed, dtype: torch.dtype) -> Tensor:
    """`weight.unpack(dtype)` for float32 and bfloat16, in one pass; scales are multiplied in float32."""
    blocks, turns = weight.values.shape[:2]
    out = torch.empty(blocks * ROWS, turns * MULTIPLE[weight.bits], dtype=dtype)
    function = kernels.unpack4 if weight.bits == 4 else kernels.unpack8
    parallel(function, blocks, out.numel(), (weight.values.numpy(), memory(weight.scales), memory(out)))
    return out[: weight.out_features, : weight.in_features]


def _product(
    functions: tuple[object, object],
    matrix: tuple[Tensor | int | None, ...],
    columns: tuple[Tensor | int | None, ...],
    y: Tensor,
    bias: Tensor | None,
    added: bool,
    sizes: tuple[int, int, int, int],
) -> Job:
    *sizes_within, chunks = sizes
    bias = None if bias is None else bias.detach().float()
    last = len(y) - 1
    outputs = (y, _distance(y), bias, added, *sizes_within, last)
    return make(functions[last > 0], chunks, *matrix, *columns, *outputs)
