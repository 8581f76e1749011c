"""The normalisation in plain torch on any device, with an explicit backward that keeps only the op's inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


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
    acc = accumulation_dtype(x.dtype)
    if residual is None:
        source, stream = x, x.new_empty(0, dtype=stream_dtype)
    else:
        source = stream = (x.to(acc) + residual).to(stream_dtype).contiguous()
    normed, _ = _normalise(_gated(source.to(acc), gate), eps, group_size)
    y = normed.flatten(-2)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype).contiguous(), stream if keep else stream.new_empty(0)


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
    more in ``branch_dtype``, for what was added to the stream in that dtype.

    With n = h / rms and w the weight: dh = (w dy - n mean(w dy n)) / rms, the mean over a group.
    """
    acc = accumulation_dtype(source.dtype)
    source, dy = source.to(acc), dy.to(acc)
    normed, scale = _normalise(_gated(source, gate), eps, group_size)
    dweight = None if weight is None else (dy * normed.flatten(-2)).reshape(-1, dy.shape[-1]).sum(0)
    dnormed = (dy if weight is None else dy * weight).unflatten(-1, (-1, group_size))
    dh = ((dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * scale).flatten(-2)
    dgate = None
    if gate is not None:
        gate = gate.to(acc)
        dgate = torch.ops.aten.silu_backward(dh * source, gate)
        dh = dh * F.silu(gate)
    if dstream is not None:
        dh = dh + dstream
    return dh, dweight, dgate, None if branch_dtype is None else dh.to(branch_dtype)


def _gated(source: Tensor, gate: Tensor | None) -> Tensor:
    return source if gate is None else source * F.silu(gate.to(source.dtype))


def _normalise(h: Tensor, eps: float, group_size: int) -> tuple[Tensor, Tensor]:
    """h / rms, and 1 / rms, with the last axis split into groups."""
    groups = h.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return groups * scale, scale
