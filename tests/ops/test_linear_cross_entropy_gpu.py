"""The loss on a GPU, its Triton kernel between products in half precision, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch

from mambalm.ops import linear_cross_entropy
from tests.helpers import FLOAT32, assert_close, assert_no_worse, gradients
from tests.ops.test_linear_cross_entropy import (
    REDUCTIONS,
    arguments,
    labels_for,
    ours,
    output_weights,
    reference,
    torchs,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("v", [101, 5003, 50280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [8, None])
def test_against_torch(reduction: str, v: int, dtype: torch.dtype, chunk_size: int | None) -> None:
    args = {name: t.cuda() for name, t in arguments(3, 33, 64, v=v, dtype=dtype).items()}
    labels = labels_for(args["x"].cpu(), v).cuda()
    weights = [t.cuda() for t in output_weights(labels.cpu(), reduction)]
    exact = gradients(torchs(labels, reduction), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(ours(labels, reduction, chunk_size=chunk_size), args, weights)
    if dtype == torch.float32:
        assert_close(found, exact, FLOAT32)
    else:
        assert_no_worse(found, gradients(torchs(labels, reduction), args, weights), exact)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str) -> None:
    """float32 weights meet bfloat16 activations: one rounding of the weights, float32 from there on."""
    args = {name: t.cuda() for name, t in arguments(200, 64, v=1001, dtype=torch.float32).items()}
    args["x"] = args["x"].bfloat16()
    labels = torch.randint(1001, (200,), device="cuda")
    weights = [t.cuda() for t in output_weights(labels.cpu(), reduction)]
    rounded = {name: t.bfloat16().double() if name == "weight" else t.double() for name, t in args.items()}
    exact = gradients(torchs(labels, reduction), rounded, weights)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = gradients(ours(labels, reduction), args, weights)
    assert found["dweight"].dtype == found["dbias"].dtype == torch.float32
    assert_close(found, exact, 2 * torch.finfo(torch.bfloat16).eps)
    assert_close({"loss": found["out0"]}, {"loss": exact["out0"]}, FLOAT32)


def test_more_than_2_to_the_31_logits_at_once() -> None:
    """One chunk of so many, whose last rows begin behind 2^31: losses and gradients are those of small chunks."""
    n, v = 2**16 + 5, 2**15 + 9
    assert n * v > 2**31
    args = {name: t.cuda() for name, t in arguments(n, 64, v=v, dtype=torch.bfloat16).items() if name != "bias"}
    labels = torch.randint(v, (n,), device="cuda")
    one, many = (gradients(ours(labels, "sum", chunk_size=size), args, [torch.ones(())]) for size in (n, 4096))
    assert_close(one, many, torch.finfo(torch.bfloat16).eps)
    assert_close({"dx": one["dx"][-200:]}, {"dx": many["dx"][-200:]}, torch.finfo(torch.bfloat16).eps)
    losses = linear_cross_entropy(*args.values(), labels, reduction="none", chunk_size=n)
    last = slice(n - 200, n)
    exact = reference(args["x"][last].double(), args["weight"].double(), labels[last], None, 0.0, "none")
    assert_close({"losses": losses[last]}, {"losses": exact}, FLOAT32)
