"""Products of small matrices in registers, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from mambalm.ops.numba_products import BELOW, FULL, LANES, LOWER, ROWS, UPPER, multiply, padded

FACTOR = {FULL: lambda a: a, LOWER: np.tril, UPPER: np.triu, BELOW: lambda a: a}


def draw(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng().standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("mode", [FULL, LOWER, UPPER, BELOW])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.25])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 1), (13, 70, 7), (64, 64, 64), (9, 17, 0), (40, 33, 40)])
def test_against_numpy(rows: int, columns: int, depth: int, beta: float, turned: bool, mode: int) -> None:
    height, width = padded(rows, ROWS), padded(columns, LANES)
    a = np.asarray(FACTOR[mode](draw(height, max(depth, height))), np.float32)
    b, c = draw(max(depth, height), width), draw(height, width)
    if beta == 0:
        c[:] = np.nan  # not read
    inner = slice(0, min(depth, a.shape[1]))
    expected = a[:, inner].astype(np.float64) @ b[inner] + (beta * c.astype(np.float64) if beta else 0)
    left = np.ascontiguousarray(a.T) if turned else np.ascontiguousarray(a)
    strides = (1, height) if turned else (a.shape[1], 1)
    found = c.copy()
    multiply(rows, columns, depth, left.ravel(), 0, *strides, b.ravel(), 0, width, found.ravel(), 0, width, beta, mode)
    if mode == BELOW:
        below = np.tri(rows, columns, dtype=bool)
        np.testing.assert_allclose(
            found[:rows, :columns][below], expected[:rows, :columns][below], rtol=1e-5, atol=1e-5
        )
        above = np.arange(width)[None] >= padded(rows, ROWS) + LANES * 2
        np.testing.assert_array_equal(found[:, above[0]], c[:, above[0]])
    else:
        np.testing.assert_allclose(found[:, :columns], expected[:, :columns], rtol=1e-5, atol=1e-5)
