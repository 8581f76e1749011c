"""One token per row on memory that stays where it is: what the steps of all kinds of blocks share, for a captured step.

A block reads the residual stream by a norm and a projection, and adds what another projection makes. One row takes
kernels that stream the weights through the registers; several rows take products of our own on Hopper (`few_rows`),
else the library's, and what a block adds is added by the next norm. `triton_mamba_steps` has what is between the
projections.
"""

import functools
import math
from collections.abc import Iterable
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
        columns, wide_columns: of a weight that a program fetches at once; the wide ones where they divide all weights.
        warps: of these programs.
        scan_channels, scan_warps: channels and warps of a program of the scan.
        batch_channels: channels of a program of the scan, for several rows.
        conv_channels: channels of a program of the convolution and of an MLP's gate, for several rows.
        head_cells: of the states of a Mamba-2 head, per program.
    """

    enter_rows: int = 4
    leave_rows: int = 2
    head_rows: int = 8
    split_rows: int = 16
    columns: int = 512
    wide_columns: int = 1024
    warps: int = 4
    scan_channels: int = 32
    scan_warps: int = 4
    batch_channels: int = 64
    conv_channels: int = 256
    head_cells: int = 2048

    def columns_of(self, widths: Iterable[int]) -> int:
        """Columns at once for weights of these widths, read row by row.

        Wide ones halve the passes over a row, and what is past its end costs as much as what is in it.
        """
        common = math.gcd(*widths)
        if common % self.wide_columns == 0:
            return self.wide_columns
        return min(self.columns, triton.next_power_of_2(min(widths)))


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the one in front of it ends: NVIDIA from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def _own_products(batch: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The module whose products several rows take; None: the library's."""
    try:
        from mambalm.ops.few_rows import gluon
    except ImportError:
        return None
    return gluon if gluon.unsupported(batch, device, dtype) is None else None


class Stream:
    """The residual stream of b rows, and what reads it and adds to it.

    Attributes:
        x: the residual stream (b, D); of several rows without what the latest block adds.
        tiles, batch, device, dtype: how kernels are cut; rows; where; of the weights and of what is between them.
        columns: of a weight that a program fetches at once.
    """

    def __init__(
        self, batch: int, width: int, dtype: torch.dtype, stream: torch.dtype, device: torch.device, widths: set[int]
    ) -> None:
        """Memory for a residual stream in the dtype ``stream``, beside weights (r, w) of the given ``widths`` w."""
        self.tiles = Tiles()
        self.batch, self.device, self.dtype = batch, device, dtype
        self.columns = self.tiles.columns_of(widths)
        self._overlap = overlaps(device)
        self.x = torch.empty(batch, width, dtype=stream, device=device)
        if batch > 1:
            self._own = _own_products(batch, device, dtype)
            self._normed = self.empty(width)
            self._branches: dict[torch.Size, Tensor] = {}
            # What is still to be added to the stream, and with which bias.
            self._left: Tensor | None = None
            self._left_bias: Tensor | None = None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory (b, *shape)."""
        return torch.empty(self.batch, *shape, dtype=dtype or self.dtype, device=self.device)

    def enter(self, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """y (b, r) of x, normalised, by a projection (r, D)."""
        if self.batch == 1:
            self._project_one(self.tiles.enter_rows, self.x, norm, eps, weight, bias, y, add=False)
            return
        self._normalise(norm, eps)
        self.project(self._normed, weight, y, bias)

    def leave(
        self, y: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None = None, eps: float = 0.0
    ) -> None:
        """Add to x what a projection (D, r) makes of y (b, r), which is normalised first if there is a norm."""
        if self.batch == 1:
            self._project_one(self.tiles.leave_rows, y, norm, eps, weight, bias, self.x, add=True)
            return
        if norm is not None:
            self.normalise_groups(y, norm, eps, 1)
        if weight.shape not in self._branches:
            self._branches[weight.shape] = self.shares(weight)
        self._left, self._left_bias = self._branches[weight.shape], bias
        self.project_shares(y, weight, self._left)

    def head(self, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
        """logits (b, v) float32 of x, normalised first."""
        if self.batch == 1:
            self._project_one(self.tiles.head_rows, self.x, norm, eps, weight, bias, logits, add=False)
            return
        self._normalise(norm, eps)
        logits.copy_(torch.nn.functional.linear(self._normed, weight, bias))

    def project(self, x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
        """y (b, r) of several rows x (b, k) by a projection (r, k)."""
        if self._own is not None and self._own.takes(weight):
            with on(self.device):
                self._own.project(x, weight, bias, y, self._own.cut_of(weight, 1), self._overlapping())
            return
        torch.mm(x, weight.t(), out=y)
        if bias is not None:
            y.add_(bias)

    def shares(self, weight: Tensor) -> Tensor:
        """Memory for the shares (s, b, r) of several rows' product by a projection (r, k)."""
        if self._own is None or not self._own.takes(weight):
            return self.empty(len(weight))[None]
        shape = (self._own.cut_of(weight).shares, self.batch, len(weight))
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def project_shares(self, x: Tensor, weight: Tensor, shares: Tensor) -> None:
        """What is to be summed to several rows' x (b, k) by a projection (r, k)."""
        if self._own is None or not self._own.takes(weight):
            self.project(x, weight, shares[0])
            return
        with on(self.device):
            self._own.project(x, weight, None, shares, self._own.cut_of(weight), self._overlapping())

    def normalise_groups(self, y: Tensor, scale: Tensor, eps: float, groups: int) -> None:
        """Normalise y (b, r) in place, group by group of its channels."""
        size = y.shape[1] // groups
        self._normalise_into(y, None, None, scale, y, eps, size, groups)

    def _normalise(self, scale: Tensor, eps: float) -> None:
        self._normalise_into(self.x, self._left, self._left_bias, scale, self._normed, eps, self.x.shape[1], 1)
        self._left = self._left_bias = None

    def _normalise_into(
        self,
        x: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        y: Tensor,
        eps: float,
        size: int,
        groups: int,
    ) -> None:
        self.launch(
            kernels.normalise,
            (self.batch, groups),
            *(x, branch, bias, scale, y, eps),
            K=size,
            WIDTH=triton.next_power_of_2(size),
            SHARES=1 if branch is None else len(branch),
            num_warps=8,
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
        self.launch(
            kernels.project_one,
            (triton.cdiv(len(weight), rows),),
            *(x, scale, eps, weight, bias, y, len(weight)),
            K=weight.shape[1],
            ROWS=rows,
            BLOCK=self.columns,
            NORM=scale is not None,
            ADD=add,
            num_warps=self.tiles.warps,
        )

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
        """Launch a kernel of `_triton_step_kernels`."""
        with on(self.device):
            kernel[grid](*arguments, **meta, **self._overlapping())

    def _overlapping(self) -> dict[str, Any]:
        """How kernels are launched: with one more launch attribute, where there is such a thing."""
        return {"OVERLAP": True, "launch_pdl": True} if self._overlap else {"OVERLAP": False}


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """A gated MLP and the norm before it.

    Attributes:
        norm, eps: weight (D) and eps of the norm.
        fc1, bias1: (2 w, D) and (2 w) or None.
        fc2, bias2: (D, w) and (D) or None.
    """

    norm: Tensor
    eps: float
    fc1: Tensor
    bias1: Tensor | None
    fc2: Tensor
    bias2: Tensor | None

    @property
    def widths(self) -> set[int]:
        """Of the projections that are read row by row."""
        return {self.fc1.shape[1], self.fc2.shape[1]}


class MLPStep:
    """The memory of gated MLPs of these sizes, and the launches on it."""

    def __init__(self, stream: Stream, weights: MLPWeights) -> None:
        self._stream, width = stream, weights.fc2.shape[1]
        self._inner, self._y = stream.empty(2 * width), stream.empty(width)

    def __call__(self, weights: MLPWeights) -> None:
        """Take the stream through an MLP."""
        stream, width, block = self._stream, self._y.shape[1], self._stream.tiles.conv_channels
        stream.enter(weights.norm, weights.eps, weights.fc1, weights.bias1, self._inner)
        grid = (triton.cdiv(width, block), stream.batch)
        stream.launch(kernels.gate, grid, self._inner, self._y, width, BLOCK=block, num_warps=4)
        stream.leave(self._y, weights.fc2, weights.bias2)
