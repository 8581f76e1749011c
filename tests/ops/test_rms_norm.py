"""The normalisation and its variants: hand-computed cases, the reference, and the backends against it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops import BackendError, rms_norm
from tests.helpers import FLOAT32, assert_close, assert_no_worse, gradients

FAST = ["portable", "cpu"]
BACKENDS = [*FAST, "reference"]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"group_size": 5},
    "gate": {},
    "gate and groups": {"group_size": 3},
    "residual": {},
    "residual and groups": {"group_size": 5},
    "residual in float32": {"residual_in_fp32": True},
    "first residual in float32": {"residual_in_fp32": True},
}


def arguments(variant: str, *shape: int, weight: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every tensor argument of a variant; the weight in float32 or float64, a float32 stream where it asks for one."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = {"x": torch.randn(shape, dtype=torch.float64).to(dtype)}
    if weight:
        result["weight"] = torch.randn(shape[-1], dtype=torch.float64).to(wide)
    if variant.startswith("gate"):
        result["gate"] = torch.randn(shape, dtype=torch.float64).to(dtype)
    if variant.startswith("residual"):
        stream = wide if VARIANTS[variant].get("residual_in_fp32") else dtype
        result["residual"] = torch.randn(shape, dtype=torch.float64).to(stream)
    return result


def norm(variant: str, backend: str = "portable") -> Any:
    def run(**kwargs: Any) -> tuple[Tensor, ...]:
        out = rms_norm(**kwargs, **VARIANTS[variant], backend=backend)
        return out if isinstance(out, tuple) else (out,)

    return run


def output_weights(variant: str, x: Tensor) -> list[Tensor]:
    return [torch.randn_like(x, dtype=torch.float64) for _ in range(2 if "residual" in variant else 1)]


@pytest.mark.parametrize("backend", BACKENDS)
class TestByHand:
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])

    def test_plain(self, backend: str) -> None:
        """The mean square is 25 / 4."""
        y = rms_norm(self.x, torch.tensor([1.0, 2.0, 3.0, 4.0]), eps=0.0, backend=backend)
        torch.testing.assert_close(y, torch.tensor([[3 / 2.5, -8 / 2.5, 0.0, 0.0]]))

    def test_eps_is_under_the_root(self, backend: str) -> None:
        y = rms_norm(self.x, eps=2.75, backend=backend)
        torch.testing.assert_close(y, torch.tensor([[1.0, -4 / 3, 0.0, 0.0]]))

    def test_groups(self, backend: str) -> None:
        """The groups' mean squares are 25 / 2 and 0."""
        y = rms_norm(self.x, eps=1e-12, group_size=2, backend=backend)
        torch.testing.assert_close(y, torch.tensor([[3.0, -4.0, 0.0, 0.0]]) / math.sqrt(12.5))

    def test_the_gate_comes_first(self, backend: str) -> None:
        """silu(gate) = 1 where the gate is 1.2784645, so closed gates make the others' outputs larger."""
        gate = torch.tensor([[1.2784645, 0.0, 0.0, 0.0]])
        y = rms_norm(self.x, eps=0.0, gate=gate, backend=backend)
        torch.testing.assert_close(y, torch.tensor([[2.0, 0.0, 0.0, 0.0]]))

    def test_residual(self, backend: str) -> None:
        out = rms_norm(self.x, eps=0.0, residual=torch.tensor([[0.0, 4.0, 4.0, 0.0]]), backend=backend)
        assert isinstance(out, tuple)
        torch.testing.assert_close(out[0], torch.tensor([[3.0, 0.0, 4.0, 0.0]]) / 2.5)
        torch.testing.assert_close(out[1], torch.tensor([[3.0, 0.0, 4.0, 0.0]]))


def test_plain_is_that_of_torch() -> None:
    x, weight = torch.randn(3, 7, 10), torch.randn(10)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-6), F.rms_norm(x, (10,), weight, 1e-6))


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, weight: bool) -> None:
    args = arguments(variant, 2, 3, 15, weight=weight)
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    run = norm(variant)
    assert torch.autograd.gradcheck(lambda *ts: run(**dict(zip(leaves, ts, strict=True))), list(leaves.values()))


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 15), (1, 15), (15,), (0, 15), (3, 1, 9, 105)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", FAST)
def test_against_reference(
    backend: str, variant: str, dtype: torch.dtype, shape: tuple[int, ...], weight: bool
) -> None:
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(BackendError, match="it computes in float32"):
            rms_norm(torch.randn(2, 3, dtype=dtype), backend="cpu")
        return
    args = arguments(variant, *shape, weight=weight, dtype=dtype)
    weights = output_weights(variant, args["x"])
    exact = gradients(norm(variant, "reference"), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(norm(variant, backend), args, weights)
    assert found["out0"].dtype == dtype
    assert {name: found[f"d{name}"].dtype for name in args} == {name: t.dtype for name, t in args.items()}
    if dtype in (torch.float32, torch.float64):
        assert_close(found, exact, FLOAT32 if dtype == torch.float32 else 1e-12)
    else:
        assert_no_worse(found, gradients(norm(variant, "reference"), args, weights), exact)


@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_a_half_precision_branch_and_a_float32_stream(backend: str) -> None:
    """The two are one sum, which each has in its own dtype."""
    args = arguments("residual", 7, 33, dtype=torch.float32)
    args["x"] = args["x"].bfloat16()
    weights = output_weights("residual", args["x"])
    exact = gradients(norm("residual", "reference"), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(norm("residual", backend), args, weights)
    assert torch.equal(found["dx"], found["dresidual"].bfloat16())
    close = ("dresidual", "dweight", "out1")
    eps = 2 * torch.finfo(torch.bfloat16).eps  # dy has x's dtype
    assert_close({name: found[name] for name in close}, {name: exact[name] for name in close}, eps)


@pytest.mark.parametrize("backend", BACKENDS)
class TestStream:
    """In which dtype the residual stream goes on, and what is normalised."""

    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    small = torch.full((1, 4), 2**-10)

    def test_in_float32(self, backend: str) -> None:
        y, stream = rms_norm(self.x, residual=self.small, residual_in_fp32=True, backend=backend)
        assert y.dtype == torch.bfloat16
        assert stream.dtype == torch.float32
        assert torch.equal(stream, torch.full((1, 4), 1 + 2**-10))

    def test_in_the_dtype_of_the_residual(self, backend: str) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            _, stream = rms_norm(self.x, residual=self.small.to(dtype), backend=backend)
            assert stream.dtype == dtype

    def test_not_asked_for(self, backend: str) -> None:
        """Only the sum's rounding is left of it; gradients are those of a stream that nobody reads."""
        x, weight = torch.randn(3, 12).bfloat16().requires_grad_(), torch.randn(12, requires_grad=True)
        residual = torch.randn(3, 12, requires_grad=True)
        both, _ = rms_norm(x, weight, residual=residual, backend=backend)
        alone = rms_norm(x, weight, residual=residual, return_residual=False, backend=backend)
        assert isinstance(alone, Tensor)
        expected, found = (torch.autograd.grad(y.sum(), [x, weight, residual]) for y in (both, alone))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with torch.no_grad():
            assert torch.equal(rms_norm(x, weight, residual=residual, return_residual=False, backend=backend), both)

    def test_the_first_is_the_input(self, backend: str) -> None:
        y, stream = rms_norm(self.x, residual_in_fp32=True, backend=backend)
        assert stream.dtype == torch.float32
        assert torch.equal(stream, self.x.float())
        assert torch.equal(y, norm("plain", backend)(x=self.x)[0])

    def test_what_is_kept_is_what_is_normalised(self, backend: str) -> None:
        x, residual = torch.randn(2, 5, 12).bfloat16().unbind()
        y, stream = rms_norm(x, residual=residual, backend=backend)
        assert torch.equal(y, norm("plain", backend)(x=stream)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_happens_at_the_end(variant: str, backend: str) -> None:
    """bfloat16 in gives the float32 result for the same numbers, rounded once."""
    args = arguments(variant, 4, 15, dtype=torch.bfloat16)
    args["residual" if "residual" in args else "x"] *= 1000
    wide = {name: t.float() for name, t in args.items()}
    if variant.startswith("residual"):
        wide = {"x": norm(variant)(**args)[1].float(), "residual": torch.zeros(4, 15), "weight": args["weight"]}
    torch.testing.assert_close(norm(variant, backend)(**args)[0], norm(variant)(**wide)[0].bfloat16())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(backend: str, variant: str) -> None:
    args = arguments(variant, 3, 4, 15, dtype=torch.float32)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in args.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    weights = output_weights(variant, args["x"])
    run = norm(variant, backend)
    assert_close(gradients(run, strided, weights), gradients(run, args, weights), tolerance=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", FAST)
def test_compiles_as_one_graph(backend: str, variant: str) -> None:
    args = arguments(variant, 3, 15, dtype=torch.float32)
    weights = output_weights(variant, args["x"])
    run = norm(variant, backend)
    torch.compiler.reset()  # each variant is a new shape of the same function
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, args, weights), gradients(run, args, weights), 1e-6)


@pytest.mark.parametrize("variant", ["plain", "gate and groups", "residual in float32"])
@pytest.mark.parametrize("backend", FAST)
def test_custom_op_is_well_formed(backend: str, variant: str) -> None:
    args = arguments(variant, 3, 15, dtype=torch.bfloat16)
    x, weight, gate, residual = (
        t if t is None else t.requires_grad_() for t in map(args.get, ("x", "weight", "gate", "residual"))
    )
    torch.library.opcheck(
        torch.ops.mambalm.rms_norm.default, (x, weight, gate, residual, 1e-5, 5, torch.float32, True, backend)
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", FAST)
def test_autocast_leaves_the_arithmetic_alone(backend: str, variant: str) -> None:
    args = arguments(variant, 3, 15, dtype=torch.float32)
    weights = output_weights(variant, args["x"])
    plain = gradients(norm(variant, backend), args, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(gradients(norm(variant, backend), args, weights), plain, tolerance=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_without_data(variant: str) -> None:
    args = {name: t.to("meta") for name, t in arguments(variant, 3, 15).items()}
    assert all(out.shape == (3, 15) for out in norm(variant)(**args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x must have shape \(..., d\) with at least one channel, got \(\)"),
        ({"weight": torch.zeros(5)}, r"weight must have shape \(d\) = \(4,\), got \(5,\)"),
        ({"gate": torch.zeros(2, 4)}, r"gate must have shape \(..., d\) = \(2, 3, 4\), got \(2, 4\)"),
        ({"residual": torch.zeros(3, 4)}, r"residual must have shape \(..., d\) = \(2, 3, 4\), got \(3, 4\)"),
        ({"group_size": 3}, "4 channels of x cannot be split into groups of group_size 3"),
        ({"group_size": 0}, "4 channels of x cannot be split into groups of group_size 0"),
        ({"eps": -1e-5}, "eps must be at least 0, got -1e-05"),
        ({"eps": float("nan")}, "eps must be at least 0, got nan"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta, x on cpu"),
        ({"gate": torch.zeros(2, 3, 4), "residual_in_fp32": True}, "gate excludes residual"),
        ({"gate": torch.zeros(2, 3, 4), "residual": torch.zeros(2, 3, 4)}, "gate excludes residual"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**({"x": torch.zeros(2, 3, 4)} | change))


def test_a_missing_backend_raises() -> None:
    with pytest.raises(BackendError, match="'gluon' backend was asked for but cannot run"):
        rms_norm(torch.zeros(2, 4), backend="gluon")
