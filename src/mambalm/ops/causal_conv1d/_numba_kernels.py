"""numba kernels of the causal convolution; see cpu.py for what the arguments are.

"Position" counts a document's inputs together with the k - 1 inputs before them, which the initial state holds.
"""

import numpy as np

from mambalm.ops.numba_support import f32, inline, kernel, narrow, part, sigmoid, widen

# Channels that are computed together (their rows stay in the first-level cache) and tokens of a job of the forward.
BLOCK = 256
TILE = 64


@inline
def _load(t, begin, document, e, width, x, x_row, initial, row):  # type: ignore[no-untyped-def]
    """The input of token t, or of the state when t lies before the document's ``begin``."""
    if t >= begin:
        source = part(x, t * x_row + e, width)
        for c in range(width):
            row[c] = widen(source[c])
    else:
        kept = part(initial[document, t - begin + initial.shape[1]], e, width)
        for c in range(width):
            row[c] = kept[c]


@inline
def convolve(t, begin, document, e, width, x, x_row, weight, bias, initial, row, out):  # type: ignore[no-untyped-def]
    """Token t of channels e..e + width, without activation; ``row`` is room."""
    taps = weight.shape[0]
    offset = part(bias, e, width)
    for c in range(width):
        out[c] = offset[c]
    for j in range(taps):
        _load(t - (taps - 1) + j, begin, document, e, width, x, x_row, initial, row)
        tap = part(weight[j], e, width)
        for c in range(width):
            out[c] += tap[c] * row[c]


@kernel
def forward(first, last, offsets, tiles, x, x_row, weight, bias, silu, initial, y):  # type: ignore[no-untyped-def]
    """Jobs first..last, each TILE tokens of a document: y. ``tiles`` are the documents' first jobs (s + 1)."""
    d = weight.shape[1]
    row, out = np.zeros(BLOCK, f32), np.zeros(BLOCK, f32)
    document = 0
    for job in range(first, last):
        while tiles[document + 1] <= job:
            document += 1
        begin, end = offsets[document], offsets[document + 1]
        start = begin + (job - tiles[document]) * TILE
        for t in range(start, min(start + TILE, end)):
            for e in range(0, d, BLOCK):
                width = min(BLOCK, d - e)
                convolve(t, begin, document, e, width, x, x_row, weight, bias, initial, row, out)
                if silu:
                    for c in range(width):
                        out[c] *= sigmoid(out[c])
                target = part(y, t * d + e, width)
                for c in range(width):
                    target[c] = narrow(target, out[c])


@inline
def _through_activation(t, e, width, dy, dy_row, silu, out, dout):  # type: ignore[no-untyped-def]
    source = part(dy, t * dy_row + e, width)
    for c in range(width):
        dout[c] = widen(source[c])
    if silu:
        for c in range(width):
            s = sigmoid(out[c])
            dout[c] *= s * (f32(1) + out[c] * (f32(1) - s))


@kernel
def backward(  # type: ignore[no-untyped-def]
    first, last, dy, dy_row, dfinal, offsets, x, x_row, weight, bias, silu, initial, dx, dweight, dbias, dinitial
):
    """Jobs first..last, each a block of channels: all gradients; dweight and dbias start at zero.

    The gradient of a position is complete once the outputs of the k - 1 tokens after it are known: they are kept in a
    ring while the document is read forwards.
    """
    taps, d = weight.shape
    row, out = np.zeros(BLOCK, f32), np.zeros(BLOCK, f32)
    ring = np.zeros((taps, BLOCK), f32)
    for job in range(first, last):
        e = job * BLOCK
        width = min(BLOCK, d - e)
        for document in range(offsets.size - 1):
            begin, end = offsets[document], offsets[document + 1]
            for position in range(begin - (taps - 1), end):
                t = position + taps - 1
                dout = ring[t % taps]
                if t < end:
                    convolve(t, begin, document, e, width, x, x_row, weight, bias, initial, row, out)
                    _through_activation(t, e, width, dy, dy_row, silu, out, dout)
                    total = part(dbias, e, width)
                    for c in range(width):
                        total[c] += dout[c]
                    for j in range(taps):
                        _load(t - (taps - 1) + j, begin, document, e, width, x, x_row, initial, row)
                        dtap = part(dweight[j], e, width)
                        for c in range(width):
                            dtap[c] += dout[c] * row[c]
                else:
                    dout[:] = f32(0)
                out[:] = f32(0)
                for j in range(taps):
                    if t - j >= begin:
                        past, tap = ring[(t - j) % taps], part(weight[j], e, width)
                        for c in range(width):
                            out[c] += tap[c] * past[c]
                kept = position - (end - (taps - 1))
                if kept >= 0:
                    handed_on = part(dfinal[document, kept], e, width)
                    for c in range(width):
                        out[c] += handed_on[c]
                if position >= begin:
                    target = part(dx, position * d + e, width)
                    for c in range(width):
                        target[c] = narrow(target, out[c])
                else:
                    before = part(dinitial[document, position - begin + taps - 1], e, width)
                    for c in range(width):
                        before[c] = out[c]
