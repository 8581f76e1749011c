"""Products whose backward reads and sums gradients where they lie.

Autograd would first copy those of an output's parts into one, round the weight's gradient to autocast's dtype before it
makes float32 of it, and add up the gradients of an input that is read twice in a pass of its own: passes over memory
that take some 4 % of a training step on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalm.ops.backends import exact


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """``torch.nn.functional.linear``, then ``split(sizes, dim=-1)``, under autocast in its dtype; one derivative only.

    Args:
        x: (..., k).
        weight: (n, k); its gradient is summed and returned in its dtype, also where autocast multiplies in bfloat16.
        bias: (n).
        sizes: of the parts, n in all.

    Returns:
        The parts (..., size), views of one tensor (..., n), or that tensor.
    """
    dtype = product_dtype(x)
    return _Parts.apply(x.to(dtype), weight, bias, dtype, tuple(sizes))


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x for one more reader, and ``torch.nn.functional.linear(x, weight)``; one derivative only.

    The gradient that the reader gives is written over: its backward must have made it for nobody else.

    Args:
        x: (..., k), in the dtype of the product, see ``product_dtype``.
        weight: (n, k); as in ``linear_parts``.
    """
    return _Beside.apply(x, weight)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of x is made: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        with exact(x.device):
            rounded = weight.to(dtype)
            rows = F.linear(x.reshape(-1, x.shape[-1]), rounded, None if bias is None else bias.to(dtype))
        # No view: the output of a Function that is one cannot be changed in place.
        y = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
        ctx.save_for_backward(x, rounded)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return (y,) if len(sizes) == 1 else y.split(sizes, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        weight_dtype, bias_dtype = ctx.dtypes
        rows = x.reshape(-1, x.shape[-1])
        given = [None if g is None or not g.numel() else g.reshape(-1, g.shape[-1]) for g in gradients]
        dx = dweight = dbias = None
        with exact(x.device):
            if wants_x:
                dx = _input_gradient(given, weight.split(ctx.sizes), rows).view(x.shape)
            if wants_weight:
                dweight = _weight_gradient(given, ctx.sizes, rows, weight_dtype)
            if wants_bias:
                sums = [rows.new_zeros(n) if g is None else g.sum(0) for g, n in zip(given, ctx.sizes, strict=True)]
                dbias = torch.cat(sums).to(bias_dtype)
        return dx, dweight, dbias, None, None


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        with exact(x.device):
            rounded = weight.to(x.dtype)
            y = F.linear(x, rounded)
        ctx.save_for_backward(x, rounded)
        ctx.weight_dtype = weight.dtype
        ctx.set_materialize_grads(False)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dx, None
        x, weight = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dweight = None
        with exact(x.device):
            if ctx.needs_input_grad[0]:
                dx = g @ weight if dx is None else dx.contiguous().view(rows.shape).addmm_(g, weight)
                dx = dx.view(x.shape)
            if ctx.needs_input_grad[1]:
                dweight = _weight_gradient([g], weight.shape[:1], rows, ctx.weight_dtype)
        return dx, dweight


def _input_gradient(gradients: Sequence[Tensor | None], weights: Sequence[Tensor], rows: Tensor) -> Tensor:
    dx = None
    for g, weight in zip(gradients, weights, strict=True):
        if g is not None:
            dx = g @ weight if dx is None else dx.addmm_(g, weight)
    return torch.zeros_like(rows) if dx is None else dx


def _weight_gradient(
    gradients: Sequence[Tensor | None], sizes: Sequence[int], rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """gᵀ rows of every part g, unrounded in between where ``dtype`` is wider and the device multiplies so."""
    total = torch.empty(sum(sizes), rows.shape[-1], dtype=dtype, device=rows.device)
    for out, g in zip(total.split(sizes), gradients, strict=True):
        if g is None:
            out.zero_()
        elif dtype == rows.dtype:
            torch.mm(g.T, rows, out=out)
        elif out.is_cuda and torch.version.hip is None:
            torch.mm(g.T, rows, out_dtype=dtype, out=out)
        else:
            out.copy_(g.T @ rows)
    return total
