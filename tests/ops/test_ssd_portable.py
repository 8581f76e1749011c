"""How ssd's portable backend lays out documents, and what it allocates."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambalm.ops.backends import Call, choose
from mambalm.ops.ssd import layout
from tests.helpers import assert_close, cu_seqlens, gradients, splits
from tests.ops.ssd_helpers import arguments, output_weights, scan


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
    """No tensor but the outputs is larger for a longer sequence."""

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
