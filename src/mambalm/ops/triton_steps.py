"""A Mamba block on one token per row and on memory that stays where it is: few kernels, for a captured decode step.

They compute what rms_norm, causal_conv1d and selective_scan compute at length 1, with the projections between them on
weights that are read where they are; states are updated in place. One row takes four kernels a block, which stream the
weights through the registers. Several rows take nine, four of them the library's matrix products.
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
        enter_rows, leave_rows, head_rows, split_rows: rows of in_proj, out_proj, the head and x_proj per program.
        columns: of a weight that a program fetches at once.
        warps: of these programs.
        scan_channels, scan_warps: channels and warps of a program of the scan.
        batch_channels: channels of a program of the scan, for several rows.
        conv_channels: channels of a program of the convolution, for several rows.
    """

    enter_rows: int = 4
    leave_rows: int = 2
    head_rows: int = 8
    split_rows: int = 16
    columns: int = 512
    warps: int = 4
    scan_channels: int = 32
    scan_warps: int = 4
    batch_channels: int = 64
    conv_channels: int = 256


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

    def __init__(self, batch: int, weights: Weights, stream: torch.dtype) -> None:
        """Memory for blocks of this block's sizes, the residual stream in the dtype ``stream``."""
        self._tiles = Tiles()
        self.batch, self._hidden = batch, weights.in_proj.shape[1]
        self._channels, self._width = weights.conv.shape[0], weights.x_proj.shape[0]
        self._device, dtype = weights.in_proj.device, weights.in_proj.dtype
        self._overlap = overlaps(self._device)
        # One more launch attribute, where there is such a thing.
        self._options: dict[str, Any] = {"launch_pdl": True} if self._overlap else {}
        # Columns at once: no more than the narrowest of the weights that are read row by row has.
        self._columns = min(self._tiles.columns, triton.next_power_of_2(min(self._hidden, self._channels)))
        rank, states = weights.dt_proj.shape[1], weights.rates.shape[1]

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device=self._device)

        self.x = empty(batch, self._hidden, of=stream)
        self._inner = empty(batch, 2 * self._channels)
        self._z = self._inner[:, self._channels :]
        self._u, self._y = empty(batch, self._channels), empty(batch, self._channels)
        if batch == 1:
            self._shares = empty(triton.cdiv(self._channels, self._columns), 1, self._width, of=torch.float32)
            return
        self._shares = empty(1, batch, self._width)
        self._normed, self._branch = empty(batch, self._hidden), empty(batch, self._hidden)
        self._low, self._steps = empty(batch, rank), empty(batch, self._channels)
        self._BC = empty(batch, 2 * states, of=torch.float32)
        # Whether the branch is still to be added to the stream, and with which bias.
        self._left, self._left_bias = False, weights.out_bias

    def block(self, weights: Weights, conv: Tensor, ssm: Tensor) -> None:
        """Take x through a block; conv (b, d, k - 1) and ssm (b, d, n) float32 move on."""
        if self.batch == 1:
            self._enter_one(weights, conv)
            self._scan_one(weights, ssm)
            leave = (self._y, None, 0.0, weights.out_proj, weights.out_bias, self.x)
            self._project_one(self._tiles.leave_rows, *leave, add=True)
            return
        self._normalise(weights.norm, weights.eps)
        self._enter(weights, conv)
        torch.mm(self._u, weights.x_proj.t(), out=self._shares[0])
        self._scan(weights, ssm)
        torch.mm(self._y, weights.out_proj.t(), out=self._branch)
        self._left, self._left_bias = True, weights.out_bias

    def head(self, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
        """logits (b, v) float32 of x, normalised first."""
        if self.batch == 1:
            self._project_one(self._tiles.head_rows, self.x, norm, eps, weight, bias, logits, add=False)
            return
        self._normalise(norm, eps)
        logits.copy_(torch.nn.functional.linear(self._normed, weight, bias))

    def _enter_one(self, weights: Weights, conv: Tensor) -> None:
        tiles = self._tiles
        self._launch(
            kernels.enter_one,
            (triton.cdiv(2 * self._channels, tiles.enter_rows),),
            *(self.x, weights.norm, weights.eps, weights.in_proj, weights.in_bias),
            *(weights.conv, weights.conv_bias, conv, self._u, self._z, self._channels),
            K=self._hidden,
            TAPS=weights.conv.shape[1],
            ROWS=tiles.enter_rows,
            BLOCK=self._columns,
            num_warps=tiles.warps,
        )
        self._launch(
            kernels.split_one,
            (triton.cdiv(self._width, tiles.split_rows), len(self._shares)),
            *(self._u, weights.x_proj, self._shares, self._width),
            K=self._channels,
            ROWS=tiles.split_rows,
            BLOCK=self._columns,
            num_warps=tiles.warps,
        )

    def _project_one(
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
            BLOCK=self._columns,
            NORM=scale is not None,
            ADD=add,
            num_warps=self._tiles.warps,
        )

    def _scan_one(self, weights: Weights, ssm: Tensor) -> None:
        tiles = self._tiles
        self._launch(
            kernels.scan_one,
            (triton.cdiv(self._channels, tiles.scan_channels),),
            *(self._shares, weights.dt_proj, weights.dt_bias, weights.rates, weights.D, self._u, self._z, ssm),
            *(self._y, weights.inner_eps or 0.0, self._channels),
            **self._lowering(weights),
            BLOCK=tiles.scan_channels,
            num_warps=tiles.scan_warps,
        )

    def _enter(self, weights: Weights, conv: Tensor) -> None:
        torch.mm(self._normed, weights.in_proj.t(), out=self._inner)
        if weights.in_bias is not None:
            self._inner.add_(weights.in_bias)
        self._launch(
            kernels.convolve,
            (triton.cdiv(self._channels, self._tiles.conv_channels), self.batch),
            *(self._inner, weights.conv, weights.conv_bias, conv, self._u, self._channels),
            TAPS=weights.conv.shape[1],
            BLOCK=self._tiles.conv_channels,
            num_warps=4,
        )

    def _scan(self, weights: Weights, ssm: Tensor) -> None:
        lowering, block = self._lowering(weights), self._tiles.batch_channels
        self._launch(
            kernels.lower,
            (self.batch,),
            *(self._shares, self._low, self._BC, self.batch, weights.inner_eps or 0.0),
            **lowering,
            num_warps=4,
        )
        torch.mm(self._low, weights.dt_proj.t(), out=self._steps)
        self._launch(
            kernels.scan,
            (triton.cdiv(self._channels, block), self.batch),
            *(self._steps, self._BC, weights.dt_bias, weights.rates, weights.D, self._u, self._z, ssm),
            *(self._y, self._channels, self._z.stride(0)),
            N=lowering["N"],
            STATES=lowering["STATES"],
            BLOCK=block,
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
        self._launch(
            kernels.normalise,
            (self.batch,),
            *(self.x, self._branch if self._left else None, self._left_bias, scale, self._normed, eps),
            K=self._hidden,
            WIDTH=triton.next_power_of_2(self._hidden),
            num_warps=8,
        )
        self._left = False

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
        with on(self._device):
            kernel[grid](*arguments, OVERLAP=self._overlap, **meta, **self._options)
