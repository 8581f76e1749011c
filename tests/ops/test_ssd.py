"""ssd: hand-computed cases, Listing 1 against the recurrence, and the portable backend held against the reference."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambalm.ops.backends import Call, choose
from mambalm.ops.ssd import layout, reference, ssd
from tests.helpers import FLOAT32, assert_close, assert_no_worse, cu_seqlens, gradients, pieces, splits

BACKENDS = ["portable", "reference"]
TOKENS = ("x", "dt", "B", "C", "z")


def arguments(
    b: int,
    l: int,
    h: int = 4,
    p: int = 3,
    n: int = 5,
    g: int = 1,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Every tensor argument; activations in ``dtype``, parameters and state in float32 or float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(to)

    return {
        "x": draw(b, l, h, p),
        "dt": draw(b, l, h),
        "A": -torch.rand(h, dtype=torch.float64).to(wide) * 4,
        "B": draw(b, l, g, n),
        "C": draw(b, l, g, n),
        "D": draw(h, to=wide),
        "z": draw(b, l, h, p),
        "dt_bias": draw(h, to=wide),
        "initial_state": draw(b if rows is None else rows, h, p, n, to=wide),
    }


def scan(backend: str | None, offsets: list[int] | None = None, **options: Any) -> Any:
    packed = None if offsets is None else cu_seqlens(offsets)
    options = {"dt_softplus": True, "chunk_size": 16} | options

    def run(**kwargs: Tensor) -> tuple[Tensor, Tensor]:
        result = ssd(**kwargs, cu_seqlens=packed, return_final_state=True, backend=backend, **options)
        assert isinstance(result, tuple)
        return result

    return run


def output_weights(args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.randn_like(args["x"].double()), torch.randn_like(args["initial_state"].double())


def doubled(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in args.items()}


def piecewise(offsets: list[int], backend: str, *, chained: bool) -> Any:
    """Each piece by a call of its own; chained: the state handed on, else every piece with its row of states."""

    def run(initial_state: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        ys, states = [], [initial_state]
        for row, piece in enumerate(pieces(offsets)):
            start = states[-1] if chained else initial_state[row : row + 1]
            part = {name: t[:, piece] if name in TOKENS else t for name, t in kwargs.items()}
            y, state = scan(backend)(**part, initial_state=start)
            ys.append(y)
            states.append(state)
        return torch.cat(ys, dim=1), states[-1] if chained else torch.cat(states[1:])

    return run


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_steps_by_hand(backend: str) -> None:
    """One head, one channel, one state: h1 = e^(-Δ1) h0 + Δ1 B1 x1, h2 = e^(-Δ2) h1 + Δ2 B2 x2 with Δ = 1, 2."""

    def row(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

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


@pytest.mark.parametrize(("b", "offsets"), [(1, None), (7, None), (1, [0, 90, 91, 93, 93, 200, 220, 300])])
def test_several_segments_and_blocks(b: int, offsets: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So little room that documents are computed a few chunks at a time, and not all side by side."""
    module = choose(Call("ssd", torch.device("cpu"), torch.float64), "portable")
    monkeypatch.setitem(module._SEGMENT_ELEMENTS, "cpu", 4 * 16 * 48)  # h times a chunk's width times tokens
    args = arguments(b, 300, g=2, rows=None if offsets is None else len(offsets) - 1)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), args, weights)
    assert_close(gradients(scan("portable", offsets), args, weights), exact, 1e-12)


@given(offsets=st.integers(0, 200).flatmap(splits), chunk=st.integers(1, 70), budget=st.integers(0, 300))
def test_layout_reads_every_token_once(offsets: list[int], chunk: int, budget: int) -> None:
    """In order within a document, with little filling, and within the budget unless one chunk exceeds it."""
    found: dict[int, list[int]] = {row: [] for row in range(len(offsets) - 1)}
    places = 0
    for block in layout.blocks(offsets, chunk, budget, torch.device("cpu")):
        rows = torch.arange(len(found))[block.rows].tolist()
        for segment in block.segments:
            real = torch.ones(segment.shape).bool() if segment.real is None else segment.real.view(segment.shape)
            for row, tokens, mask in zip(rows, segment.tokens.view(segment.shape), real, strict=True):
                found[row] += tokens[mask].tolist()
            assert segment.tokens.numel() <= max(budget, segment.shape[2])
            places += segment.tokens.numel()
    assert list(found.values()) == [list(range(i, j)) for i, j in pairwise(offsets)]
    assert places <= 3 * offsets[-1]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=12)
def test_any_split_gives_the_same(dtype: torch.dtype, data: st.DataObject) -> None:
    """One pass = chunks that hand the state on: output, final state and all gradients."""
    l = data.draw(st.integers(1, 300))
    cuts = data.draw(splits(l))
    args = arguments(2, l, h=2, g=data.draw(st.sampled_from([1, 2])), dtype=dtype)
    weights = output_weights(args)
    exact = gradients(scan("reference"), doubled(args), weights)
    found = gradients(piecewise(cuts, "portable", chained=True), args, weights)
    if dtype == torch.float32:
        assert_close(found, exact)
    else:
        assert_no_worse(found, gradients(scan("reference"), args, weights), exact)


@given(l=st.integers(1, 24))
@settings(max_examples=8)
def test_token_by_token_is_one_pass(l: int) -> None:
    args = arguments(2, l, dtype=torch.float32)
    weights = output_weights(args)
    found = gradients(piecewise(list(range(l + 1)), "portable", chained=True), args, weights)
    assert_close(found, gradients(scan("reference"), doubled(args), weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=12)
def test_packed_is_each_document_alone(dtype: torch.dtype, data: st.DataObject) -> None:
    l = data.draw(st.integers(1, 300))
    offsets = data.draw(splits(l))
    args = arguments(1, l, h=2, g=data.draw(st.sampled_from([1, 2])), rows=len(offsets) - 1, dtype=dtype)
    weights = output_weights(args)
    alone = piecewise(offsets, "reference", chained=False)
    exact = gradients(alone, doubled(args), weights)
    found = gradients(scan("portable", offsets), args, weights)
    if dtype == torch.float32:
        assert_close(found, exact)
    else:
        assert_no_worse(found, gradients(alone, args, weights), exact)


def without_states(args: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor]]:
    """The arguments but the initial state, and a weight for y."""
    few = {name: t for name, t in args.items() if name != "initial_state"}
    return few, (torch.randn_like(args["x"].double()),)


def only_y(backend: str, offsets: list[int], **options: Any) -> Any:
    packed = cu_seqlens(offsets)
    return lambda **kwargs: ssd(
        **kwargs, dt_softplus=True, cu_seqlens=packed, backend=backend, **{"chunk_size": 16} | options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=12)
def test_packed_without_states_is_each_document_alone(dtype: torch.dtype, data: st.DataObject) -> None:
    """What packed training runs: documents share chunks, and none sees another."""
    l = data.draw(st.integers(1, 300))
    offsets = data.draw(splits(l))
    args, weights = without_states(arguments(1, l, h=2, g=data.draw(st.sampled_from([1, 2])), dtype=dtype))

    def alone(**kwargs: Tensor) -> Tensor:
        nothing = kwargs["A"].new_zeros(len(offsets) - 1, 2, 3, 5)
        y: Tensor = piecewise(offsets, "reference", chained=False)(initial_state=nothing, **kwargs)[0]
        return y

    exact = gradients(alone, doubled(args), weights)
    found = gradients(only_y("portable", offsets), args, weights)
    if dtype == torch.float32:
        assert_close(found, exact)
    else:
        assert_no_worse(found, gradients(alone, args, weights), exact)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0], [0, 0, 1, 1, 5, 9, 9]])
def test_packed_without_states_gradcheck(offsets: list[int]) -> None:
    args, _ = without_states(arguments(1, offsets[-1], h=2, p=2, n=2, g=2))
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    run = only_y("portable", offsets, chunk_size=3)
    assert torch.autograd.gradcheck(lambda *ts: run(**dict(zip(leaves, ts, strict=True))), list(leaves.values()))
    torch.testing.assert_close(run(**args), only_y("reference", offsets)(**args))


def test_a_document_does_not_see_its_neighbours() -> None:
    """A document of NaN leaves the others, which share its chunks, bit for bit as they were."""
    args = arguments(1, 30, rows=3, dtype=torch.float32)
    run = scan("portable", [0, 5, 20, 30])
    y, state = run(**args)
    poisoned = args | {name: args[name].index_fill(1, torch.arange(5, 20), math.nan) for name in TOKENS}
    y_poisoned, state_poisoned = run(**poisoned)
    for piece in (slice(0, 5), slice(20, 30)):
        assert torch.equal(y_poisoned[:, piece], y[:, piece])
    assert torch.equal(state_poisoned[[0, 2]], state[[0, 2]])
    first = {name: t.index_fill(1, torch.arange(5), math.nan) if name in TOKENS else t for name, t in args.items()}
    assert torch.equal(run(**first)[0][:, 5:], y[:, 5:])


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
        ({"dt_limit": (0.5, 0.1)}, r"dt_limit must be \(smallest, largest\).*got \(0.5, 0.1\)"),
        ({"chunk_size": 0}, "chunk_size must be positive or None, got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    args = arguments(2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ssd(**(args | change))


def portable_calls(length: int, h: int, offsets: list[int] | None = None, states: bool = True) -> list[Any]:
    """Portable's forward and backward with everything on (but states), as functions without arguments."""
    module = choose(Call("ssd", torch.device("cpu"), torch.float32), "portable")
    rows = None if offsets is None else len(offsets) - 1
    args = arguments(1, length, h=h, p=16, n=32, rows=rows, dtype=torch.float32)
    packed = None if offsets is None else cu_seqlens(offsets)
    *tensors, initial_state = args.values()
    rest = (True, 0.0, math.inf, initial_state if states else None, packed, None)
    dy, dstate = torch.ones_like(args["x"]), torch.ones_like(initial_state) if states else None
    return [
        lambda: module.forward(*tensors, *rest, final=states, save=True),
        lambda: module.backward(dy, dstate, *tensors, *rest, torch.empty(0)),
    ]


def test_memory_is_bounded_by_a_segment() -> None:
    """From a certain length on, no allocation grows with it but the outputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            for t in out if isinstance(out, (tuple, list)) else [out]:
                fresh = isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs
                if fresh and func is not torch.ops.aten.empty_like.default:
                    self.largest = max(self.largest, t.numel())
            return out

    for call, longer in zip(portable_calls(8192, h=8), portable_calls(16384, h=8), strict=True):
        with Allocations() as short:
            call()
        with Allocations() as long:
            longer()
        assert 0 < long.largest == short.largest


@pytest.mark.parametrize("states", [True, False])
def test_short_documents_are_computed_side_by_side(states: bool) -> None:
    """No loop over documents: 2,000 of them take no more operations than 200 with as many tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    def operations(documents: int) -> list[int]:
        offsets = (torch.arange(8) * (2000 // documents)).repeat(documents // 8).cumsum(0).tolist()
        counts = []
        for call in portable_calls(offsets[-1], 1, [0, *offsets], states):
            with Count() as count:
                call()
            counts.append(count.seen)
        return counts

    assert all(many <= few for many, few in zip(operations(2000), operations(200), strict=True))
