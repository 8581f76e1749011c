"""Products of a few rows with a weight, for a captured step on a Hopper GPU."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mambalm.ops import gluon_support
from mambalm.ops.few_rows import _gluon_kernels as kernels
from mambalm.ops.gluon_support import gl
from mambalm.ops.triton_support import ceil_div, processors

# Columns at once; bytes of shared memory for what is copied in ahead, the rest being for the kernel before; registers a
# thread, as many as leave room for that kernel.
_COLUMNS, _SHARED, _REGISTERS = 64, 204 * 1024, 96
_MOST_ROWS, _MOST_SHARES = 64, 8
_WIDTHS = (8, 16, 32, 64, 128)
# What an output's share costs a program, in bytes, once it is written.
_SHARE = 8


@dataclass(frozen=True)
class Cut:
    """How a product is cut into programs.

    Attributes:
        first, second: outputs of a program, as two tiles, of which the second may be 0.
        shares: parts of the sum, by as many programs.
        stages: blocks of columns that are copied in ahead.
    """

    first: int
    second: int
    shares: int
    stages: int


def unsupported(batch: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no product of so many rows can run here; None if they can."""
    if not 1 < batch <= _MOST_ROWS or dtype not in (torch.bfloat16, torch.float16):
        return f"it takes 2 to {_MOST_ROWS} rows in half precision"
    return gluon_support.unsupported(device, lambda capability: capability == (9, 0), "9.0")


def takes(weight: Tensor) -> bool:
    """Whether the copy engine can read a weight (r, k), and a program on each multiprocessor is enough for it."""
    dense = weight.is_contiguous() and len(weight) > 1 and weight.shape[1] % 8 == 0 and weight.data_ptr() % 16 == 0
    return dense and cut(*weight.shape, 1, processors(weight.device)) is not None


@functools.cache
def cut(outputs: int, width: int, most_shares: int, programs: int) -> Cut | None:
    """The cut of a product by (outputs, width) for so many multiprocessors: a program on each, with the fewest bytes.

    Those are its tiles of the weight and of x, what it writes, and what the shares cost until they are summed.
    None if there are more outputs than that.
    """
    blocks, best, least = ceil_div(width, _COLUMNS), None, 0
    for first in _WIDTHS:
        for second in (0, *(other for other in _WIDTHS if other < first)):
            tiles = ceil_div(outputs, first + second)
            shares = min(programs // tiles, blocks, most_shares)
            if not shares:
                continue
            per_share = ceil_div(blocks, shares)
            read = per_share * _COLUMNS * 2 * (first + second + _MOST_ROWS)
            moved = read + _MOST_ROWS * (first + second) * (2 if most_shares == 1 else 4) + _SHARE * shares * outputs
            if best is None or moved < least:
                best, least = (first, second, shares, per_share), moved
    if best is None:
        return None
    first, second, shares, per_share = best
    stage = (first + second + _MOST_ROWS) * _COLUMNS * 2
    return Cut(first, second, shares, min(per_share, _SHARED // stage))


def cut_of(weight: Tensor, most_shares: int = _MOST_SHARES) -> Cut:
    """The cut of the product by a weight (r, k) on its device."""
    chosen = cut(*weight.shape, most_shares, processors(weight.device))
    assert chosen is not None, "it takes the weight"
    return chosen


def project(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, chosen: Cut, options: dict[str, Any]) -> None:
    """Write x (b, k) times a weight (r, k), transposed, to y: the shares (s, b, r) of the ``chosen`` cut, or (b, r)."""
    outputs, width = weight.shape
    kernels.project[(ceil_div(outputs, chosen.first + chosen.second), chosen.shares)](
        _tiles(x, _MOST_ROWS, _COLUMNS),
        _tiles(weight, chosen.first, _COLUMNS),
        _tiles(weight, chosen.second, _COLUMNS) if chosen.second else None,
        bias,
        y,
        len(x),
        outputs,
        ceil_div(width, _COLUMNS),
        ROWS=_MOST_ROWS,
        FIRST=chosen.first,
        SECOND=chosen.second,
        BLOCK=_COLUMNS,
        STAGES=chosen.stages,
        num_warps=4,
        maxnreg=_REGISTERS,
        **options,
    )


def _tiles(t: Tensor, *shape: int) -> TensorDescriptor:
    """A tensor for the copy engine, in tiles whose lines have at most 128 bytes."""
    width = min(shape[-1] * t.element_size(), 128)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * t.element_size(), rank=t.ndim)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(shape), layout)
