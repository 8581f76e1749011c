"""The Triton kernels of the causal convolution, run by Triton's interpreter on a CPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambalm.ops import BackendError, causal_conv1d, explain  # noqa: E402
from tests.helpers import FLOAT32, assert_close, cu_seqlens, gradients  # noqa: E402
from tests.ops.test_causal_conv1d import arguments, convolution, output_weights  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for Triton's interpreter")

CASES = [
    (2, 1, 5, 4, None),
    (2, 21, 6, 4, None),
    (2, 2, 4, 5, None),
    (1, 11, 3, 8, None),
    (2, 9, 3, 1, None),
    (2, 0, 4, 3, None),
    (0, 7, 4, 3, None),
    (1, 40, 5, 4, [0, 0, 1, 3, 6, 7, 30, 39, 40, 40]),
    (1, 33, 3, 2, [0, 33]),
    (1, 10, 2, 4, list(range(11))),
    (1, 0, 3, 3, [0, 0, 0]),
    (1, 0, 3, 3, [0]),
]


@pytest.mark.parametrize(("b", "l", "d", "k", "offsets"), CASES)
def test_against_reference(b: int, l: int, d: int, k: int, offsets: list[int] | None) -> None:
    args = arguments(b, l, d, k, rows=None if offsets is None else len(offsets) - 1, dtype=torch.float32)
    weights = output_weights(args)
    exact = gradients(convolution("reference", offsets), {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(convolution("triton", offsets), args, weights), exact, FLOAT32)


@pytest.mark.parametrize("unused", [(), (0,), (1, 2)])
@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [((128, 2, 3), None), ((128, 128, 5), [0, 3, 3, 8]), ((0, 128, 1), None), ((2, 4, 3), None), ((128,) * 4, None)],
)
def test_gradients_of_parts_where_they_lie(
    sizes: tuple[int, ...], offsets: list[int] | None, unused: tuple[int, ...]
) -> None:
    """On the borders of blocks, within them, and more than are read apart."""
    args = arguments(1, 8, sum(sizes), 4, rows=None if offsets is None else len(offsets) - 1, dtype=torch.float32)
    y_weight, *rest = output_weights(args)
    for part, use in zip(y_weight.split(sizes, dim=-1), range(len(sizes)), strict=True):
        part.mul_(use not in unused)
    packed = None if offsets is None else cu_seqlens(offsets)

    def parts(**kwargs: Tensor) -> Tensor:
        options = {"activation": "silu", "cu_seqlens": packed, "return_final_state": True, "backend": "triton"}
        found, final_state = causal_conv1d(**kwargs, **options, sizes=sizes)
        weights = y_weight.split(sizes, dim=-1)
        used = [(y * w).sum() for i, (y, w) in enumerate(zip(found, weights, strict=True)) if i not in unused]
        return sum(used) + (final_state * rest[0]).sum()

    leaves = {name: t.clone().requires_grad_() for name, t in args.items()}
    found = torch.autograd.grad(parts(**leaves), list(leaves.values()))
    exact = gradients(convolution("reference", offsets), {n: t.double() for n, t in args.items()}, (y_weight, *rest))
    names = [f"d{name}" for name in leaves]
    assert_close(dict(zip(names, found, strict=True)), {name: exact[name] for name in names}, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Against the reference on the same rounded values: only the outputs are rounded (the interpreter truncates)."""
    args = arguments(1, 12, 6, 4, dtype=dtype)
    weights = output_weights(args)
    exact = gradients(convolution("reference"), {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(convolution("triton"), args, weights), exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("offsets", [None, [0, 5, 5, 6, 12]])
def test_optional_arguments_left_out(offsets: list[int] | None) -> None:
    args = {name: t for name, t in arguments(1, 12, 4, 4, dtype=torch.float32).items() if name in ("x", "weight")}
    weights = (torch.randn(1, 12, 4),)
    packed = None if offsets is None else cu_seqlens(offsets)

    def run(backend: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: causal_conv1d(**kwargs, cu_seqlens=packed, backend=backend)

    exact = gradients(run("reference"), {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(run("triton"), args, weights), exact)


@pytest.mark.parametrize("offsets", [None, [0, 5, 12]])
def test_strided_inputs(offsets: list[int] | None) -> None:
    """x as half of a wider projection, and with channels that are not the fastest axis."""
    args = arguments(1, 12, 4, 4, rows=2 if offsets else None, dtype=torch.float32)
    expected = convolution("triton", offsets)(**args)
    half = torch.cat([args["x"], torch.full_like(args["x"], torch.nan)], dim=-1)[..., :4]
    turned = args["x"].transpose(1, 2).contiguous().transpose(1, 2)
    for x in (half, turned):
        assert not x.is_contiguous()
        found = convolution("triton", offsets)(**(args | {"x": x}))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("offsets", [None, [0, 2, 12]])
def test_gradient_through_the_final_state_alone(offsets: list[int] | None) -> None:
    args = arguments(1, 12, 4, 4, rows=2 if offsets else None, dtype=torch.float32)
    weights = (torch.randn_like(args["initial_state"]),)

    def final(backend: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: convolution(backend, offsets)(**kwargs)[1]

    exact = gradients(final("reference"), {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(final("triton"), args, weights), exact)


@pytest.mark.parametrize(("k", "dtype", "message"), [(9, torch.float32, "at most 8"), (4, torch.float64, "coarse")])
def test_refusals_are_named(k: int, dtype: torch.dtype, message: str) -> None:
    reason = explain("causal_conv1d", "cuda", dtype, k=k)["triton"]
    assert reason is not None
    assert message in reason
    with pytest.raises(BackendError, match=message):
        convolution("triton")(**arguments(1, 2, 2, k, dtype=dtype))
