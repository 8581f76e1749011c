"""Normalisation kernels in plain Triton: a tile of tokens by one group of channels, in float32 from the load on."""

import triton
import triton.language as tl

from mambalm.ops.triton_support import sigmoid, silu_gradient


@triton.jit
def place(channels, group_size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The first tile of a program: its tokens as a column, the channels of its group as a row, and their mask."""
    groups = channels // group_size
    column = tl.arange(0, BLOCK)[None, :]
    channel = (tl.program_id(0) % groups).to(tl.int64) * group_size + column
    token = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return token, channel, column < group_size


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
    BLOCK: tl.constexpr,
):
    """y, and of the first ``kept`` tokens the residual stream if there is a ``residual``."""
    token, channel, inside = place(channels, group_size, ROWS, BLOCK)
    there = (token < tokens) & inside
    h = tl.load(x + token * x_row + channel, mask=there, other=0.0).to(tl.float32)
    if gate is not None:
        g = tl.load(gate + token * gate_row + channel, mask=there, other=0.0).to(tl.float32)
        h *= g * sigmoid(g)
    if residual is not None:
        h += tl.load(residual + token * residual_row + channel, mask=there, other=0.0).to(tl.float32)
        rounded = h.to(total.dtype.element_ty)
        tl.store(total + token * channels + channel, rounded, mask=there & (token < kept))
        h = rounded.to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, axis=1) / group_size + eps)[:, None]
    if weight is not None:
        h *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * channels + channel, h.to(y.dtype.element_ty), mask=there)


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
    BLOCK: tl.constexpr,
):
    """The gradients, that of the source once more as ``dbranch``; ``shares`` (programs, channels) are the programs'
    parts of that of the weight.

    A program takes every so-many-th tile of tokens. With n = h / rms and w the weight,
    dh = (w dy - n mean(w dy n)) / rms.
    """
    token, channel, inside = place(channels, group_size, ROWS, BLOCK)
    scale = tl.full((1, BLOCK), 1.0, tl.float32)
    if weight is not None:
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    program = tl.program_id(0) // (channels // group_size)
    for _ in range(program * ROWS, tokens, programs * ROWS):
        there = (token < tokens) & inside
        x = tl.load(source + token * source_row + channel, mask=there, other=0.0).to(tl.float32)
        out = tl.load(dy + token * dy_row + channel, mask=there, other=0.0).to(tl.float32)
        h = x
        if gate is not None:
            g = tl.load(gate + token * gate_row + channel, mask=there, other=0.0).to(tl.float32)
            h = x * g * sigmoid(g)
        # Both sums before either is used, so that the warps wait for each other once.
        squares, products = tl.sum(h * h, axis=1), tl.sum(out * scale * h, axis=1)
        inverse = tl.rsqrt(squares / group_size + eps)
        mean = products * inverse / group_size
        normed = h * inverse[:, None]
        if weight is not None:
            sums += out * normed
        dh = (out * scale - normed * mean[:, None]) * inverse[:, None]
        if gate is not None:
            dg = dh * x * silu_gradient(g)
            tl.store(dgate + token * channels + channel, dg.to(dgate.dtype.element_ty), mask=there)
            dh *= g * sigmoid(g)
        if dstream is not None:
            dh += tl.load(dstream + token * dstream_row + channel, mask=there, other=0.0).to(tl.float32)
        tl.store(dsource + token * channels + channel, dh.to(dsource.dtype.element_ty), mask=there)
        if dbranch is not None:
            tl.store(dbranch + token * channels + channel, dh.to(dbranch.dtype.element_ty), mask=there)
        token += programs * ROWS
    if weight is not None:
        share = shares + program.to(tl.int64) * channels + channel
        tl.store(share, tl.sum(sums, axis=0)[None, :], mask=inside)
