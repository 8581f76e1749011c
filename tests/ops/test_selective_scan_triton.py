"""The plain Triton kernels of the selective scan, run by Triton's interpreter on a CPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambalm.ops import BackendError, explain, selective_scan  # noqa: E402
from mambalm.ops.selective_scan import _launch  # noqa: E402
from tests.helpers import FLOAT32, assert_close, gradients  # noqa: E402
from tests.ops.test_selective_scan import arguments, output_weights, scan  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for Triton's interpreter")

CASES = [
    (2, 1, 5, 4, 1, None),
    (1, 35, 6, 16, 3, None),
    (3, 17, 4, 5, 2, None),
    (1, 0, 4, 4, 1, None),
    (1, 16, 70, 16, 1, None),
    (1, 3, 2, 256, 1, None),
    (1, 40, 4, 4, 2, [0, 0, 1, 7, 16, 16, 34, 40, 40]),
]


@pytest.mark.parametrize("many", [False, True], ids=["few elements", "many elements"])
@pytest.mark.parametrize(("b", "l", "d", "n", "g", "offsets"), CASES)
def test_against_reference(
    b: int, l: int, d: int, n: int, g: int, offsets: list[int] | None, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        monkeypatch.setattr(_launch, "_MANY_ELEMENTS", 0)
    args = arguments(b, l, d, n, g, rows=None if offsets is None else len(offsets) - 1, dtype=torch.float32)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), {k: t.double() for k, t in args.items()}, weights)
    assert_close(gradients(scan("triton", offsets), args, weights), exact, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Against the reference on the same rounded values: only the outputs are rounded (the interpreter truncates)."""
    args = arguments(1, 20, 6, 4, dtype=dtype)
    weights = output_weights(args)
    exact = gradients(scan("reference"), {k: t.double() for k, t in args.items()}, weights)
    found = gradients(scan("triton"), args, weights)
    assert all(found[f"d{name}"].dtype == t.dtype for name, t in args.items())
    assert_close(found, exact, torch.finfo(dtype).eps)


def test_optional_arguments_left_out() -> None:
    args = arguments(2, 20, 4, 4, dtype=torch.float32)
    few = {name: args[name] for name in ("u", "delta", "A", "B", "C")}
    few["delta"] = few["delta"].abs()
    weights = (torch.randn(2, 20, 4),)

    def run(backend: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: selective_scan(**kwargs, backend=backend)

    exact = gradients(run("reference"), {k: t.double() for k, t in few.items()}, weights)
    assert_close(gradients(run("triton"), few, weights), exact)


def test_strided_inputs() -> None:
    """Views into wider tensors, as a layer's projections give them, and channels that are not the fastest axis."""
    args = arguments(2, 19, 4, 4, 2, dtype=torch.float32)
    strided = dict(args)
    for name in ("u", "z", "B", "C"):
        t = args[name]
        strided[name] = torch.cat([t, torch.full_like(t, torch.nan)], dim=-1)[..., : t.shape[-1]]
    strided["delta"] = args["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(strided[name].is_contiguous() for name in ("u", "delta", "z", "B", "C"))
    found = selective_scan(**strided, delta_softplus=True, backend="triton")
    assert torch.equal(found, selective_scan(**args, delta_softplus=True, backend="triton"))


def test_gradient_through_the_final_state_alone() -> None:
    args = arguments(1, 18, 4, 4, dtype=torch.float32)
    weights = (torch.randn_like(args["initial_state"]),)

    def final(backend: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: scan(backend)(**kwargs)[1]

    exact = gradients(final("reference"), {k: t.double() for k, t in args.items()}, weights)
    assert_close(gradients(final("triton"), args, weights), exact)


def test_more_rows_than_shares() -> None:
    args = arguments(1, 70, 2, 4, rows=70, dtype=torch.float32)
    weights = output_weights(args)
    offsets = list(range(71))
    exact = gradients(scan("reference", offsets), {k: t.double() for k, t in args.items()}, weights)
    assert_close(gradients(scan("triton", offsets), args, weights), exact)


@pytest.mark.parametrize(("change", "message"), [({"n": 257}, "at most 256 states"), ({}, "too coarse for")])
def test_refusals_are_named(change: dict[str, int], message: str) -> None:
    dtype = torch.float32 if change else torch.float64
    reason = explain("selective_scan", "cuda", dtype, **change)["triton"]
    assert reason is not None
    assert message in reason
    args: dict[str, Tensor] = arguments(1, 2, 2, change.get("n", 4), dtype=dtype)
    with pytest.raises(BackendError, match=message):
        selective_scan(**args, backend="triton")
