"""Mamba and Mamba-2 blocks on one token per row: few kernels on memory that stays where it is, for a captured step.

They compute what rms_norm, causal_conv1d and selective_scan or ssd compute at length 1, with the projections between
them on weights that are read where they are; states are updated in place. One row takes four kernels a block in Mamba,
three in Mamba-2. Several rows take eight (four of them matrix products) and five or six (two).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mambalm.ops import _triton_step_kernels as kernels
from mambalm.ops.triton_steps import Stream


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """What the blocks of both kinds have; the parameters are as modules have them.

    Attributes:
        norm, eps: weight (D) and eps of the block's norm.
        in_proj, in_bias: (r, D) and (r) or None.
        conv, conv_bias: (c, k) and (c) or None.
        out_proj, out_bias: (D, d) and (D) or None.
    """

    norm: Tensor
    eps: float
    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None

    @property
    def widths(self) -> set[int]:
        """Of the projections that are read row by row."""
        return {self.in_proj.shape[1], self.out_proj.shape[1]}


@dataclass(frozen=True, eq=False)
class MambaWeights(BlockWeights):
    """A Mamba block's parameters as the kernels take them; r = 2 d, c = d.

    Attributes:
        x_proj: (r + 2 n, d).
        dt_proj, dt_bias: (d, r) and (d).
        rates: A log2(e), float32 (d, n).
        D: (d).
        inner_eps: eps of the norms of Δ, B and C; None without.
    """

    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    rates: Tensor
    D: Tensor
    inner_eps: float | None


@dataclass(frozen=True, eq=False)
class Mamba2Weights(BlockWeights):
    """A Mamba-2 block's parameters as the kernels take them; in_proj makes z (d), x, B and C (c = d + 2 g n), dt (h).

    Attributes:
        dt_bias, rates: float32 (h), the second A log2(e).
        D: float32 (d).
        groups, states: g and n.
        dt_limit: the range of the step sizes.
        gate_norm, gate_eps: weight (d) and eps of the norm after the gate; None without.
    """

    dt_bias: Tensor
    rates: Tensor
    D: Tensor
    groups: int
    states: int
    dt_limit: tuple[float, float]
    gate_norm: Tensor | None
    gate_eps: float


class MambaStep:
    """The memory of Mamba blocks of these sizes, and the launches on it."""

    def __init__(self, stream: Stream, weights: MambaWeights) -> None:
        self._stream = stream
        channels, self._width = weights.conv.shape[0], weights.x_proj.shape[0]
        rank, states = weights.dt_proj.shape[1], weights.rates.shape[1]
        self._channels = channels
        self._inner = stream.empty(2 * channels)
        self._u, self._y = stream.empty(channels), stream.empty(channels)
        if stream.batch == 1:
            shape = (triton.cdiv(channels, stream.columns), 1, self._width)
            self._shares = torch.empty(shape, dtype=torch.float32, device=stream.device)
            return
        self._shares = stream.shares(weights.x_proj)
        self._low, self._steps = stream.empty(rank), stream.empty(channels)
        self._BC = stream.empty(2 * states, dtype=torch.float32)

    def __call__(self, weights: MambaWeights, conv: Tensor, ssm: Tensor) -> None:
        """Take the stream through a block; conv, memory (b, k - 1, d), and ssm (b, d, n) float32 move on."""
        stream = self._stream
        if stream.batch == 1:
            z = self._inner[:, : self._channels]
            enter_one(stream, weights, conv, self._u, z, 0)
            self._split_one(weights)
            self._scan_one(weights, z, ssm)
        else:
            z = self._inner[:, self._channels :]
            stream.enter(weights.norm, weights.eps, weights.in_proj, weights.in_bias, self._inner)
            convolve(stream, weights, conv, self._inner, self._u)
            stream.project_shares(self._u, weights.x_proj, self._shares)
            self._scan(weights, z, ssm)
        stream.leave(self._y, weights.out_proj, weights.out_bias)

    def _split_one(self, weights: MambaWeights) -> None:
        stream = self._stream
        stream.launch(
            kernels.split_one,
            (triton.cdiv(self._width, stream.tiles.split_rows), len(self._shares)),
            *(self._u, weights.x_proj, self._shares, self._width),
            K=self._channels,
            ROWS=stream.tiles.split_rows,
            BLOCK=stream.columns,
            num_warps=stream.tiles.warps,
        )

    def _scan_one(self, weights: MambaWeights, z: Tensor, ssm: Tensor) -> None:
        tiles = self._stream.tiles
        self._stream.launch(
            kernels.scan_one,
            (triton.cdiv(self._channels, tiles.scan_channels),),
            *(self._shares, weights.dt_proj, weights.dt_bias, weights.rates, weights.D, self._u, z, ssm),
            *(self._y, weights.inner_eps or 0.0, self._channels),
            **self._lowering(weights),
            BLOCK=tiles.scan_channels,
            num_warps=tiles.scan_warps,
        )

    def _scan(self, weights: MambaWeights, z: Tensor, ssm: Tensor) -> None:
        lowering, stream = self._lowering(weights), self._stream
        block = stream.tiles.batch_channels
        stream.launch(
            kernels.lower,
            (stream.batch,),
            *(self._shares, self._low, self._BC, stream.batch, weights.inner_eps or 0.0),
            **lowering,
            num_warps=4,
        )
        stream.project(self._low, weights.dt_proj, self._steps)
        stream.launch(
            kernels.scan,
            (triton.cdiv(self._channels, block), stream.batch),
            *(self._steps, self._BC, weights.dt_bias, weights.rates, weights.D, self._u, z, ssm),
            *(self._y, self._channels, z.stride(0)),
            N=lowering["N"],
            STATES=lowering["STATES"],
            BLOCK=block,
            num_warps=4,
        )

    def _lowering(self, weights: MambaWeights) -> dict[str, Any]:
        rank, states = weights.dt_proj.shape[1], weights.rates.shape[1]
        return {
            "N": states,
            "STATES": triton.next_power_of_2(states),
            "RANK": rank,
            "K": triton.next_power_of_2(rank),
            "SHARES": len(self._shares),
            "MOST": triton.next_power_of_2(len(self._shares)),
            "NORM": weights.inner_eps is not None,
        }


class Mamba2Step:
    """The memory of Mamba-2 blocks of these sizes, and the launches on it."""

    def __init__(self, stream: Stream, weights: Mamba2Weights) -> None:
        self._stream = stream
        (rows, _), mixed = weights.in_proj.shape, weights.conv.shape[0]
        self._channels = channels = weights.D.shape[0]
        # One row's convolved part is written beside the rest, several rows' behind their products.
        self._inner = stream.empty(rows if stream.batch > 1 else rows - mixed)
        self._xBC, self._y = stream.empty(mixed), stream.empty(channels)

    def __call__(self, weights: Mamba2Weights, conv: Tensor, ssm: Tensor) -> None:
        """Take the stream through a block; conv, memory (b, k - 1, c), and ssm (b, h, p, n) float32 move on."""
        stream, d = self._stream, self._channels
        z, dt = self._inner[:, :d], self._inner[:, -len(weights.rates) :]
        if stream.batch == 1:
            enter_one(stream, weights, conv, self._xBC, self._inner, d)
        else:
            stream.enter(weights.norm, weights.eps, weights.in_proj, weights.in_bias, self._inner)
            convolve(stream, weights, conv, self._inner[:, d:], self._xBC)
        self._heads(weights, z, dt, ssm)
        norm, eps = weights.gate_norm, weights.gate_eps
        if norm is not None and weights.groups > 1:
            stream.normalise_groups(self._y, norm, eps, weights.groups)
            norm = None
        stream.leave(self._y, weights.out_proj, weights.out_bias, norm, eps)

    def _heads(self, weights: Mamba2Weights, z: Tensor, dt: Tensor, ssm: Tensor) -> None:
        heads = len(weights.rates)
        channels, states = self._channels // heads, triton.next_power_of_2(weights.states)
        block = max(min(self._stream.tiles.head_cells // states, triton.next_power_of_2(channels)), 1)
        self._stream.launch(
            kernels.heads,
            (heads * triton.cdiv(channels, block), self._stream.batch),
            *(self._xBC, z, dt, weights.dt_bias, weights.rates, weights.D, ssm, self._y, *weights.dt_limit),
            *(heads, heads // weights.groups, channels, z.stride(0)),
            N=weights.states,
            STATES=states,
            BLOCK=block,
            num_warps=4,
        )


def enter_one(stream: Stream, weights: BlockWeights, conv: Tensor, u: Tensor, rest: Tensor, first: int) -> None:
    """The one row's in_proj, of which the rows from ``first`` on pass the convolution into u, and the others go to
    ``rest``."""
    rows = stream.tiles.enter_rows
    channels, taps = weights.conv.shape
    stream.launch(
        kernels.enter_one,
        (triton.cdiv(len(weights.in_proj), rows),),
        *(stream.x, weights.norm, weights.eps, weights.in_proj, weights.in_bias),
        *(weights.conv, weights.conv_bias, conv, u, rest, len(weights.in_proj), first, channels),
        K=weights.in_proj.shape[1],
        TAPS=taps,
        ROWS=rows,
        BLOCK=stream.columns,
        num_warps=stream.tiles.warps,
    )


def convolve(stream: Stream, weights: BlockWeights, conv: Tensor, x: Tensor, y: Tensor) -> None:
    """y (b, c) of the first c channels of x, whose rows may lie apart."""
    block = stream.tiles.conv_channels
    channels, taps = weights.conv.shape
    stream.launch(
        kernels.convolve,
        (triton.cdiv(channels, block), stream.batch),
        *(x, weights.conv, weights.conv_bias, conv, y, channels, x.stride(0)),
        TAPS=taps,
        BLOCK=block,
        num_warps=4,
    )
