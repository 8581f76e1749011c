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
from torch import Tensor

GROUP = 64
ROWS = 4
BITS = {"int8": 8, "int4": 4}
# Inputs are padded to a multiple of this.
MULTIPLE = {8: GROUP, 4: 2 * GROUP}
_WORDS = 32  # int16 words of a vector


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
            values = ((self.values.unsqueeze(-2) >> _shifts(self.values.device)) & 15).sub_(
                8
            )  # (blocks, G / 2, ROWS, 4, 32)
            values = values.unflatten(-2, (2, 2)).flatten(-2)  # (..., 2, GROUP)
        else:
            values = self.values
        weight = values.to(dtype).mul_(self.scales[..., None].to(dtype))
        rows = weight.transpose(1, 2).reshape(weight.shape[0] * ROWS, -1)
        return rows[: self.out_features, : self.in_features]


def pack(values: Tensor, scales: Tensor, bits: int, out_features: int, in_features: int) -> Packed:
    """Lay out integers (rows, groups, GROUP) and scales (rows, groups), rows and groups already padded."""
    blocks = values.unflatten(0, (-1, ROWS)).transpose(1, 2)  # (blocks, G, ROWS, GROUP)
    scales = scales.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()  # (blocks, G, ROWS)
    if bits == 8:
        return Packed(blocks.contiguous(), scales, bits, out_features, in_features)
    halves = blocks.unflatten(1, (-1, 2)).transpose(2, 3)  # (blocks, G / 2, ROWS, 2, GROUP)
    nibbles = halves.unflatten(-1, (2, _WORDS)).flatten(-3, -2).to(torch.int16) + 8  # (..., 4, 32)
    words = (nibbles << _shifts(values.device)).sum(
        -2, dtype=torch.int16
    )  # the bits do not overlap, the highest is the sign
    return Packed(words, scales.unflatten(1, (-1, 2)).transpose(2, 3).contiguous(), bits, out_features, in_features)


def _shifts(device: torch.device) -> Tensor:
    """Where the nibbles of a word lie, (4, 1)."""
    return torch.arange(0, 16, 4, dtype=torch.int16, device=device)[:, None]
