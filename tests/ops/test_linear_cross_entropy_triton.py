"""The Triton kernel of the loss, run by Triton's interpreter on a CPU, against the plain implementation in float64."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from mambalm.ops.linear_cross_entropy import portable  # noqa: E402
from mambalm.ops.linear_cross_entropy import triton as backend  # noqa: E402
from tests.helpers import FLOAT32, assert_close  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for Triton's interpreter")


@pytest.mark.parametrize("v", [1, 101, 8192, 17001])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks(v: int, biased: bool) -> None:
    weight, bias = torch.randn(v, 9), torch.randn(v) if biased else None
    if biased and v > 1:
        assert bias is not None
        bias[v // 2] = -torch.inf
    ours = backend.Chunks(6, weight, bias, 0.01)
    exact = portable.Chunks(6, weight.double(), None if bias is None else bias.double(), 0.01)
    for size in (6, 3):
        rows, factor = torch.randn(size, 9), torch.rand(size, 1)
        label = torch.randint(v, (size, 1))
        label[0] = v - 1
        expected = dict(zip("ld", exact.gradients(rows.double(), label, factor.double()), strict=True))
        assert_close(dict(zip("ld", ours.gradients(rows, label, factor), strict=True)), expected, FLOAT32)
        assert_close({"l": ours.losses(rows, label)}, {"l": expected["l"]}, FLOAT32)


def test_a_label_outside_gives_nan() -> None:
    """On a GPU nobody waits for the labels to check them."""
    chunks = backend.Chunks(2, torch.randn(5, 3), None, 0.0)
    losses = chunks.losses(torch.randn(2, 3), torch.tensor([[99], [1]]))
    assert losses.isnan().tolist() == [True, False]
