"""ssd's GPU backends on a GPU, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambalm.ops import ssd
from mambalm.ops.backends import explain
from tests.helpers import FLOAT32, assert_close, assert_no_worse, gradients, relative_error
from tests.ops.ssd_helpers import TOKENS, arguments, doubled, output_weights, rounded_states, without_states
from tests.ops.ssd_helpers import scan as scan_on

pytestmark = pytest.mark.gpu

BACKENDS = ["triton"]
# Gluon makes the outputs of calls without a gate, in bfloat16; the rest of it is Triton's.
BOTH = ["gluon", "triton"]
CASES = [
    (2, 1, 4, 64, 128, 1, None),
    (2, 37, 16, 64, 128, 2, None),
    (1, 300, 12, 32, 16, 3, None),
    (2, 129, 8, 128, 64, 1, None),
    (1, 200, 8, 256, 256, 1, None),
    (3, 257, 16, 80, 20, 2, None),
    (1, 0, 4, 64, 128, 1, None),
    (1, 2000, 16, 64, 128, 2, None),  # few heads, a long row: cut into segments
    (3, 640, 96, 64, 128, 1, None),  # more units than a GPU has multiprocessors
    (1, 300, 16, 64, 128, 2, [0, 0, 1, 7, 16, 16, 200, 256, 300, 300]),
    (1, 1200, 16, 64, 128, 1, [0, 1100, 1200]),
    (1, 1200, 16, 64, 128, 1, [0, 0, 1200]),
]


def scan(backend: str, offsets: list[int] | None = None, **options: Any) -> Any:
    return scan_on(backend, offsets, device="cuda", **{"chunk_size": None} | options)


def on_gpu(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cuda() for name, t in args.items()}


def check(found: dict[str, Tensor], args: dict[str, Tensor], weights: Any, *run: Any, **options: Any) -> None:
    dtype = args["x"].dtype
    exact = gradients(scan("reference", *run, **options), doubled(args), weights)
    if dtype == torch.float32:
        assert_close(found, exact, FLOAT32)
    else:
        rounded = gradients(scan("reference", *run, **options), args, weights)
        assert_no_worse(found, rounded_states(rounded, exact, dtype), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "l", "h", "p", "n", "g", "offsets"), CASES)
def test_against_reference(
    b: int, l: int, h: int, p: int, n: int, g: int, offsets: list[int] | None, dtype: torch.dtype, backend: str
) -> None:
    args = on_gpu(arguments(b, l, h, p, n, g, rows=None if offsets is None else len(offsets) - 1, dtype=dtype))
    weights = output_weights(args)
    check(gradients(scan(backend, offsets), args, weights), args, weights, offsets)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize(
    ("b", "l", "h", "g"), [(2, 64, 16, 1), (3, 257, 16, 2), (1, 2000, 16, 2), (4, 700, 80, 1), (2, 150, 7, 1)]
)
def test_without_a_gate(b: int, l: int, h: int, g: int, states: bool, backend: str) -> None:
    """What Mamba-2's layers call, and what the Hopper kernels take whole: odd lengths, ranges that end in a row."""
    args = on_gpu(arguments(b, l, h, 64, 128, g, dtype=torch.bfloat16))
    weights = output_weights(args)
    del args["z"]
    if states:
        return check(gradients(scan(backend), args, weights), args, weights)
    del args["initial_state"]

    def run(name: str) -> Any:
        return lambda **kwargs: ssd(**kwargs, dt_softplus=True, backend=name)

    exact, rounded = (gradients(run("reference"), a, weights[:1]) for a in (doubled(args), args))
    found = gradients(run(backend), args, weights[:1])
    return assert_no_worse(found, rounded_states(rounded, exact, torch.bfloat16), exact)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("offsets", [[0, 0, 1, 7, 16, 16, 200, 256, 300, 300], [0, 1100, 1200]])
def test_packed_without_a_gate(offsets: list[int], backend: str) -> None:
    args = on_gpu(arguments(1, offsets[-1], 16, 64, 128, 2, rows=len(offsets) - 1, dtype=torch.bfloat16))
    weights = output_weights(args)
    del args["z"]
    check(gradients(scan(backend, offsets), args, weights), args, weights, offsets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_weights_of_channels_and_limits_of_steps(dtype: torch.dtype, backend: str) -> None:
    args = on_gpu(arguments(2, 150, 16, 64, 128, dtype=dtype))
    args["D"] = torch.randn(16, 64, device="cuda")
    weights = output_weights(args)
    found = gradients(scan(backend, dt_limit=(0.5, 0.9)), args, weights)
    check(found, args, weights, dt_limit=(0.5, 0.9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_steps_beside_large_ones(dtype: torch.dtype, backend: str) -> None:
    args = on_gpu(arguments(1, 200, 4, 64, 128, dtype=dtype))
    args["dt"] = torch.where(torch.rand(1, 200, 4, device="cuda") < 0.1, 3000.0, 1e-4).to(dtype)
    weights = output_weights(args)
    check(gradients(scan(backend, dt_softplus=False), args, weights), args, weights, dt_softplus=False)


@pytest.mark.parametrize("backend", BOTH)
def test_repeats_bit_for_bit(backend: str) -> None:
    args = on_gpu(arguments(2, 1100, 8, 64, 128, dtype=torch.bfloat16))
    weights = output_weights(args)
    del args["z"]
    first = gradients(scan(backend), args, weights)
    second = gradients(scan(backend), args, weights)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_arguments_left_out(backend: str) -> None:
    args, weights = without_states(on_gpu(arguments(2, 100, 4, 64, 128, dtype=torch.float32)))
    few = {name: args[name] for name in ("x", "dt", "A", "B", "C")}

    def run(name: str) -> Any:
        return lambda **kwargs: ssd(**kwargs, dt_softplus=True, backend=name)

    exact = gradients(run("reference"), doubled(few), weights)
    assert_close(gradients(run(backend), few, weights), exact)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_equalities(dtype: torch.dtype, backend: str) -> None:
    """In two pieces, and packed with another document, as in one pass."""
    args = on_gpu(arguments(1, 150, 4, 64, 128, dtype=dtype))
    del args["z"]
    whole, state = scan(backend)(**args)
    cut = {name: (t[:, :70], t[:, 70:]) if name in TOKENS else (t, t) for name, t in args.items()}
    first, between = scan(backend)(**{name: t for name, (t, _) in cut.items()})
    second, last = scan(backend)(**{name: t for name, (_, t) in cut.items()} | {"initial_state": between})
    other = on_gpu(arguments(1, 33, 4, 64, 128, dtype=dtype))
    both = {name: torch.cat([other[name], t], dim=1) if name in TOKENS else t for name, t in args.items()}
    both["initial_state"] = torch.cat([other["initial_state"], args["initial_state"]])
    packed, states = scan(backend, [0, 33, 183])(**both)
    exact, exact_state = scan("reference")(**doubled(args))
    if dtype == torch.float32:
        allowed, allowed_state = FLOAT32, FLOAT32
    else:
        allowed = 2 * relative_error(exact.to(dtype), exact)
        allowed_state = 2 * relative_error(exact_state.to(dtype), exact_state)
    for y in (whole, torch.cat([first, second], dim=1), packed[:, 33:]):
        assert relative_error(y, exact) <= allowed
    for h in (state, last, states[1:]):
        assert relative_error(h, exact_state) <= allowed_state


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize(("l", "offsets"), [(1, None), (64, None), (64, [0, 10, 64])])
def test_graph_replays_on_new_inputs(backend: str, l: int, offsets: list[int] | None) -> None:
    """Nothing waits for the device, so that a decode step, a chunk or a packed batch can be captured."""
    rows = 4 if offsets is None else 1
    args = on_gpu(arguments(rows, l, 4, 64, 128, rows=2 if offsets else None, dtype=torch.bfloat16))
    del args["z"]
    run = scan(backend, offsets)
    with torch.no_grad():
        run(**args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, state = run(**args)
        for name in ("x", "initial_state"):
            args[name].normal_()
        graph.replay()
        expected_y, expected_state = run(**args)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)


def test_automatic_choice_is_quiet(recwarn: pytest.WarningsRecorder) -> None:
    reasons = explain("ssd", "cuda", torch.bfloat16)
    assert next(iter(reasons.values())) is None
    with torch.no_grad():
        ssd(**on_gpu(arguments(1, 9, 4, 64, 128, dtype=torch.bfloat16)))
    assert not [w for w in recwarn if "slower" in str(w.message)]


@pytest.mark.parametrize("n", [16, 128])  # of 128 the gradients are those of Hopper's kernels
def test_more_than_two_to_the_31_elements(n: int) -> None:
    """The last steps of a long row, and their gradients, are those of a row that begins 512 steps before its end."""
    l, h, p, tail = 2**20 + 5, 33, 64, 512
    shape = {"x": (1, l, h, p), "dt": (1, l, h), "B": (1, l, 1, n), "C": (1, l, 1, n)}
    args = {name: torch.randn(*s, device="cuda", dtype=torch.bfloat16) for name, s in shape.items()}
    assert args["x"].numel() > 2**31
    args["A"] = -1 - torch.rand(h, device="cuda")  # after 400 steps nothing is left of a state
    weight = torch.randn(1, 64, h, p, device="cuda", dtype=torch.bfloat16)

    def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        y = ssd(**leaves, dt_softplus=True)
        assert isinstance(y, Tensor)
        dy = torch.zeros_like(y)
        dy[:, -64:] = weight
        found = torch.autograd.grad(y, list(leaves.values()), dy)
        return {
            n: t[:, -64:] if t.ndim > 2 else t
            for n, t in {"y": y.detach(), **dict(zip(leaves, found, strict=True))}.items()
        }

    found = run(args)
    expected = run({name: t[:, -tail:] if t.ndim > 2 else t for name, t in args.items()})
    for name, t in expected.items():
        assert relative_error(found[name], t) < 4e-3, name  # chunks lie elsewhere: bfloat16's rounding differs
