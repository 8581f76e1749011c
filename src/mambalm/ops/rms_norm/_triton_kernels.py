"""Normalisation kernels in plain Triton: a tile of tokens by one group of channels, in float32 from the load on.

The channels of a tile are a tuple of PARTS blocks of a power of two, so that a width such as 5 x 512 wastes no lane.
"""

import triton
import triton.language as tl

from mambalm.ops.triton_support import LOG2E, sigmoid


@triton.jit
def quick_sigmoid(x):
    """1 / (1 + e^-x) to 3e-7, in fewer instructions than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def place(channels, group_size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The first tile of a program: its tokens as a column, the first channel of its group, and a row of columns."""
    groups = channels // group_size
    first = (tl.program_id(0) % groups).to(tl.int64) * group_size
    token = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return token, first, tl.arange(0, BLOCK)[None, :]


@triton.jit
def within(there, column, size, PADDED: tl.constexpr):
    """The mask of a part at ``column`` for the tokens that are ``there``."""
    return there & (column < size) if PADDED else there


@triton.jit
def load_parts(
    at,
    there,
    column,
    size,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr = False,
):
    """What lies at ``at``, as it is stored; LAST if it was loaded before, and nobody will want it again.

    The compiler takes a load for a second one of the same policy, whose values it would keep instead.
    """
    parts = ()
    at += column
    for i in tl.static_range(PARTS):
        mask = within(there, column + i * BLOCK, size, PADDED)
        parts += (tl.load(at + i * BLOCK, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else ""),)
    return parts


@triton.jit(do_not_specialize=["tokens", "kept"])
def norm_forward(
    x,
    weight,
    gate,
    residual,
    y,
    total,
    x_row,
    gate_row,
    residual_row,
    channels,
    group_size,
    tokens,
    kept,
    eps,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """y, and of the first ``kept`` tokens the residual stream if there is a ``residual``."""
    token, first, column = place(channels, group_size, ROWS, BLOCK)
    there = token < tokens
    parts = load_parts(x + token * x_row + first, there, column, group_size, PADDED, PARTS, BLOCK)
    if gate is not None:
        gates = load_parts(gate + token * gate_row + first, there, column, group_size, PADDED, PARTS, BLOCK)
    if residual is not None:
        stream = load_parts(residual + token * residual_row + first, there, column, group_size, PADDED, PARTS, BLOCK)
    out = token * channels + first + column
    sources = ()
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(PARTS):
        h = parts[i].to(tl.float32)
        if gate is not None:
            g = gates[i].to(tl.float32)
            h *= g * sigmoid(g)
        if residual is not None:
            rounded = (h + stream[i].to(tl.float32)).to(total.dtype.element_ty)
            mask = within(there & (token < kept), column + i * BLOCK, group_size, PADDED)
            tl.store(total + out + i * BLOCK, rounded, mask=mask)
            h = rounded.to(tl.float32)
        squares += h * h
        sources += (h,)
    inverse = tl.rsqrt(tl.sum(squares, axis=1) / group_size + eps)[:, None]
    if weight is not None:
        scales = load_parts(weight + first, True, column, group_size, PADDED, PARTS, BLOCK)
    for i in tl.static_range(PARTS):
        h = sources[i] * inverse
        if weight is not None:
            h *= scales[i].to(tl.float32)
        mask = within(there, column + i * BLOCK, group_size, PADDED)
        tl.store(y + out + i * BLOCK, h.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "programs"])
def norm_backward(
    dy,
    dstream,
    source,
    weight,
    gate,
    dsource,
    dbranch,
    dgate,
    shares,
    dy_row,
    dstream_row,
    source_row,
    gate_row,
    channels,
    group_size,
    tokens,
    programs,
    eps,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The gradients, that of the source once more as ``dbranch``; ``shares`` (programs, channels) are the programs'
    parts of that of the weight.

    A program takes every so-many-th tile of tokens. With n = h / rms and w the weight,
    dh = (w dy - n mean(w dy n)) / rms.
    """
    token, first, column = place(channels, group_size, ROWS, BLOCK)
    program = tl.program_id(0) // (channels // group_size)
    zeros = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = (zeros,) * PARTS
    for _ in range(program * ROWS, tokens, programs * ROWS):
        there = token < tokens
        source_at, dy_at = source + token * source_row + first, dy + token * dy_row + first
        xs = load_parts(source_at, there, column, group_size, PADDED, PARTS, BLOCK)
        dys = load_parts(dy_at, there, column, group_size, PADDED, PARTS, BLOCK)
        if gate is not None:
            gate_at = gate + token * gate_row + first
            gates = load_parts(gate_at, there, column, group_size, PADDED, PARTS, BLOCK)
        if weight is not None:
            scales = load_parts(weight + first, True, column, group_size, PADDED, PARTS, BLOCK)
        # Both sums before either is used, so that the warps wait for each other once.
        squares, products = zeros, zeros
        for i in tl.static_range(PARTS):
            h = xs[i].to(tl.float32)
            if gate is not None:
                g = gates[i].to(tl.float32)
                h *= g * quick_sigmoid(g)
            out = dys[i].to(tl.float32)
            if weight is not None:
                out *= scales[i].to(tl.float32)
            squares += h * h
            products += out * h
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / group_size + eps)
        mean = (tl.sum(products, axis=1) * inverse / group_size)[:, None]
        inverse = inverse[:, None]
        if gate is not None:
            # Kept, they would take the registers of other programs: they are read again, from a cache.
            xs = load_parts(source_at, there, column, group_size, PADDED, PARTS, BLOCK, True)
            dys = load_parts(dy_at, there, column, group_size, PADDED, PARTS, BLOCK, True)
            gates = load_parts(gate_at, there, column, group_size, PADDED, PARTS, BLOCK, True)
            if weight is not None:
                scales = load_parts(weight + first, True, column, group_size, PADDED, PARTS, BLOCK, True)
        if dstream is not None:
            stream_at = dstream + token * dstream_row + first
            dstreams = load_parts(stream_at, there, column, group_size, PADDED, PARTS, BLOCK)
        new_sums = ()
        at = token * channels + first + column
        for i in tl.static_range(PARTS):
            mask = within(there, column + i * BLOCK, group_size, PADDED)
            x = xs[i].to(tl.float32)
            h = x
            if gate is not None:
                g = gates[i].to(tl.float32)
                s = quick_sigmoid(g)
                h = x * g * s
            out = dys[i].to(tl.float32)
            normed = h * inverse
            if weight is not None:
                new_sums += (sums[i] + out * normed,)
                out *= scales[i].to(tl.float32)
            dh = (out - normed * mean) * inverse
            if gate is not None:
                dg = dh * x * (s * (1.0 + g * (1.0 - s)))
                tl.store(dgate + at + i * BLOCK, dg.to(dgate.dtype.element_ty), mask=mask)
                dh *= g * s
            if dstream is not None:
                dh += dstreams[i].to(tl.float32)
            tl.store(dsource + at + i * BLOCK, dh.to(dsource.dtype.element_ty), mask=mask)
            if dbranch is not None:
                tl.store(dbranch + at + i * BLOCK, dh.to(dbranch.dtype.element_ty), mask=mask)
        if weight is not None:
            sums = new_sums
        token += programs * ROWS
    if weight is not None:
        share = shares + program.to(tl.int64) * channels + first + column
        for i in tl.static_range(PARTS):
            mask = within(True, column + i * BLOCK, group_size, PADDED)
            tl.store(share + i * BLOCK, tl.sum(sums[i], axis=0)[None, :], mask=mask)
