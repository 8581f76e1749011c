"""Products of few rows on a Hopper GPU, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_no_worse

pytestmark = pytest.mark.gpu
few_rows = pytest.importorskip("mambalm.ops.few_rows.gluon")
HALVES = (torch.bfloat16, torch.float16)
# outputs, width: projections of mamba-2.8b, falcon-mamba-7b, mamba2-2.7b and mamba-130m, ragged ends
SIZES = ((10240, 2560), (2560, 5120), (192, 5120), (5120, 160), (288, 8192), (4096, 8192), (10576, 2560), (80, 1536))
SIZES += ((50, 40), (777, 1000))


def product(batch: int, outputs: int, width: int, dtype: torch.dtype, most_shares: int, bias: bool) -> Tensor:
    """What the kernel leaves in memory full of NaN, beside torch in that dtype and in float64; its shares."""
    generator = torch.Generator("cuda").manual_seed(outputs + width + batch)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    x, weight, shift = some(batch, width), some(outputs, width), some(outputs) if bias else None
    chosen = few_rows.cut_of(weight, most_shares)
    single = most_shares == 1
    shape = (batch, outputs) if single else (chosen.shares, batch, outputs)
    y = torch.full(shape, torch.nan, dtype=dtype if single else torch.float32, device="cuda")
    few_rows.project(x, weight, shift, y, chosen, {"OVERLAP": False})
    found = y if single else y.sum(0).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if shift is None else shift.double())
    rounded = torch.nn.functional.linear(x, weight, shift)
    assert_no_worse({"y": found}, {"y": rounded}, {"y": exact})
    return y


@pytest.fixture(autouse=True)
def hopper() -> None:
    if (reason := few_rows.unsupported(64, torch.device("cuda", 0), torch.bfloat16)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("most_shares", [1, 16])
@pytest.mark.parametrize("sizes", SIZES)
def test_against_float64(sizes: tuple[int, int], most_shares: int) -> None:
    first = product(64, *sizes, torch.bfloat16, most_shares, bias=most_shares == 1)
    assert torch.equal(first, product(64, *sizes, torch.bfloat16, most_shares, bias=most_shares == 1))


@pytest.mark.parametrize("batch", [2, 3, 8, 33])
@pytest.mark.parametrize("dtype", HALVES)
def test_few_rows(batch: int, dtype: torch.dtype) -> None:
    for most_shares in (1, 16):
        product(batch, 777, 1000, dtype, most_shares, bias=False)


def test_cuts_use_the_device() -> None:
    for outputs, width in SIZES[:6]:
        for most in (1, 16):
            chosen = few_rows.cut(outputs, width, most, 132)
            assert -(-outputs // (chosen.first + chosen.second)) * chosen.shares <= 132
