"""Selective scan kernels in Gluon, Triton's lower level, for NVIDIA GPUs.

A program takes BLOCK channels of one row (an element of the batch or a packed document), or of one of CHUNKS pieces of
it, and goes through it in tiles of TILE steps. Loads, Δ and the gate are computed with a thread per few neighbouring
channels of a step and handed over in shared memory as float32; the recurrence runs with LANES threads per channel, each
holding STATES / LANES states in registers, sequentially in time. SEVERAL channels share a thread, and with it what it
reads of B and C: shared memory's bandwidth is the narrowest resource next to the exponentials. Sums over the states are
left as one partial sum per lane in shared memory, where the first layout picks them up; the backward of 8 lanes or more
makes them by shuffles, so that a lane has those of one step, which it finishes and stores. Shared memory is written in
groups of GROUP steps, because every store to a buffer that was stored to before costs a barrier.
"""

from mambalm.ops.gluon_support import barrier, gl, gluon, view

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# log1p(e) / e on [0, 1] to 2e-7, see triton_support.py.
P0 = gl.constexpr(0.999999806)
P1 = gl.constexpr(-0.499974053)
P2 = gl.constexpr(0.332754776)
P3 = gl.constexpr(-0.244954498)
P4 = gl.constexpr(0.177452043)
P5 = gl.constexpr(-0.10768117)
P6 = gl.constexpr(0.0440892381)
P7 = gl.constexpr(-0.00853909631)


@gluon.constexpr_function
def state_layout(states, lanes, several, warps):
    """(channel / several, several, lane, state): a thread holds one lane's states of ``several`` channels."""
    held = [1, several, 1, states // lanes]
    return gl.BlockedLayout(held, [32 // lanes, 1, lanes, 1], [warps, 1, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def vector_width(steps, width, warps, most):
    return max(min(steps * width // (32 * warps), most, width), 1)


@gluon.constexpr_function
def tile_layout(steps, width, warps, most):
    """(step, column) with up to ``most`` neighbouring columns in a thread, no element twice if it can be helped."""
    vector = vector_width(steps, width, warps, most)
    across = min(width // vector, 32)
    return gl.BlockedLayout([1, vector], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def step_layout(several, lanes, warps):
    """(channel / several, several, step) on the threads of ``state_layout``: a lane's number is that of the step, and a
    thread's channels are neighbours in memory."""
    return gl.BlockedLayout([1, several, 1], [32 // lanes, 1, lanes], [warps, 1, 1], [1, 2, 0])


@gluon.constexpr_function
def step_layout_in_memory(several, lanes, warps):
    """``step_layout`` as (step, channel / several, several)."""
    return gl.BlockedLayout([1, 1, several], [lanes, 32 // lanes, 1], [1, warps, 1], [2, 0, 1])


@gluon.constexpr_function
def partial_layout(steps, width, lanes, warps, most):
    """(step, lane, channel): the tile's layout, each thread with all lanes of its channels."""
    vector = vector_width(steps, width, warps, most)
    across = min(width // vector, 32)
    return gl.BlockedLayout([1, lanes, vector], [32 // across, 1, across], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def partial_memory(block, lanes):
    """(step, lane, channel) so that the lanes of a channel fall on different banks."""
    rows = max(32 // block, 1)
    return gl.SwizzledSharedLayout(32 // lanes, rows, max(lanes // rows, 1), [2, 1, 0])


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def apart(x):
    """``x`` as a value that the compiler takes for another, so that it keeps the half precision until it is used again
    instead of the float32 that it was converted to before."""
    if x.dtype.primitive_bitwidth == 16:
        x = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    return x


@gluon.jit
def sigmoid(x):
    return reciprocal(1.0 + exp2(-x * LOG2E))


@gluon.jit
def log1p_of_unit(e):
    """log1p(e) for e in [0, 1], on the FMA pipe: the exponentials leave the other one no time for a logarithm."""
    p = (((P7 * e + P6) * e + P5) * e + P4) * e + P3
    return (((p * e + P2) * e + P1) * e + P0) * e


@gluon.jit
def step_size(x, inside, SOFTPLUS: gl.constexpr):
    """Δ of the tile, 0 where there is no step, which leaves the state alone."""
    if SOFTPLUS:
        x = gl.maximum(x, 0.0) + log1p_of_unit(exp2(-gl.abs(x) * LOG2E))
    return gl.where(inside, x, 0.0)


@gluon.jit
def step_slope(x, inside, SOFTPLUS: gl.constexpr):
    """The derivative of ``step_size``, from the same exponential."""
    if SOFTPLUS:
        e = exp2(-gl.abs(x) * LOG2E)
        r = reciprocal(1.0 + e)
        slope = gl.where(x >= 0.0, r, e * r)
    else:
        slope = gl.full_like(x, 1.0)
    return gl.where(inside, slope, 0.0)


@gluon.jit
def locate(cu_seqlens, row, length, PIECE: gl.constexpr):
    """Batch element, first step and number of steps of a row, and where its checkpoints start."""
    if cu_seqlens is None:
        batch, begin, steps, piece = row, row * 0, length, row * ((length + PIECE - 1) // PIECE)
    else:
        begin = gl.load(cu_seqlens + row).to(gl.int64)
        steps = (gl.load(cu_seqlens + row + 1) - begin).to(gl.int32)
        batch, piece = row * 0, begin // PIECE + row
    return batch, begin, steps, piece


@gluon.jit
def locate_chunk(cu_seqlens, item, length, PIECE: gl.constexpr, CHUNKS: gl.constexpr):
    """A row is cut into CHUNKS of whole pieces, the last ones perhaps empty: the row and the number of the chunk, and
    what ``locate`` says, for the chunk."""
    row = item // CHUNKS
    chunk = (item % CHUNKS).to(gl.int32)
    batch, begin, steps, piece = locate(cu_seqlens, row, length, PIECE)
    most = (steps + CHUNKS * PIECE - 1) // (CHUNKS * PIECE) * PIECE
    skipped = gl.minimum(chunk * most, steps)
    return row, chunk, batch, begin + skipped, gl.minimum(steps - skipped, most), piece + skipped // PIECE


@gluon.jit
def through_chunk(h, a, ends, totals, item, channels, channel, size, cells, inside, both):
    """What a state becomes over a chunk: its decay is exp(A ΣΔ), and ``ends`` what the chunk makes of a zero state.
    Backwards in time the same holds of the state's gradient."""
    total = gl.load(totals + item * channels + channel, mask=inside, other=0.0)
    return exp2(a * of_channel(total)) * h + gl.load(ends + item * size + cells, mask=both, other=0.0)


@gluon.jit
def channel_vector(pointer, channel, mask):
    if pointer is None:
        values = gl.zeros_like(channel, dtype=gl.float32)
    else:
        values = gl.load(pointer + channel, mask=mask, other=0.0).to(gl.float32)
    return values


@gluon.jit
def of_channel(x):
    """(channel / several, several) over the lanes and states."""
    return gl.expand_dims(gl.expand_dims(x, 2), 3)


@gluon.jit
def of_state(x):
    """(lane, state) over the channels."""
    return gl.expand_dims(gl.expand_dims(x, 0), 0)


@gluon.jit
def stack4(a, b, c, d):
    """Four steps' values (x, y, z) as (x, y, z, step), in registers."""
    pairs = gl.join(gl.join(a, c), gl.join(b, d))
    return gl.reshape(pairs, [a.shape[0], a.shape[1], a.shape[2], 4])


@gluon.jit
def by_lane(values):
    """(channel / several, several, lane, step) as (step, lane, channel)."""
    several: gl.constexpr = values.shape[1]
    flat = gl.permute(values, [3, 2, 0, 1])
    return gl.reshape(flat, [4, values.shape[2], values.shape[0] * several])


@gluon.jit
def by_state(x, y):
    """Two (channel / several, lane, state, step) as one (step and which of the two, channel / several, state)."""
    heads: gl.constexpr = x.shape[0]
    states: gl.constexpr = x.shape[1] * x.shape[2]
    return gl.reshape(gl.permute(gl.join(x, y), [3, 4, 0, 1, 2]), [2 * x.shape[3], heads, states])


@gluon.jit
def prefetch(pointers, mask):
    """Ask for the lines at ``pointers`` to be brought into the L2 cache."""
    code: gl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
    gl.inline_asm_elementwise(code, "=r,l,r", [pointers, mask.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def sum_of_lanes(memory, LAYOUT: gl.constexpr, LIKE: gl.constexpr):
    """(step, lane, channel) to (step, channel)."""
    return gl.convert_layout(gl.sum(memory.load(LAYOUT), axis=1), LIKE, assert_trivial=True)


@gluon.constexpr_function
def shuffle(bit):
    return f"shfl.sync.bfly.b32 $0, $1, {bit}, 0x1f, 0xffffffff;"


@gluon.jit
def of_lane(x, BIT: gl.constexpr):
    """What the thread holds whose lane differs in that bit."""
    code: gl.constexpr = shuffle(BIT)
    return gl.inline_asm_elementwise(code, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def fold(values, lane, BIT: gl.constexpr):
    """Sums over pairs of lanes: of two neighbours in ``values``, the lanes with the bit keep the second's."""
    odd = (lane & BIT) != 0
    folded = ()
    for i in gl.static_range(len(values) // 2):
        keep = gl.where(odd, values[2 * i + 1], values[2 * i])
        folded += (keep + of_lane(gl.where(odd, values[2 * i], values[2 * i + 1]), BIT),)
    return folded


@gluon.jit
def sum_of_steps(values, lane, LANES: gl.constexpr):
    """The sums over the lanes of a tuple of steps' (channel / several, several, lane), in registers, as (channel /
    several, several, step): a step's on the lane of its number, and on those a multiple of the steps away."""
    steps: gl.constexpr = len(values)
    for bit in gl.static_range(5):
        if (1 << bit) < steps:
            values = fold(values, lane, 1 << bit)
    total = values[0]
    if steps < LANES:
        total = gl.sum(gl.reshape(total, [total.shape[0], total.shape[1], LANES // steps, steps]), axis=2)
    return total


@gluon.jit
def by_step(memory, LAYOUT: gl.constexpr, LIKE: gl.constexpr):
    """(step, channel / several, several) in shared memory as (channel / several, several, step)."""
    return gl.convert_layout(gl.permute(memory.load(LAYOUT), [1, 2, 0]), LIKE, assert_trivial=True)


@gluon.jit
def scan_ends(
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
    dy,
    ends,
    totals,
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
    SOFTPLUS: gl.constexpr,
    PIECE: gl.constexpr,
    BLOCK: gl.constexpr,
    STATES: gl.constexpr,
    LANES: gl.constexpr,
    SEVERAL: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """``ends``: the state at the end of each chunk from zero at its start or, given dy, the state's gradient at the
    start of each chunk from zero at its end. ``totals``: the sum of Δ over each chunk."""
    WARPS: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = PIECE
    HELD: gl.constexpr = STATES // LANES
    HEADS: gl.constexpr = BLOCK // SEVERAL
    STATE: gl.constexpr = state_layout(STATES, LANES, SEVERAL, WARPS)
    CHANNEL: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, STATE))
    LANE_STATE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, STATE))
    IO: gl.constexpr = tile_layout(TILE, BLOCK, WARPS, 4)
    BC: gl.constexpr = tile_layout(TILE, STATES, WARPS, 4)
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    blocks = (per_group + BLOCK - 1) // BLOCK
    block = gl.program_id(0) % (blocks * groups)
    item = (gl.program_id(0) // (blocks * groups)).to(gl.int64)
    group = block // blocks
    first = group * per_group + block % blocks * BLOCK
    last = group * per_group + per_group
    size = channels.to(gl.int64) * states
    _row, _chunk, batch, begin, steps, _piece = locate_chunk(cu_seqlens, item, length, PIECE, CHUNKS)

    head = gl.expand_dims(gl.arange(0, HEADS, gl.SliceLayout(1, CHANNEL)), 1)
    channel = first + head * SEVERAL + gl.expand_dims(gl.arange(0, SEVERAL, gl.SliceLayout(0, CHANNEL)), 0)
    lane = gl.expand_dims(gl.arange(0, LANES, gl.SliceLayout(1, LANE_STATE)), 1)
    state = of_state(lane * HELD + gl.expand_dims(gl.arange(0, HELD, gl.SliceLayout(0, LANE_STATE)), 0))
    cells = of_channel(channel) * states + state
    both = of_channel(channel < last) & (state < states)
    a = gl.load(A + cells, mask=both, other=0.0).to(gl.float32) * LOG2E
    h = gl.zeros([HEADS, SEVERAL, LANES, HELD], gl.float32, STATE)

    time = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(1, IO)), 1)
    column = first + gl.arange(0, BLOCK, gl.SliceLayout(0, IO))
    inside = column < last
    offset = gl.expand_dims(channel_vector(bias, column, inside), 0)
    at = gl.expand_dims(column, 0)
    time_BC = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(1, BC)), 1)
    state_BC = gl.expand_dims(gl.arange(0, STATES, gl.SliceLayout(0, BC)), 0)
    delta += batch * delta_b + begin * delta_l
    if dy is None:
        u += batch * u_b + begin * u_l
        B += batch * B_b + begin * B_l + group * B_g
    else:
        dy += batch * dy_b + begin * dy_l
        C += batch * C_b + begin * C_l + group * C_g
        if z is not None:
            z += batch * z_b + begin * z_l

    memory_step = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK], PLAIN2)
    memory_inflow = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK], PLAIN2)
    memory_BC = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN2)
    step_at = view(memory_step, [TILE, HEADS, SEVERAL], PLAIN2)
    inflow_at = view(memory_inflow, [TILE, HEADS, SEVERAL], PLAIN2)
    BC_at = view(memory_BC, [TILE, LANES, HELD], PLAIN2)

    total = gl.zeros([TILE, BLOCK], gl.float32, IO)
    tiles = (steps + TILE - 1) // TILE
    for i in range(tiles):
        start = i * TILE if dy is None else (tiles - 1 - i) * TILE
        far = start.to(gl.int64)
        now = (time < steps - start) & gl.expand_dims(inside, 0)
        now_BC = (time_BC < steps - start) & (state_BC < states)
        raw = gl.load(delta + far * delta_l + (time * delta_l + at), mask=now, other=0.0).to(gl.float32)
        step = step_size(raw + offset, now, SOFTPLUS)
        if dy is None:
            inflow = step * gl.load(u + far * u_l + (time * u_l + at), mask=now, other=0.0).to(gl.float32)
            matrix = gl.load(B + far * B_l + (time_BC * B_l + state_BC), mask=now_BC, other=0.0).to(gl.float32)
        else:
            inflow = gl.load(dy + far * dy_l + (time * dy_l + at), mask=now, other=0.0).to(gl.float32)
            if z is not None:
                gate = gl.load(z + far * z_l + (time * z_l + at), mask=now, other=0.0).to(gl.float32)
                inflow = inflow * gate * sigmoid(gate)
            matrix = gl.load(C + far * C_l + (time_BC * C_l + state_BC), mask=now_BC, other=0.0).to(gl.float32)
        total += step
        memory_step.store(step)
        memory_inflow.store(inflow)
        memory_BC.store(matrix)
        for j in gl.static_range(TILE):
            t = j if dy is None else TILE - 1 - j
            decay = exp2(a * of_channel(step_at.index(t).load(CHANNEL)))
            flow = of_channel(inflow_at.index(t).load(CHANNEL)) * of_state(BC_at.index(t).load(LANE_STATE))
            h = decay * h + flow if dy is None else decay * (h + flow)
    gl.store(ends + item * size + cells, h, mask=both)
    gl.store(totals + item * channels + column, gl.sum(total, axis=0), mask=inside)


@gluon.jit
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
    ends,
    totals,
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
    SOFTPLUS: gl.constexpr,
    PIECE: gl.constexpr,
    BLOCK: gl.constexpr,
    STATES: gl.constexpr,
    LANES: gl.constexpr,
    SEVERAL: gl.constexpr,
    TILE: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    GROUP: gl.constexpr = 4
    HELD: gl.constexpr = STATES // LANES
    HEADS: gl.constexpr = BLOCK // SEVERAL
    STATE: gl.constexpr = state_layout(STATES, LANES, SEVERAL, WARPS)
    CHANNEL_LANE: gl.constexpr = gl.SliceLayout(3, STATE)
    CHANNEL: gl.constexpr = gl.SliceLayout(2, CHANNEL_LANE)
    LANE_STATE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, STATE))
    IO: gl.constexpr = tile_layout(TILE, BLOCK, WARPS, 4)
    IO_LANES: gl.constexpr = partial_layout(TILE, BLOCK, LANES, WARPS, 4)
    BC: gl.constexpr = tile_layout(TILE, STATES, WARPS, 4)
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PARTIAL: gl.constexpr = partial_memory(BLOCK, LANES)

    blocks = (per_group + BLOCK - 1) // BLOCK
    block = gl.program_id(0) % (blocks * groups)
    item = (gl.program_id(0) // (blocks * groups)).to(gl.int64)
    group = block // blocks
    first = group * per_group + block % blocks * BLOCK
    last = group * per_group + per_group
    size = channels.to(gl.int64) * states
    row, chunk, batch, begin, steps, piece = locate_chunk(cu_seqlens, item, length, PIECE, CHUNKS)

    head = gl.expand_dims(gl.arange(0, HEADS, gl.SliceLayout(1, CHANNEL)), 1)
    channel = first + head * SEVERAL + gl.expand_dims(gl.arange(0, SEVERAL, gl.SliceLayout(0, CHANNEL)), 0)
    lane = gl.expand_dims(gl.arange(0, LANES, gl.SliceLayout(1, LANE_STATE)), 1)
    state = of_state(lane * HELD + gl.expand_dims(gl.arange(0, HELD, gl.SliceLayout(0, LANE_STATE)), 0))
    cells = of_channel(channel) * states + state
    both = of_channel(channel < last) & (state < states)
    a = gl.load(A + cells, mask=both, other=0.0).to(gl.float32) * LOG2E
    if initial is None:
        h = gl.zeros([HEADS, SEVERAL, LANES, HELD], gl.float32, STATE)
    else:
        h = gl.load(initial + row * size + cells, mask=both, other=0.0).to(gl.float32)
    if CHUNKS > 1:
        for i in range(chunk):
            earlier = item - chunk + i
            h = through_chunk(h, a, ends, totals, earlier, channels, channel, size, cells, channel < last, both)

    time = gl.arange(0, TILE, gl.SliceLayout(1, IO))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, IO))
    inside = gl.expand_dims(first + column < last, 0)
    offset = gl.expand_dims(channel_vector(bias, first + column, first + column < last), 0)
    skip = gl.expand_dims(channel_vector(D, first + column, first + column < last), 0)
    time = gl.expand_dims(time, 1)
    column = gl.expand_dims(column, 0)
    time_BC = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(1, BC)), 1)
    state_BC = gl.expand_dims(gl.arange(0, STATES, gl.SliceLayout(0, BC)), 0)
    known = state_BC < states
    u += batch * u_b + begin * u_l + first
    delta += batch * delta_b + begin * delta_l + first
    B += batch * B_b + begin * B_l + group * B_g
    C += batch * C_b + begin * C_l + group * C_g
    y += (batch * length + begin) * channels + first
    at_u = time * u_l + column
    at_delta = time * delta_l + column
    at_B = time_BC * B_l + state_BC
    at_C = time_BC * C_l + state_BC
    at_y = time * channels + column
    if z is not None:
        z += batch * z_b + begin * z_l + first
        at_z = time * z_l + column

    memory_step = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK], PLAIN2)
    memory_inflow = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK], PLAIN2)
    memory_B = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN2)
    memory_C = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN2)
    memory_out = gl.allocate_shared_memory(gl.float32, [TILE // GROUP, GROUP, LANES, BLOCK], PARTIAL)
    step_at = view(memory_step, [TILE, HEADS, SEVERAL], PLAIN2)
    inflow_at = view(memory_inflow, [TILE, HEADS, SEVERAL], PLAIN2)
    B_at = view(memory_B, [TILE, LANES, HELD], PLAIN2)
    C_at = view(memory_C, [TILE, LANES, HELD], PLAIN2)
    tile_out = view(memory_out, [TILE, LANES, BLOCK], PARTIAL)

    mask = (time < steps) & inside
    mask_BC = (time_BC < steps) & known
    next_u = gl.load(u + at_u, mask=mask, other=0.0)
    next_delta = gl.load(delta + at_delta, mask=mask, other=0.0)
    next_B = gl.load(B + at_B, mask=mask_BC, other=0.0)
    next_C = gl.load(C + at_C, mask=mask_BC, other=0.0)
    for start in range(0, steps, TILE):
        now = mask
        tile_u = apart(next_u)
        step = step_size(next_delta.to(gl.float32) + offset, now, SOFTPLUS)
        memory_step.store(step)
        memory_inflow.store(step * next_u.to(gl.float32))
        memory_B.store(next_B.to(gl.float32))
        memory_C.store(next_C.to(gl.float32))
        u += TILE * u_l
        delta += TILE * delta_l
        B += TILE * B_l
        C += TILE * C_l
        mask = (time < steps - start - TILE) & inside
        mask_BC = (time_BC < steps - start - TILE) & known
        next_u = gl.load(u + at_u, mask=mask, other=0.0)
        next_delta = gl.load(delta + at_delta, mask=mask, other=0.0)
        next_B = gl.load(B + at_B, mask=mask_BC, other=0.0)
        next_C = gl.load(C + at_C, mask=mask_BC, other=0.0)
        if z is not None:
            tile_z = gl.load(z + at_z, mask=now, other=0.0)
            z += TILE * z_l
        for i in range(TILE // GROUP):
            if checkpoints is not None:
                reached = start + i * GROUP
                if reached % PIECE == 0:
                    here = checkpoints + (piece + reached // PIECE) * size
                    gl.store(here + cells, h, mask=both & (reached < steps))
            sums = ()
            for j in gl.static_range(GROUP):
                t = i * GROUP + j
                decay = exp2(a * of_channel(step_at.index(t).load(CHANNEL)))
                h = decay * h + of_channel(inflow_at.index(t).load(CHANNEL)) * of_state(B_at.index(t).load(LANE_STATE))
                sums += (gl.sum(h * of_state(C_at.index(t).load(LANE_STATE)), axis=3),)
            memory_out.index(i).store(by_lane(stack4(sums[0], sums[1], sums[2], sums[3])))
        out = sum_of_lanes(tile_out, IO_LANES, IO) + skip * tile_u.to(gl.float32)
        if z is not None:
            gate = tile_z.to(gl.float32)
            out = out * gate * sigmoid(gate)
        gl.store(y + at_y, out.to(y.dtype.element_ty), mask=now)
        y += TILE * channels
    gl.store(final + row * size + cells, h, mask=both & (chunk == CHUNKS - 1))


@gluon.constexpr_function
def channel_sum_layout(states, warps):
    """(step of a group and dB or dC, channel, state) for sums over the channels: vectors of states, few lanes along
    the channels."""
    across = max(min(states // 4, 32), 1)
    sums = max(min(8 // warps, 32 // across), 1)
    return gl.BlockedLayout([1, 1, 4], [sums, 32 // across // sums, across], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def held_state_layout(states, lanes, several, warps):
    """``state_layout`` as (several, channel / several, lane, state)."""
    held = [several, 1, 1, states // lanes]
    return gl.BlockedLayout(held, [1, 32 // lanes, lanes, 1], [1, warps, 1, 1], [3, 2, 1, 0])


@gluon.jit
def before(first, values):
    found = (first,)
    return found + values


@gluon.jit
def store_sums(pointers, memory, mask, LAYOUT: gl.constexpr):
    """The sums over the second axis of what lies in ``memory``."""
    gl.store(pointers, gl.sum(memory.load(LAYOUT), axis=1), mask=mask)


@gluon.jit
def outputs(memory, i, STEPS: gl.constexpr, SEVERAL: gl.constexpr, MEMORY: gl.constexpr, OUT: gl.constexpr):
    """The i-th STEPS steps of (step, channel) in the layout of the outputs: (step, channel), or by step."""
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tiles: gl.constexpr = memory.shape[0] // STEPS
    width: gl.constexpr = memory.shape[1]
    if len(OUT.order) == 2:
        found = view(memory, [tiles, STEPS, width], PLAIN2).index(i).load(OUT)
    else:
        apart = view(memory, [tiles, STEPS, width // SEVERAL, SEVERAL], PLAIN3)
        found = by_step(apart.index(i), MEMORY, OUT)
    return found


@gluon.jit
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
    ends,
    totals,
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
    SOFTPLUS: gl.constexpr,
    PIECE: gl.constexpr,
    BLOCK: gl.constexpr,
    STATES: gl.constexpr,
    LANES: gl.constexpr,
    SEVERAL: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    GROUP: gl.constexpr = 4
    HELD: gl.constexpr = STATES // LANES
    HEADS: gl.constexpr = BLOCK // SEVERAL
    STATE: gl.constexpr = state_layout(STATES, LANES, SEVERAL, WARPS)
    CHANNEL_LANE: gl.constexpr = gl.SliceLayout(3, STATE)
    CHANNEL: gl.constexpr = gl.SliceLayout(2, CHANNEL_LANE)
    HELD_STATE: gl.constexpr = held_state_layout(STATES, LANES, SEVERAL, WARPS)
    LANE_STATE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, STATE))
    IO: gl.constexpr = tile_layout(PIECE, BLOCK, WARPS, 4)
    BC: gl.constexpr = tile_layout(PIECE, STATES, WARPS, 4)
    # Many lanes make the sums over their states by shuffles, for OUTS steps at once; few, in shared memory.
    SHUFFLED: gl.constexpr = LANES >= 8
    OUTS: gl.constexpr = 8 if SHUFFLED else GROUP
    OUT: gl.constexpr = step_layout(SEVERAL, LANES, WARPS) if SHUFFLED else tile_layout(GROUP, BLOCK, WARPS, 4)
    OUT_MEMORY: gl.constexpr = step_layout_in_memory(SEVERAL, LANES, WARPS)
    OUT_LANES: gl.constexpr = partial_layout(GROUP, BLOCK, LANES, WARPS, 4)
    SUM: gl.constexpr = channel_sum_layout(STATES, WARPS)
    SUM_STATE: gl.constexpr = gl.SliceLayout(1, SUM)
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    PLAIN4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    PARTIAL: gl.constexpr = partial_memory(BLOCK, LANES)

    blocks = (per_group + BLOCK - 1) // BLOCK
    block = gl.program_id(0) % (blocks * groups)
    share = (gl.program_id(0) // (blocks * groups)).to(gl.int64)
    group = block // blocks
    first = group * per_group + block % blocks * BLOCK
    last = group * per_group + per_group
    size = channels.to(gl.int64) * states
    pair_block = (block % blocks).to(gl.int64) * tokens

    head = gl.expand_dims(gl.arange(0, HEADS, gl.SliceLayout(1, CHANNEL)), 1)
    channel = first + head * SEVERAL + gl.expand_dims(gl.arange(0, SEVERAL, gl.SliceLayout(0, CHANNEL)), 0)
    lane = gl.expand_dims(gl.arange(0, LANES, gl.SliceLayout(1, LANE_STATE)), 1)
    state = of_state(lane * HELD + gl.expand_dims(gl.arange(0, HELD, gl.SliceLayout(0, LANE_STATE)), 0))
    cells = of_channel(channel) * states + state
    both = of_channel(channel < last) & (state < states)
    a = gl.load(A + cells, mask=both, other=0.0).to(gl.float32) * LOG2E

    time = gl.expand_dims(gl.arange(0, PIECE, gl.SliceLayout(1, IO)), 1)
    column = first + gl.arange(0, BLOCK, gl.SliceLayout(0, IO))
    inside = gl.expand_dims(column < last, 0)
    offset = gl.expand_dims(channel_vector(bias, column, column < last), 0)
    column = gl.expand_dims(column, 0)
    time_BC = gl.expand_dims(gl.arange(0, PIECE, gl.SliceLayout(1, BC)), 1)
    state_BC = gl.expand_dims(gl.arange(0, STATES, gl.SliceLayout(0, BC)), 0)
    if SHUFFLED:
        LANE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, CHANNEL_LANE))
        lane_number = gl.expand_dims(gl.expand_dims(gl.arange(0, LANES, LANE), 0), 1)
        OUT_CHANNEL: gl.constexpr = gl.SliceLayout(2, OUT)
        out_time = gl.arange(0, OUTS, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))
        out_time = gl.expand_dims(gl.expand_dims(out_time, 0), 1)
        out_head = gl.expand_dims(gl.arange(0, HEADS, gl.SliceLayout(1, OUT_CHANNEL)), 1)
        out_several = gl.expand_dims(gl.arange(0, SEVERAL, gl.SliceLayout(0, OUT_CHANNEL)), 0)
        out_channel = first + out_head * SEVERAL + out_several
        out_inside = out_channel < last
        skip = gl.expand_dims(channel_vector(D, out_channel, out_inside), 2)
        out_column = gl.expand_dims(out_channel, 2)
        out_mask = gl.expand_dims(out_inside, 2)
    else:
        out_time = gl.expand_dims(gl.arange(0, GROUP, gl.SliceLayout(1, OUT)), 1)
        out_channel = first + gl.arange(0, BLOCK, gl.SliceLayout(0, OUT))
        out_inside = out_channel < last
        skip = gl.expand_dims(channel_vector(D, out_channel, out_inside), 0)
        out_column = gl.expand_dims(out_channel, 0)
        out_mask = gl.expand_dims(out_inside, 0)
    sum_index = gl.expand_dims(gl.arange(0, 2 * GROUP, gl.SliceLayout(1, SUM_STATE)), 1)
    sum_time = sum_index // 2
    sum_state = gl.expand_dims(gl.arange(0, STATES, gl.SliceLayout(0, SUM_STATE)), 0)
    of_C = (sum_index % 2).to(gl.int64) * (blocks * (share * 0 + tokens) * groups * states)
    at_sum = dBC + (of_C + (sum_time * (groups * states) + sum_state))

    # A line of every step of a tile, and those of the checkpoints, for the prefetches.
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    line_time = gl.arange(0, PIECE, LINE)
    line = line_time < PIECE
    at_line_u = line_time * u_l + first
    at_line_delta = line_time * delta_l + first
    at_line_dy = line_time * dy_l + first
    if z is not None:
        at_line_z = line_time * z_l + first
    line_cell = gl.arange(0, BLOCK * STATES // 32, LINE) * 32
    at_line_cell = first * states + line_cell
    line_cell = at_line_cell < last * states

    memory_step = gl.allocate_shared_memory(gl.float32, [PIECE, BLOCK], PLAIN2)
    memory_inflow = gl.allocate_shared_memory(gl.float32, [PIECE, BLOCK], PLAIN2)
    memory_dy = gl.allocate_shared_memory(gl.float32, [PIECE, BLOCK], PLAIN2)
    memory_B = gl.allocate_shared_memory(gl.float32, [PIECE, STATES], PLAIN2)
    memory_C = gl.allocate_shared_memory(gl.float32, [PIECE, STATES], PLAIN2)
    step_at = view(memory_step, [PIECE, HEADS, SEVERAL], PLAIN2)
    memory_slope = gl.allocate_shared_memory(gl.float32, [PIECE, BLOCK], PLAIN2)
    if z is not None:
        memory_dz = gl.allocate_shared_memory(gl.float32, [PIECE, BLOCK], PLAIN2)
    inflow_at = view(memory_inflow, [PIECE, HEADS, SEVERAL], PLAIN2)
    dy_at = view(memory_dy, [PIECE, HEADS, SEVERAL], PLAIN2)
    B_at = view(memory_B, [PIECE, LANES, HELD], PLAIN2)
    C_at = view(memory_C, [PIECE, LANES, HELD], PLAIN2)
    # The state at the start of each group: private to a thread, but for the barriers.
    start_at = gl.allocate_shared_memory(gl.float32, [PIECE // GROUP, SEVERAL, HEADS, LANES, HELD], PLAIN4)
    if SHUFFLED:
        memory_x = gl.allocate_shared_memory(gl.float32, [PIECE, BLOCK], PLAIN2)
    else:
        # A group's sums over the states, by lane: of y and of the gradients of Δ u and of Δ A.
        memory_y = gl.allocate_shared_memory(gl.float32, [GROUP, LANES, BLOCK], PARTIAL)
        memory_p = gl.allocate_shared_memory(gl.float32, [GROUP, LANES, BLOCK], PARTIAL)
        memory_q = gl.allocate_shared_memory(gl.float32, [GROUP, LANES, BLOCK], PARTIAL)
    # A group's gradients of B and C, summed over a thread's channels.
    memory_dBC = gl.allocate_shared_memory(gl.float32, [2 * GROUP, HEADS, STATES], PLAIN3)

    sum_A = gl.zeros([HEADS, SEVERAL, LANES, HELD], gl.float32, STATE)
    sum_D = gl.zeros([HEADS, SEVERAL, OUTS] if SHUFFLED else [GROUP, BLOCK], gl.float32, OUT)
    sum_bias = gl.zeros([HEADS, SEVERAL, OUTS] if SHUFFLED else [GROUP, BLOCK], gl.float32, OUT)
    for item in range(share, rows * CHUNKS, shares):
        row, chunk, batch, begin, steps, piece = locate_chunk(cu_seqlens, item, length, PIECE, CHUNKS)
        u_row = u + batch * u_b + begin * u_l
        delta_row = delta + batch * delta_b + begin * delta_l
        dy_row = dy + batch * dy_b + begin * dy_l
        B_row = B + batch * B_b + begin * B_l + group * B_g
        C_row = C + batch * C_b + begin * C_l + group * C_g
        if z is not None:
            z_row = z + batch * z_b + begin * z_l
        token = batch * length + begin
        if dfinal is None:
            dh = gl.zeros([HEADS, SEVERAL, LANES, HELD], gl.float32, STATE)
        else:
            dh = gl.load(dfinal + row * size + cells, mask=both, other=0.0).to(gl.float32)
        if CHUNKS > 1:
            for i in range(CHUNKS - 1 - chunk):
                later = item - chunk + CHUNKS - 1 - i
                dh = through_chunk(dh, a, ends, totals, later, channels, channel, size, cells, channel < last, both)
        pieces = (steps + PIECE - 1) // PIECE
        for back in range(pieces):
            start = (pieces - 1 - back) * PIECE
            far = start.to(gl.int64)
            now = (time < steps - start) & inside
            now_BC = (time_BC < steps - start) & (state_BC < states)
            saved = gl.load(checkpoints + (piece + start // PIECE) * size + cells, mask=both, other=0.0)
            x = gl.load(u_row + far * u_l + (time * u_l + column), mask=now, other=0.0).to(gl.float32)
            raw = gl.load(delta_row + far * delta_l + (time * delta_l + column), mask=now, other=0.0)
            gated = gl.load(dy_row + far * dy_l + (time * dy_l + column), mask=now, other=0.0).to(gl.float32)
            if z is not None:
                gate = gl.load(z_row + far * z_l + (time * z_l + column), mask=now, other=0.0).to(gl.float32)
                open = sigmoid(gate)
                memory_dz.store(gated * open * (1.0 + gate * (1.0 - open)))
                gated = gated * gate * open
            b = gl.load(B_row + far * B_l + (time_BC * B_l + state_BC), mask=now_BC, other=0.0)
            c = gl.load(C_row + far * C_l + (time_BC * C_l + state_BC), mask=now_BC, other=0.0)
            argument = raw.to(gl.float32) + offset
            step = step_size(argument, now, SOFTPLUS)
            memory_slope.store(step_slope(argument, now, SOFTPLUS))
            if start > 0:
                early = far - PIECE
                prefetch(u_row + early * u_l + at_line_u, line)
                prefetch(delta_row + early * delta_l + at_line_delta, line)
                prefetch(dy_row + early * dy_l + at_line_dy, line)
                if z is not None:
                    prefetch(z_row + early * z_l + at_line_z, line)
                prefetch(checkpoints + (piece + start // PIECE - 1) * size + at_line_cell, line_cell)
            if SHUFFLED:
                memory_x.store(x)
            memory_step.store(step)
            memory_inflow.store(step * x)
            memory_dy.store(gated)
            memory_B.store(b.to(gl.float32))
            memory_C.store(c.to(gl.float32))
            h = saved
            for i in range(PIECE // GROUP - 1):
                start_at.index(i).store(gl.permute(h, [1, 0, 2, 3]))
                for j in gl.static_range(GROUP):
                    t = i * GROUP + j
                    flow = of_channel(inflow_at.index(t).load(CHANNEL)) * of_state(B_at.index(t).load(LANE_STATE))
                    h = exp2(a * of_channel(step_at.index(t).load(CHANNEL))) * h + flow
            start_at.index(PIECE // GROUP - 1).store(gl.permute(h, [1, 0, 2, 3]))
            if SHUFFLED:
                barrier()  # else Triton puts one inside of the loop
            for k in range(PIECE // OUTS):
                i = PIECE // OUTS - 1 - k
                near = far + i * OUTS
                valid = (out_time < steps - start - i * OUTS) & out_mask
                if not SHUFFLED:
                    u_t = gl.load(u_row + near * u_l + (out_time * u_l + out_column), mask=valid, other=0.0)
                ys = ()
                ps = ()
                qs = ()
                for part in gl.static_range(OUTS // GROUP):
                    t0 = i * OUTS + (OUTS - GROUP - part * GROUP)
                    h = gl.permute(start_at.index(t0 // GROUP).load(HELD_STATE), [1, 0, 2, 3])
                    h = gl.convert_layout(h, STATE, assert_trivial=True)
                    hs = (h,)
                    decays = ()
                    for j in gl.static_range(GROUP):
                        t = t0 + j
                        flow = of_channel(inflow_at.index(t).load(CHANNEL)) * of_state(B_at.index(t).load(LANE_STATE))
                        decay = exp2(a * of_channel(step_at.index(t).load(CHANNEL)))
                        h = decay * h + flow
                        hs += (h,)
                        decays += (decay,)
                    dBs = ()
                    dCs = ()
                    for j in gl.static_range(GROUP):
                        t = t0 + GROUP - 1 - j
                        step_t = of_channel(step_at.index(t).load(CHANNEL))
                        flow_t = of_channel(inflow_at.index(t).load(CHANNEL))
                        dy_t = of_channel(dy_at.index(t).load(CHANNEL))
                        B_t = of_state(B_at.index(t).load(LANE_STATE))
                        C_t = of_state(C_at.index(t).load(LANE_STATE))
                        h = hs[GROUP - j]
                        if z is not None:
                            ys = before(gl.sum(h * C_t, axis=3), ys)
                        dCs += (gl.sum(h * dy_t, axis=1),)
                        dh = dh + dy_t * C_t
                        ps = before(gl.sum(dh * B_t, axis=3), ps)
                        dBs += (gl.sum(dh * flow_t, axis=1),)
                        dh = dh * decays[GROUP - 1 - j]
                        exponent = dh * hs[GROUP - 1 - j]
                        sum_A += exponent * step_t
                        qs = before(gl.sum(exponent * a, axis=3), qs)
                    if not SHUFFLED:
                        memory_p.store(by_lane(stack4(ps[0], ps[1], ps[2], ps[3])))
                        memory_q.store(by_lane(stack4(qs[0], qs[1], qs[2], qs[3])))
                    dB = stack4(dBs[3], dBs[2], dBs[1], dBs[0])
                    memory_dBC.store(by_state(dB, stack4(dCs[3], dCs[2], dCs[1], dCs[0])))
                    if part + 1 < OUTS // GROUP:
                        pairs = at_sum + ((pair_block + token + far + t0) * groups + group) * states
                        store_sums(pairs, memory_dBC, (sum_time < steps - start - t0) & (sum_state < states), SUM)
                if z is not None and not SHUFFLED:
                    memory_y.store(by_lane(stack4(ys[0], ys[1], ys[2], ys[3])))
                if SHUFFLED:
                    inflow = gl.convert_layout(sum_of_steps(ps, lane_number, LANES), OUT, assert_trivial=True)
                    change = gl.convert_layout(sum_of_steps(qs, lane_number, LANES), OUT, assert_trivial=True)
                here = (token + near) * channels + (out_time * channels + out_column)
                x_t = outputs(memory_x, i, OUTS, SEVERAL, OUT_MEMORY, OUT) if SHUFFLED else u_t.to(gl.float32)
                dgated = outputs(memory_dy, i, OUTS, SEVERAL, OUT_MEMORY, OUT)
                if z is not None:
                    if SHUFFLED:
                        out = gl.convert_layout(sum_of_steps(ys, lane_number, LANES), OUT, assert_trivial=True)
                    else:
                        out = sum_of_lanes(memory_y, OUT_LANES, OUT)
                    dgate = (out + skip * x_t) * outputs(memory_dz, i, OUTS, SEVERAL, OUT_MEMORY, OUT)
                    gl.store(dz + here, dgate.to(dz.dtype.element_ty), mask=valid)
                if not SHUFFLED:
                    inflow = sum_of_lanes(memory_p, OUT_LANES, OUT)
                    change = sum_of_lanes(memory_q, OUT_LANES, OUT)
                change = change * LN2 + inflow * x_t
                change *= outputs(memory_slope, i, OUTS, SEVERAL, OUT_MEMORY, OUT)
                sum_bias += change
                sum_D += dgated * x_t
                into_u = inflow * outputs(memory_step, i, OUTS, SEVERAL, OUT_MEMORY, OUT) + skip * dgated
                gl.store(du + here, into_u.to(du.dtype.element_ty), mask=valid)
                gl.store(ddelta + here, change.to(ddelta.dtype.element_ty), mask=valid)
                # Last, so that the other warps have come this far meanwhile.
                pairs = at_sum + ((pair_block + token + near) * groups + group) * states
                summed = (sum_time < steps - start - i * OUTS) & (sum_state < states)
                store_sums(pairs, memory_dBC, summed, SUM)
        if dinitial is not None:
            gl.store(dinitial + row * size + cells, dh, mask=both & (chunk == 0))
    gl.store(dA + share * size + cells, sum_A, mask=both)
    if dD is not None:
        gl.store(dD + share * channels + out_channel, gl.sum(sum_D, axis=2 if SHUFFLED else 0), mask=out_inside)
    if dbias is not None:
        gl.store(dbias + share * channels + out_channel, gl.sum(sum_bias, axis=2 if SHUFFLED else 0), mask=out_inside)
