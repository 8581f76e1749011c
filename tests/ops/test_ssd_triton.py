"""The plain Triton kernels of ssd, run by Triton's interpreter on a CPU, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from mambalm.ops import BackendError, explain, ssd  # noqa: E402
from mambalm.ops.ssd import _launch, _triton_kernels  # noqa: E402
from mambalm.ops.ssd import triton as backend  # noqa: E402
from tests.helpers import FLOAT32, assert_close, gradients, relative_error  # noqa: E402
from tests.ops.ssd_helpers import TOKENS, arguments, doubled, only_y, output_weights, scan, without_states  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for Triton's interpreter")

CASES = [
    (2, 1, 2, 3, 5, 1, None),
    (2, 35, 4, 5, 16, 2, None),
    (1, 16, 2, 40, 20, 1, None),  # two blocks of channels
    (1, 3, 1, 1, 200, 1, None),
    (1, 0, 4, 3, 4, 1, None),
    (1, 40, 2, 4, 4, 2, [0, 0, 1, 7, 16, 16, 34, 40, 40]),
    (1, 0, 2, 4, 4, 1, [0, 0]),
    (1, 0, 2, 4, 4, 1, [0]),
]


@pytest.mark.parametrize(("b", "l", "h", "p", "n", "g", "offsets"), CASES)
def test_against_reference(b: int, l: int, h: int, p: int, n: int, g: int, offsets: list[int] | None) -> None:
    args = arguments(b, l, h, p, n, g, rows=None if offsets is None else len(offsets) - 1, dtype=torch.float32)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), doubled(args), weights)
    assert_close(gradients(scan("triton", offsets), args, weights), exact, FLOAT32)


@pytest.mark.parametrize("offsets", [None, [0, 100, 128, 250]])
def test_rows_cut_into_segments(offsets: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What long rows at small batch do: all segments side by side, from the states that the others hand on."""
    monkeypatch.setattr(_launch.Problem, "segments", lambda self: 4)
    args = arguments(1, 250, 2, 4, 4, rows=3 if offsets else None, dtype=torch.float32)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), doubled(args), weights)
    assert_close(gradients(scan("triton", offsets), args, weights), exact, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Against the reference on the same rounded values: only the outputs are rounded (the interpreter truncates)."""
    args = arguments(1, 20, 2, 6, 4, dtype=dtype)
    weights = output_weights(args)
    exact = gradients(scan("reference"), doubled(args), weights)
    found = gradients(scan("triton"), args, weights)
    assert all(found[f"d{name}"].dtype == t.dtype for name, t in args.items())
    assert_close(found, exact, torch.finfo(dtype).eps)


@triton.jit
def product_of_rounded(a, b, PRECISION):  # type: ignore[no-untyped-def]
    """The interpreter multiplies no bfloat16, but rounds to it, towards zero."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32))


@pytest.mark.parametrize(("l", "offsets"), [(1, None), (150, None), (150, [0, 0, 70, 150])])
@pytest.mark.parametrize("gate", [True, False])
def test_gradients_of_parameters_with_operands_in_bfloat16(
    l: int, offsets: list[int] | None, gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roundings as on a GPU, even coarser ones: the gradients of A, the bias and the initial state hardly notice."""
    monkeypatch.setattr(_triton_kernels, "product", product_of_rounded)
    monkeypatch.setattr(_launch, "operands", lambda dtype: (tl.bfloat16, "ieee"))
    args = arguments(1, l, 4, 20, 24, 2, rows=3 if offsets else None, dtype=torch.bfloat16)
    weights = output_weights(args)
    if not gate:
        del args["z"]
    exact = gradients(scan("reference", offsets), doubled(args), weights)
    rounded = gradients(scan("reference", offsets), args, weights)
    found = gradients(scan("triton", offsets), args, weights)
    for name in ("dA", "ddt_bias", "dinitial_state"):
        allowed = max(1.2 * relative_error(rounded[name], exact[name]), 3e-4)
        assert relative_error(found[name], exact[name]) <= allowed, name


@pytest.mark.parametrize("packed", [False, True])
def test_optional_arguments_left_out(packed: bool) -> None:
    offsets = [0, 7, 20] if packed else [0, 20]
    args, weights = without_states(arguments(1, 20, 2, 4, 4, dtype=torch.float32))
    few = {name: args[name] for name in ("x", "dt", "A", "B", "C")}
    exact = gradients(only_y("reference", offsets), doubled(few), weights)
    assert_close(gradients(only_y("triton", offsets), few, weights), exact)


def test_skip_weights_of_channels_and_limits_of_steps() -> None:
    args = arguments(2, 20, 2, 40, 4, dtype=torch.float32)
    args["D"] = torch.randn(2, 40)
    weights = output_weights(args)
    options = {"dt_limit": (0.5, 0.9)}
    exact = gradients(scan("reference", **options), doubled(args), weights)
    found = gradients(scan("triton", **options), args, weights)
    assert_close(found, exact)
    assert 0 < (found["ddt"] == 0).sum() < found["ddt"].numel()


def test_small_steps_beside_large_ones() -> None:
    args = arguments(1, 100, 2, 4, 4, dtype=torch.float32)
    args["dt"] = torch.where(torch.rand(1, 100, 2) < 0.1, 3000.0, 1e-4)
    weights = output_weights(args)
    options = {"dt_softplus": False, "chunk_size": 64}
    exact = gradients(scan("reference", **options), doubled(args), weights)
    assert_close(gradients(scan("triton", **options), args, weights), exact)


def test_strided_inputs() -> None:
    """Views into wider tensors, as a layer's projections give them, and channels that are not the fastest axis."""
    args = arguments(2, 19, 2, 4, 4, 2, dtype=torch.float32)
    strided = dict(args)
    for name in ("x", "z", "B"):
        t = args[name].flatten(-2)
        strided[name] = torch.cat([t, torch.full_like(t, torch.nan)], dim=-1)[..., : t.shape[-1]].unflatten(
            -1, args[name].shape[2:]
        )
    strided["C"] = args["C"].transpose(2, 3).contiguous().transpose(2, 3)
    strided["dt"] = args["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(strided[name].is_contiguous() for name in TOKENS)
    found, state = scan("triton")(**strided)
    expected, expected_state = scan("triton")(**args)
    assert torch.equal(found, expected)
    assert torch.equal(state, expected_state)


def test_gradient_through_the_final_state_alone() -> None:
    args = arguments(1, 18, 2, 4, 4, dtype=torch.float32)
    weights = (torch.randn_like(args["initial_state"]),)

    def final(backend: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: scan(backend)(**kwargs)[1]

    exact = gradients(final("reference"), doubled(args), weights)
    assert_close(gradients(final("triton"), args, weights), exact)


def test_a_document_does_not_see_its_neighbours() -> None:
    args = arguments(1, 30, 2, 4, 4, rows=3, dtype=torch.float32)
    run = scan("triton", [0, 5, 20, 30])
    y, state = run(**args)
    poisoned = {n: t.index_fill(1, torch.arange(5, 20), math.nan) if n in TOKENS else t for n, t in args.items()}
    y_poisoned, state_poisoned = run(**poisoned)
    for piece in (slice(0, 5), slice(20, 30)):
        assert torch.equal(y_poisoned[:, piece], y[:, piece])
    assert torch.equal(state_poisoned[[0, 2]], state[[0, 2]])


def test_one_step_takes_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a step needs no chunks")

    monkeypatch.setattr(backend, "_launch_scan", never)
    args = arguments(3, 1, 4, 5, 7, 2, dtype=torch.float32)
    y, state = scan("triton")(**args)
    expected, expected_state = scan("reference")(**doubled(args))
    assert_close({"y": y, "state": state}, {"y": expected, "state": expected_state})


@pytest.mark.parametrize(("change", "message"), [({"n": 257}, "at most 256 states"), ({}, "too coarse for")])
def test_refusals_are_named(change: dict[str, int], message: str) -> None:
    dtype = torch.float32 if change else torch.float64
    reason = explain("ssd", "cuda", dtype, **change)["triton"]
    assert reason is not None
    assert message in reason
    args = arguments(1, 2, 2, 2, change.get("n", 4), dtype=dtype)
    with pytest.raises(BackendError, match=message):
        ssd(**args, backend="triton")


def test_gluon_says_why_not() -> None:
    reason = explain("ssd", "cuda", torch.bfloat16)["gluon"]
    assert reason == "Gluon does not run in Triton's interpreter"
