"""SSD kernels in plain Triton: masked attention within a chunk, the state handed from chunk to chunk in registers.

They run wherever Triton does, its interpreter on a CPU included. A row is an element of the batch or a packed document,
cut into chunks of Q tokens from its own start; a chunk's place among those of all rows is its slot. A block is up to P
channels of one head: the blocks of a head share its decays and are otherwise heads of their own.

`prepare` makes each chunk's steps and running sums of log decays. `scan` computes the outputs, and run backwards in
time, with C and B exchanged and the output's gradient for the input, it computes the input's gradient. Both keep the
states that enter each chunk (`keep`). From them `pairs` computes the gradients of B and C, a chunk at a time and over
all heads of a group, and what those of D and, token by token, of the steps and log decays are sums of, which `finish`
puts together.

Sums of log decays are counted in powers of two. Of float32 inputs, whole and broken parts are summed apart (`whole`),
so that small steps are not lost beside large ones. Products run on matrix units: operands are rounded to OPERAND, sums
are float32. In what the gradients of A and the bias, sums in which most cancels, are made of, the remainder of such a
rounding is multiplied too (`careful`), or they are float16 divided by a power of two, as the states that are kept
(`fitting`).
"""

import triton
import triton.language as tl

from mambalm.ops.triton_support import LOG2E, sigmoid, silu_gradient, softplus

# A decay to less than the smallest float32 number is as good as one to it, and keeps sums small.
FORGOTTEN = tl.constexpr(-160.0)


@triton.jit
def locate_row(cu_seqlens, row, length, Q: tl.constexpr):
    """Batch element, first token and number of tokens of a row, and its first slot."""
    if cu_seqlens is None:
        batch, begin, tokens, slot = row, row * 0, length, row * tl.cdiv(length, Q)
    else:
        begin = tl.load(cu_seqlens + row).to(tl.int64)
        tokens = (tl.load(cu_seqlens + row + 1) - begin).to(tl.int32)
        batch, slot = row * 0, begin // Q + row
    return batch, begin, tokens, slot


@triton.jit
def locate_slot(cu_seqlens, slot, length, rows, Q: tl.constexpr):
    """Batch element and first token of a slot's chunk, and how many tokens it has: none if no chunk has the slot."""
    if cu_seqlens is None:
        batch = slot // tl.cdiv(length, Q)
        begin = slot % tl.cdiv(length, Q) * Q
        left = (length - begin).to(tl.int32)
    else:
        low, high = slot * 0, slot * 0 + rows
        while high - low > 1:  # the last document whose first slot is not after this one
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle) // Q + middle <= slot:
                low = middle
            else:
                high = middle
        start = tl.load(cu_seqlens + low).to(tl.int64)
        begin = start + (slot - start // Q - low) * Q
        left = (tl.load(cu_seqlens + low + 1) - begin).to(tl.int32)
        batch = slot * 0
    return batch, begin, left


@triton.jit
def raw_steps(dt, bias, batch, begin, head, inside, dt_b, dt_l, dt_h, Q: tl.constexpr):
    """dt + bias (Q, heads) in float32."""
    i = tl.arange(0, Q)
    at = dt + batch * dt_b + begin * dt_l + i[:, None] * dt_l + head[None, :] * dt_h
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + head, mask=tl.max(inside.to(tl.int32), axis=0) > 0, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def limited(x, least, most, SOFTPLUS: tl.constexpr):
    """Δ before and after the limits."""
    free = softplus(x) if SOFTPLUS else x
    return free, tl.minimum(tl.maximum(free, least), most)


@triton.jit
def prepare(
    dt,
    A,
    bias,
    cu_seqlens,
    step,
    decay,
    whole,
    dt_b,
    dt_l,
    dt_h,
    least,
    most,
    length,
    heads,
    rows,
    slots,
    SOFTPLUS: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Δ and the running sums of Δ A log2(e) within each chunk, (heads, slots, Q); steps of the padding are zero."""
    parts = tl.cdiv(heads, HEADS)
    slot = (tl.program_id(0) // parts).to(tl.int64)
    head = tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS)
    batch, begin, left = locate_slot(cu_seqlens, slot, length, rows, Q)
    i = tl.arange(0, Q)
    known = head < heads
    inside = (i < left)[:, None] & known[None, :]
    x = raw_steps(dt, bias, batch, begin, head, inside, dt_b, dt_l, dt_h, Q)
    _, size = limited(x, least, most, SOFTPLUS)
    size = tl.where(inside, size, 0.0)
    a = tl.load(A + head, mask=known, other=0.0).to(tl.float32) * LOG2E
    log_decay = tl.maximum(size * a[None, :], FORGOTTEN)
    at = (head.to(tl.int64)[None, :] * slots + slot) * Q + i[:, None]
    mask = known[None, :] & (i[:, None] >= 0)
    tl.store(step + at, size, mask=mask)
    if whole is not None:
        integer = tl.floor(log_decay + 0.5)
        tl.store(whole + at, tl.cumsum(integer, axis=0), mask=mask)
        log_decay -= integer
    tl.store(decay + at, tl.cumsum(log_decay, axis=0), mask=mask)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def remainder(value, OPERAND: tl.constexpr):
    """What rounding a float32 value to OPERAND leaves over."""
    return (value - value.to(OPERAND).to(tl.float32)).to(OPERAND)


@triton.jit
def careful(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """The product of ``a``, which OPERAND holds exactly, and a float32 ``b``."""
    result = product(a, b.to(OPERAND), PRECISION)
    if tl.float32 != OPERAND:
        result += product(a, remainder(b, OPERAND), PRECISION)
    return result


@triton.jit
def fitting(value):
    """A power of two by which float16 holds a float32 matrix, and its inverse: the largest becomes 2^14 to 2^15."""
    # The exponent is taken and inverted as bits, infinity included.
    most = tl.max(tl.max(tl.abs(value), axis=1), axis=0).to(tl.int32, bitcast=True) & 0x7F800000
    most = tl.maximum(most, 15 << 23)
    inverse = (254 << 23) - most + (14 << 23)
    return (most - (14 << 23)).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def keep(states, scales, corner, h, u, N: tl.constexpr, P: tl.constexpr):
    """Store a state (N, P), as it is or, of half the size, as float16 of 11 bits beside the power of two that it is
    divided by; and beside that the one by which float16 holds the chunk's inputs ``u`` (Q, P)."""
    n, p = tl.arange(0, N), tl.arange(0, P)
    at = states + corner * (N * P) + n[:, None] * P + p[None, :]
    if scales is None:
        tl.store(at, h)
    else:
        scale, inverse = fitting(h)
        tl.store(at, (h * inverse).to(tl.float16))
        tl.store(scales + corner * 2, scale)
        scale, inverse = fitting(u.to(tl.float32))
        tl.store(scales + corner * 2 + 1, scale)


@triton.jit
def kept(states, scales, corner, n, N: tl.constexpr, P: tl.constexpr):
    """Rows n of a state (N, P) that `keep` stored, its scale and that of the chunk's inputs; they are 1 where it stored
    none."""
    p = tl.arange(0, P)
    h = tl.load(states + corner * (N * P) + n[:, None] * P + p[None, :])
    scale, size = 1.0, 1.0
    if scales is not None:
        scale, size = tl.load(scales + corner * 2), tl.load(scales + corner * 2 + 1)
    return h, scale, size


@triton.jit
def running_sums(decay, whole, at, i, Q: tl.constexpr):
    """Of a chunk: the sums in two parts, the sums from the start to each token and from there to the end."""
    part = tl.load(decay + at + i)
    last = tl.load(decay + at + Q - 1)
    if whole is None:
        integer = part
        start, end, total = part, last - part, last
    else:
        integer = tl.load(whole + at + i)
        last_integer = tl.load(whole + at + Q - 1)
        start, end, total = part + integer, (last_integer - integer) + (last - part), last_integer + last
    return part, integer, start, end, total


@triton.jit
def between(later, later_whole, earlier, earlier_whole, EXACT: tl.constexpr):
    """What is left at a later token of what an earlier one adds."""
    difference = later - earlier
    if EXACT:
        difference += later_whole - earlier_whole
    return tl.exp2(difference)


@triton.jit
def load_tile(pointer, token_stride, i, column, inside, columns):
    """(Q, columns) of a chunk, zero outside."""
    at = pointer + i[:, None] * token_stride + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def scan(
    u,
    key,
    query,
    D,
    z,
    dy,
    initial,
    cu_seqlens,
    step,
    decay,
    whole,
    ends,
    totals,
    out,
    states,
    scales,
    final,
    u_b,
    u_l: tl.constexpr,
    u_h,
    key_b,
    key_l: tl.constexpr,
    key_g,
    query_b,
    query_l: tl.constexpr,
    query_g,
    z_b,
    z_l: tl.constexpr,
    z_h,
    dy_b,
    dy_l: tl.constexpr,
    dy_h,
    D_h,
    D_p,
    length,
    heads: tl.constexpr,
    per_group: tl.constexpr,
    channels: tl.constexpr,
    state_size: tl.constexpr,
    slots,
    SEGMENTS: tl.constexpr,
    SUMMARY: tl.constexpr,
    REVERSE: tl.constexpr,
    CAREFUL: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of channels of one of SEGMENTS pieces of a row, chunk by chunk.

    Forwards: u = x, key = B, query = C, out = y, or dz where dy is given. REVERSE: u = dy, key = C,
    query = B, out = dx. SUMMARY: only what the segment does to a state, (rows, SEGMENTS, heads, p, n) into ``ends`` and
    its decay into ``totals``, from which the other segments start when they are computed.
    """
    blocks = tl.cdiv(channels, P)
    block = tl.program_id(0) % (heads * blocks)
    piece = (tl.program_id(0) // (heads * blocks)).to(tl.int64)
    row, segment = piece // SEGMENTS, (piece % SEGMENTS).to(tl.int32)
    head, first = block // blocks, block % blocks * P
    group = head // per_group
    i, p, n = tl.arange(0, Q), first + tl.arange(0, P), tl.arange(0, N)
    batch, begin, tokens, slot = locate_row(cu_seqlens, row, length, Q)

    u += batch * u_b + begin * u_l + head.to(tl.int64) * u_h
    key += batch * key_b + begin * key_l + group.to(tl.int64) * key_g
    query += batch * query_b + begin * query_l + group.to(tl.int64) * query_g
    if z is not None:
        z += batch * z_b + begin * z_l + head.to(tl.int64) * z_h
    if dy is not None:
        dy += batch * dy_b + begin * dy_l + head.to(tl.int64) * dy_h
    here = (batch * length + begin) * heads * channels + head * channels
    sums = (head.to(tl.int64) * slots + slot) * Q
    if D is None:
        skip = tl.zeros((P,), tl.float32)
    else:
        skip = tl.load(D + head * D_h + p * D_p, mask=p < channels, other=0.0).to(tl.float32)

    chunks = tl.cdiv(tokens, Q)
    per_segment = tl.cdiv(chunks, SEGMENTS)
    first_chunk = tl.minimum(segment * per_segment, chunks)
    count = tl.minimum(first_chunk + per_segment, chunks) - first_chunk

    cells = p[None, :] * state_size + n[:, None]
    real = (p < channels)[None, :] & (n < state_size)[:, None]
    size = (row * 0 + channels) * state_size
    if (initial is None) or SUMMARY:
        h = tl.zeros((N, P), tl.float32)
    else:
        h = tl.load(initial + (row * heads + head) * size + cells, mask=real, other=0.0).to(tl.float32)
    if SEGMENTS > 1 and not SUMMARY:
        for j in range(SEGMENTS - 1 - segment if REVERSE else segment):
            other = (row * SEGMENTS + (SEGMENTS - 1 - j if REVERSE else j)) * heads + head
            h = h * tl.load(totals + other) + tl.load(ends + other * size + cells, mask=real, other=0.0)
    log_total = 0.0
    for k in tl.range(0, count, num_stages=STAGES):
        chunk = first_chunk + count - 1 - k if REVERSE else first_chunk + k
        offset = chunk.to(tl.int64) * Q
        inside = i < tokens - chunk * Q
        part, integer, start, end, total = running_sums(decay, whole, sums + offset, i, Q)
        size_of_step = tl.load(step + sums + offset + i)
        ut = load_tile(u + offset * u_l, u_l, i, p, inside, channels)
        keys = load_tile(key + offset * key_l, key_l, i, n, inside, state_size).to(OPERAND)
        if REVERSE and z is not None:
            gate = load_tile(z + offset * z_l, z_l, i, p, inside, channels).to(tl.float32)
            ut = ut.to(tl.float32) * (gate * sigmoid(gate))
        if states is not None:
            keep(states, scales, (slot + chunk) * heads * blocks + block, h, ut, N, P)
        if out is not None:
            queries = load_tile(query + offset * query_l, query_l, i, n, inside, state_size).to(OPERAND)
            scores = product(queries, tl.trans(keys), PRECISION)
            if REVERSE:
                left = between(part[None, :], integer[None, :], part[:, None], integer[:, None], whole is not None)
                scores = tl.where(i[:, None] <= i[None, :], scores * left, 0.0)
                result = product(queries, h.to(OPERAND), PRECISION) * tl.exp2(end)[:, None]
            else:
                left = between(part[:, None], integer[:, None], part[None, :], integer[None, :], whole is not None)
                scores = tl.where(i[:, None] >= i[None, :], scores * left * size_of_step[None, :], 0.0)
                result = product(queries, h.to(OPERAND), PRECISION) * tl.exp2(start)[:, None]
            weights = scores.to(OPERAND)
            result += product(weights, ut.to(OPERAND), PRECISION)
            if REVERSE:
                result *= size_of_step[:, None]
            if D is not None:
                result += skip[None, :] * ut.to(tl.float32)
            at = here + offset * heads * channels + i[:, None] * heads * channels + p[None, :]
            mask = inside[:, None] & (p < channels)[None, :]
            if z is not None and not REVERSE:
                gate = load_tile(z + offset * z_l, z_l, i, p, inside, channels).to(tl.float32)
                if dy is None:
                    result *= gate * sigmoid(gate)
                else:
                    change = load_tile(dy + offset * dy_l, dy_l, i, p, inside, channels).to(tl.float32)
                    result *= change * silu_gradient(gate)
            tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)
        weight = tl.exp2(start) if REVERSE else tl.exp2(end) * size_of_step
        inflow = ut.to(tl.float32) * weight[:, None]
        if CAREFUL:
            h = h * tl.exp2(total) + careful(tl.trans(keys), inflow, OPERAND, PRECISION)
        else:
            h = h * tl.exp2(total) + product(tl.trans(keys), inflow.to(OPERAND), PRECISION)
        log_total += total
    if SUMMARY:
        tl.store(ends + ((row * SEGMENTS + segment) * heads + head) * size + cells, h, mask=real)
        tl.store(totals + (row * SEGMENTS + segment) * heads + head, tl.exp2(log_total))
    if final is not None and not SUMMARY:  # noqa: SIM102 (known at compile time, the other not)
        if segment == (0 if REVERSE else SEGMENTS - 1):
            tl.store(final + (row * heads + head) * size + cells, h, mask=real)


@triton.jit
def fitted(value, by, scales, OPERAND: tl.constexpr):
    """A value for products with kept states: float16, divided by a power of two, or OPERAND."""
    return value.to(OPERAND) if scales is None else (value.to(tl.float32) * (1.0 / by)).to(tl.float16)


@triton.jit
def by_state(rows, state, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """The product of ``rows`` (Q, p) and a state (n, p) as it was kept."""
    if state.dtype == tl.float16:
        result = tl.dot(rows, tl.trans(state))
    else:
        result = careful(rows, tl.trans(state), OPERAND, PRECISION)
    return result


@triton.jit
def pairs(
    x,
    dy,
    z,
    B,
    C,
    cu_seqlens,
    step,
    decay,
    whole,
    states,
    scales,
    dstates,
    dscales,
    dB,
    dC,
    dD,
    crossing,
    within,
    writes,
    direct,
    skips,
    passed,
    x_b,
    x_l: tl.constexpr,
    x_h,
    dy_b,
    dy_l: tl.constexpr,
    dy_h,
    z_b,
    z_l: tl.constexpr,
    z_h,
    B_b,
    B_l: tl.constexpr,
    B_g,
    C_b,
    C_l: tl.constexpr,
    C_g,
    length,
    heads: tl.constexpr,
    per_group: tl.constexpr,
    groups: tl.constexpr,
    channels: tl.constexpr,
    state_size: tl.constexpr,
    rows,
    slots,
    tokens,
    shares,
    SOME: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of one chunk, SOME of its states and one share of a group's blocks of channels.

    The gradients of B and C (shares, tokens, g, n), sums over these blocks; of each block its shares in the gradients
    of the log decays and the steps, crossing, within, writes and direct (blocks, parts, slots, Q) and passed (blocks,
    parts, slots, SOME), and in that of D: skips (blocks, parts, slots, Q) or, of channels, dD (slots, blocks, p).
    """
    blocks = tl.cdiv(channels, P)
    parts: tl.constexpr = N // SOME
    part_of = (tl.program_id(0) % parts).to(tl.int32)
    program = tl.program_id(0) // parts
    slot = (program // (groups * shares)).to(tl.int64)
    group = program // shares % groups
    share = program % shares
    i, p, n = tl.arange(0, Q), tl.arange(0, P), part_of * SOME + tl.arange(0, SOME)
    batch, begin, left = locate_slot(cu_seqlens, slot, length, rows, Q)
    inside = i < left
    each = tl.cdiv(per_group * blocks, shares)
    stop = tl.minimum((share + 1) * each, per_group * blocks) + group * per_group * blocks
    x += batch * x_b + begin * x_l
    dy += batch * dy_b + begin * dy_l
    if z is not None:
        z += batch * z_b + begin * z_l
    B += batch * B_b + begin * B_l + group.to(tl.int64) * B_g
    C += batch * C_b + begin * C_l + group.to(tl.int64) * C_g
    keys = load_tile(B, B_l, i, n, inside, state_size)
    queries = load_tile(C, C_l, i, n, inside, state_size)
    scores = product(queries.to(OPERAND), tl.trans(keys.to(OPERAND)), PRECISION)
    scores = tl.where(i[:, None] > i[None, :], scores, 0.0)
    same = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), axis=1)
    dscores = tl.zeros((Q, Q), tl.float32)
    dkeys = tl.zeros((Q, SOME), tl.float32)
    dqueries = tl.zeros((Q, SOME), tl.float32)
    zero = slot * 0  # makes 64 bits of a loop's counter
    for number in tl.range(group * per_group * blocks + share * each, stop, num_stages=STAGES):
        block = zero + number
        head, first = block // blocks, block % blocks * P
        sums = (head * slots + slot) * Q
        part, integer, start, end, total = running_sums(decay, whole, sums, i, Q)
        size_of_step = tl.load(step + sums + i)
        xt = load_tile(x + head * x_h, x_l, i, first + p, inside, channels)
        change = load_tile(dy + head * dy_h, dy_l, i, first + p, inside, channels)
        if z is not None:
            gate = load_tile(z + head * z_h, z_l, i, first + p, inside, channels).to(tl.float32)
            change = change.to(tl.float32) * (gate * sigmoid(gate))
        corner = slot * heads * blocks + block
        entering, scale, x_by = kept(states, scales, corner, n, N, P)
        leaving, dscale, change_by = kept(dstates, dscales, corner, n, N, P)
        line = (block * parts + part_of) * slots + slot
        through = tl.sum(entering.to(tl.float32) * leaving.to(tl.float32), axis=1) * (scale * dscale)
        tl.store(passed + line * SOME + tl.arange(0, SOME), through * tl.exp2(total))
        skipped = change.to(tl.float32) * xt.to(tl.float32)
        at_once = tl.sum(skipped, axis=1)
        if skips is not None:
            tl.store(skips + line * Q + i, tl.where(part_of == 0, at_once, 0.0))
        if dD is not None:
            tl.store(dD + corner * P + p, tl.sum(skipped, axis=0), mask=p * 0 == part_of)
        # float16 holds what x and dy have, and multiplies the states as they are kept.
        xs, changes = fitted(xt, x_by, scales, OPERAND), fitted(change, change_by, scales, OPERAND)
        dweights = product(changes, tl.trans(xs), PRECISION) * change_by
        if z is not None and tl.float32 != OPERAND:
            rest_by = change_by * 2**-11  # of what rounding leaves over
            rest = fitted(change - changes.to(tl.float32) * change_by, rest_by, scales, OPERAND)
            dweights += product(rest, tl.trans(xs), PRECISION) * rest_by
        # Within the chunk.
        decays = between(part[:, None], integer[:, None], part[None, :], integer[None, :], whole is not None)
        dweights = tl.where(i[:, None] >= i[None, :], dweights * decays * x_by, 0.0)
        dscores += dweights * size_of_step[None, :]
        weights = dweights * scores
        inward = tl.sum(weights, axis=0)
        here = line * Q + i
        if within is None:
            crossed = tl.sum(weights * size_of_step[None, :], axis=1) - inward * size_of_step
        else:  # the difference would leave rounding where decays leave nothing
            crossed = tl.zeros((Q,), tl.float32)
            before = tl.cumsum(weights * size_of_step[None, :], axis=1)
            before = tl.where(i[:, None] > i[None, :], before, 0.0)
            tl.store(within + here + 1, tl.sum(before, axis=0), mask=i < Q - 1)
            tl.store(within + here, crossed, mask=i == 0)
        # Between chunks: the outputs read the state that enters, the inflow adds to the one that leaves.
        reads = by_state(changes, entering, OPERAND, PRECISION) * change_by
        if z is not None and tl.float32 != OPERAND:
            reads += by_state(rest, entering, OPERAND, PRECISION) * rest_by
        reads *= (tl.exp2(start) * scale)[:, None]
        dqueries += reads
        tl.store(crossing + here, crossed + tl.sum(reads * queries.to(tl.float32), axis=1))
        added = by_state(xs, leaving, OPERAND, PRECISION) * (tl.exp2(end) * (x_by * dscale))[:, None]
        dkeys += added * size_of_step[:, None]
        written = tl.sum(added * keys.to(tl.float32), axis=1)
        tl.store(writes + here, written * size_of_step)
        tl.store(direct + here, inward + at_once * same + written)
    dscores = dscores.to(OPERAND)
    dqueries += product(dscores, keys.to(OPERAND), PRECISION)
    dkeys += product(tl.trans(dscores), queries.to(OPERAND), PRECISION)
    token = share.to(tl.int64) * tokens + batch * length + begin
    at = ((token + i)[:, None] * groups + group) * state_size + n[None, :]
    mask = inside[:, None] & (n < state_size)[None, :]
    tl.store(dB + at, dkeys.to(dB.dtype.element_ty), mask=mask)
    tl.store(dC + at, dqueries.to(dC.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    dt,
    A,
    bias,
    cu_seqlens,
    step,
    crossing,
    within,
    writes,
    direct,
    skips,
    passed,
    ddt,
    dA,
    dbias,
    dD,
    dt_b,
    dt_l,
    dt_h,
    least,
    most,
    length,
    heads,
    blocks,
    crossings,
    rows,
    slots,
    SOFTPLUS: tl.constexpr,
    Q: tl.constexpr,
    SOME: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of dt, and each slot's share of those of A, the bias and D, (slots, heads)."""
    parts = tl.cdiv(heads, HEADS)
    slot = (tl.program_id(0) // parts).to(tl.int64)
    head = tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS)
    batch, begin, left = locate_slot(cu_seqlens, slot, length, rows, Q)
    i, n = tl.arange(0, Q), tl.arange(0, SOME)
    known = head < heads
    inside = (i < left)[:, None] & known[None, :]
    crossed = tl.zeros((Q, HEADS), tl.float32)
    written = tl.zeros((Q, HEADS), tl.float32)
    change = tl.zeros((Q, HEADS), tl.float32)
    through = tl.zeros((HEADS,), tl.float32)
    skipped = tl.zeros((HEADS,), tl.float32)
    dlog_decay = tl.zeros((Q, HEADS), tl.float32)
    for number in range(crossings):
        at = ((head.to(tl.int64)[None, :] * crossings + number) * slots + slot) * Q + i[:, None]
        crossed += tl.load(crossing + at, mask=inside, other=0.0)
    for block in range(blocks):
        line = (head.to(tl.int64) * blocks + block) * slots + slot
        at = line[None, :] * Q + i[:, None]
        if within is not None:
            dlog_decay += tl.load(within + at, mask=inside, other=0.0)
        written += tl.load(writes + at, mask=inside, other=0.0)
        change += tl.load(direct + at, mask=inside, other=0.0)
        if skips is not None:
            skipped += tl.sum(tl.load(skips + at, mask=inside, other=0.0), axis=0)
        real = (known & (head * 0 < left))[:, None]
        through += tl.sum(tl.load(passed + line[:, None] * SOME + n[None, :], mask=real, other=0.0), axis=1)
    # The gradient of a log decay: of all that crosses it, from before it to after it.
    before = tl.cumsum(written, axis=0) - written
    dlog_decay += tl.cumsum(crossed, axis=0, reverse=True) + before + through[None, :]
    a = tl.load(A + head, mask=known, other=0.0).to(tl.float32)
    size = tl.load(step + (head.to(tl.int64)[None, :] * slots + slot) * Q + i[:, None], mask=inside, other=0.0)
    # Nothing crosses a step that forgets; rounding that is left over there would be multiplied with a large step.
    dlog_decay = tl.where(size * a[None, :] * LOG2E > FORGOTTEN, dlog_decay, 0.0)
    x = raw_steps(dt, bias, batch, begin, head, inside, dt_b, dt_l, dt_h, Q)
    free, limit = limited(x, least, most, SOFTPLUS)
    change += dlog_decay * a[None, :]
    if SOFTPLUS:
        change *= sigmoid(x)
    change = tl.where(inside & (free == limit), change, 0.0)
    at = (batch * length + begin + i)[:, None] * heads + head[None, :]
    tl.store(ddt + at, change.to(ddt.dtype.element_ty), mask=inside)
    tl.store(dA + slot * heads + head, tl.sum(dlog_decay * size, axis=0), mask=known)
    if dbias is not None:
        tl.store(dbias + slot * heads + head, tl.sum(change, axis=0), mask=known)
    if skips is not None:
        tl.store(dD + slot * heads + head, skipped, mask=known)


@triton.jit
def advance(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial,
    y,
    final,
    x_b,
    x_h,
    dt_b,
    dt_h,
    B_b,
    B_g,
    C_b,
    C_g,
    z_b,
    z_h,
    D_h,
    D_p,
    least,
    most,
    heads,
    per_group,
    channels,
    state_size,
    SOFTPLUS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """One step of every row: P channels of a head."""
    blocks = tl.cdiv(channels, P)
    block = tl.program_id(0) % (heads * blocks)
    row = (tl.program_id(0) // (heads * blocks)).to(tl.int64)
    head = block // blocks
    group = (head // per_group).to(tl.int64)
    p, n = block % blocks * P + tl.arange(0, P), tl.arange(0, N)
    inside, known = p < channels, n < state_size
    cells = (row * heads + head) * channels * state_size + p[:, None] * state_size + n[None, :]
    both = inside[:, None] & known[None, :]
    if initial is None:
        h = tl.zeros((P, N), tl.float32)
    else:
        h = tl.load(initial + cells, mask=both, other=0.0).to(tl.float32)
    raw = tl.load(dt + row * dt_b + head * dt_h).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head).to(tl.float32)
    _, size = limited(raw, least, most, SOFTPLUS)
    u = tl.load(x + row * x_b + head * x_h + p, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + row * B_b + group * B_g + n, mask=known, other=0.0).to(tl.float32)
    c = tl.load(C + row * C_b + group * C_g + n, mask=known, other=0.0).to(tl.float32)
    h = tl.exp2(size * tl.load(A + head).to(tl.float32) * LOG2E) * h + (size * u)[:, None] * b[None, :]
    out = tl.sum(h * c[None, :], axis=1)
    if D is not None:
        out += tl.load(D + head * D_h + p * D_p, mask=inside, other=0.0).to(tl.float32) * u
    if z is not None:
        gate = tl.load(z + row * z_b + head * z_h + p, mask=inside, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + (row * heads + head) * channels + p, out.to(y.dtype.element_ty), mask=inside)
    if final is not None:
        tl.store(final + cells, h, mask=both)
