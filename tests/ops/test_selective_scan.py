"""The selective scan: hand-computed cases, the reference, and the portable backend held against it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambalm.ops import BackendError, selective_scan
from mambalm.ops.backends import Call, choose
from tests.helpers import (
    FLOAT32,
    assert_close,
    assert_no_worse,
    cu_seqlens,
    gradients,
    pieces,
    relative_error,
    splits,
)

BACKENDS = ["portable", "reference"]
FAST = ["portable", "cpu"]


def arguments(
    b: int, l: int, d: int, n: int, g: int = 1, *, rows: int | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Every tensor argument; activations in ``dtype``, parameters and state in float32 or float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(to)

    return {
        "u": draw(b, l, d),
        "delta": draw(b, l, d),
        "A": -torch.rand(d, n, dtype=torch.float64).to(wide) * 4,
        "B": draw(b, l, g, n),
        "C": draw(b, l, g, n),
        "D": draw(d, to=wide),
        "z": draw(b, l, d),
        "delta_bias": draw(d, to=wide),
        "initial_state": draw(b if rows is None else rows, d, n, to=wide),
    }


def scan(backend: str | None, offsets: list[int] | None = None) -> Any:
    packed = None if offsets is None else cu_seqlens(offsets)

    def run(**kwargs: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(
            **kwargs, delta_softplus=True, cu_seqlens=packed, return_final_state=True, backend=backend
        )

    return run


def output_weights(args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.randn_like(args["u"].double()), torch.randn_like(args["initial_state"].double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_steps_by_hand(backend: str) -> None:
    """d = n = 1: h1 = e^(-Δ1) h0 + Δ1 B1 u1, h2 = e^(-Δ2) h1 + Δ2 B2 u2, worked out with Δ = 1, 2."""
    column = torch.tensor
    y, state = selective_scan(
        column([[[3.0], [5.0]]], dtype=torch.float64),
        column([[[1.0], [2.0]]], dtype=torch.float64),
        column([[-1.0]], dtype=torch.float64),
        column([[[2.0], [1.0]]], dtype=torch.float64),
        column([[[1.0], [-1.0]]], dtype=torch.float64),
        D=column([0.5], dtype=torch.float64),
        initial_state=column([[[4.0]]], dtype=torch.float64),
        return_final_state=True,
        backend=backend,
    )
    first = math.exp(-1) * 4 + 1 * 2 * 3
    second = math.exp(-2) * first + 2 * 1 * 5
    expected = torch.tensor([[[first + 1.5], [-second + 2.5]]], dtype=torch.float64)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, torch.tensor([[[second]]], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_softplus_and_gate_by_hand(backend: str) -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    y = selective_scan(
        one,
        0.25 * one,
        -one[0],
        one,
        one,
        z=2 * one,
        delta_bias=0.5 * one[0, 0],
        delta_softplus=True,
        backend=backend,
    )
    assert isinstance(y, Tensor)
    assert y.item() == pytest.approx(math.log1p(math.exp(0.75)) * 2 / (1 + math.exp(-2)))


@pytest.mark.parametrize("offsets", [None, [0, 0, 3, 9, 9]])
def test_gradcheck(offsets: list[int] | None) -> None:
    args = arguments(1 if offsets else 2, 9, 4, 3, 2, rows=4 if offsets else None)
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    run = scan("portable", offsets)
    assert torch.autograd.gradcheck(lambda *ts: run(**dict(zip(leaves, ts, strict=True))), list(leaves.values()))


CASES = [
    (2, 1, 5, 4, 1, None),
    (1, 300, 6, 16, 3, None),
    (3, 257, 4, 5, 2, None),
    (1, 0, 4, 4, 1, None),
    (1, 300, 4, 4, 2, [0, 0, 1, 7, 16, 16, 200, 256, 300, 300]),
    (1, 40, 4, 8, 1, [0, 40]),
]


@pytest.mark.parametrize(("b", "l", "d", "n", "g", "offsets"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_against_reference(
    backend: str, b: int, l: int, d: int, n: int, g: int, offsets: list[int] | None, dtype: torch.dtype
) -> None:
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(BackendError, match="it computes in float32"):
            selective_scan(**arguments(b, l, d, n, g, dtype=dtype), backend="cpu")
        return
    args = arguments(b, l, d, n, g, rows=None if offsets is None else len(offsets) - 1, dtype=dtype)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), {k: t.double() for k, t in args.items()}, weights)
    found = gradients(scan(backend, offsets), args, weights)
    assert found["out0"].dtype == dtype
    assert found["out1"].dtype in (torch.float32, torch.float64)
    if dtype in (torch.float32, torch.float64):
        assert_close(found, exact, FLOAT32 if dtype == torch.float32 else 1e-12)
    else:
        assert_no_worse(found, gradients(scan("reference", offsets), args, weights), exact)


@pytest.mark.parametrize("backend", FAST)
def test_wide_enough_for_several_segments_and_blocks(backend: str) -> None:
    """Sizes at which a segment is shorter than the sequence and scanned as one chunk; several blocks of channels."""
    args = arguments(2, 70, 600, 16, 3, dtype=torch.float32)
    weights = output_weights(args)
    exact = gradients(scan("reference"), {k: t.double() for k, t in args.items()}, weights)
    assert_close(gradients(scan(backend), args, weights), exact)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_no_documents(backend: str) -> None:
    args = arguments(1, 0, 4, 3, rows=0, dtype=torch.float32)
    found = gradients(scan(backend, [0]), args, output_weights(args))
    assert (found["out0"].shape, found["out1"].shape) == ((1, 0, 4), (0, 4, 3))
    assert not any(t.any() for t in found.values())


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_optional_arguments_left_out(backend: str) -> None:
    args = arguments(2, 20, 4, 4, dtype=torch.float32)
    few = {name: args[name] for name in ("u", "delta", "A", "B", "C")}
    y = selective_scan(**few, backend=backend)
    neutral = selective_scan(**few, D=torch.zeros(4), initial_state=torch.zeros(2, 4, 4), backend="reference")
    assert relative_error(y, neutral) <= FLOAT32


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_split_gives_the_same(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """One pass = chunks that hand the state on: output, final state and all gradients."""
    l = data.draw(st.integers(1, 300))
    args = arguments(2, l, 3, 4, dtype=dtype)
    cuts = data.draw(splits(l))
    weights = output_weights(args)

    def in_chunks(initial_state: Tensor, **kw: Tensor) -> tuple[Tensor, Tensor]:
        ys, state = [], initial_state
        for piece in pieces(cuts):
            part = {k: t[:, piece] if t.ndim > 2 else t for k, t in kw.items()}
            y, state = scan(backend)(**part, initial_state=state)
            ys.append(y)
        return torch.cat(ys, 1), state

    exact = gradients(scan("reference"), {k: t.double() for k, t in args.items()}, weights)
    found = gradients(in_chunks, args, weights)
    if dtype == torch.float32:
        assert_close(found, exact)
    else:
        assert_no_worse(found, gradients(scan("reference"), args, weights), exact)


@pytest.mark.parametrize("backend", FAST)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_packed_is_each_document_alone(backend: str, data: st.DataObject) -> None:
    l = data.draw(st.integers(1, 300))
    offsets = data.draw(splits(l))
    args = arguments(1, l, 3, 4, rows=len(offsets) - 1, dtype=torch.float32)
    weights = output_weights(args)

    def alone(initial_state: Tensor, **kw: Tensor) -> tuple[Tensor, Tensor]:
        ys, states = [], []
        for row, piece in enumerate(pieces(offsets)):
            part = {k: t[:, piece] if t.ndim > 2 else t for k, t in kw.items()}
            y, state = scan("reference")(**part, initial_state=initial_state[row : row + 1])
            ys.append(y)
            states.append(state)
        return torch.cat(ys, 1), torch.cat(states)

    exact = gradients(alone, {k: t.double() for k, t in args.items()}, weights)
    assert_close(gradients(scan(backend, offsets), args, weights), exact)


@pytest.mark.parametrize("backend", FAST)
def test_gradients_are_contiguous(backend: str) -> None:
    """As the compiler is told."""
    args = arguments(1, 17, 4, 4, 2, dtype=torch.float32)
    assert all(t.is_contiguous() for t in gradients(scan(backend), args, output_weights(args)).values())


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(backend: str) -> None:
    args = arguments(2, 33, 4, 4, dtype=torch.float32)
    strided = {k: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t for k, t in args.items()}
    assert not strided["u"].is_contiguous()
    weights = output_weights(args)
    assert_close(gradients(scan(backend), strided, weights), gradients(scan(backend), args, weights), tolerance=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("offsets", [None, [0, 5, 17]])
def test_compiles_as_one_graph(backend: str, offsets: list[int] | None) -> None:
    args = arguments(1, 17, 4, 4, rows=2 if offsets else None, dtype=torch.float32)
    weights = output_weights(args)
    compiled = torch.compile(scan(backend, offsets), fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, args, weights), gradients(scan(backend, offsets), args, weights), 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_custom_op_is_well_formed(backend: str) -> None:
    args = arguments(1, 17, 4, 4, 2, rows=2, dtype=torch.float32)
    initial_state = args.pop("initial_state")
    leaves = [t.requires_grad_() for t in args.values()]
    torch.library.opcheck(
        torch.ops.mambalm.selective_scan.default,
        (*leaves, True, initial_state.requires_grad_(), cu_seqlens([0, 5, 17]), backend, True),
    )


@pytest.mark.parametrize("backend", FAST)
def test_autocast_leaves_the_arithmetic_alone(backend: str) -> None:
    args = arguments(1, 40, 4, 4, dtype=torch.float32)
    weights = output_weights(args)
    plain = gradients(scan(backend), args, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(gradients(scan(backend), args, weights), plain, tolerance=0)


@pytest.mark.parametrize("backend", FAST)
def test_inputs_are_left_alone_and_outputs_are_fresh(backend: str) -> None:
    args = arguments(1, 20, 4, 4, rows=3, dtype=torch.float32)
    before = {k: t.clone() for k, t in args.items()}
    for offsets in ([0, 0, 12, 20], [0, 20, 20, 20]):
        _, final_state = scan(backend, offsets)(**args)
        final_state.zero_()
        assert all(torch.equal(args[k], before[k]) for k in args)


@pytest.mark.parametrize("backend", FAST)
def test_the_state_after_nothing_is_a_copy(backend: str) -> None:
    # Of one state the layouts are the same memory.
    args = arguments(2, 0, 4, 1, dtype=torch.float32)
    before = args["initial_state"].clone()
    _, final_state = scan(backend)(**args)
    assert torch.equal(final_state, before)
    final_state.zero_()
    assert torch.equal(args["initial_state"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(2, 8, 5)}, r"delta must have shape \(b, l, d\) = \(2, 8, 4\), got \(2, 8, 5\)"),
        ({"A": torch.zeros(3, 4)}, r"A must have shape \(d, n\)"),
        ({"B": torch.zeros(2, 8, 3, 4)}, "4 channels of u cannot be split into the 3 groups"),
        ({"C": torch.zeros(2, 8, 2, 4)}, "C must have shape"),
        ({"initial_state": torch.zeros(1, 4, 4)}, r"initial_state must have shape \(b, d, n\) = \(2, 4, 4\)"),
        ({"z": torch.zeros(2, 8, 4, device="meta")}, "z is on meta, u on cpu"),
        ({"cu_seqlens": cu_seqlens([0, 8])}, "batch axis must be 1"),
        ({"cu_seqlens": cu_seqlens([0, 8], "meta")}, "cu_seqlens is on meta, what it packs on cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    args = arguments(2, 8, 4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**(args | change))


@pytest.mark.parametrize("offsets", [[1, 8], [0, 7], [0, 5, 3, 8]])
def test_bad_offsets_are_named(offsets: list[int]) -> None:
    args = arguments(1, 8, 4, 4, rows=len(offsets) - 1)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the length 8"):
        scan("portable", offsets)(**args)


def test_offsets_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(TypeError, match=r"cu_seqlens must be an int32 tensor .* got list"):
        selective_scan(**arguments(1, 8, 4, 4), cu_seqlens=[0, 8])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["u", "delta", "B", "z", "initial_state"])
def test_nan_is_never_swallowed(backend: str, name: str) -> None:
    args = arguments(1, 20, 4, 4, dtype=torch.float32)
    args[name].view(-1)[0] = math.nan
    y, _ = scan(backend)(**args)
    assert y.isnan().any()


def test_the_cpu_result_does_not_depend_on_the_number_of_threads() -> None:
    args = arguments(3, 150, 300, 8, dtype=torch.float32)
    weights = output_weights(args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(scan("cpu"), args, weights)
        torch.set_num_threads(3)
        shared = gradients(scan("cpu"), args, weights)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_two_callers_at_once() -> None:
    args = arguments(2, 150, 300, 8, dtype=torch.float32)
    expected = scan("cpu")(**args)
    with ThreadPoolExecutor(2) as callers:
        found = list(callers.map(lambda _: scan("cpu")(**args), range(8)))
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected, strict=True))


def test_memory_is_bounded_by_a_segment() -> None:
    """Nothing of size (b, l, d, n) is ever allocated, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    self.seen = max(self.seen, t.numel())
            return out

    module = choose(Call("selective_scan", torch.device("cpu"), torch.float32), "portable")
    b, l, d, n = 1, 4096, 64, 16
    args = arguments(b, l, d, n, dtype=torch.float32)
    values = [args[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    with Largest() as mode:
        y, state, kept = module.forward(*values, True, args["initial_state"], None, save=True)
        module.backward(y, state, *values, True, args["initial_state"], None, kept)
    assert mode.seen <= max(l * d, 1024 * d * n // 4)
    assert mode.seen < l * d * n / 8
