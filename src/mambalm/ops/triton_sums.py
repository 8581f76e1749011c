"""The second stage of gradients on a GPU: what programs left as shares is added up in a fixed order, by one launch."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambalm.ops.triton_support import ceil_div, launch, on

# Elements of a program, shares that it loads together, and its warps.
_BLOCK, _ROWS, _WARPS = 512, 16, 4
_MOST = 5


@triton.jit
def sum_rows(block, shares, total, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of ``total`` (size), the sum over the rows of ``shares`` (rows, size)."""
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (column < size)
        sums += tl.sum(tl.load(shares + row.to(tl.int64) * size + column, mask=there, other=0.0), axis=0)
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + column, sums.to(total.dtype.element_ty), mask=column < size)


@triton.jit
def sum_shares(  # type: ignore[no-untyped-def]
    shares0, shares1, shares2, shares3, shares4,
    total0, total1, total2, total3, total4,
    rows0, rows1, rows2, rows3, rows4,
    size0, size1, size2, size3, size4,
    end0, end1, end2, end3,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to five sums; those of number i are the programs up to ``end``i. A size of zero has none."""
    block = tl.program_id(0)
    if block < end0:
        sum_rows(block, shares0, total0, rows0, size0, ROWS, BLOCK)
    elif block < end1:
        sum_rows(block - end0, shares1, total1, rows1, size1, ROWS, BLOCK)
    elif block < end2:
        sum_rows(block - end1, shares2, total2, rows2, size2, ROWS, BLOCK)
    elif block < end3:
        sum_rows(block - end2, shares3, total3, rows3, size3, ROWS, BLOCK)
    else:
        sum_rows(block - end3, shares4, total4, rows4, size4, ROWS, BLOCK)


def sums(shares: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Of each (rows, ...) the sum over the rows (...), in the dtype given; None stays None.

    At most five contiguous float32 tensors. The order of summation depends on the shape alone.
    """
    there = [t for t in shares if t is not None]
    totals = [
        None if t is None else torch.empty(t.shape[1:], dtype=dtype, device=t.device)
        for t, dtype in zip(shares, dtypes, strict=True)
    ]
    found = [t for t in totals if t is not None]
    if not there:
        return totals
    padding = _MOST - len(there)
    sizes = [t.numel() for t in found] + [0] * padding
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + ceil_div(size, _BLOCK))
    arguments: dict[str, Any] = {f"shares{i}": t for i, t in enumerate(there + there[:1] * padding)}
    arguments |= {f"total{i}": t for i, t in enumerate(found + found[:1] * padding)}
    arguments |= {f"rows{i}": n for i, n in enumerate([t.shape[0] for t in there] + [0] * padding)}
    arguments |= {f"size{i}": n for i, n in enumerate(sizes)} | {f"end{i}": n for i, n in enumerate(ends[1:])}
    if ends[-1]:
        with on(there[0].device):
            launch(sum_shares, ends[-1], arguments | {"ROWS": _ROWS, "BLOCK": _BLOCK}, {"num_warps": _WARPS})
    return totals
