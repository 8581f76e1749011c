"""Keyed permutations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambalm.data.permutation import Permutation


@given(st.integers(1, 3000), st.text(max_size=5))
def test_every_index_comes_once(size: int, key: str) -> None:
    order = Permutation(size, key)
    assert sorted(map(order, range(size))) == list(range(size))


def test_keys_and_neighbours_are_independent() -> None:
    size = 10_000
    one, two = (np.array([Permutation(size, key)(i) for i in range(size)]) for key in "ab")
    assert (one == two).sum() < 10
    for values in (one, two):
        assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 0.05
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.05
        # The mean distance of two random places is a third of the range.
        assert np.abs(np.diff(values)).mean() == pytest.approx(size / 3, rel=0.03)


def test_a_large_range_costs_no_memory() -> None:
    order = Permutation(10**15, "x")
    assert len({order(i) for i in range(100)}) == 100
    with pytest.raises(IndexError, match="not in range"):
        order(10**15)
