"""ssd's numba backend: the contract against the reference in float64, the equalities, threads."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambalm.ops import BackendError, explain
from mambalm.ops.ssd import ssd
from tests.helpers import assert_close, assert_no_worse, cu_seqlens, gradients, splits
from tests.ops.ssd_helpers import (
    TOKENS,
    arguments,
    doubled,
    only_y,
    output_weights,
    piecewise,
    scan,
    without_states,
)

# b, l, h, p, n, g, offsets: chunks and stretches of them that end early, heads that are no whole block, odd sizes.
CASES = [
    (2, 1, 4, 3, 5, 1, None),
    (3, 37, 4, 3, 5, 2, None),
    (1, 300, 6, 20, 19, 3, None),
    (2, 129, 6, 3, 5, 1, None),
    (1, 600, 5, 33, 40, 1, None),
    (1, 70, 2, 64, 130, 1, None),
    (1, 0, 4, 3, 5, 1, None),
    (2, 0, 4, 3, 5, 1, None),
    (1, 700, 4, 3, 5, 2, [0, 0, 1, 7, 16, 16, 200, 256, 320, 320, 700, 700]),
    (1, 40, 4, 3, 5, 1, [0, 40]),
    (1, 0, 4, 3, 5, 1, [0, 0, 0]),
    (1, 0, 4, 3, 5, 1, [0]),
]


@pytest.mark.parametrize(("b", "l", "h", "p", "n", "g", "offsets"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_reference(
    b: int, l: int, h: int, p: int, n: int, g: int, offsets: list[int] | None, dtype: torch.dtype
) -> None:
    args = arguments(b, l, h, p, n, g, rows=None if offsets is None else len(offsets) - 1, dtype=dtype)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), doubled(args), weights)
    found = gradients(scan("cpu", offsets), args, weights)
    assert found["out0"].dtype == dtype
    assert found["out1"].dtype == torch.float32
    if dtype == torch.float32:
        assert_close(found, exact)
    else:
        assert_no_worse(found, gradients(scan("reference", offsets), args, weights), exact)


def test_it_is_chosen_and_says_what_it_cannot() -> None:
    assert explain("ssd")["cpu"] is None
    assert next(iter(explain("ssd"))) == "cpu"
    with pytest.raises(BackendError, match="it computes in float32"):
        scan("cpu")(**arguments(1, 8))


def test_small_steps_beside_large_ones() -> None:
    """Steps that erase the state next to steps that barely touch it: nothing overflows, nothing is lost."""
    args = arguments(1, 400, dtype=torch.float32)
    args["dt"] = torch.where(torch.rand(1, 400, 4) < 0.1, 3000.0, 1e-4)
    weights = output_weights(args)
    exact = gradients(scan("reference", dt_softplus=False), doubled(args), weights)
    assert_close(gradients(scan("cpu", dt_softplus=False), args, weights), exact)


@pytest.mark.parametrize("softplus", [True, False])
def test_step_limits_stop_gradients(softplus: bool) -> None:
    args = arguments(2, 140, dtype=torch.float32)
    weights = output_weights(args)
    options = {"dt_softplus": softplus, "dt_limit": (0.5, 0.9)}
    found = gradients(scan("cpu", **options), args, weights)
    assert_close(found, gradients(scan("reference", **options), doubled(args), weights))
    assert 0 < (found["ddt"] == 0).sum() < found["ddt"].numel()


def test_a_skip_weight_per_channel() -> None:
    args = arguments(2, 70, dtype=torch.float32) | {"D": torch.randn(4, 3)}
    weights = output_weights(args)
    assert_close(gradients(scan("cpu"), args, weights), gradients(scan("reference"), doubled(args), weights))


def test_optional_arguments_left_out() -> None:
    args = arguments(2, 70, dtype=torch.float32)
    few = {name: args[name] for name in ("x", "dt", "A", "B", "C")}
    weights = (torch.randn(2, 70, 4, 3, dtype=torch.float64),)

    def run(backend: str):  # type: ignore[no-untyped-def]
        return lambda **kwargs: ssd(**kwargs, dt_softplus=True, backend=backend)

    assert_close(gradients(run("cpu"), few, weights), gradients(run("reference"), doubled(few), weights))


def test_strided_inputs() -> None:
    args = arguments(2, 73, dtype=torch.float32)
    strided = {k: t.transpose(1, -1).contiguous().transpose(1, -1) if t.ndim > 2 else t for k, t in args.items()}
    weights = output_weights(args)
    assert_close(gradients(scan("cpu"), strided, weights), gradients(scan("cpu"), args, weights), 0)
    wide = torch.randn(2, 73, 40)
    args["x"] = wide[..., 5:17].unflatten(-1, (4, 3))  # as a layer cuts it out of a projection
    expected = scan("cpu")(**args | {"x": args["x"].contiguous()})
    assert all(map(torch.equal, scan("cpu")(**args), expected))


@pytest.mark.parametrize("offsets", [None, [0, 5, 117]])
def test_compiles_as_one_graph(offsets: list[int] | None) -> None:
    args = arguments(1, 117, g=2, rows=2 if offsets else None, dtype=torch.float32)
    weights = output_weights(args)
    compiled = torch.compile(scan("cpu", offsets), fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, args, weights), gradients(scan("cpu", offsets), args, weights), 1e-6)


@pytest.mark.parametrize("states", [True, False])
def test_custom_op_is_well_formed(states: bool) -> None:
    args = arguments(1, 17, g=2, rows=2, dtype=torch.float32)
    *tensors, initial_state = [t.requires_grad_() for t in args.values()]
    rest = (True, 0.0, math.inf, initial_state if states else None, cu_seqlens([0, 5, 17]), None, "cpu")
    torch.library.opcheck(torch.ops.mambalm.ssd.default, (*tensors, *rest, states, True))


def test_gradients_are_contiguous() -> None:
    """As the compiler is told."""
    args = arguments(1, 17, g=2, dtype=torch.float32)
    assert all(t.is_contiguous() for t in gradients(scan("cpu"), args, output_weights(args)).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=10)
def test_any_split_gives_the_same(dtype: torch.dtype, data: st.DataObject) -> None:
    """One pass = chunks that hand the state on, down to single tokens: output, final state and all gradients."""
    l = data.draw(st.integers(1, 300))
    cuts = data.draw(st.one_of(splits(l), st.just([*range(min(l, 24)), l])))
    args = arguments(2, l, h=2, g=data.draw(st.sampled_from([1, 2])), dtype=dtype)
    weights = output_weights(args)
    exact = gradients(scan("reference"), doubled(args), weights)
    found = gradients(piecewise(cuts, "cpu", chained=True), args, weights)
    if dtype == torch.float32:
        assert_close(found, exact)
    else:
        assert_no_worse(found, gradients(scan("reference"), args, weights), exact)


@given(data=st.data())
@settings(max_examples=10)
def test_packed_is_each_document_alone(data: st.DataObject) -> None:
    """With states and, as in packed training, without."""
    l = data.draw(st.integers(1, 600))
    offsets = data.draw(splits(l))
    args = arguments(1, l, h=2, g=data.draw(st.sampled_from([1, 2])), rows=len(offsets) - 1, dtype=torch.float32)
    weights = output_weights(args)
    exact = gradients(scan("reference", offsets), doubled(args), weights)
    assert_close(gradients(scan("cpu", offsets), args, weights), exact)
    few, weights_of_y = without_states(args)
    exact = gradients(only_y("reference", offsets), doubled(few), weights_of_y)
    assert_close(gradients(only_y("cpu", offsets), few, weights_of_y), exact)


def test_a_document_does_not_see_its_neighbours() -> None:
    """A document of NaN leaves the others bit for bit as they were, gradients too, and is not swallowed itself."""
    args = arguments(1, 330, rows=3, dtype=torch.float32)
    run, weights = scan("cpu", [0, 5, 220, 330]), output_weights(args)
    clean = gradients(run, args, weights)
    nan = args | {name: args[name].index_fill(1, torch.arange(5, 220), math.nan) for name in TOKENS}
    found = gradients(run, nan, weights)
    tokens = ["out0", *(f"d{name}" for name in TOKENS)]
    for name in tokens:
        for piece in (slice(0, 5), slice(220, 330)):
            assert torch.equal(found[name][:, piece], clean[name][:, piece]), name
        assert found[name][:, 5:220].isnan().all(), name
    for name in ("out1", "dinitial_state"):
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]])


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_nan_is_never_swallowed(name: str) -> None:
    args = arguments(1, 70, dtype=torch.float32)
    args[name].view(-1)[0] = math.nan
    y, _ = scan("cpu")(**args)
    assert y.isnan().any()


@pytest.mark.usefixtures("two_threads")
def test_the_result_depends_neither_on_threads_nor_on_other_callers() -> None:
    args = arguments(2, 300, 6, 20, 40, dtype=torch.float32)
    weights = output_weights(args)

    def run() -> dict[str, Tensor]:
        return gradients(scan("cpu"), args, weights)

    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(2)
    with ThreadPoolExecutor(2) as callers:
        found = [run(), *callers.map(lambda _: run(), range(4))]
    assert all(torch.equal(each[name], alone[name]) for each in found for name in alone)
