"""A Mamba block on one token per row and on memory that stays where it is: few kernels, for a captured decode step.

They compute what rms_norm, causal_conv1d and selective_scan compute at length 1, with the projections between them on
weights that are read where they are; states are updated in place. One row takes four kernels a block, which stream the
weights through the registers; several rows take seven, on tensor cores.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mambalm.ops import _triton_step_kernels as kernels
from mambalm.ops.triton_support import on


@dataclass(frozen=True)
class Tiles:
    """How the kernels are cut; measured on an H200 (docs/decisions/decode-step-gpu.md).

    Attributes:
        enter_rows, leave_rows, head_rows, split_rows: rows of a weight per program, for one row of the batch.
        columns: of a weight that a thread block fetches at once.
        warps: of these programs.
        scan_channels, scan_warps: channels and warps of a program of the scan.
        tile, block, stages, batch_warps: rows of a weight, columns at once, depth and warps for several rows.
        split_tile, split_spans, leave_tile, leave_spans: rows and shares of the sum of x_proj, and of out_proj.
        ahead: columns of a weight that a program for several rows has brought near before it needs them; 0: none.
        batch, batch_channels: rows of the batch in a program of the products, channels in one of the scan.
    """

    enter_rows: int = 8
    leave_rows: int = 4
    head_rows: int = 8
    split_rows: int = 16
    columns: int = 512
    warps: int = 8
    scan_channels: int = 32
    scan_warps: int = 4
    tile: int = 64
    block: int = 64
    stages: int = 4
    batch_warps: int = 8
    split_tile: int = 16
    split_spans: int = 8
    leave_tile: int = 64
    leave_spans: int = 4
    batch: int = 64
    batch_channels: int = 64
    ahead: int = 512


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the one in front of it ends: NVIDIA from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@dataclass(frozen=True, eq=False)
class Weights:
    """A Mamba block's parameters as the kernels take them; the projections' and the convolution's as modules have them.

    Attributes:
        norm, eps: weight (D) and eps of the block's norm.
        in_proj, in_bias: (2 d, D) and (2 d) or None.
        conv, conv_bias: (d, k) and (d) or None.
        x_proj: (r + 2 n, d).
        dt_proj, dt_bias: (d, r) and (d).
        rates: A log2(e), float32 (d, n).
        D: (d).
        out_proj, out_bias: (D, d) and (D) or None.
        inner_eps: eps of the norms of Δ, B and C; None without.
    """

    norm: Tensor
    eps: float
    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    rates: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    inner_eps: float | None


class Step:
    """The memory of a step of b rows and the launches on it.

    Attributes:
        x: the residual stream (b, D).
    """

    def __init__(self, batch: int, weights: Weights, stream: torch.dtype, tiles: Tiles | None = None) -> None:
        """Memory for blocks of this block's sizes, the residual stream in the dtype ``stream``."""
        self.tiles = Tiles() if tiles is None else tiles
        self.batch, self.hidden = batch, weights.in_proj.shape[1]
        self.channels, self.width = weights.conv.shape[0], weights.x_proj.shape[0]
        self._device, dtype = weights.in_proj.device, weights.in_proj.dtype
        self._overlap = overlaps(self._device)
        # One more launch attribute, where there is such a thing.
        self._options: dict[str, Any] = {"launch_pdl": True} if self._overlap else {}

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device=self._device)

        self.x = empty(batch, self.hidden, of=stream)
        self._normed = empty(batch, self.hidden)
        self._u, self._z, self._y = (empty(batch, self.channels) for _ in range(3))
        spans = self._spans(self.tiles.split_spans) if batch > 1 else triton.cdiv(self.channels, self._columns())
        self._shares = empty(spans, batch, self.width, of=torch.float32)
        self._leaving = empty(self._spans(self.tiles.leave_spans), batch, self.hidden, of=torch.float32)
        rank, states = weights.dt_proj.shape[1], weights.rates.shape[1]
        self._low, self._BC = empty(batch, rank), empty(batch, 2 * states, of=torch.float32)
        self._steps = empty(1, batch, self.channels, of=torch.float32)
        self._left: tuple[Tensor, Tensor | None] | None = None

    def block(self, weights: Weights, conv: Tensor, ssm: Tensor) -> None:
        """Take x through a block; conv (b, d, k - 1) and ssm (b, d, n) float32 move on."""
        if self.batch == 1:
            self._block_one(weights, conv, ssm)
            return
        tiles = self.tiles
        self._normalise(weights.norm, weights.eps)
        sizes: dict[str, Any] = {"BATCH": self._tile_of_rows(), "BLOCK": tiles.block, "AHEAD": tiles.ahead}
        options = {"num_warps": tiles.batch_warps, "num_stages": tiles.stages}
        self._launch(
            kernels.enter,
            (triton.cdiv(2 * self.channels, tiles.tile), triton.cdiv(self.batch, self._tile_of_rows())),
            *(self._normed, weights.in_proj, weights.in_bias, weights.conv, weights.conv_bias, conv, self._u, self._z),
            *(self.batch, self.channels),
            **sizes,
            **options,
            K=self.hidden,
            TAPS=weights.conv.shape[1],
            TILE=tiles.tile,
        )
        self._split(self._u, weights.x_proj, self._shares, tiles.split_tile)
        self._scan(weights, ssm)
        self._split(self._y, weights.out_proj, self._leaving, tiles.leave_tile)
        self._left = (self._leaving, weights.out_bias)

    def head(self, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
        """logits (1, v) float32 of a single row's x, normalised first."""
        tiles = self.tiles
        self._project(tiles.head_rows, self.x, norm, eps, weight, bias, logits, add=False)

    def normed(self, norm: Tensor, eps: float) -> Tensor:
        """x, normalised (b, D): what a head takes that is a module."""
        self._normalise(norm, eps)
        return self._normed

    def _block_one(self, weights: Weights, conv: Tensor, ssm: Tensor) -> None:
        tiles = self.tiles
        self._launch(
            kernels.enter_one,
            (triton.cdiv(2 * self.channels, tiles.enter_rows),),
            *(self.x, weights.norm, weights.eps, weights.in_proj, weights.in_bias),
            *(weights.conv, weights.conv_bias, conv, self._u, self._z, self.channels),
            K=self.hidden,
            TAPS=weights.conv.shape[1],
            ROWS=tiles.enter_rows,
            BLOCK=self._columns(),
            num_warps=tiles.warps,
        )
        self._launch(
            kernels.split_one,
            (triton.cdiv(self.width, tiles.split_rows), len(self._shares)),
            *(self._u, weights.x_proj, self._shares, self.width),
            K=self.channels,
            ROWS=tiles.split_rows,
            BLOCK=self._columns(),
            num_warps=tiles.warps,
        )
        self._scan_one(weights, ssm)
        self._project(tiles.leave_rows, self._y, None, 0.0, weights.out_proj, weights.out_bias, self.x, add=True)

    def _project(
        self,
        rows: int,
        x: Tensor,
        scale: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        *,
        add: bool,
    ) -> None:
        self._launch(
            kernels.project_one,
            (triton.cdiv(len(weight), rows),),
            *(x, scale, eps, weight, bias, y, len(weight)),
            K=weight.shape[1],
            ROWS=rows,
            BLOCK=self._columns(),
            NORM=scale is not None,
            ADD=add,
            num_warps=self.tiles.warps,
        )

    def _split(self, x: Tensor, weight: Tensor, shares: Tensor, tile: int) -> None:
        tiles = self.tiles
        columns = weight.shape[1]
        span = triton.cdiv(triton.cdiv(columns, len(shares)), tiles.block) * tiles.block
        self._launch(
            kernels.split,
            (triton.cdiv(len(weight), tile), triton.cdiv(self.batch, self._tile_of_rows()), len(shares)),
            *(x, weight, shares, self.batch, len(weight)),
            K=columns,
            SPAN=span,
            TILE=tile,
            BATCH=self._tile_of_rows(),
            BLOCK=tiles.block,
            AHEAD=tiles.ahead,
            num_warps=tiles.batch_warps,
            num_stages=tiles.stages,
        )

    def _scan_one(self, weights: Weights, ssm: Tensor) -> None:
        tiles = self.tiles
        self._launch(
            kernels.scan_one,
            (triton.cdiv(self.channels, tiles.scan_channels),),
            *(self._shares, weights.dt_proj, weights.dt_bias, weights.rates, weights.D, self._u, self._z, ssm),
            *(self._y, weights.inner_eps or 0.0, self.channels),
            **self._lowering(weights),
            BLOCK=tiles.scan_channels,
            num_warps=tiles.scan_warps,
        )

    def _scan(self, weights: Weights, ssm: Tensor) -> None:
        tiles = self.tiles
        states = weights.rates.shape[1]
        self._launch(
            kernels.lower,
            (self.batch,),
            *(self._shares, self._low, self._BC, self.batch, weights.inner_eps or 0.0),
            **self._lowering(weights),
            num_warps=4,
        )
        self._split(self._low, weights.dt_proj, self._steps, tiles.tile)
        self._launch(
            kernels.scan,
            (triton.cdiv(self.channels, tiles.batch_channels), self.batch),
            *(self._steps, self._BC, weights.dt_bias, weights.rates, weights.D, self._u, self._z, ssm),
            *(self._y, self.channels),
            N=states,
            STATES=triton.next_power_of_2(states),
            BLOCK=tiles.batch_channels,
            num_warps=4,
        )

    def _lowering(self, weights: Weights) -> dict[str, Any]:
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

    def _normalise(self, scale: Tensor, eps: float) -> None:
        shares, bias = (self._leaving, None) if self._left is None else self._left
        self._launch(
            kernels.normalise,
            (self.batch,),
            *(self.x, shares, bias, scale, self._normed, eps, self.batch),
            K=self.hidden,
            WIDTH=triton.next_power_of_2(self.hidden),
            SHARES=0 if self._left is None else len(shares),
            num_warps=8,
        )
        self._left = None

    def _columns(self) -> int:
        """Columns at once: no more than the narrowest of the weights that are read row by row has."""
        return min(self.tiles.columns, triton.next_power_of_2(min(self.hidden, self.channels)))

    def _tile_of_rows(self) -> int:
        return min(max(16, triton.next_power_of_2(self.batch)), self.tiles.batch)

    def _spans(self, wanted: int) -> int:
        """Shares of a sum over the channels: no empty one among them."""
        blocks = triton.cdiv(self.channels, self.tiles.block)
        return triton.cdiv(blocks, triton.cdiv(blocks, wanted))

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
        with on(self._device):
            kernel[grid](*arguments, OVERLAP=self._overlap, **meta, **self._options)
