"""Causal convolution kernels in plain Triton: down the tokens, the last inputs of a block of channels in registers.

The rows of a batch count as documents of equal length, so that one program serves batches and packed rows: it takes a
chunk of all tokens, finds the document in which the chunk begins, and goes through the documents from there on. Within
a document every load is a row of neighbouring channels, read once but for the K - 1 rows around a chunk's borders.
Everything is float32 from the load on.
"""

import triton
import triton.language as tl

from mambalm.ops.triton_support import sigmoid, silu_gradient

SIZES = ["length", "documents", "tokens", "chunk"]


@triton.jit
def edge(cu_seqlens, document, length):
    """Where a document begins, in tokens."""
    return document * length if cu_seqlens is None else tl.load(cu_seqlens + document).to(tl.int64)


@triton.jit
def first_document(cu_seqlens, documents, length, start):
    """The document that goes on at token ``start``, else the first that begins there."""
    if cu_seqlens is None:
        low = start // tl.maximum(length, 1)
    else:
        low, high = start * 0, start * 0 + documents
        while low < high:
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle) < start:
                low = middle + 1
            else:
                high = middle
        low -= (tl.load(cu_seqlens + low) > start).to(tl.int64)
    return low


@triton.jit
def those(channel, channels, condition):
    """The mask of the channels there are if the scalar ``condition`` holds, else of none."""
    return channel < tl.where(condition, channels, 0)


@triton.jit
def load_columns(pointer, channel, mask, dtype: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """A (channels, COLUMNS) matrix, rounded to ``dtype``, as a tuple of its columns: one coalesced load, taken apart in
    registers."""
    column = tl.arange(0, PADDED)[None, :]
    cells = channel[:, None] * COLUMNS + column
    tile = tl.load(pointer + cells, mask=mask[:, None] & (column < COLUMNS), other=0.0).to(dtype).to(tl.float32)
    columns = ()
    for j in tl.static_range(COLUMNS):
        columns += (tl.sum(tl.where(column == j, tile, 0.0), axis=1),)
    return columns


@triton.jit
def store_columns(pointer, channel, mask, columns, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of ``load_columns``."""
    column = tl.arange(0, PADDED)[None, :]
    tile = tl.zeros((channel.shape[0], PADDED), tl.float32)
    for j in tl.static_range(COLUMNS):
        tile = tl.where(column == j, columns[j][:, None], tile)
    cells = channel[:, None] * COLUMNS + column
    tl.store(pointer + cells, tile.to(pointer.dtype.element_ty), mask=mask[:, None] & (column < COLUMNS))


@triton.jit
def inputs_before(x, x_l, state, channel, channels, t, K: tl.constexpr):
    """The K - 1 inputs before step t of the document at ``x``, oldest first; before its first come those of ``state``,
    which is empty for zeros."""
    rows = ()
    for j in tl.static_range(K - 1):
        at = t - (K - 1) + j
        row = tl.load(x + at * x_l, mask=those(channel, channels, at >= 0), other=0.0).to(tl.float32)
        for slot in tl.static_range(len(state)):
            row = tl.where(at + (K - 1) == slot, state[slot], row)
        rows += (row,)
    return rows


@triton.jit
def load_rows(at, stride, channel, channels, left, ROWS: tl.constexpr):
    """ROWS rows as they are stored; zeros from the ``left``-th on."""
    rows = ()
    for i in tl.static_range(ROWS):
        rows += (tl.load(at, mask=those(channel, channels, i < left), other=0.0),)
        at += stride
    return rows


@triton.jit
def skip_rows(at, stride, ROWS: tl.constexpr):
    """ROWS rows on. By additions, since the product could pass 32 bits."""
    for _ in tl.static_range(ROWS):
        at += stride
    return at


@triton.jit
def weighted_sum(start, rows, weights, K: tl.constexpr, REVERSED: tl.constexpr = False):
    for j in tl.static_range(K):
        start += rows[K - 1 - j if REVERSED else j] * weights[j]
    return start


@triton.jit
def keep_last_inputs(
    x, x_b, x_l, initial, cu_seqlens, final, document, length, channel, channels, K: tl.constexpr, PADDED: tl.constexpr
):
    """The final state of a document."""
    begin = edge(cu_seqlens, document, length)
    steps = edge(cu_seqlens, document + 1, length) - begin
    x += channel + (document * x_b if cu_seqlens is None else begin * x_l)
    state_row = document * channels * (K - 1)
    state = ()
    if initial is not None:
        near = those(channel, channels, steps < K - 1)
        state = load_columns(initial + state_row, channel, near, x.dtype.element_ty, K - 1, PADDED)
    rows = inputs_before(x, x_l, state, channel, channels, steps, K)
    store_columns(final + state_row, channel, channel < channels, rows, K - 1, PADDED)


@triton.jit(do_not_specialize=[*SIZES, "chunks"])
def convolve_forward(
    x,
    weight,
    bias,
    initial,
    cu_seqlens,
    y,
    final,
    x_b,
    x_l,
    channels,
    length,
    documents,
    tokens,
    chunk,
    chunks,
    SILU: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y, of ``chunk`` tokens and BLOCK channels by each of the first programs, and the final states by those after.

    In the same programs the final states would take registers from the loop, 128 instead of 72.
    """
    blocks = tl.cdiv(channels, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    if part >= chunks:
        if K > 1:
            document = part - chunks
            keep_last_inputs(x, x_b, x_l, initial, cu_seqlens, final, document, length, channel, channels, K, PADDED)
    else:
        inside = channel < channels
        start = part * chunk
        stop = tl.minimum(start + chunk, tokens)
        taps = load_columns(weight, channel, inside, tl.float32, K, PADDED)
        offset = tl.zeros((BLOCK,), tl.float32)
        if bias is not None:
            offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)

        document = first_document(cu_seqlens, documents, length, start)
        begin = edge(cu_seqlens, document, length)
        while (document < documents) & (begin < stop):
            end = edge(cu_seqlens, document + 1, length)
            first = tl.maximum(start - begin, 0)
            x_row = x + channel + (document * x_b if cu_seqlens is None else begin * x_l)
            state = ()
            if initial is not None:
                near = those(channel, channels, first < K - 1)
                state_row = initial + document * channels * (K - 1)
                state = load_columns(state_row, channel, near, x.dtype.element_ty, K - 1, PADDED)
            rows = inputs_before(x_row, x_l, state, channel, channels, first, K)
            left = (tl.minimum(stop, end) - begin - first).to(tl.int32)
            x_at = x_row + first * x_l
            y_at = y + channel + (begin + first) * channels
            for t in range(0, left, ROWS):
                current = load_rows(x_at, x_l, channel, channels, left - t, ROWS)
                x_at = skip_rows(x_at, x_l, ROWS)
                for i in tl.static_range(ROWS):
                    rows += (current[i].to(tl.float32),)
                    out = weighted_sum(offset, rows, taps, K)
                    if SILU:
                        out *= sigmoid(out)
                    tl.store(y_at, out.to(y.dtype.element_ty), mask=those(channel, channels, i < left - t))
                    y_at += channels
                    rows = rows[1:]
            document += 1
            begin = end


@triton.jit(do_not_specialize=SIZES)
def convolve_backward(
    x,
    weight,
    bias,
    initial,
    cu_seqlens,
    dy0,
    dy1,
    dy2,
    dfinal,
    dx,
    shares,
    dinitial,
    x_b,
    x_l,
    dy0_b,
    dy0_l,
    dy1_b,
    dy1_l,
    dy2_b,
    dy2_l,
    first1,
    first2,
    channels,
    length,
    documents,
    tokens,
    chunk,
    SILU: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients, from those of y in up to three parts, of which the second and third begin at the channels
    ``first1`` and ``first2``, at blocks. ``shares`` (chunks, K + 1, channels) are the chunks' parts of those of the
    weights and the bias.

    The gradient of an input is complete K - 1 steps later, so a program goes on for as many into the next chunk. Those
    steps count for its shares, and not for the next chunk's.
    """
    blocks = tl.cdiv(channels, BLOCK)
    dy, dy_b, dy_l = dy0, dy0_b, dy0_l
    if dy1 is not None:
        second = tl.program_id(0) % blocks * BLOCK >= first1
        dy_b, dy_l = tl.where(second, dy1_b, dy_b), tl.where(second, dy1_l, dy_l)
        if second:
            dy = dy1 - first1
    if dy2 is not None:
        third = tl.program_id(0) % blocks * BLOCK >= first2
        dy_b, dy_l = tl.where(third, dy2_b, dy_b), tl.where(third, dy2_l, dy_l)
        if third:
            dy = dy2 - first2
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    start = (tl.program_id(0) // blocks).to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, tokens)
    taps = load_columns(weight, channel, inside, tl.float32, K, PADDED)
    zeros = tl.zeros((BLOCK,), tl.float32)
    offset = zeros
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    sums = (zeros,) * (K + 1)

    document = first_document(cu_seqlens, documents, length, start)
    begin = edge(cu_seqlens, document, length)
    while (document < documents) & ((begin < stop) | (stop == tokens)):
        end = edge(cu_seqlens, document + 1, length)
        steps = end - begin
        first = tl.maximum(start - begin, 0)
        last = tl.minimum(stop, end) - begin
        x_row = x + channel + (document * x_b if cu_seqlens is None else begin * x_l)
        dy_row = dy + channel + (document * dy_b if cu_seqlens is None else begin * dy_l)
        dx_row = dx + channel + begin * channels
        state_row = document * channels * (K - 1)
        state = ()
        if initial is not None:
            near = those(channel, channels, first < K - 1)
            state = load_columns(initial + state_row, channel, near, x.dtype.element_ty, K - 1, PADDED)
        # K - 1 steps of which nothing but the gradient of the state, if that, is complete.
        rows = inputs_before(x_row, x_l, state, channel, channels, first, K)
        douts = (zeros,) * (K - 1)
        dstate = ()
        for i in tl.static_range(K - 1):
            there = those(channel, channels, first + i < steps)
            rows += (tl.load(x_row + (first + i) * x_l, mask=there, other=0.0).to(tl.float32),)
            dout = tl.load(dy_row + (first + i) * dy_l, mask=there, other=0.0).to(tl.float32)
            if SILU:
                dout *= silu_gradient(weighted_sum(offset, rows, taps, K))
            douts += (dout,)
            sums = add_products(sums, tl.where(first == 0, dout, 0.0), rows, K)
            out = weighted_sum(zeros, douts, taps, K, REVERSED=True)
            if dfinal is not None:
                kept = those(channel, channels, (i >= steps) & (first == 0))
                slot = channel * (K - 1) + (i - steps)
                out += tl.load(dfinal + state_row + slot, mask=kept, other=0.0).to(tl.float32)
            dstate += (out,)
            rows, douts = rows[1:], douts[1:]
        if dinitial is not None:
            store_columns(dinitial + state_row, channel, those(channel, channels, first == 0), dstate, K - 1, PADDED)
        reach = tl.minimum(last + K - 1, steps)
        left = (last - first).to(tl.int32)
        left_in = (reach - first).to(tl.int32) - (K - 1)
        x_at = x_row + (first + K - 1) * x_l
        dy_at = dy_row + (first + K - 1) * dy_l
        dx_at = dx_row + first * channels
        for t in range(0, left, ROWS):
            current = load_rows(x_at, x_l, channel, channels, left_in - t, ROWS)
            current_dy = load_rows(dy_at, dy_l, channel, channels, left_in - t, ROWS)
            x_at = skip_rows(x_at, x_l, ROWS)
            dy_at = skip_rows(dy_at, dy_l, ROWS)
            for i in tl.static_range(ROWS):
                rows += (current[i].to(tl.float32),)
                dout = current_dy[i].to(tl.float32)
                if SILU:
                    dout *= silu_gradient(weighted_sum(offset, rows, taps, K))
                douts += (dout,)
                sums = add_products(sums, dout, rows, K)
                out = weighted_sum(zeros, douts, taps, K, REVERSED=True)
                if dfinal is not None:
                    slot = first + t + i - steps + (K - 1)
                    kept = those(channel, channels, (slot >= 0) & (i < left - t))
                    slot += channel * (K - 1)
                    out += tl.load(dfinal + state_row + slot, mask=kept, other=0.0).to(tl.float32)
                tl.store(dx_at, out.to(dx.dtype.element_ty), mask=those(channel, channels, i < left - t))
                dx_at += channels
                rows, douts = rows[1:], douts[1:]
        document += 1
        begin = end
    share = shares + (tl.program_id(0) // blocks).to(tl.int64) * (K + 1) * channels + channel
    for j in tl.static_range(K + 1):
        tl.store(share + j * channels, sums[j], mask=inside)


@triton.jit
def add_products(sums, dout, rows, K: tl.constexpr):
    """Add what one step gives to the gradients of the K weights and of the bias."""
    result = ()
    for j in tl.static_range(K):
        result += (sums[j] + dout * rows[j],)
    result += (sums[K] + dout,)
    return result
