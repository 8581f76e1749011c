"""The causal convolution: hand-computed cases, the reference, and the backends held against it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambalm.ops import BackendError, causal_conv1d
from mambalm.ops.backends import Call, choose
from tests.helpers import FLOAT32, assert_close, assert_no_worse, cu_seqlens, gradients, pieces, splits

FAST = ["portable", "cpu"]
BACKENDS = [*FAST, "reference"]


def arguments(
    b: int, l: int, d: int, k: int, *, rows: int | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Every tensor argument; x and state in ``dtype``, parameters in float32 or float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(b, l, d, dtype=torch.float64).to(dtype),
        "weight": torch.randn(d, k, dtype=torch.float64).to(wide),
        "bias": torch.randn(d, dtype=torch.float64).to(wide),
        "initial_state": torch.randn(b if rows is None else rows, d, k - 1, dtype=torch.float64).to(dtype),
    }


def convolution(backend: str | None, offsets: list[int] | None = None, activation: str | None = "silu") -> Any:
    packed = None if offsets is None else cu_seqlens(offsets)

    def run(**kwargs: Tensor) -> tuple[Tensor, Tensor]:
        y = causal_conv1d(**kwargs, activation=activation, cu_seqlens=packed, return_final_state=True, backend=backend)
        assert isinstance(y, tuple)
        return y

    return run


def output_weights(args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.randn_like(args["x"].double()), torch.randn_like(args["initial_state"].double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """k = 3: y_t = 0.5 + 1 x_{t-2} + 10 x_{t-1} + 100 x_t, after the inputs 7, 8."""
    y, state = causal_conv1d(
        torch.tensor([[[1.0], [2.0], [3.0]]]),
        torch.tensor([[1.0, 10.0, 100.0]]),
        torch.tensor([0.5]),
        initial_state=torch.tensor([[[7.0, 8.0]]]),
        return_final_state=True,
        backend=backend,
    )
    assert y.flatten().tolist() == [187.5, 218.5, 321.5]
    assert state.tolist() == [[[2.0, 3.0]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_by_hand(backend: str) -> None:
    """Documents of 1, 0 and 2 inputs: the state slides along by as many, and no document sees another's inputs."""
    y, state = causal_conv1d(
        torch.tensor([[[1.0], [2.0], [3.0]]]),
        torch.tensor([[1.0, 10.0, 100.0]]),
        initial_state=torch.tensor([[[7.0, 8.0]], [[5.0, 6.0]], [[0.0, 9.0]]]),
        cu_seqlens=cu_seqlens([0, 1, 1, 3]),
        return_final_state=True,
        backend=backend,
    )
    assert y.flatten().tolist() == [187.0, 290.0, 329.0]
    assert state.tolist() == [[[8.0, 1.0]], [[5.0, 6.0]], [[2.0, 3.0]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_filter_is_that_of_torch(backend: str) -> None:
    module = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    x = torch.randn(2, 11, 6)
    expected = F.silu(module(x.transpose(1, 2))[..., :11]).transpose(1, 2)
    for activation in ("silu", "swish"):
        y = causal_conv1d(x, module.weight[:, 0], module.bias, activation, backend=backend)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("offsets", [None, [0, 0, 1, 3, 9, 9]])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(offsets: list[int] | None, activation: str | None) -> None:
    args = arguments(1 if offsets else 2, 9, 3, 4, rows=5 if offsets else None)
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    run = convolution("portable", offsets, activation)
    assert torch.autograd.gradcheck(lambda *ts: run(**dict(zip(leaves, ts, strict=True))), list(leaves.values()))


CASES = [
    (2, 1, 5, 4, None),
    (1, 300, 6, 4, None),
    (3, 77, 5, 5, None),
    (2, 2, 4, 5, None),
    (2, 0, 4, 3, None),
    (0, 7, 4, 3, None),
    (3, 19, 7, 1, None),
    (1, 60, 5, 4, [0, 0, 1, 3, 6, 7, 40, 59, 60, 60]),
    (1, 33, 3, 2, [0, 33]),
    (1, 0, 3, 3, [0, 0, 0]),
    (1, 0, 3, 3, [0]),
    (1, 9, 3, 1, [0, 0, 9]),
    (1, 20, 300, 4, [0, 2, 20]),
]


@pytest.mark.parametrize(("b", "l", "d", "k", "offsets"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_against_reference(
    backend: str, b: int, l: int, d: int, k: int, offsets: list[int] | None, dtype: torch.dtype
) -> None:
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(BackendError, match="it computes in float32"):
            causal_conv1d(torch.randn(1, 2, 3, dtype=dtype), torch.randn(3, 2), backend="cpu")
        return
    args = arguments(b, l, d, k, rows=None if offsets is None else len(offsets) - 1, dtype=dtype)
    weights = output_weights(args)
    exact = gradients(convolution("reference", offsets), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(convolution(backend, offsets), args, weights)
    assert found["out0"].dtype == found["out1"].dtype == dtype
    assert {name: found[f"d{name}"].dtype for name in args} == {name: t.dtype for name, t in args.items()}
    if dtype in (torch.float32, torch.float64):
        assert_close(found, exact, FLOAT32 if dtype == torch.float32 else 1e-12)
    else:
        assert_no_worse(found, gradients(convolution("reference", offsets), args, weights), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [None, [0, 5, 5, 6, 20]])
def test_optional_arguments_left_out(backend: str, offsets: list[int] | None) -> None:
    args = arguments(1, 20, 4, 4, rows=4 if offsets else None, dtype=torch.float32)
    packed = None if offsets is None else cu_seqlens(offsets)
    y = causal_conv1d(args["x"], args["weight"], cu_seqlens=packed, backend=backend)
    zeros = {"bias": torch.zeros(4), "initial_state": torch.zeros_like(args["initial_state"])}
    torch.testing.assert_close(y, convolution("reference", offsets, None)(**(args | zeros))[0])


def token_by_token(l: int) -> list[int]:
    return list(range(l + 1))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
def test_any_split_gives_the_same(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """One pass = chunks that hand the state on = token by token: output, final state and all gradients."""
    l, k = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 5))
    # Enough channels that the rounding of handed-on gradients averages out.
    args = arguments(2, l, 32, k, dtype=dtype)
    cuts = data.draw(splits(l) | st.just(token_by_token(l)))
    weights = output_weights(args)

    def in_chunks(backend: str, x: Tensor, initial_state: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        ys, state = [], initial_state
        for piece in pieces(cuts):
            y, state = convolution(backend)(x=x[:, piece], initial_state=state, **parameters)
            ys.append(y)
        return torch.cat(ys, 1), state

    exact = gradients(convolution("reference"), {name: t.double() for name, t in args.items()}, weights)
    found = gradients(partial(in_chunks, backend), args, weights)
    if dtype == torch.float32:
        assert_close(found, exact)
    else:
        # In the same chunks, because the gradient of a state is rounded wherever it is handed on.
        assert_no_worse(found, gradients(partial(in_chunks, "reference"), args, weights), exact)


@pytest.mark.parametrize("backend", FAST)
@given(data=st.data())
def test_packed_is_each_document_alone(backend: str, data: st.DataObject) -> None:
    l, k = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 5))
    offsets = data.draw(splits(l) | st.just(token_by_token(l)))
    args = arguments(1, l, 3, k, rows=len(offsets) - 1, dtype=torch.float32)
    weights = output_weights(args)

    def alone(x: Tensor, initial_state: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        results = [
            convolution("reference")(x=x[:, piece], initial_state=initial_state[row : row + 1], **parameters)
            for row, piece in enumerate(pieces(offsets))
        ]
        ys, states = zip(*results, strict=True)
        return torch.cat(ys, 1), torch.cat(states)

    exact = gradients(alone, {name: t.double() for name, t in args.items()}, weights)
    assert_close(gradients(convolution(backend, offsets), args, weights), exact)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("offsets", [None, [0, 5, 33]])
def test_strided_inputs(backend: str, offsets: list[int] | None) -> None:
    args = arguments(1, 33, 4, 4, rows=2 if offsets else None, dtype=torch.float32)
    strided = {
        name: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t for name, t in args.items()
    }
    assert not any(strided[name].is_contiguous() for name in ("x", "weight", "initial_state"))
    weights = output_weights(args)
    run = convolution(backend, offsets)
    assert_close(gradients(run, strided, weights), gradients(run, args, weights), tolerance=1e-6)


@pytest.mark.parametrize("offsets", [None, [0, 2, 17]])
@pytest.mark.parametrize("backend", FAST)
def test_compiles_as_one_graph(backend: str, offsets: list[int] | None) -> None:
    args = arguments(1, 17, 4, 4, rows=2 if offsets else None, dtype=torch.float32)
    weights = output_weights(args)
    run = convolution(backend, offsets)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, args, weights), gradients(run, args, weights), 1e-6)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("offsets", [None, [0, 2, 17]])
@pytest.mark.parametrize("backend", FAST)
def test_custom_op_is_well_formed(backend: str, k: int, offsets: list[int] | None) -> None:
    args = arguments(1, 17, 4, k, rows=2 if offsets else None, dtype=torch.float32)
    x, weight, bias, initial_state = (t.requires_grad_() for t in args.values())
    packed = None if offsets is None else cu_seqlens(offsets)
    torch.library.opcheck(
        torch.ops.mambalm.causal_conv1d.default, (x, weight, bias, True, initial_state, packed, backend)
    )


@pytest.mark.parametrize("backend", FAST)
def test_autocast_leaves_the_arithmetic_alone(backend: str) -> None:
    args = arguments(1, 40, 4, 4, dtype=torch.float32)
    weights = output_weights(args)
    plain = gradients(convolution(backend), args, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(gradients(convolution(backend), args, weights), plain, tolerance=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [None, [0, 0, 20], [0, 20, 20]])
def test_inputs_are_left_alone_and_outputs_are_fresh(backend: str, offsets: list[int] | None) -> None:
    for l in (20, 0):
        edges = None if offsets is None else [min(edge, l) for edge in offsets]
        args = arguments(1, l, 4, 4, rows=2 if edges else None, dtype=torch.float32)
        before = {name: t.clone() for name, t in args.items()}
        for out in convolution(backend, edges)(**args):
            out.fill_(1)
        assert all(torch.equal(args[name], before[name]) for name in args)


@pytest.mark.parametrize("offsets", [None, [0, 5, 17]])
def test_shapes_without_data(offsets: list[int] | None) -> None:
    args: dict[str, Any] = {
        name: t.to("meta") for name, t in arguments(1, 17, 4, 4, rows=2 if offsets else None).items()
    }
    packed = None if offsets is None else cu_seqlens(offsets, "meta")
    y, state = causal_conv1d(**args, cu_seqlens=packed, return_final_state=True)
    assert (y.shape, state.shape) == (args["x"].shape, args["initial_state"].shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4)}, r"x must have 3 axes \(b, l, d\), got shape \(8, 4\)"),
        ({"weight": torch.zeros(4, 1, 4)}, r"weight must have 2 axes \(d, k\), got shape \(4, 1, 4\)"),
        ({"weight": torch.zeros(3, 4)}, r"weight must have shape \(d, k\) = \(4, 4\), got \(3, 4\)"),
        ({"weight": torch.zeros(4, 0)}, r"weight must have at least one tap, got shape \(4, 0\)"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(d\) = \(4,\), got \(5,\)"),
        ({"initial_state": torch.zeros(2, 4, 4)}, r"initial_state must have shape \(b, d, k-1\) = \(2, 4, 3\)"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta, x on cpu"),
        ({"cu_seqlens": cu_seqlens([0, 8])}, "batch axis must be 1"),
        ({"cu_seqlens": cu_seqlens([0, 8], "meta")}, "cu_seqlens is on meta, what it packs on cpu"),
        ({"activation": "relu"}, "activation must be None, 'silu' or 'swish', got 'relu'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {**arguments(2, 8, 4, 4, dtype=torch.float32)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(args | change))


def test_parts_of_the_output_are_parts() -> None:
    sizes = (3, 0, 2)
    args = arguments(2, 9, 5, 4, dtype=torch.float32)
    whole, state = causal_conv1d(**args, return_final_state=True)
    parts, final_state = causal_conv1d(**args, return_final_state=True, sizes=sizes)
    assert torch.equal(torch.cat(parts, dim=-1), whole)
    assert torch.equal(final_state, state)
    assert [part.shape[-1] for part in causal_conv1d(**args, sizes=sizes, backend="reference")] == list(sizes)
    with pytest.raises(ValueError, match="must add up to the 5 channels"):
        causal_conv1d(**args, sizes=(3, 1))


def test_a_missing_backend_raises() -> None:
    with pytest.raises(BackendError, match="'gluon' backend was asked for but cannot run"):
        convolution("gluon")(**arguments(1, 8, 4, 4))


@pytest.mark.parametrize("offsets", [None, [0, 100, 512]])
def test_memory_does_not_grow_with_the_taps(offsets: list[int] | None) -> None:
    """Nothing much larger than x is ever allocated: the taps are passes over one buffer, not copies of it."""

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    module = choose(Call("causal_conv1d", torch.device("cpu"), torch.float32), "portable")
    args = arguments(1, 512, 8, 16, rows=2 if offsets else None, dtype=torch.float32)
    packed = None if offsets is None else cu_seqlens(offsets)
    values = (args["x"], args["weight"], args["bias"], True, args["initial_state"], packed)
    with Largest() as mode:
        y, state = module.forward(*values)
        module.backward(y, state, *values)
    assert args["x"].numel() < mode.seen < 1.2 * args["x"].numel()
