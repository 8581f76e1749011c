"""Linear layers as jobs: y = W x + bias for one float32 vector x, the weight as it lies in memory; and unpacking."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambalm.ops.numba_support import memory, parallel
from mambalm.ops.numba_team import Job, make
from mambalm.quantization import _numba_kernels as kernels
from mambalm.quantization.layout import GROUP, MULTIPLE, ROWS, Packed

# Bytes of weights that a thread takes at once: enough to hide the taking, few enough to share a small weight.
_CHUNK_BYTES = 48 * 1024
_PLAIN = {torch.float32: kernels.float32, torch.bfloat16: kernels.bfloat16}


def refuses(weight: Tensor) -> str | None:
    """Why no job reads a weight (out, in) that is not packed; None if one does."""
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if weight.dtype not in _PLAIN:
        return f"it is {weight.dtype}"
    if weight.shape[1] % kernels.LANES or weight.shape[0] < ROWS or not weight.is_contiguous():
        return f"it is not contiguous, has fewer than {ROWS} rows, or no multiple of {kernels.LANES} columns"
    return None


def plain(weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor, *, added: bool = False) -> list[Job]:
    """y (out) = weight (out, in) x + bias, or added to y; x, bias and y float32, weight float32 or bfloat16."""
    weight = weight.detach()
    rows, size = weight.shape
    row = size * weight.itemsize
    turn = kernels.LANES * weight.itemsize
    layout = (rows, row, 0, row, turn, ROWS * row, size // kernels.LANES)
    return [_product(_PLAIN[weight.dtype], (weight, None, x, None, torch.ones(1)), y, bias, added, rows, layout)]


def packed(weight: Packed, bias: Tensor | None, x: Tensor, y: Tensor, *, added: bool = False) -> list[Job]:
    """The same for a packed weight."""
    blocks, turns = weight.values.shape[:2]
    padded = turns * MULTIPLE[weight.bits]
    rounded, factor = torch.zeros(padded, dtype=torch.int16), torch.zeros(1)
    offset = torch.zeros(padded // GROUP, kernels.LANES, dtype=torch.int32) if weight.bits == 4 else None
    ready = make(kernels.prepare, 1, x, weight.in_features, rounded, padded, factor, offset)
    row, scale = weight.values[0, 0, 0].nbytes, weight.scales[0, 0, 0].nbytes
    layout = (blocks * ROWS, turns * row, turns * scale, row, ROWS * row, kernels.AHEAD, turns)
    function = kernels.int4 if weight.bits == 4 else kernels.int8
    inputs = (weight.values, weight.scales, rounded, offset, factor)
    return [ready, _product(function, inputs, y, bias, added, weight.out_features, layout)]


def unpack(weight: Packed, dtype: torch.dtype) -> Tensor:
    """`weight.unpack(dtype)` for float32 and bfloat16, in one pass; scales are multiplied in float32."""
    blocks, turns = weight.values.shape[:2]
    out = torch.empty(blocks * ROWS, turns * MULTIPLE[weight.bits], dtype=dtype)
    function = kernels.unpack4 if weight.bits == 4 else kernels.unpack8
    parallel(function, blocks, out.numel(), (weight.values.numpy(), memory(weight.scales), memory(out)))
    return out[: weight.out_features, : weight.in_features]


def _product(
    function: object,
    inputs: tuple[Tensor | None, ...],
    y: Tensor,
    bias: Tensor | None,
    added: bool,
    out: int,
    layout: tuple[int, ...],
) -> Job:
    per_chunk = max(1, _CHUNK_BYTES // (ROWS * layout[1]))
    chunks = math.ceil(out / ROWS / per_chunk)
    bias = None if bias is None else bias.detach().float()
    return make(function, chunks, *inputs, y, bias, added, out, *layout, per_chunk)
