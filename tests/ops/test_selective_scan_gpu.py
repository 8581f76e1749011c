"""The selective scan's GPU backends on a GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambalm.ops import selective_scan
from mambalm.ops.selective_scan import _launch, gluon
from tests.helpers import FLOAT32, assert_close, assert_no_worse, cu_seqlens, gradients, relative_error
from tests.ops.test_selective_scan import arguments, output_weights, scan

pytestmark = pytest.mark.gpu

BACKENDS = ["gluon", "triton"]
CASES = [
    (2, 1, 5, 4, 1, None),
    (2, 37, 70, 16, 1, None),
    (1, 300, 6, 16, 3, None),
    (3, 257, 4, 5, 2, None),
    (1, 0, 4, 4, 1, None),
    (2, 33, 8, 64, 1, None),
    (1, 40, 12, 256, 1, None),
    (1, 50, 36, 8, 1, None),
    (2, 1100, 6, 16, 2, None),  # few channels, long rows: cut into chunks
    (1, 300, 40, 5, 2, [0, 0, 1, 7, 16, 16, 200, 256, 300, 300]),
    (1, 1200, 24, 16, 1, [0, 1100, 1200]),
    (1, 1200, 24, 16, 1, [0, 0, 1200]),
]


def on_gpu(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cuda() for name, t in args.items()}


@pytest.mark.parametrize("many", [False, True], ids=["few elements", "many elements"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "l", "d", "n", "g", "offsets"), CASES)
def test_against_reference(
    b: int,
    l: int,
    d: int,
    n: int,
    g: int,
    offsets: list[int] | None,
    dtype: torch.dtype,
    backend: str,
    many: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if many:  # the plans of large calls
        monkeypatch.setattr(_launch, "_MANY_ELEMENTS", 0)
        monkeypatch.setattr(gluon, "processors", lambda device: 0.01)
    args = on_gpu(arguments(b, l, d, n, g, rows=None if offsets is None else len(offsets) - 1, dtype=dtype))
    weights = output_weights(args)
    packed = None if offsets is None else cu_seqlens(offsets, "cuda")

    def run(name: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: selective_scan(
            **kwargs, delta_softplus=True, cu_seqlens=packed, return_final_state=True, backend=name
        )

    exact = gradients(run("reference"), {k: t.double() for k, t in args.items()}, weights)
    found = gradients(run(backend), args, weights)
    if dtype == torch.float32:
        assert_close(found, exact, FLOAT32)
    else:
        assert_no_worse(found, gradients(run("reference"), args, weights), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend: str) -> None:
    args = on_gpu(arguments(2, 1100, 200, 16, dtype=torch.bfloat16))
    weights = output_weights(args)
    first = gradients(scan(backend), args, weights)
    second = gradients(scan(backend), args, weights)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_arguments_left_out(backend: str) -> None:
    args = on_gpu(arguments(2, 40, 20, 16, dtype=torch.float32))
    few = {name: args[name] for name in ("u", "delta", "A", "B", "C")}
    few["delta"] = few["delta"].abs()
    weights = (torch.randn_like(args["u"]),)

    def run(name: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: selective_scan(**kwargs, backend=name)

    exact = gradients(run("reference"), {k: t.double() for k, t in few.items()}, weights)
    assert_close(gradients(run(backend), few, weights), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l", [1, 64])
def test_graph_replays_on_new_inputs(backend: str, l: int) -> None:
    """Nothing waits for the device, so that a decode step or a chunk can be captured."""
    args = on_gpu(arguments(4, l, 96, 16, dtype=torch.bfloat16))
    with torch.no_grad():
        scan(backend)(**args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, state = scan(backend)(**args)
        for name in ("u", "initial_state"):
            args[name].normal_()
        graph.replay()
        expected_y, expected_state = scan(backend)(**args)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)


def test_more_than_two_to_the_31_elements() -> None:
    """The last steps of a long row, and their gradients, are those of a row that begins 512 steps before its end."""
    l, d, tail = 2**20 + 5, 2056, 512
    shape = {"u": (1, l, d), "delta": (1, l, d), "B": (1, l, 1, 4), "C": (1, l, 1, 4)}
    args = {name: torch.randn(*s, device="cuda", dtype=torch.bfloat16) for name, s in shape.items()}
    assert args["u"].numel() > 2**31
    args["A"] = -1 - torch.rand(d, 4, device="cuda")  # after 400 steps nothing is left of a state
    weight = torch.randn(1, 64, d, device="cuda", dtype=torch.bfloat16)

    def last(t: Tensor) -> Tensor:
        return t[:, -64:] if t.ndim > 2 else t

    def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        y = selective_scan(**leaves, delta_softplus=True, backend="gluon")
        assert isinstance(y, Tensor)
        dy = torch.zeros_like(y)
        dy[:, -64:] = weight
        found = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": last(y.detach()), **{name: last(t) for name, t in zip(leaves, found, strict=True)}}

    found = run(args)
    expected = run({name: t[:, -tail:] if t.ndim > 2 else t for name, t in args.items()})
    for name, t in expected.items():
        assert relative_error(found[name], t) < 1e-4, name
