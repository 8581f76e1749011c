"""Sums over shares: interpreted on a CPU, by the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from mambalm.ops.triton_sums import sums  # noqa: E402
from tests.helpers import FLOAT32, assert_close  # noqa: E402

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
if triton.knobs.runtime.interpret:
    DEVICES.append(pytest.param("cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_against_torch(device: str) -> None:
    shapes = [(1, 7, 3), (40, 2, 600), (37, 513), (2, 0), (16, 1)]
    shares = [torch.randn(shape, device=device) for shape in shapes]
    dtypes = [torch.float32] * 3 + [torch.bfloat16, torch.float32]
    found = sums(shares, dtypes)
    assert [t.dtype for t in found if t is not None] == dtypes
    named = {str(shape): t for shape, t in zip(shapes, found, strict=True) if t is not None and t.numel()}
    exact = {str(tuple(t.shape)): t.double().sum(0) for t in shares if t.numel()}
    assert_close(named, exact, FLOAT32)


@pytest.mark.parametrize("device", DEVICES)
def test_absent_ones_stay_absent(device: str) -> None:
    shares = torch.randn(3, 1000, device=device)
    found = sums([None, shares, None], [torch.float32] * 3)
    assert found[0] is None
    assert found[2] is None
    assert found[1] is not None
    assert_close({"sum": found[1]}, {"sum": shares.double().sum(0)}, FLOAT32)
    assert sums([None], [torch.float32]) == [None]
