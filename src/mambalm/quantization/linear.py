"""A Linear whose weight is packed in 8 or 4 bits. numba is imported by the first call that needs it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mambalm.ops.backends import is_plain, needs_grad
from mambalm.ops.linear import linear
from mambalm.quantization.layout import Packed

if TYPE_CHECKING:
    from mambalm.ops.numba_team import Team

# Up to so many rows of x are multiplied with the packed weight; beyond, unpacking it once is cheaper.
_FEW = 4


@functools.cache
def _team() -> Team:
    from mambalm.ops.numba_team import Team

    return Team()


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + bias with W in 8 or 4 bits, activations in their own dtype; on a CPU.

    One row, or a few, multiply the packed weight. More rows, and calls that autograd records, unpack it into x's dtype
    for a common matrix product; gradients flow to x only.

    Args:
        weight: packed.
        bias: (out_features), kept as it is.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, weight: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.out_features, self.in_features = weight.bits, weight.out_features, weight.in_features
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, bits: int) -> QuantizedLinear:
        """The quantised form of a Linear.

        Raises:
            ValueError: see ``quantize``.
        """
        from mambalm.quantization.schemes import quantize

        return cls(quantize(linear.weight, bits), linear.bias)

    @property
    def packed(self) -> Packed:
        """The weight."""
        return Packed(self.values, self.scales, self.bits, self.out_features, self.in_features)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # `model.to(dtype)` is about activations: the scales stay what the values were rounded with.
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        from mambalm.ops.numba_team import JobList
        from mambalm.quantization import products

        plain = x.device.type == "cpu" and is_plain(x) and not needs_grad(x)
        rows = x.numel() // self.in_features
        if not plain or rows > _FEW or x.dtype == torch.float64:
            fast = plain and x.dtype in (torch.float32, torch.bfloat16)
            weight = products.unpack(self.packed, x.dtype) if fast else self.packed.unpack(x.dtype)
            return linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        inputs = x.reshape(rows, self.in_features).float().contiguous()
        y = torch.empty(rows, self.out_features)
        JobList(products.packed(self.packed, self.bias, inputs, y)).run(_team())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sizes, for print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"
