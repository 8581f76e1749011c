"""The Triton kernels of the normalisation on a GPU, against the reference in float64."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from mambalm.ops import rms_norm
from tests.helpers import FLOAT32, assert_close, assert_no_worse, gradients
from tests.ops.test_rms_norm import VARIANTS, arguments, norm, output_weights

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 3, 15), (15,), (0, 15), (1000, 15), (2, 70, 1920), (9, 5120), (7, 2550), (2, 20010)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_reference(variant: str, dtype: torch.dtype, shape: tuple[int, ...], weight: bool) -> None:
    if "groups" in variant and shape[-1] % 15:
        pytest.skip("the groups do not fit")
    args = {name: t.cuda() for name, t in arguments(variant, *shape, weight=weight, dtype=dtype).items()}
    weights = output_weights(variant, args["x"])
    exact = gradients(norm(variant, "reference"), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(norm(variant, "triton"), args, weights)
    assert {name: found[f"d{name}"].dtype for name in args} == {name: t.dtype for name, t in args.items()}
    if dtype == torch.float32:
        assert_close(found, exact, FLOAT32)
    else:
        assert_no_worse(found, gradients(norm(variant, "reference"), args, weights), exact)


@pytest.mark.parametrize("d", [768, 2560, 33])
def test_gradients_of_a_half_precision_branch_and_a_float32_stream(d: int) -> None:
    """The two are one sum, which each has in its own dtype."""
    args = {name: t.cuda() for name, t in arguments("residual", 300, d, dtype=torch.float32).items()}
    args["x"] = args["x"].bfloat16()
    weights = output_weights("residual", args["x"])
    weights[0] = weights[0].bfloat16().to(weights[0].dtype)
    exact = gradients(norm("residual", "reference"), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(norm("residual", "triton"), args, weights)
    assert torch.equal(found["dx"], found["dresidual"].bfloat16())
    close = ("dresidual", "dweight", "out1")
    assert_close({name: found[name] for name in close}, {name: exact[name] for name in close}, FLOAT32)


@pytest.mark.parametrize("variant", ["plain", "gate and groups", "residual in float32"])
def test_repeated_bit_for_bit_and_captured_in_a_graph(variant: str) -> None:
    module = import_module("mambalm.ops.rms_norm.triton")
    args: dict[str, Any] = {n: t.cuda() for n, t in arguments(variant, 2000, 768, dtype=torch.bfloat16).items()}
    options = (1e-5, VARIANTS[variant].get("group_size", 768))
    given = [args.get(name) for name in ("x", "weight", "gate")]

    def both() -> tuple[Any, ...]:
        y, stream = module.forward(*given, args.get("residual"), *options, torch.float32)
        source = stream if stream.numel() else args["x"]
        return y, stream, *module.backward(y, None, source, *given[1:], *options, torch.bfloat16)

    expected = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    graph.replay()
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("d", [768, 2560, 33])
def test_a_stream_that_is_not_kept_changes_no_bit(d: int) -> None:
    """Nor does it matter that the sum is given, with nothing to add: the layers compute the norm again so."""
    x, residual = torch.randn(300, d, device="cuda").bfloat16(), torch.randn(300, d, device="cuda")
    weight = torch.randn(d, device="cuda")
    y, stream = rms_norm(x, weight, residual=residual, backend="triton")
    nothing = x.new_zeros(d).expand(x.shape)
    again = rms_norm(nothing, weight, residual=stream, return_residual=False, backend="triton")
    assert isinstance(again, torch.Tensor)
    assert torch.equal(y, again)


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows, forwards and backwards, are those of the same rows alone; x is half of wider rows."""
    module = import_module("mambalm.ops.rms_norm.triton")
    wide = torch.randn(2**19 + 3, 8192, device="cuda", dtype=torch.bfloat16)
    x = wide[:, 4096:]
    weight = torch.randn(4096, device="cuda")
    assert wide.numel() > 2**31
    y, _ = module.forward(x, weight, None, None, 1e-5, 4096, torch.float32)
    dx = module.backward(x, None, x, weight, None, 1e-5, 4096)[0]
    last = x[-50:].clone()
    assert torch.equal(y[-50:], module.forward(last, weight, None, None, 1e-5, 4096, torch.float32)[0])
    assert torch.equal(dx[-50:], module.backward(last, None, last, weight, None, 1e-5, 4096)[0])
