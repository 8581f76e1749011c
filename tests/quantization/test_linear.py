"""The quantised Linear and the products under it, beside the weight that the packed one stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mambalm.ops.numba_team import JobList, Team
from mambalm.quantization import products
from mambalm.quantization.linear import QuantizedLinear
from tests.helpers import FLOAT32, relative_error

# x is rounded to 16 bits of its largest value where it meets packed weights.
ROUNDED_X = 1e-4


def linear(out_features: int, in_features: int, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=bias)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(10, 64), (7, 96), (1, 1), (200, 256)])
@torch.no_grad()
def test_few_rows_and_many_rows_are_the_unpacked_weight(shape: tuple[int, int], bits: int) -> None:
    quantized = QuantizedLinear.of(linear(*shape), bits)
    weight = quantized.packed.unpack().double()
    assert quantized.bias is not None
    for rows in (0, 1, 3, 20):
        x = torch.randn(2, rows, shape[1])
        expected = x.double() @ weight.T + quantized.bias
        assert relative_error(quantized(x), expected) < ROUNDED_X
        assert relative_error(quantized(x.bfloat16()), expected) < 1e-2
        assert quantized(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_zero_and_an_outlier() -> None:
    quantized = QuantizedLinear.of(linear(8, 128, bias=False), 4)
    assert not quantized(torch.zeros(1, 128)).any()
    x = torch.randn(1, 128)
    x[0, 5] = 1000.0
    expected = x.double() @ quantized.packed.unpack().double().T
    assert relative_error(quantized(x), expected) < ROUNDED_X


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_what_is_not_finite_does_not_get_lost(value: float) -> None:
    x = torch.randn(1, 64)
    x[0, 3] = value
    assert QuantizedLinear.of(linear(8, 64), 8)(x).isnan().all()


def test_gradients_flow_to_the_input() -> None:
    quantized = QuantizedLinear.of(linear(10, 64), 8)
    x = torch.randn(1, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(quantized(x).sum(), x)
    assert relative_error(gradient[0], quantized.packed.unpack().sum(0)) < FLOAT32
    assert not [parameter for parameter in quantized.parameters() if parameter.requires_grad]


def test_a_cast_of_the_model_leaves_the_packed_weight_alone() -> None:
    quantized = QuantizedLinear.of(linear(10, 64), 8)
    before = quantized.packed.unpack()
    assert torch.equal(quantized.to(torch.float64).packed.unpack(), before)
    assert quantized.scales.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 16), (7, 48), (130, 96)])
@pytest.mark.parametrize(("threads", "rows"), [(1, 1), (3, 1), (1, 3), (3, 6)])
def test_a_product_is_the_weight_times_x(dtype: torch.dtype, shape: tuple[int, int], threads: int, rows: int) -> None:
    weight, bias, x, y = (
        torch.randn(shape).to(dtype),
        torch.randn(shape[0]),
        torch.randn(rows, shape[1] + 16)[:, :-16],  # the rows need not lie side by side
        torch.randn(rows, shape[0]),
    )
    expected = x.double() @ weight.double().T + bias
    added = y.double() + x.double() @ weight.double().T
    out = torch.empty_like(y)
    jobs = JobList([*products.plain(weight, bias, x, out), *products.plain(weight, None, x, y, added=True)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        jobs.run(Team())
    finally:
        torch.set_num_threads(before)
    assert relative_error(out, expected) < FLOAT32
    assert relative_error(y, added) < FLOAT32


def test_weights_that_no_product_reads_are_named() -> None:
    assert products.refuses(torch.randn(4, 16)) is None
    assert "float16" in str(products.refuses(torch.randn(4, 16).half()))
    assert "columns" in str(products.refuses(torch.randn(4, 17)))
    assert "contiguous" in str(products.refuses(torch.randn(16, 32).T))
