"""The Triton kernels of the causal convolution on a GPU, against the reference in float64."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from mambalm.ops import causal_conv1d
from tests.helpers import FLOAT32, assert_close, assert_no_worse, cu_seqlens, gradients
from tests.ops.test_causal_conv1d import arguments, output_weights

pytestmark = pytest.mark.gpu

CASES = [
    (2, 1, 5, 4, None),
    (3, 257, 70, 4, None),
    (2, 100, 512, 5, None),
    (1, 33, 24, 8, None),
    (2, 19, 260, 2, None),
    (300, 2, 16, 4, None),
    (2, 9, 4, 1, None),
    (2, 0, 4, 3, None),
    (1, 300, 264, 4, [0, 0, 1, 3, 6, 7, 140, 259, 300, 300]),
    (1, 60, 8, 3, list(range(61))),
    (1, 0, 3, 3, [0, 0, 0]),
]


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cuda() for name, t in tensors.items()}


def convolution(backend: str, offsets: list[int] | None = None, activation: str | None = "silu") -> Any:
    packed = None if offsets is None else cu_seqlens(offsets, "cuda")

    def run(**kwargs: Tensor) -> Any:
        return causal_conv1d(
            **kwargs, activation=activation, cu_seqlens=packed, return_final_state=True, backend=backend
        )

    return run


@pytest.mark.parametrize("sizes", [(1536, 128, 128), (256, 64, 64), (128, 0, 40), (128, 128, 128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_parts_where_they_lie(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """The bits that joined gradients give; x is part of wider rows, as in a layer."""
    args = on_gpu(arguments(2, 301, sum(sizes), 4, dtype=dtype))
    args["x"] = torch.cat([args["x"], args["x"]], dim=-1)[..., : sum(sizes)]
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    weights = [torch.randn(2, 301, size, device="cuda", dtype=dtype) for size in sizes]
    options: dict[str, Any] = {"activation": "silu", "backend": "triton"}
    found = torch.autograd.grad(causal_conv1d(**leaves, **options, sizes=sizes), list(leaves.values()), weights)
    joined = torch.cat(weights, dim=-1)
    expected = torch.autograd.grad(causal_conv1d(**leaves, **options), list(leaves.values()), joined)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("b", "l", "d", "k", "offsets"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_against_reference(
    b: int, l: int, d: int, k: int, offsets: list[int] | None, dtype: torch.dtype, activation: str | None
) -> None:
    args = on_gpu(arguments(b, l, d, k, rows=None if offsets is None else len(offsets) - 1, dtype=dtype))
    weights = output_weights(args)
    exact = gradients(convolution("reference", offsets, activation), {n: t.double() for n, t in args.items()}, weights)
    found = gradients(convolution("triton", offsets, activation), args, weights)
    assert {name: found[f"d{name}"].dtype for name in args} == {name: t.dtype for name, t in args.items()}
    if dtype == torch.float32:
        assert_close(found, exact, FLOAT32)
    else:
        assert_no_worse(found, gradients(convolution("reference", offsets, activation), args, weights), exact)


@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 700, 2000]])
def test_a_slice_of_a_projection_is_read_where_it_lies(offsets: list[int] | None) -> None:
    args = on_gpu(arguments(1, 2000, 256, 4, rows=4 if offsets else None, dtype=torch.bfloat16))
    wide = torch.full((1, 2000, 512), torch.nan, device="cuda", dtype=torch.bfloat16)
    wide[..., 256:] = args["x"]
    run = convolution("triton", offsets)
    expected = run(**args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(**(args | {"x": wide[..., 256:]}))
    assert torch.cuda.max_memory_allocated() - before < 1.1 * args["x"].nbytes
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 700, 2000]])
def test_repeated_bit_for_bit_and_captured_in_a_graph(offsets: list[int] | None) -> None:
    """No waiting for the device, forwards or backwards: a capture would refuse it."""
    module = import_module("mambalm.ops.causal_conv1d.triton")
    args = on_gpu(arguments(1, 2000, 264, 4, rows=4 if offsets else None, dtype=torch.bfloat16))
    packed = None if offsets is None else cu_seqlens(offsets, "cuda")
    inputs = (args["x"], args["weight"], args["bias"], True, args["initial_state"], packed)
    dy, dfinal = torch.randn_like(args["x"]), torch.randn_like(args["initial_state"])
    expected = (*module.forward(*inputs), *module.backward(dy, dfinal, *inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = (*module.forward(*inputs), *module.backward(dy, dfinal, *inputs))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    """The end of a long row, forwards and backwards, is that of its last tokens alone behind their state."""
    d, l, tail = 8192, 2**18 + 77, 150
    x = torch.randn(1, l, d, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(d, 4, device="cuda"), torch.randn(d, device="cuda")
    assert x.numel() > 2**31
    module = import_module("mambalm.ops.causal_conv1d.triton")
    state = x[:, -tail - 3 : -tail].transpose(1, 2).contiguous()
    short = (x[:, -tail:], weight, bias, True, state, None)
    y, final = module.forward(x, weight, bias, True, None, None)
    expected, expected_final = module.forward(*short)
    assert torch.equal(y[:, -tail:], expected)
    assert torch.equal(final, expected_final)
    dx = module.backward(y, None, x, weight, bias, True, None, None)[0]
    assert torch.equal(dx[:, -tail:], module.backward(y[:, -tail:], None, *short)[0])
