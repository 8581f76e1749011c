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


@inline
def _lay(taps, weight, bias, room):  # type: ignore[no-untyped-def]
    """Blocks of channels side by side, each four taps and the bias: one array for LLVM to tell from the others."""
    d = bias.size
    for e in range(0, d, BLOCK):
        width = min(BLOCK, d - e)
        block = part(room, e * (taps + 1), BLOCK * (taps + 1))
        for j in range(taps + 1):
            source = part(weight[j] if j < taps else bias, e, width)
            target = part(block, j * BLOCK, width)
            for c in range(width):
                target[c] = source[c]


@inline
def _four_taps(x, place, x_row, width, w, silu, target):  # type: ignore[no-untyped-def]
    """A token from ``place`` on, of which the three inputs before are inputs too: read once, in registers."""
    x0, x1 = part(x, place - 3 * x_row, width), part(x, place - 2 * x_row, width)
    x2, x3 = part(x, place - x_row, width), part(x, place, width)
    if silu:
        for c in range(width):
            out = w[c + 4 * BLOCK] + w[c] * widen(x0[c])
            out += w[c + BLOCK] * widen(x1[c])
            out += w[c + 2 * BLOCK] * widen(x2[c])
            out += w[c + 3 * BLOCK] * widen(x3[c])
            target[c] = narrow(target, out * sigmoid(out))
    else:
        for c in range(width):
            out = w[c + 4 * BLOCK] + w[c] * widen(x0[c])
            out += w[c + BLOCK] * widen(x1[c])
            out += w[c + 2 * BLOCK] * widen(x2[c])
            out += w[c + 3 * BLOCK] * widen(x3[c])
            target[c] = narrow(target, out)


@kernel
def forward(first, last, offsets, tiles, x, x_row, weight, bias, silu, initial, y):  # type: ignore[no-untyped-def]
    """Jobs first..last, each TILE tokens of a document: y. ``tiles`` are the documents' first jobs (s + 1)."""
    taps, d = weight.shape
    row, out = np.zeros(BLOCK, f32), np.zeros(BLOCK, f32)
    laid = np.zeros((d + BLOCK - 1) // BLOCK * BLOCK * (taps + 1), f32)
    _lay(taps, weight, bias, laid)
    document = 0
    for job in range(first, last):
        while tiles[document + 1] <= job:
            document += 1
        begin, end = offsets[document], offsets[document + 1]
        start = begin + (job - tiles[document]) * TILE
        for t in range(start, min(start + TILE, end)):
            for e in range(0, d, BLOCK):
                width = min(BLOCK, d - e)
                target = part(y, t * d + e, width)
                if taps == 4 and t - begin >= 3:
                    _four_taps(x, t * x_row + e, x_row, width, part(laid, e * 5, 5 * BLOCK), silu, target)
                    continue
                convolve(t, begin, document, e, width, x, x_row, weight, bias, initial, row, out)
                if silu:
                    for c in range(width):
                        out[c] *= sigmoid(out[c])
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
