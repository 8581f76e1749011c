"""The equalities of ssd, as properties: one pass = chunks = token by token = packed, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import assert_close, assert_no_worse, gradients, splits
from tests.ops.ssd_helpers import TOKENS, arguments, doubled, only_y, output_weights, piecewise, scan, without_states


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
