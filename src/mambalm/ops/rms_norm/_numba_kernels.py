"""numba kernels of the normalisation; see cpu.py for what the arguments are. A job is a run of ROWS tokens."""

import numpy as np

from mambalm.ops.numba_support import f32, inline, kernel, narrow, part, sigmoid, sums, widen

ROWS = 16


@sums
def _sum_of_products(a, b):  # type: ignore[no-untyped-def]
    total = f32(0)
    for c in range(a.size):
        total += a[c] * b[c]
    return total


@inline
def _load(values, row, h):  # type: ignore[no-untyped-def]
    source = part(values, row, h.size)
    for c in range(h.size):
        h[c] = widen(source[c])


@inline
def _gate(gates, row, h, slopes):  # type: ignore[no-untyped-def]
    """h times silu(gate), and silu's derivative."""
    gate = part(gates, row, h.size)
    for c in range(h.size):
        v = widen(gate[c])
        s = sigmoid(v)
        slopes[c] = s * (f32(1) + v * (f32(1) - s))
        h[c] *= v * s


@inline
def _scale(h, first, size, eps):  # type: ignore[no-untyped-def]
    group = part(h, first, size)
    return f32(1) / f32(np.sqrt(_sum_of_products(group, group) / f32(size) + eps))


@kernel
def forward(  # type: ignore[no-untyped-def]
    first, last, count, x, x_row, weight, gate, gate_row, gated, residual, residual_row, added, eps, size, y, stream
):
    """Jobs first..last: y, and stream = x + residual if ``added``."""
    d = weight.size
    h, other = np.empty(d, f32), np.empty(d, f32)
    for t in range(first * ROWS, min(last * ROWS, count)):
        _load(x, t * x_row, h)
        if added:
            _load(residual, t * residual_row, other)
            target = part(stream, t * d, d)
            for c in range(d):
                kept = narrow(target, h[c] + other[c])
                target[c] = kept
                h[c] = widen(kept)
        if gated:
            _gate(gate, t * gate_row, h, other)
        result = part(y, t * d, d)
        for g in range(0, d, size):
            scale = _scale(h, g, size, eps)
            source, factor, target = part(h, g, size), part(weight, g, size), part(result, g, size)
            for c in range(size):
                target[c] = narrow(target, source[c] * scale * factor[c])


@kernel
def backward(  # type: ignore[no-untyped-def]
    first,
    last,
    count,
    dy,
    dy_row,
    dstream,
    dstream_row,
    added,
    source,
    source_row,
    weight,
    gate,
    gate_row,
    gated,
    eps,
    size,
    dsource,
    dweight,
    dgate,
):
    """Jobs first..last: dsource and dgate, and a job's share of dweight (jobs, d), which starts at zero.

    With n = h / rms and w the weight: dh = (w dy - n mean(w dy n)) / rms, the mean over a group.
    """
    d = weight.size
    h, dh, slopes = np.empty(d, f32), np.empty(d, f32), np.empty(d, f32)
    for t in range(first * ROWS, min(last * ROWS, count)):
        share = dweight[t // ROWS]
        _load(source, t * source_row, h)
        _load(dy, t * dy_row, dh)
        if gated:
            _gate(gate, t * gate_row, h, slopes)
        for g in range(0, d, size):
            scale = _scale(h, g, size, eps)
            n, dn, factor, total = part(h, g, size), part(dh, g, size), part(weight, g, size), part(share, g, size)
            for c in range(size):
                n[c] *= scale
                total[c] += dn[c] * n[c]
                dn[c] *= factor[c]
            mean = _sum_of_products(dn, n) / f32(size)
            for c in range(size):
                dn[c] = (dn[c] - n[c] * mean) * scale
        if gated:
            inputs, gates, target = part(source, t * source_row, d), part(gate, t * gate_row, d), part(dgate, t * d, d)
            for c in range(d):
                target[c] = narrow(target, dh[c] * widen(inputs[c]) * slopes[c])
                v = widen(gates[c])
                dh[c] *= v * sigmoid(v)
        if added:
            _load(dstream, t * dstream_row, slopes)
            for c in range(d):
                dh[c] += slopes[c]
        target = part(dsource, t * d, d)
        for c in range(d):
            target[c] = narrow(target, dh[c])
