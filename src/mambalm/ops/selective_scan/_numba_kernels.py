"""numba kernels of the selective scan; see cpu.py for what the arguments are.

Within a job everything is (n, BLOCK) with the channels innermost, in local arrays that stay in the first-level cache;
rows past the n states and channels past the width of the block are zero. The states are updated two at a time: with
more, the polynomials' constants no longer fit the registers (docs/decisions/2026-11-27-cpu-prefill.md).
"""

import numpy as np

from mambalm.ops.numba_support import LOG2_E, exp2, f32, inline, kernel, narrow, part, sigmoid, softplus, sums, widen

BLOCK = 128
# Steps between the states that the forward keeps for the backward. Document i keeps its states from slot
# offsets[i] // KEPT_EVERY + i on: slots of different documents never meet.
KEPT_EVERY = 16


@inline
def padded_states(n):  # type: ignore[no-untyped-def]
    return (n + 7) // 8 * 8


@inline
def _locate(job, d, groups):  # type: ignore[no-untyped-def]
    """The document, the group, the first channel and the number of channels of a job."""
    per_group = d // groups
    blocks = (per_group + BLOCK - 1) // BLOCK
    document, block = job // (groups * blocks), job % (groups * blocks)
    group, within = block // blocks, (block % blocks) * BLOCK
    return document, group, block, group * per_group + within, min(BLOCK, per_group - within)


@inline
def _load_step(t, e, width, u, u_row, delta, delta_row, bias, soft, x, raw, step):  # type: ignore[no-untyped-def]
    """u, delta + bias and Δ of a step into local rows."""
    values, offset = part(u, t * u_row + e, width), part(bias, e, width)
    for j in range(width):
        x[j] = widen(values[j])
    steps = part(delta, t * delta_row + e, width)
    for j in range(width):
        raw[j] = widen(steps[j]) + offset[j]
    if soft:
        for j in range(BLOCK):
            step[j] = softplus(raw[j])
    else:
        for j in range(BLOCK):
            step[j] = raw[j]


@inline
def _load_padded(t, group, matrix, row):  # type: ignore[no-untyped-def]
    for i in range(matrix.shape[2]):
        row[i] = matrix[t, group, i]


@inline
def _update(h, rate, step, inflow, y, b, c):  # type: ignore[no-untyped-def]
    """h = exp(Δ A) h + Δ u B and y += C h for one step."""
    for i in range(0, h.shape[0], 2):
        b0, b1, c0, c1 = b[i], b[i + 1], c[i], c[i + 1]
        for j in range(BLOCK):
            s, v = step[j], inflow[j]
            h0 = h[i, j] * exp2(s * rate[i, j]) + v * b0
            h1 = h[i + 1, j] * exp2(s * rate[i + 1, j]) + v * b1
            h[i, j] = h0
            h[i + 1, j] = h1
            y[j] += h0 * c0 + h1 * c1


@inline
def load_rates(rate, A, e, width, scale):  # type: ignore[no-untyped-def]
    for j in range(width):
        for i in range(A.shape[1]):
            rate[i, j] = A[e + j, i] * scale


@inline
def advance(  # type: ignore[no-untyped-def]
    t, group, e, width, u, u_row, delta, delta_row, z, z_row, gated, soft, B, C, D, bias, y, h, rate, rows, b, c
):
    """Step t of a block of channels: y, and the states h (n, BLOCK) after it. ``rows`` is room for five."""
    x, raw, step, inflow, out = rows[0], rows[1], rows[2], rows[3], rows[4]
    _load_step(t, e, width, u, u_row, delta, delta_row, bias, soft, x, raw, step)
    _load_padded(t, group, B, b)
    _load_padded(t, group, C, c)
    for j in range(BLOCK):
        inflow[j] = step[j] * x[j]
        out[j] = f32(0)
    _update(h, rate, step, inflow, out, b, c)
    skip = part(D, e, width)
    for j in range(width):
        out[j] += skip[j] * x[j]
    if gated:
        gate = part(z, t * z_row + e, width)
        for j in range(width):
            g = widen(gate[j])
            out[j] *= g * sigmoid(g)
    result = part(y, t * D.size + e, width)
    for j in range(width):
        result[j] = narrow(result, out[j])


@kernel
def forward(  # type: ignore[no-untyped-def]
    first,
    last,
    offsets,
    u,
    u_row,
    delta,
    delta_row,
    z,
    z_row,
    gated,
    soft,
    A,
    B,
    C,
    D,
    bias,
    initial,
    y,
    final,
    save,
    kept,
):
    """Jobs first..last: y and final, and the kept states if ``save``."""
    d, n = A.shape
    padded = padded_states(n)
    h, rate = np.zeros((padded, BLOCK), f32), np.zeros((padded, BLOCK), f32)
    rows = np.zeros((5, BLOCK), f32)
    b, c = np.zeros(padded, f32), np.zeros(padded, f32)
    for job in range(first, last):
        document, group, _, e, width = _locate(job, d, B.shape[1])
        begin, end = offsets[document], offsets[document + 1]
        h[:] = f32(0)
        rate[:] = f32(0)
        rows[:] = f32(0)
        load_rates(rate, A, e, width, LOG2_E)
        load_rates(h, initial[document], e, width, f32(1))
        for t in range(begin, end):
            if save and (t - begin) % KEPT_EVERY == 0:
                slot = begin // KEPT_EVERY + document + (t - begin) // KEPT_EVERY
                for i in range(n):
                    target = part(kept[slot, i], e, width)
                    for j in range(width):
                        target[j] = h[i, j]
            advance(
                t,
                group,
                e,
                width,
                u,
                u_row,
                delta,
                delta_row,
                z,
                z_row,
                gated,
                soft,
                B,
                C,
                D,
                bias,
                y,
                h,
                rate,
                rows,
                b,
                c,
            )
        for j in range(width):
            for i in range(n):
                final[document, e + j, i] = h[i, j]


@inline
def _recompute(a, before, after, rate, step, inflow, y, b, c):  # type: ignore[no-untyped-def]
    """The decays, the states after a step from those before it, and y += C h."""
    for i in range(0, before.shape[0], 2):
        b0, b1, c0, c1 = b[i], b[i + 1], c[i], c[i + 1]
        for j in range(BLOCK):
            s, v = step[j], inflow[j]
            a0, a1 = exp2(s * rate[i, j]), exp2(s * rate[i + 1, j])
            h0 = before[i, j] * a0 + v * b0
            h1 = before[i + 1, j] * a1 + v * b1
            a[i, j] = a0
            a[i + 1, j] = a1
            after[i, j] = h0
            after[i + 1, j] = h1
            y[j] += h0 * c0 + h1 * c1


@sums
def _step_back(g, a, before, after, A, step, inflow, dy, b, c, dA, dstep, dinflow, db, dc):  # type: ignore[no-untyped-def]
    """One step of the recurrence backwards; g holds the gradient of the states, of this step and then of the last.

    In loops over few arrays each: for all that LLVM knows they overlap, and it checks before it vectorises, up to eight
    pairs of a loop.
    """
    for i in range(g.shape[0]):
        bi, ci, db_i, dc_i = b[i], c[i], f32(0), f32(0)
        for j in range(BLOCK):
            gj = g[i, j] + ci * dy[j]
            g[i, j] = gj
            dinflow[j] += gj * bi
        for j in range(BLOCK):
            db_i += g[i, j] * inflow[j]
            dc_i += after[i, j] * dy[j]
        db[i], dc[i] = db_i, dc_i
        for j in range(BLOCK):
            gj = g[i, j] * a[i, j]
            g[i, j] = gj
            dstep[j] += gj * before[i, j] * A[i, j]
        for j in range(BLOCK):
            dA[i, j] += g[i, j] * before[i, j] * step[j]


@inline
def _through_gate(t, e, width, dout, dout_row, z, z_row, gated, y, dy, dz, dz_row):  # type: ignore[no-untyped-def]
    """dy and dz of a step from the gradient of the output."""
    source = part(dout, t * dout_row + e, width)
    for j in range(width):
        dy[j] = widen(source[j])
    if gated:
        gate, target = part(z, t * z_row + e, width), part(dz, t * dz_row + e, width)
        for j in range(width):
            v = widen(gate[j])
            s = sigmoid(v)
            target[j] = narrow(target, dy[j] * y[j] * s * (f32(1) + v * (f32(1) - s)))
            dy[j] *= v * s


@kernel
def backward(  # type: ignore[no-untyped-def]
    first,
    last,
    dout,
    dout_row,
    dfinal,
    kept,
    offsets,
    u,
    u_row,
    delta,
    delta_row,
    z,
    z_row,
    gated,
    soft,
    A,
    B,
    C,
    D,
    bias,
    initial,
    du,
    ddelta,
    dz,
    dA,
    dB,
    dC,
    dD,
    dbias,
    dinitial,
):
    """Jobs first..last: all gradients; a document's share of dA, dD, dbias, a block's share of dB and dC."""
    d, n = A.shape
    padded = padded_states(n)
    rates, plain = np.zeros((padded, BLOCK), f32), np.zeros((padded, BLOCK), f32)
    g, sum_A = np.zeros((padded, BLOCK), f32), np.zeros((padded, BLOCK), f32)
    h = np.zeros((KEPT_EVERY + 1, padded, BLOCK), f32)
    a = np.zeros((KEPT_EVERY, padded, BLOCK), f32)
    x, raw, step, inflow, y = (
        np.zeros((KEPT_EVERY, BLOCK), f32),
        np.zeros((KEPT_EVERY, BLOCK), f32),
        np.zeros((KEPT_EVERY, BLOCK), f32),
        np.zeros((KEPT_EVERY, BLOCK), f32),
        np.zeros((KEPT_EVERY, BLOCK), f32),
    )
    dy, dstep, dinflow = np.zeros(BLOCK, f32), np.zeros(BLOCK, f32), np.zeros(BLOCK, f32)
    sum_D, sum_bias = np.zeros(BLOCK, f32), np.zeros(BLOCK, f32)
    b, c, db, dc = np.zeros(padded, f32), np.zeros(padded, f32), np.zeros(padded, f32), np.zeros(padded, f32)
    for job in range(first, last):
        document, group, block, e, width = _locate(job, d, B.shape[1])
        begin, end = offsets[document], offsets[document + 1]
        for local in (rates, plain, g, sum_A, h[0], x, raw, step):
            local[:] = f32(0)
        for local in (dy, sum_D, sum_bias):
            local[:] = f32(0)
        load_rates(rates, A, e, width, LOG2_E)
        load_rates(plain, A, e, width, f32(1))
        load_rates(g, dfinal[document], e, width, f32(1))
        for chunk in range((end - begin + KEPT_EVERY - 1) // KEPT_EVERY - 1, -1, -1):
            start = begin + chunk * KEPT_EVERY
            length = min(KEPT_EVERY, end - start)
            slot = begin // KEPT_EVERY + document + chunk
            for i in range(n):
                source = part(kept[slot, i], e, width)
                for j in range(width):
                    h[0, i, j] = source[j]
            for k in range(length):
                t = start + k
                _load_step(t, e, width, u, u_row, delta, delta_row, bias, soft, x[k], raw[k], step[k])
                _load_padded(t, group, B, b)
                _load_padded(t, group, C, c)
                for j in range(BLOCK):
                    inflow[k, j] = step[k, j] * x[k, j]
                    y[k, j] = f32(0)
                _recompute(a[k], h[k], h[k + 1], rates, step[k], inflow[k], y[k], b, c)
                skip = part(D, e, width)
                for j in range(width):
                    y[k, j] += skip[j] * x[k, j]
            for k in range(length - 1, -1, -1):
                t = start + k
                _through_gate(t, e, width, dout, dout_row, z, z_row, gated, y[k], dy, dz, d)
                _load_padded(t, group, B, b)
                _load_padded(t, group, C, c)
                for j in range(BLOCK):
                    dstep[j] = f32(0)
                    dinflow[j] = f32(0)
                _step_back(g, a[k], h[k], h[k + 1], plain, step[k], inflow[k], dy, b, c, sum_A, dstep, dinflow, db, dc)
                for i in range(n):
                    dB[block, t, i] = db[i]
                    dC[block, t, i] = dc[i]
                target, skip = part(du, t * d + e, width), part(D, e, width)
                for j in range(width):
                    sum_D[j] += dy[j] * x[k, j]
                    target[j] = narrow(target, dinflow[j] * step[k, j] + dy[j] * skip[j])
                    dstep[j] += dinflow[j] * x[k, j]
                if soft:
                    for j in range(width):
                        dstep[j] *= sigmoid(raw[k, j])
                target = part(ddelta, t * d + e, width)
                for j in range(width):
                    sum_bias[j] += dstep[j]
                    target[j] = narrow(target, dstep[j])
        for j in range(width):
            dD[document, e + j] = sum_D[j]
            dbias[document, e + j] = sum_bias[j]
            for i in range(n):
                dA[document, e + j, i] = sum_A[i, j]
                dinitial[document, e + j, i] = g[i, j]
