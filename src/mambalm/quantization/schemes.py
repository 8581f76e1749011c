"""Weights in 8 and 4 bits: symmetric, one bfloat16 scale for each group of 64 neighbouring inputs of an output.

The packed layouts are those that the kernels read from one end to the other. Rows come in blocks of ROWS, and of each
block all rows of one vector of inputs lie side by side:

- 8 bits: (blocks, groups, ROWS, 64) int8, scales (blocks, groups, ROWS);
- 4 bits: (blocks, groups / 2, ROWS, 32) int16, of which word j holds inputs j, 32 + j, 64 + j and 96 + j of 128, the
  first in the lowest bits, each plus 8; scales (blocks, groups / 2, ROWS, 2).

Rows and inputs past the weight's are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
ROWS = 4
BITS = {"int8": 8, "int4": 4}
_LARGEST = {8: 127, 4: 7}
_ROWS_AT_ONCE = 128  # quantised at a time: what is computed on the way stays in cache
_WORDS = 32  # int16 words of a vector
# Inputs are padded to a multiple of this.
MULTIPLE = {8: GROUP, 4: 2 * GROUP}
# Fewer steps between 0 and the largest weight waste its range, more clip it: which is best depends on the group.
_STEPS_TRIED = {8: (127.0,), 4: (7.0, -8.0, 8.0, -7.0)}


@dataclass(frozen=True)
class Packed:
    """A weight (out_features, in_features) in 8 or 4 bits; layouts above."""

    values: Tensor
    scales: Tensor
    bits: int
    out_features: int
    in_features: int

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the packed values stand for, in ``dtype``."""
        if self.bits == 4:
            values = ((self.values.unsqueeze(-2) >> _shifts(torch.int16)) & 15).sub_(8)  # (blocks, G / 2, ROWS, 4, 32)
            values = values.unflatten(-2, (2, 2)).flatten(-2)  # (..., 2, GROUP)
        else:
            values = self.values
        weight = values.to(dtype).mul_(self.scales[..., None].to(dtype))
        rows = weight.transpose(1, 2).reshape(weight.shape[0] * ROWS, -1)
        return rows[: self.out_features, : self.in_features]


def quantize(weight: Tensor, bits: int) -> Packed:
    """Round a weight (out_features, in_features) to the nearest multiples of its groups' scales.

    In 4 bits the scale of a group is the one of least squared error among those that map its largest weight to the
    ends of the range.

    Raises:
        ValueError: bits is neither 8 nor 4, or the weight is not finite.
    """
    if bits not in _LARGEST:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight has values that are not finite, which no scale can represent")
    out_features, in_features = weight.shape
    padding = (0, -in_features % MULTIPLE[bits], 0, -out_features % ROWS)
    rows = F.pad(weight.detach(), padding).split(_ROWS_AT_ONCE)
    values, scales = (torch.cat(parts) for parts in zip(*(_packed_rows(part, bits) for part in rows), strict=True))
    return Packed(values, scales, bits, out_features, in_features)


def _packed_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values and scales as they lie in memory, of rows that make whole blocks."""
    values, scales = _nearest(rows.float().unflatten(1, (-1, GROUP)), bits)
    blocks = values.unflatten(0, (-1, ROWS)).transpose(1, 2)  # (blocks, G, ROWS, GROUP)
    scales = scales.to(torch.bfloat16).unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()  # (blocks, G, ROWS)
    if bits == 8:
        return blocks.to(torch.int8).contiguous(), scales
    halves = blocks.unflatten(1, (-1, 2)).transpose(2, 3)  # (blocks, G / 2, ROWS, 2, GROUP)
    nibbles = halves.unflatten(-1, (2, _WORDS)).flatten(-3, -2).to(torch.int32) + 8  # (..., 4, 32)
    words = (nibbles << _shifts(torch.int32)).sum(-2, dtype=torch.int32).to(torch.int16)  # the highest bit wraps
    return words, scales.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def _shifts(dtype: torch.dtype) -> Tensor:
    """Where the nibbles of a word lie, (4, 1)."""
    return torch.arange(0, 16, 4, dtype=dtype)[:, None]


def _nearest(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers as floats (r, G, GROUP) and scales (r, G) of weights (r, G, GROUP)."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for steps in _STEPS_TRIED[bits]:
        # The scale as it will be read back: rounding it later would be an error of its own.
        scale = (extreme / steps).to(torch.bfloat16).float()
        lowest = -_LARGEST[bits] - (bits == 4)
        values = (groups / scale.where(scale != 0, 1)).round_().clamp_(lowest, _LARGEST[bits])
        error = (values * scale - groups).square_().sum(-1, keepdim=True)
        if best is None:
            best = error, values, scale
        else:
            better = error < best[0]
            new = (error, values, scale)
            best = tuple(a.where(better, b) for a, b in zip(new, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2].squeeze(-1)
