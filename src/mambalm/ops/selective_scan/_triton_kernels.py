"""Selective scan kernels in plain Triton: sequential in time, the state of a block of channels in registers.

They run wherever Triton does, its interpreter on a CPU included. Everything is float32 from the load on. A program
takes one block of channels of one row, a row being an element of the batch or a packed document; so a document starts
from its own state and nothing is reset on the way.
"""

import triton
import triton.language as tl

from mambalm.ops.triton_support import LOG2E, sigmoid, silu_gradient, softplus


@triton.jit
def locate(cu_seqlens, row, length, PIECE: tl.constexpr):
    """Batch element, first step and number of steps of a row, and where its checkpoints start."""
    if cu_seqlens is None:
        batch, begin, steps, piece = row, row * 0, length, row * tl.cdiv(length, PIECE)
    else:
        begin = tl.load(cu_seqlens + row).to(tl.int64)
        steps = (tl.load(cu_seqlens + row + 1) - begin).to(tl.int32)
        batch, piece = row * 0, begin // PIECE + row
    return batch, begin, steps, piece


@triton.jit
def step_size(pointer, mask, bias, SOFTPLUS: tl.constexpr):
    """Δ and its derivative by delta."""
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        step, slope = softplus(x), sigmoid(x)
    else:
        step, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return step, slope


@triton.jit
def channel_vector(pointer, channel, mask):
    if pointer is None:
        values = tl.zeros(channel.shape, tl.float32)
    else:
        values = tl.load(pointer + channel, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def scan_forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial,
    cu_seqlens,
    y,
    final,
    checkpoints,
    u_b,
    u_l,
    delta_b,
    delta_l,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    z_b,
    z_l,
    length,
    channels,
    per_group,
    states,
    groups,
    SOFTPLUS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    blocks = tl.cdiv(per_group, BLOCK)
    block = tl.program_id(0) % (blocks * groups)
    row = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    group = block // blocks
    channel = group * per_group + block % blocks * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, STATES)
    inside = channel < (group + 1) * per_group
    known = state < states
    cells = channel[:, None] * states + state[None, :]
    both = inside[:, None] & known[None, :]
    size = channels.to(tl.int64) * states

    a = tl.load(A + cells, mask=both, other=0.0).to(tl.float32) * LOG2E
    skip = channel_vector(D, channel, inside)
    offset = channel_vector(bias, channel, inside)
    batch, begin, steps, piece = locate(cu_seqlens, row, length, PIECE)
    u += batch * u_b + begin * u_l + channel
    delta += batch * delta_b + begin * delta_l + channel
    B += batch * B_b + begin * B_l + group * B_g + state
    C += batch * C_b + begin * C_l + group * C_g + state
    if z is not None:
        z += batch * z_b + begin * z_l + channel
    y += (batch * length + begin) * channels + channel
    if initial is None:
        h = tl.zeros((BLOCK, STATES), tl.float32)
    else:
        h = tl.load(initial + row * size + cells, mask=both, other=0.0).to(tl.float32)
    # The loads of several steps are issued before the first is used, and no store stands between them.
    for start in range(0, steps, AHEAD):
        if checkpoints is not None:  # noqa: SIM102 (known at compile time, the other not)
            if start % PIECE == 0:
                tl.store(checkpoints + (piece + start // PIECE) * size + cells, h, mask=both)
        xs, sizes, bs, cs, gates = (), (), (), (), ()
        for i in tl.static_range(AHEAD):
            now = inside & (channel * 0 < steps - start - i)
            known_now = known & (state * 0 < steps - start - i)
            x = tl.load(u + i * u_l, mask=now, other=0.0).to(tl.float32)
            step, _slope = step_size(delta + i * delta_l, now, offset, SOFTPLUS)
            xs += (x,)
            sizes += (tl.where(now, step, 0.0),)
            bs += (tl.load(B + i * B_l, mask=known_now, other=0.0).to(tl.float32),)
            cs += (tl.load(C + i * C_l, mask=known_now, other=0.0).to(tl.float32),)
            if z is not None:
                gates += (tl.load(z + i * z_l, mask=now, other=0.0).to(tl.float32),)
        for i in tl.static_range(AHEAD):
            h = tl.exp2(sizes[i][:, None] * a) * h + (sizes[i] * xs[i])[:, None] * bs[i][None, :]
            out = tl.sum(h * cs[i][None, :], axis=1) + skip * xs[i]
            if z is not None:
                out *= gates[i] * sigmoid(gates[i])
            tl.store(y + i * channels, out.to(y.dtype.element_ty), mask=inside & (channel * 0 < steps - start - i))
        u += AHEAD * u_l
        delta += AHEAD * delta_l
        B += AHEAD * B_l
        C += AHEAD * C_l
        y += AHEAD * channels
        if z is not None:
            z += AHEAD * z_l
    tl.store(final + row * size + cells, h, mask=both)


@triton.jit
def scan_backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial,
    cu_seqlens,
    checkpoints,
    dy,
    dfinal,
    du,
    ddelta,
    dz,
    dA,
    dBC,
    dD,
    dbias,
    dinitial,
    scratch,
    u_b,
    u_l,
    delta_b,
    delta_l,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    z_b,
    z_l,
    dy_b,
    dy_l,
    length,
    channels,
    per_group,
    states,
    groups,
    tokens,
    rows,
    shares,
    SOFTPLUS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
):
    blocks = tl.cdiv(per_group, BLOCK)
    block = tl.program_id(0) % (blocks * groups)
    share = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    zero = share * 0  # makes 64 bits of a loop's counter
    group = block // blocks
    channel = group * per_group + block % blocks * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, STATES)
    inside = channel < (group + 1) * per_group
    known = state < states
    cells = channel[:, None] * states + state[None, :]
    both = inside[:, None] & known[None, :]
    size = channels.to(tl.int64) * states
    # The states of a piece, written and read by this program alone.
    held = scratch + tl.program_id(0).to(tl.int64) * (PIECE * BLOCK * STATES)
    held += tl.arange(0, BLOCK)[:, None] * STATES + state[None, :]
    pair_block = (block % blocks).to(tl.int64) * tokens
    half = blocks * (zero + tokens) * groups * states

    decay = tl.load(A + cells, mask=both, other=0.0).to(tl.float32)
    a = decay * LOG2E
    skip = channel_vector(D, channel, inside)
    offset = channel_vector(bias, channel, inside)
    sum_A = tl.zeros((BLOCK, STATES), tl.float32)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(share, rows, shares):
        batch, begin, steps, piece = locate(cu_seqlens, zero + row, length, PIECE)
        u_row = u + batch * u_b + begin * u_l + channel
        delta_row = delta + batch * delta_b + begin * delta_l + channel
        B_row = B + batch * B_b + begin * B_l + group * B_g + state
        C_row = C + batch * C_b + begin * C_l + group * C_g + state
        dy_row = dy + batch * dy_b + begin * dy_l + channel
        token = batch * length + begin
        if dfinal is None:
            dh = tl.zeros((BLOCK, STATES), tl.float32)
        else:
            dh = tl.load(dfinal + row * size + cells, mask=both, other=0.0).to(tl.float32)
        for back in range(tl.cdiv(steps, PIECE)):
            index = tl.cdiv(steps, PIECE) - 1 - back
            start = index * PIECE
            stop = min(start + PIECE, steps)
            h = tl.load(checkpoints + (piece + index) * size + cells, mask=both, other=0.0)
            for t in range(start, stop):
                tl.store(held + (t - start) * BLOCK * STATES, h)
                at = zero + t
                x = tl.load(u_row + at * u_l, mask=inside, other=0.0).to(tl.float32)
                step, slope = step_size(delta_row + at * delta_l, inside, offset, SOFTPLUS)
                b = tl.load(B_row + at * B_l, mask=known, other=0.0).to(tl.float32)
                h = tl.exp2(step[:, None] * a) * h + (step * x)[:, None] * b[None, :]
            tl.debug_barrier()
            for i in range(stop - start):
                t = stop - 1 - i
                at = zero + t
                x = tl.load(u_row + at * u_l, mask=inside, other=0.0).to(tl.float32)
                step, slope = step_size(delta_row + at * delta_l, inside, offset, SOFTPLUS)
                b = tl.load(B_row + at * B_l, mask=known, other=0.0).to(tl.float32)
                c = tl.load(C_row + at * C_l, mask=known, other=0.0).to(tl.float32)
                out = tl.load(dy_row + at * dy_l, mask=inside, other=0.0).to(tl.float32)
                before = tl.load(held + (t - start) * BLOCK * STATES)
                factor = tl.exp2(step[:, None] * a)
                h = factor * before + (step * x)[:, None] * b[None, :]
                here = (token + at) * channels + channel
                if z is not None:
                    gate = tl.load(z + batch * z_b + (begin + at) * z_l + channel, mask=inside, other=0.0)
                    gate = gate.to(tl.float32)
                    dgate = out * (tl.sum(h * c[None, :], axis=1) + skip * x) * silu_gradient(gate)
                    tl.store(dz + here, dgate.to(dz.dtype.element_ty), mask=inside)
                    out *= gate * sigmoid(gate)
                dh += out[:, None] * c[None, :]
                pair = ((pair_block + token + at) * groups + group) * states + state
                tl.store(dBC + half + pair, tl.sum(out[:, None] * h, axis=0), mask=known)
                tl.store(dBC + pair, tl.sum((step * x)[:, None] * dh, axis=0), mask=known)
                inflow = tl.sum(dh * b[None, :], axis=1)
                dh *= factor
                exponent = dh * before
                sum_A += exponent * step[:, None]
                change = (tl.sum(exponent * decay, axis=1) + inflow * x) * slope
                tl.store(ddelta + here, change.to(ddelta.dtype.element_ty), mask=inside)
                tl.store(du + here, (inflow * step + skip * out).to(du.dtype.element_ty), mask=inside)
                sum_D += out * x
                sum_bias += change
            tl.debug_barrier()
        if dinitial is not None:
            tl.store(dinitial + row * size + cells, dh, mask=both)
    tl.store(dA + share * size + cells, sum_A, mask=both)
    if dD is not None:
        tl.store(dD + share * channels + channel, sum_D, mask=inside)
    if dbias is not None:
        tl.store(dbias + share * channels + channel, sum_bias, mask=inside)
