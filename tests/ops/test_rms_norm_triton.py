"""The Triton kernels of the normalisation, run by Triton's interpreter on a CPU, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from mambalm.ops import BackendError, explain, rms_norm  # noqa: E402
from tests.helpers import FLOAT32, assert_close, gradients  # noqa: E402
from tests.ops.test_rms_norm import VARIANTS, arguments, norm, output_weights  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for Triton's interpreter")


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 15), (15,), (0, 15), (3, 1, 5, 105), (300, 15), (3, 1530), (2, 1260)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_reference(variant: str, shape: tuple[int, ...], weight: bool) -> None:
    args = arguments(variant, *shape, weight=weight, dtype=torch.float32)
    weights = output_weights(variant, args["x"])
    exact = gradients(norm(variant, "reference"), {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(norm(variant, "triton"), args, weights), exact, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["plain", "gate and groups", "first residual in float32"])
def test_half_precision_is_computed_in_float32(variant: str, dtype: torch.dtype) -> None:
    """Against the reference on the same rounded values: only the outputs are rounded (the interpreter truncates)."""
    args = arguments(variant, 7, 15, dtype=dtype)
    weights = output_weights(variant, args["x"])
    exact = gradients(norm(variant, "reference"), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(norm(variant, "triton"), args, weights)
    assert {name: found[f"d{name}"].dtype for name in args} == {name: t.dtype for name, t in args.items()}
    assert_close(found, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs(variant: str) -> None:
    """Rows inside wider rows, as a projection's parts are, and channels that are not side by side."""
    args = arguments(variant, 3, 4, 15, dtype=torch.float32)
    expected = norm(variant, "triton")(**args)
    inside: dict[str, Any] = {name: torch.cat([t, t * torch.nan], dim=-1)[..., :15] for name, t in args.items()}
    apart: dict[str, Any] = {name: torch.stack([t, t * torch.nan], dim=-1)[..., 0] for name, t in args.items()}
    for strided in (inside, apart):
        found = norm(variant, "triton")(**strided)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_tiles_than_programs() -> None:
    """A program of the backward goes on to a next tile, and the sum over programs is complete."""
    args = arguments("plain", 2500, 256, dtype=torch.float32)
    weights = output_weights("plain", args["x"])

    def run(backend: str) -> Any:
        return lambda **kwargs: rms_norm(**kwargs, group_size=4, backend=backend)

    exact = gradients(run("reference"), {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(run("triton"), args, weights), exact, FLOAT32)


def test_refusals_are_named() -> None:
    assert "groups of at most 65536 channels" in str(explain("rms_norm", "cuda", d=2**17, g=1)["triton"])
    with pytest.raises(BackendError, match="too coarse"):
        rms_norm(torch.zeros(2, 4, dtype=torch.float64), backend="triton")
