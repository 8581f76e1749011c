"""numba kernels of ssd; see cpu.py for what the arguments are.

A chunk of CHUNK tokens of a head is a handful of products of matrices that stay in the second-level cache: the masked
attention W = L ∘ C Bᵀ times Δx, and what the state gives and takes. States are transposed, (n, p), in local arrays with
n and p rounded up; filling and the tokens after a document's end are zero. L is made by multiplying each row by the
next decay: no exponent is a difference of sums, and a token costs one exponential.
"""

import numpy as np

from mambalm.ops.numba_products import BELOW, FULL, LANES, LOWER, UPPER, multiply
from mambalm.ops.numba_support import LOG2_E, exp2, f32, inline, kernel, narrow, part, sigmoid, softplus, sums, widen

CHUNK = 64
# Chunks between the states that the forward keeps for the backward. Document i keeps its states from slot
# offsets[i] // (CHUNK * KEPT_EVERY) + i on: slots of different documents never meet.
KEPT_EVERY = 4
# Heads of a group that the backward takes together: they share the sums of dB and dC.
HEADS = 4


@inline
def round_up(size):  # type: ignore[no-untyped-def]
    return (size + LANES - 1) // LANES * LANES


@inline
def _transpose(rows, columns, source, s_row, target, t_row):  # type: ignore[no-untyped-def]
    for i in range(rows):
        for j in range(columns):
            target[j * t_row + i] = source[i * s_row + j]


@kernel
def prepare(first, last, begins, ends, B, C, b, c, turned, scores):  # type: ignore[no-untyped-def]
    """Jobs first..last, a chunk of a group each: B, C (q, n), C again as (n, q), and the lower triangle of C Bᵀ."""
    groups, n = B.shape[1], B.shape[2]
    width = round_up(n)
    across = np.zeros(width * CHUNK, f32)
    for job in range(first, last):
        chunk, group = job // groups, job % groups
        begin, length = begins[chunk], ends[chunk] - begins[chunk]
        own_b, own_c, own_turned, own_scores = b[job], c[job], turned[job], scores[job]
        across[:] = f32(0)
        for i in range(length):
            for j in range(n):
                own_b[i * width + j] = B[begin + i, group, j]
                own_c[i * width + j] = C[begin + i, group, j]
        _transpose(length, n, own_b, width, across, CHUNK)
        _transpose(length, n, own_c, width, own_turned, CHUNK)
        multiply(length, length, n, own_c, 0, width, 1, across, 0, CHUNK, own_scores, 0, CHUNK, f32(0), BELOW)
        for i in range(CHUNK):
            for j in range(i + 1, CHUNK):
                own_scores[i * CHUNK + j] = f32(0)


@inline
def _load_steps(begin, length, head, dt, bias, soft, low, high, raw, step):  # type: ignore[no-untyped-def]
    """dt + bias and Δ of a chunk."""
    raw[:] = f32(0)
    for i in range(length):
        raw[i] = dt[begin + i, head] + bias[head]
    if soft:
        for i in range(CHUNK):
            step[i] = min(max(softplus(raw[i]), low), high)
    else:
        for i in range(CHUNK):
            step[i] = min(max(raw[i], low), high)
    for i in range(length, CHUNK):
        step[i] = f32(0)


@inline
def _decays(step, A, a, from_start, to_end):  # type: ignore[no-untyped-def]
    """Each step's decay; what is left at each token of the entering state, and at the end of what each token adds."""
    for i in range(CHUNK):
        a[i] = exp2(step[i] * A * LOG2_E)
    left = f32(1)
    for i in range(CHUNK):
        left *= a[i]
        from_start[i] = left
    left = f32(1)
    for i in range(CHUNK - 1, -1, -1):
        to_end[i] = left
        left *= a[i]


@inline
def _load_rows(begin, length, head, source, s_row, p, target, width):  # type: ignore[no-untyped-def]
    """A head's channels of a chunk, as float32; zero beside and after them."""
    target[:] = f32(0)
    for i in range(length):
        values, row = part(source, (begin + i) * s_row + head * p, p), part(target, i * width, p)
        for j in range(p):
            row[j] = widen(values[j])


@inline
def _inflow(step, scale, x, width, inflow):  # type: ignore[no-untyped-def]
    """Δ x, times a factor for each token."""
    for i in range(CHUNK):
        factor = step[i] * scale[i]
        row, values = part(inflow, i * width, width), part(x, i * width, width)
        for j in range(width):
            row[j] = factor * values[j]


@inline
def _scale(rows, width, factor, matrix):  # type: ignore[no-untyped-def]
    for i in range(rows):
        row = part(matrix, i * width, width)
        for j in range(width):
            row[j] *= factor[i]


@inline
def _within(length, a, scores, L, W):  # type: ignore[no-untyped-def]
    """L[i, j], what is left at token i of what token j adds, row by row; and W = L ∘ scores."""
    for i in range(CHUNK):
        L[i] = f32(0)
    L[0] = f32(1)
    for i in range(length):
        row, weighed, score = part(L, i * CHUNK, CHUNK), part(W, i * CHUNK, CHUNK), part(scores, i * CHUNK, CHUNK)
        if i > 0:
            before = part(L, (i - 1) * CHUNK, CHUNK)
            for j in range(CHUNK):
                row[j] = a[i] * before[j]
            row[i] = f32(1)
        for j in range(CHUNK):
            weighed[j] = row[j] * score[j]


@inline
def _outputs(length, p, width, n, c, W, h, inflow, from_start, D, x, y):  # type: ignore[no-untyped-def]
    """y = C h + W Δx + D x, from the state that enters."""
    multiply(length, p, n, c, 0, round_up(n), 1, h, 0, width, y, 0, width, f32(0), FULL)
    _scale(CHUNK, width, from_start, y)
    multiply(length, p, length, W, 0, CHUNK, 1, inflow, 0, width, y, 0, width, f32(1), LOWER)
    for i in range(length):
        row, values = part(y, i * width, p), part(x, i * width, p)
        for j in range(p):
            row[j] += D[j] * values[j]


@inline
def _advance(length, p, width, n, b, inflow, through, h):  # type: ignore[no-untyped-def]
    """The state at the chunk's end; ``inflow`` is Δx times what is left of it there."""
    multiply(n, p, length, b, 0, 1, round_up(n), inflow, 0, width, h, 0, width, through, FULL)


@kernel
def forward(  # type: ignore[no-untyped-def]
    first,
    last,
    offsets,
    chunks,
    x,
    x_row,
    z,
    z_row,
    gated,
    dt,
    A,
    D,
    bias,
    soft,
    low,
    high,
    b,
    c,
    scores,
    groups,
    initial,
    y,
    final,
    save,
    kept,
):
    """Jobs first..last, a head of a document each: y, the final state, and the kept states if ``save``."""
    heads, p, n = initial.shape[1:]
    width, size = round_up(p), round_up(n) * round_up(p)
    h, ones = np.zeros(size, f32), np.ones(CHUNK, f32)
    local = np.zeros((3, CHUNK * width), f32)
    rows, inflow, out = local[0], local[1], local[2]
    vectors = np.zeros((5, CHUNK), f32)
    raw, step, a, from_start, to_end = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
    L, W = np.zeros(CHUNK * CHUNK, f32), np.zeros(CHUNK * CHUNK, f32)
    for job in range(first, last):
        document, head = job // heads, job % heads
        h[:] = f32(0)
        for j in range(p):
            for i in range(n):
                h[i * width + j] = initial[document, head, j, i]
        for chunk in range(chunks[document], chunks[document + 1]):
            index = chunk - chunks[document]
            begin = offsets[document] + index * CHUNK
            length = min(CHUNK, offsets[document + 1] - begin)
            if save and index % KEPT_EVERY == 0:
                kept[offsets[document] // (CHUNK * KEPT_EVERY) + document + index // KEPT_EVERY, head] = h
            shared = chunk * groups + head // (heads // groups)
            _load_steps(begin, length, head, dt, bias, soft, low, high, raw, step)
            _decays(step, A[head], a, from_start, to_end)
            _load_rows(begin, length, head, x, x_row, p, rows, width)
            _within(length, a, scores[shared], L, W)
            _inflow(step, ones, rows, width, inflow)
            _outputs(length, p, width, n, c[shared], W, h, inflow, from_start, D[head], rows, out)
            for i in range(length):
                target, values = part(y, ((begin + i) * heads + head) * p, p), part(out, i * width, p)
                if gated:
                    gate = part(z, (begin + i) * z_row + head * p, p)
                    for j in range(p):
                        g = widen(gate[j])
                        values[j] *= g * sigmoid(g)
                for j in range(p):
                    target[j] = narrow(target, values[j])
            _inflow(step, to_end, rows, width, inflow)
            _advance(length, p, width, n, b[shared], inflow, from_start[CHUNK - 1], h)
        for j in range(p):
            for i in range(n):
                final[document, head, j, i] = h[i * width + j]


@sums
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = f32(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@sums
def _total(x):  # type: ignore[no-untyped-def]
    total = f32(0)
    for i in range(x.size):
        total += x[i]
    return total


@inline
def _through_gate(begin, length, head, p, width, z, z_row, y, dy, dz, dz_row):  # type: ignore[no-untyped-def]
    """dz, and dy before the gate in place of dy after it."""
    for i in range(length):
        gate, target = part(z, (begin + i) * z_row + head * p, p), part(dz, (begin + i) * dz_row + head * p, p)
        row, values = part(dy, i * width, p), part(y, i * width, p)
        for j in range(p):
            v = widen(gate[j])
            s = sigmoid(v)
            target[j] = narrow(target, row[j] * values[j] * s * (f32(1) + v * (f32(1) - s)))
            row[j] *= v * s


@inline
def _add_columns(n, factor, source, target):  # type: ignore[no-untyped-def]
    for i in range(n):
        values, row = part(source, i * CHUNK, CHUNK), part(target, i * CHUNK, CHUNK)
        for j in range(CHUNK):
            row[j] += factor[j] * values[j]


@inline
def _reads(n, from_start, turned, dC, reads):  # type: ignore[no-untyped-def]
    """The share of each token's dy · y that comes from the state that enters."""
    reads[:] = f32(0)
    for i in range(n):
        values, row = part(turned, i * CHUNK, CHUNK), part(dC, i * CHUNK, CHUNK)
        for j in range(CHUNK):
            reads[j] += values[j] * row[j]
    for j in range(CHUNK):
        reads[j] *= from_start[j]


@inline
def _pairs(length, dW, L, W, dscores, columns, crossing):  # type: ignore[no-untyped-def]
    """dscores += dW ∘ L; and of each decay t the sum of dW ∘ W over the pairs j < t <= i that it lies between."""
    columns[:] = f32(0)
    for i in range(length - 1, -1, -1):
        at = i * CHUNK
        row, left, weighed, target = (
            part(dW, at, CHUNK),
            part(L, at, CHUNK),
            part(W, at, CHUNK),
            part(dscores, at, CHUNK),
        )
        for j in range(CHUNK):
            target[j] += row[j] * left[j]
            columns[j] += row[j] * weighed[j]
        columns[i] = f32(0)
        crossing[i] = _total(columns)


@kernel
def backward(  # type: ignore[no-untyped-def]
    first,
    last,
    dout,
    dout_row,
    dfinal,
    kept,
    offsets,
    chunks,
    x,
    x_row,
    z,
    z_row,
    gated,
    dt,
    A,
    D,
    bias,
    soft,
    low,
    high,
    b,
    c,
    scores,
    turned,
    groups,
    blocks,
    dx,
    ddt,
    dz,
    dA,
    dB,
    dC,
    dD,
    dinitial,
):
    """Jobs first..last, a block of a group's heads of a document each: all gradients, a document's share of dA and dD,
    a block's share of dB and dC."""
    heads, p, n = dfinal.shape[1:]
    width, states = round_up(p), round_up(n)
    size, square = states * width, CHUNK * CHUNK
    g, h = np.zeros((HEADS, size), f32), np.zeros((KEPT_EVERY, size), f32)
    local = np.zeros((7, CHUNK * width), f32)
    rows, inflow, dy, out, dinflow, turned_dy, turned_inflow = (
        local[0],
        local[1],
        local[2],
        local[3],
        local[4],
        local[5],
        local[6],
    )
    vectors = np.zeros((9, CHUNK), f32)
    raw, step, a, from_start, to_end = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
    reads, writes, columns, crossing = vectors[5], vectors[6], vectors[7], vectors[8]
    ones = np.ones(CHUNK, f32)
    L, W, dW = np.zeros(square, f32), np.zeros(square, f32), np.zeros(square, f32)
    own, product = np.zeros(states * CHUNK, f32), np.zeros(states * CHUNK, f32)
    dscores = np.zeros((KEPT_EVERY, square), f32)
    sum_B, sum_C = np.zeros((KEPT_EVERY, states * CHUNK), f32), np.zeros((KEPT_EVERY, states * CHUNK), f32)
    sum_A = np.zeros(HEADS)  # float64: most of it cancels
    per_group = heads // groups
    for job in range(first, last):
        document, group, block = job // (groups * blocks), job // blocks % groups, job % blocks
        heads_from = group * per_group + block * HEADS
        heads_to = min(heads_from + HEADS, (group + 1) * per_group)
        g[:] = f32(0)
        for head in range(heads_from, heads_to):
            sum_A[head - heads_from] = 0.0
            dD[document, head] = f32(0)
            for j in range(p):
                for i in range(n):
                    g[head - heads_from, i * width + j] = dfinal[document, head, j, i]
        count = chunks[document + 1] - chunks[document]
        for stretch in range((count + KEPT_EVERY - 1) // KEPT_EVERY - 1, -1, -1):
            start = stretch * KEPT_EVERY
            stop = min(start + KEPT_EVERY, count)
            dscores[:] = f32(0)
            sum_B[:] = f32(0)
            sum_C[:] = f32(0)
            for head in range(heads_from, heads_to):
                state = g[head - heads_from]
                h[0] = kept[offsets[document] // (CHUNK * KEPT_EVERY) + document + stretch, head]
                for index in range(start, stop - 1):
                    begin, k = offsets[document] + index * CHUNK, index - start
                    shared = (chunks[document] + index) * groups + group
                    _load_steps(begin, CHUNK, head, dt, bias, soft, low, high, raw, step)
                    _decays(step, A[head], a, from_start, to_end)
                    _load_rows(begin, CHUNK, head, x, x_row, p, rows, width)
                    _inflow(step, to_end, rows, width, inflow)
                    h[k + 1] = h[k]
                    _advance(CHUNK, p, width, n, b[shared], inflow, from_start[CHUNK - 1], h[k + 1])
                for index in range(stop - 1, start - 1, -1):
                    begin, k = offsets[document] + index * CHUNK, index - start
                    length = min(CHUNK, offsets[document + 1] - begin)
                    shared = (chunks[document] + index) * groups + group
                    _load_steps(begin, length, head, dt, bias, soft, low, high, raw, step)
                    _decays(step, A[head], a, from_start, to_end)
                    _load_rows(begin, length, head, x, x_row, p, rows, width)
                    _load_rows(begin, length, head, dout, dout_row, p, dy, width)
                    _within(length, a, scores[shared], L, W)
                    _inflow(step, ones, rows, width, inflow)
                    if gated:
                        _outputs(length, p, width, n, c[shared], W, h[k], inflow, from_start, D[head], rows, out)
                        _through_gate(begin, length, head, p, width, z, z_row, out, dy, dz, heads * p)
                    _transpose(CHUNK, width, dy, width, turned_dy, CHUNK)
                    _transpose(CHUNK, width, inflow, width, turned_inflow, CHUNK)
                    # Between chunks: the outputs read the state that enters, the inflow adds to the one that leaves.
                    multiply(n, length, p, h[k], 0, width, 1, turned_dy, 0, CHUNK, own, 0, CHUNK, f32(0), FULL)
                    _reads(n, from_start, turned[shared], own, reads)
                    _add_columns(n, from_start, own, sum_C[k])
                    multiply(n, length, p, state, 0, width, 1, turned_inflow, 0, CHUNK, own, 0, CHUNK, f32(0), FULL)
                    _add_columns(n, to_end, own, sum_B[k])
                    multiply(length, p, n, b[shared], 0, states, 1, state, 0, width, dinflow, 0, width, f32(0), FULL)
                    _scale(CHUNK, width, to_end, dinflow)
                    for i in range(length):
                        writes[i] = _dot(part(inflow, i * width, p), part(dinflow, i * width, p))
                    # Within the chunk.
                    multiply(length, CHUNK, p, dy, 0, width, 1, turned_inflow, 0, CHUNK, dW, 0, CHUNK, f32(0), BELOW)
                    _pairs(length, dW, L, W, dscores[k], columns, crossing)
                    multiply(length, p, length, W, 0, 1, CHUNK, dy, 0, width, dinflow, 0, width, f32(1), UPPER)
                    # Each decay: what passes from before it to behind it.
                    through = from_start[CHUNK - 1]
                    passed = through * _dot(h[k], state)
                    behind = passed
                    for i in range(length - 1, -1, -1):
                        behind += reads[i]
                        crossing[i] += behind
                    before = f32(0)
                    for i in range(length):
                        crossing[i] += before
                        before += writes[i]
                    for i in range(length):
                        t = begin + i
                        dv, values, w = part(dinflow, i * width, p), part(rows, i * width, p), part(dy, i * width, p)
                        slope = f32(1)
                        unlimited = raw[i]
                        if soft:
                            slope, unlimited = sigmoid(raw[i]), softplus(raw[i])
                        if not low <= unlimited <= high:
                            slope = f32(0)
                        sum_A[head - heads_from] += crossing[i] * step[i]
                        ddt[t, head] = (_dot(dv, values) + crossing[i] * A[head]) * slope
                        target, skip, sum_D = part(dx, (t * heads + head) * p, p), D[head], dD[document, head]
                        for j in range(p):
                            target[j] = narrow(target, dv[j] * step[i] + w[j] * skip[j])
                            sum_D[j] += w[j] * values[j]
                    _scale(CHUNK, width, from_start, dy)
                    multiply(n, p, length, c[shared], 0, 1, states, dy, 0, width, state, 0, width, through, FULL)
            for index in range(start, stop):
                begin, k = offsets[document] + index * CHUNK, index - start
                length = min(CHUNK, offsets[document + 1] - begin)
                shared = (chunks[document] + index) * groups + group
                share = group * blocks + block
                multiply(
                    length, n, length, dscores[k], 0, CHUNK, 1, b[shared], 0, states, product, 0, states, f32(0), LOWER
                )
                for i in range(length):
                    for j in range(n):
                        dC[share, begin + i, j] = product[i * states + j] + sum_C[k, j * CHUNK + i]
                multiply(
                    length, n, length, dscores[k], 0, 1, CHUNK, c[shared], 0, states, product, 0, states, f32(0), UPPER
                )
                for i in range(length):
                    for j in range(n):
                        dB[share, begin + i, j] = product[i * states + j] + sum_B[k, j * CHUNK + i]
        for head in range(heads_from, heads_to):
            dA[document, head] = sum_A[head - heads_from]
            for j in range(p):
                for i in range(n):
                    dinitial[document, head, j, i] = g[head - heads_from, i * width + j]
