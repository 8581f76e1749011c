"""ssd: hand-computed cases, Listing 1 against the recurrence, and the portable backend held against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mambalm.ops.ssd import reference, ssd
from tests.helpers import FLOAT32, assert_close, assert_no_worse, cu_seqlens, gradients
from tests.ops.ssd_helpers import arguments, doubled, only_y, output_weights, scan, without_states

BACKENDS = ["portable", "reference"]


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
def test_two_steps_by_hand(backend: str) -> None:
    """One head, one channel, one state: h1 = e^(-Δ1) h0 + Δ1 B1 x1, h2 = e^(-Δ2) h1 + Δ2 B2 x2 with Δ = 1, 2."""

    def row(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32 if backend == "cpu" else torch.float64)

    y, state = scan(backend, dt_softplus=False)(
        x=row(3, 5).view(1, 2, 1, 1),
        dt=row(1, 2).view(1, 2, 1),
        A=row(-1),
        B=row(2, 1).view(1, 2, 1, 1),
        C=row(1, -1).view(1, 2, 1, 1),
        D=row(0.5),
        initial_state=row(4).view(1, 1, 1, 1),
    )
    first = math.exp(-1) * 4 + 1 * 2 * 3
    second = math.exp(-2) * first + 2 * 1 * 5
    torch.testing.assert_close(y.flatten(), row(first + 1.5, -second + 2.5))
    torch.testing.assert_close(state.flatten(), row(second))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("limit", "step"), [(math.inf, math.log1p(math.exp(0.75))), (0.5, 0.5)])
def test_bias_softplus_limit_and_gate_by_hand(backend: str, limit: float, step: float) -> None:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y, _ = scan(backend, dt_limit=(0.0, limit))(
        x=one, dt=0.25 * one[0], A=-one[0, 0, 0], B=one, C=one, z=2 * one, dt_bias=0.5 * one[0, 0, 0]
    )
    assert y.item() == pytest.approx(step * 2 / (1 + math.exp(-2)))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 48])
def test_listing_1_is_the_recurrence(length: int) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dtype=torch.float64)

    inputs = (draw(length, 4, 3), -draw(length, 4).exp(), draw(length, 4, 5), draw(length, 4, 5), draw(4, 3, 5))
    found, expected = reference.listing1(*inputs, chunk=16), reference.recurrence(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_heads_share_groups_as_neighbours() -> None:
    """Heads 0 and 1 read group 0, heads 2 and 3 group 1, in every backend."""
    args = arguments(1, 9, h=4, g=2)
    wide = args | {name: args[name][:, :, [0, 0, 1, 1]] for name in ("B", "C")}
    for backend in BACKENDS:
        torch.testing.assert_close(scan(backend)(**args), scan("reference")(**wide))


@pytest.mark.parametrize("d_form", ["head", "channel"])
@pytest.mark.parametrize("offsets", [None, [0, 0, 3, 7, 7]])
def test_gradcheck(offsets: list[int] | None, d_form: str) -> None:
    args = arguments(1 if offsets else 2, 7, h=2, p=2, n=2, g=2, rows=4 if offsets else None)
    if d_form == "channel":
        args["D"] = torch.randn(2, 2, dtype=torch.float64)
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    run = scan("portable", offsets, chunk_size=3, dt_limit=(0.3, 1.5))
    assert torch.autograd.gradcheck(lambda *ts: run(**dict(zip(leaves, ts, strict=True))), list(leaves.values()))


CASES = [
    (2, 1, 4, 1, None),
    (3, 37, 4, 2, None),
    (1, 300, 6, 3, None),
    (2, 129, 4, 4, None),
    (1, 0, 4, 1, None),
    (2, 0, 4, 1, None),
    (1, 300, 4, 2, [0, 0, 1, 7, 16, 16, 200, 256, 300, 300]),
    (1, 40, 4, 1, [0, 40]),
    (1, 0, 4, 1, [0, 0, 0]),
    (1, 0, 4, 1, [0]),
]


@pytest.mark.parametrize(("b", "l", "h", "g", "offsets"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_portable_against_reference(
    b: int, l: int, h: int, g: int, offsets: list[int] | None, dtype: torch.dtype, chunk_size: int | None
) -> None:
    args = arguments(b, l, h, g=g, rows=None if offsets is None else len(offsets) - 1, dtype=dtype)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), doubled(args), weights)
    found = gradients(scan("portable", offsets, chunk_size=chunk_size), args, weights)
    assert found["out0"].dtype == dtype
    assert found["out1"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype in (torch.float32, torch.float64):
        assert_close(found, exact, FLOAT32 if dtype == torch.float32 else 1e-12)
    else:
        assert_no_worse(found, gradients(scan("reference", offsets), args, weights), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_steps_beside_large_ones(backend: str) -> None:
    """Steps that erase the state next to steps that barely touch it: nothing overflows, nothing is lost."""
    args = arguments(1, 200, dtype=torch.float32)
    args["dt"] = torch.where(torch.rand(1, 200, 4) < 0.1, 3000.0, 1e-4)
    run = scan(backend, dt_softplus=False, chunk_size=64)
    weights = output_weights(args)
    assert_close(gradients(run, args, weights), gradients(run, doubled(args), weights))


@pytest.mark.parametrize("softplus", [True, False])
def test_step_limits_stop_gradients(softplus: bool) -> None:
    args = arguments(2, 40)
    weights = output_weights(args)
    options = {"dt_softplus": softplus, "dt_limit": (0.5, 0.9)}
    exact = gradients(scan("reference", **options), args, weights)
    found = gradients(scan("portable", **options), args, weights)
    assert_close(found, exact, 1e-12)
    assert 0 < (found["ddt"] == 0).sum() < found["ddt"].numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_arguments_left_out(backend: str) -> None:
    args = arguments(2, 20)
    few = {name: args[name] for name in ("x", "dt", "A", "B", "C")}
    neutral = {"D": torch.zeros(4), "dt_bias": torch.zeros(4), "initial_state": torch.zeros(2, 4, 3, 5)}
    y = ssd(**few, dt_softplus=True, backend=backend)
    torch.testing.assert_close(y, scan("reference")(**few, **neutral)[0])


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0], [0, 0, 1, 1, 5, 9, 9]])
def test_packed_without_states_gradcheck(offsets: list[int]) -> None:
    args, _ = without_states(arguments(1, offsets[-1], h=2, p=2, n=2, g=2))
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    run = only_y("portable", offsets, chunk_size=3)
    assert torch.autograd.gradcheck(lambda *ts: run(**dict(zip(leaves, ts, strict=True))), list(leaves.values()))
    torch.testing.assert_close(run(**args), only_y("reference", offsets)(**args))


def test_strided_inputs() -> None:
    args = arguments(2, 33)
    strided = {k: t.transpose(1, -1).contiguous().transpose(1, -1) if t.ndim > 2 else t for k, t in args.items()}
    assert not strided["x"].is_contiguous()
    weights = output_weights(args)
    assert_close(gradients(scan("portable"), strided, weights), gradients(scan("portable"), args, weights), 1e-13)


@pytest.mark.parametrize("offsets", [None, [0, 5, 17]])
def test_compiles_as_one_graph(offsets: list[int] | None) -> None:
    args = arguments(1, 17, rows=2 if offsets else None, dtype=torch.float32)
    weights = output_weights(args)
    compiled = torch.compile(scan("portable", offsets), fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, args, weights), gradients(scan("portable", offsets), args, weights), 1e-6)


@pytest.mark.parametrize("states", [True, False])
def test_custom_op_is_well_formed(states: bool) -> None:
    args = arguments(1, 17, g=2, rows=2, dtype=torch.float32)
    *tensors, initial_state = [t.requires_grad_() for t in args.values()]
    rest = (True, 0.0, math.inf, initial_state if states else None, cu_seqlens([0, 5, 17]), None, "portable")
    torch.library.opcheck(torch.ops.mambalm.ssd.default, (*tensors, *rest, states, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_arithmetic_alone(backend: str) -> None:
    args = arguments(1, 40, dtype=torch.float32)
    weights = output_weights(args)

    def cast(**kwargs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result: tuple[Tensor, Tensor] = scan(backend)(**kwargs)
        return result

    plain = gradients(scan(backend), args, weights)
    assert_close(gradients(cast, args, weights), plain, tolerance=0)


def test_autocast_around_the_backward_leaves_it_alone() -> None:
    args = arguments(1, 40, dtype=torch.float32)
    weights = output_weights(args)
    plain = gradients(scan("portable"), args, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(gradients(scan("portable"), args, weights), plain, tolerance=0)


def test_inputs_are_left_alone_and_outputs_are_fresh() -> None:
    args = arguments(1, 20, rows=3)
    before = {k: t.clone() for k, t in args.items()}
    for backend in BACKENDS:
        for offsets in ([0, 0, 12, 20], [0, 20, 20, 20]):
            _, final_state = scan(backend, offsets)(**args)
            final_state.zero_()
            assert all(torch.equal(args[k], before[k]) for k in args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, r"x must have 4 axes \(b, l, h, p\)"),
        ({"dt": torch.zeros(2, 8, 5)}, r"dt must have shape \(b, l, h\) = \(2, 8, 4\), got \(2, 8, 5\)"),
        ({"A": torch.zeros(4, 4)}, r"A must have shape \(h\)"),
        ({"B": torch.zeros(2, 8, 3, 5)}, "4 heads of x cannot be split into the 3 groups"),
        ({"C": torch.zeros(2, 8, 2, 5)}, "C must have shape"),
        ({"D": torch.zeros(3)}, r"D must have shape \(h\) = \(4,\) or \(h, p\) = \(4, 3\), got \(3,\)"),
        ({"z": torch.zeros(2, 8, 4, 3, device="meta")}, "z is on meta, x on cpu"),
        ({"initial_state": torch.zeros(1, 4, 3, 5)}, r"initial_state must have shape \(b, h, p, n\) = \(2, 4, 3, 5\)"),
        ({"cu_seqlens": cu_seqlens([0, 8])}, "batch axis must be 1"),
        ({"cu_seqlens": cu_seqlens([0, 8], "meta")}, "cu_seqlens is on meta, what it packs on cpu"),
        ({"dt_limit": (0.5, 0.1)}, r"dt_limit must be \(smallest, largest\).*got \(0.5, 0.1\)"),
        ({"chunk_size": 0}, "chunk_size must be positive or None, got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    args = arguments(2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ssd(**(args | change))
