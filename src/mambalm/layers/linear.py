"""The projections' Linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from mambalm.layers.hooks import hooked, kind_of, sharded
from mambalm.ops.backends import is_plain, needs_grad
from mambalm.ops.linear import linear
from mambalm.ops.linear_parts import linear_beside, linear_parts, product_dtype


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies in the way that is fast on the device; see ``product``."""

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Any:
        """(..., in_features) -> (..., out_features); with ``sizes`` as `in_parts` gives it."""
        if sizes is None:
            return product(x, self.weight, self.bias)
        return _parts(x, self.weight, self.bias, sizes)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k), weight (n, k), bias (n) -> x weightᵀ + bias (..., n); on a CPU see ``mambalm.ops.linear``.

    Autocast on a GPU rounds the weight, not its gradient.
    """
    if x.is_cuda and torch.is_autocast_enabled("cuda") and _is_trained(x, weight, bias):
        return linear_parts(x, weight, bias, weight.shape[:1])[0]
    return linear(x, weight, bias)


def in_parts(projection: nn.Module, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``projection(x).split(sizes, dim=-1)``; on a GPU the backward of a plain projection copies no part's gradient."""
    if x.is_cuda and _is_plain_projection(projection):
        return _parts(x, *_parameters(projection), sizes)
    if x.is_cuda and _is_sharded_projection(projection):
        return projection(x, sizes)
    return projection(x).split(sizes, dim=-1)


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor]:
    fits = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if fits and _is_trained(x, weight, bias):
        return linear_parts(x, weight, bias, sizes)
    return product(x, weight, bias).split(sizes, dim=-1)


def beside(projection: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and ``projection(x)``; on a GPU the backward of a plain projection adds its gradient of x to what x's other
    reader gave, whose backward must have made that for nobody else."""
    if x.is_cuda and _is_plain_projection(projection):
        weight, bias = _parameters(projection)
        fits = x.dtype == product_dtype(x) and (x.dtype == weight.dtype or torch.is_autocast_enabled("cuda"))
        if fits and bias is None and _is_trained(x, weight):
            return linear_beside(x, weight)
    return x, projection(x)


def _is_plain_projection(module: nn.Module) -> TypeGuard[Linear]:
    return type(module) is Linear and not _is_observed(module)


def _is_sharded_projection(module: nn.Module) -> bool:
    plain = kind_of(module) is Linear and not _has_backward_hooks(module)
    return plain and not torch.compiler.is_compiling() and sharded(module)


def _parameters(projection: Linear) -> tuple[Tensor, Tensor | None]:
    return projection.weight, projection.bias


def _is_trained(*tensors: Tensor | None) -> bool:
    return is_plain(*tensors) and needs_grad(*tensors)


def _is_observed(module: nn.Module) -> bool:
    """Whether anybody wants to see the module's call, or its backward."""
    return hooked(module) or _has_backward_hooks(module)


def _has_backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)
