"""The Gluon product of a decode step, run on a CPU by an interpreter of the tests, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mambalm.ops.few_rows import _gluon_kernels as kernels
from tests.helpers import relative_error
from tests.ops import gluon_interpreter

ROWS, COLUMNS = 64, 32


@dataclass
class Descriptor:
    """A tensor as the copy engine reads it, in tiles."""

    base: Tensor
    block_shape: list[int]
    layout: None = None

    def __post_init__(self) -> None:
        self.shape, self.strides, self.dtype = self.base.shape, self.base.stride(), self.base.dtype


@pytest.mark.parametrize(
    ("batch", "outputs", "blocks", "first", "second", "shares", "stages", "bias"),
    [
        (64, 48, 7, 48, 0, 1, 3, True),
        (5, 90, 4, 32, 16, 2, 4, False),  # tiles past the last output, fewer blocks than stages
        (33, 40, 9, 32, 8, 1, 2, True),
        (2, 16, 1, 16, 0, 1, 4, False),
    ],
)
def test_shares_add_up_to_the_product(
    batch: int, outputs: int, blocks: int, first: int, second: int, shares: int, stages: int, bias: bool
) -> None:
    width = blocks * COLUMNS - 8  # the last block is short
    x, weight = torch.randn(batch, width).bfloat16(), torch.randn(outputs, width).bfloat16()
    added = torch.randn(outputs) if bias else None
    y = torch.full((shares, batch, outputs), torch.nan)
    arguments = {
        "x_desc": Descriptor(x, [ROWS, COLUMNS]),
        "first_desc": Descriptor(weight, [first, COLUMNS]),
        "second_desc": Descriptor(weight, [second, COLUMNS]) if second else None,
        "bias": added,
        "y": y,
        "batch": batch,
        "outputs": outputs,
        "blocks": blocks,
        "ROWS": ROWS,
        "FIRST": first,
        "SECOND": second,
        "BLOCK": COLUMNS,
        "STAGES": stages,
        "OVERLAP": True,
    }
    gluon_interpreter.launch(kernels, kernels.project, (-(-outputs // (first + second)), shares), arguments)
    expected = x.double() @ weight.double().T + (0 if added is None else added)
    assert relative_error(y.sum(0), expected) < 1e-6
