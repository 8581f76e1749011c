"""ssd's kernels for Hopper GPUs in Gluon, Triton's lower level: warps with one task each, tiles by the copy engine.

For heads of P = 64 channels, N = 128 states and bfloat16. `scan` is plain Triton's for y, in one launch and transposed
throughout: the state (p, n) stays in a warpgroup's accumulator, and rounded it is the register operand of the outputs'
product, so that the recurrence from chunk to chunk never goes through memory.

A program has two warpgroups that compute, one head each, and share the tiles of keys and queries; a warp that copies
tiles in, STAGES chunks ahead; and two warps that make the decays of a chunk from their running sums, one per head.

Units (a pair of heads, a row, one of SEGMENTS pieces of it) times chunks are cut into equal ranges, one per program. A
range ends in the middle of a unit: the program takes that part first and hands the state to the next program through
memory, so that none waits while ranges are longer than units. Ranges are given out in the order in which programs
start: one that waits, waits for one that runs.

A backward begins with `states`: those that enter the chunks, forwards, and backwards in time the gradients of those
that leave them, all kept as float16 with a power of two for each. A program follows two heads of a row, as above.

Then `chunks` makes, from these, the gradients of one chunk and some heads of a group: dx, the sums over these heads for
dB and dC, and token by token what `finish` needs. A program has three warpgroups that compute, each for all of its
heads one after the other: one sums dC and what the outputs read from the state that enters and from their own inputs,
one sums dB and what passes through the chunk, one makes dx and all else that stays within the chunk. A warp copies
tiles in, STAGES heads ahead, another makes their decays. All its tiles are 64 x 64.
"""

from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mambalm.ops.gluon_support import barrier, copy_in, copy_out, gl, gluon, view

# Rows of a chunk's decays in shared memory: factors of the attention by output and by input token, as logarithms, then
# the weights of the inputs in the state and of the state in the outputs.
FACTORS = gl.constexpr(4)


@gluon.jit
def ranges(ticket, total, per_unit):
    """The program's range of (unit, chunk): the tail of a unit begun before it, whole units, the head of its last one;
    the head comes first. Returns the borders, and how many heads, whole units and parts there are."""
    # Less than a unit each would only make programs wait for each other.
    each = gl.maximum((total + gl.num_programs(0) - 1) // gl.num_programs(0), per_unit)
    start = gl.minimum(ticket * each, total)
    end = gl.minimum(start + each, total)
    whole = (start + per_unit - 1) // per_unit * per_unit
    last = gl.minimum(gl.maximum(end // per_unit * per_unit, whole), end)
    whole = gl.minimum(whole, end)
    heads = (last < end).to(gl.int32)
    units = (last - whole) // per_unit
    return start, whole, last, end, heads, units, heads + units + (start < whole).to(gl.int32)


@gluon.jit
def part(j, start, whole, last, end, heads, units, per_unit):
    """Of the j-th part: the unit, and its chunks from and to."""
    k = j - heads
    begin = gl.where(k < 0, last, gl.where(k < units, whole + k * per_unit, start))
    stop = gl.where(k < 0, end, gl.where(k < units, begin + per_unit, whole))
    unit = begin // per_unit
    return unit, begin - unit * per_unit, stop - unit * per_unit


@gluon.jit
def place(unit, length, heads, SEGMENTS: gl.constexpr, Q: gl.constexpr):
    """Of a unit: the pair of heads, row, segment, its first chunk, and how many it has."""
    pair = unit % (heads // 2)
    row = unit // (heads // 2) // SEGMENTS
    segment = unit // (heads // 2) % SEGMENTS
    chunks = (length + Q - 1) // Q
    per_unit = (chunks + SEGMENTS - 1) // SEGMENTS
    first = gl.minimum(segment * per_unit, chunks)
    count = gl.minimum(first + per_unit, chunks) - first
    return pair, row, segment, first, count


@gluon.jit
def copy(
    u_desc, key_desc, query_desc, us, keys, queries, full, empty, ticket, length, heads, per_group, total, per_unit,
    SEGMENTS: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    start, whole, last, end, n_heads, units, parts = ranges(ticket, total, per_unit)
    i = 0
    for j in range(parts):
        unit, c0, c1 = part(j, start, whole, last, end, n_heads, units, per_unit)
        pair, row, _segment, first, count = place(unit, length, heads, SEGMENTS, Q)
        group = pair * 2 // per_group
        for c in range(c0, gl.minimum(c1, count)):
            stage = i % STAGES
            token = row * length + (first + c) * Q
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, 4 * Q * (N + P))
            copy_in(query_desc, [token, group * N], ready, queries.index(stage))
            copy_in(key_desc, [token, group * N], ready, keys.index(stage))
            copy_in(u_desc, [token, pair * 2 * P], ready, us.index(stage * 2))
            copy_in(u_desc, [token, pair * 2 * P + P], ready, us.index(stage * 2 + 1))
            i += 1


@gluon.jit
def weigh(
    step, decay, factors, full, empty, ticket, length, heads, slots, total, per_unit,
    SEGMENTS: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    start, whole, last, end, n_heads, units, parts = ranges(ticket, total, per_unit)
    per_row = (length + Q - 1) // Q
    t = gl.arange(0, Q, layout)
    i = 0
    for j in range(parts):
        unit, c0, c1 = part(j, start, whole, last, end, n_heads, units, per_unit)
        pair, row, _segment, first, count = place(unit, length, heads, SEGMENTS, Q)
        line = ((pair * 2 + HEAD).to(gl.int64) * slots + row * per_row + first) * Q
        for c in range(c0, gl.minimum(c1, count)):
            stage = i % STAGES
            at = line + c * Q
            sums = gl.load(decay + at + t)
            size = gl.load(step + at + t)
            through = gl.load(decay + at + Q - 1)
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            k = (stage * 2 + HEAD) * FACTORS
            factors.index(k).store(sums)
            factors.index(k + 1).store(sums - gl.log2(size))
            factors.index(k + 2).store(gl.exp2(through - sums) * size)
            factors.index(k + 3).store(gl.exp2(sums))
            mbarrier.arrive(full.index(stage), count=1)
            i += 1


@gluon.jit
def barriers(writers: gl.constexpr, readers: gl.constexpr, STAGES: gl.constexpr):
    """Of each stage a barrier that completes when all writers have filled it, and one when all readers have done."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(full.index(k), count=writers)
        mbarrier.init(empty.index(k), count=readers)
    return full, empty


@gluon.jit
def clear_rest(tile, left, WIDTH: gl.constexpr, Q: gl.constexpr):
    """Zero the rows of a tile from ``left`` on: they are another row's tokens. Two warpgroups may do it at once."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    i = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(1, layout)), 1)
    values = tile.load(layout)
    tile.store(gl.where(i < left, values, gl.zeros_like(values)))


@gluon.jit
def clear_both(first, second, left, WIDTH: gl.constexpr, SECOND: gl.constexpr, Q: gl.constexpr):
    """Zero what two tiles of inputs have beyond a row's end, if it ends in this chunk, before products read them."""
    if left < Q:
        clear_rest(first, left, WIDTH, Q)
        clear_rest(second, left, SECOND, Q)
        fence_async_shared()
        barrier()


@gluon.jit
def store_rows(corner, tile, heads, left, Q: gl.constexpr, P: gl.constexpr):
    """The first ``left`` rows of a tile into (tokens, heads, P); the copy engine would write all of them."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(1, layout)), 1)
    p = gl.expand_dims(gl.arange(0, P, gl.SliceLayout(0, layout)), 0)
    values = tile.load(layout)
    gl.store(corner + row * heads * P + p, values, mask=row + p * 0 < left)


@gluon.jit
def compute(
    out_desc, out, D, initial, ends, totals, final, handed, flags,
    us, keys, queries, by_row, by_value, weights, results, full, empty,
    ticket, D_h, length, heads, total, per_unit,
    SEGMENTS: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
    Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    narrow_operand: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    wide_operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    start, whole, last, end, n_heads, units, parts = ranges(ticket, total, per_unit)
    to = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(1, narrow)), 1)
    of = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(0, narrow)), 0)
    i = 0
    for j in range(parts):
        unit, c0, c1 = part(j, start, whole, last, end, n_heads, units, per_unit)
        pair, row, segment, first, count = place(unit, length, heads, SEGMENTS, Q)
        head = pair * 2 + HEAD
        cells = gl.expand_dims(gl.arange(0, P, gl.SliceLayout(1, wide)), 1) * N
        cells += gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, wide)), 0)
        skip = 0.0
        if D is not None:
            skip = gl.load(D + head * D_h).to(gl.float32)
        if c0 > 0:
            mailbox = (ticket - 1) * 2 + HEAD
            while gl.atomic_add(flags + mailbox, 0, sem="acquire") == 0:
                pass
            barrier()
            state = gl.load(handed + mailbox * (P * N) + cells, cache_modifier=".cg")
        else:
            state = gl.zeros([P, N], gl.float32, wide)
            if initial is not None:
                state = gl.load(initial + (row * heads + head).to(gl.int64) * (P * N) + cells).to(gl.float32)
            if SEGMENTS > 1:
                for k in range(segment):
                    other = (row * SEGMENTS + k) * heads + head
                    state = state * gl.load(totals + other) + gl.load(ends + other.to(gl.int64) * (P * N) + cells)
        for c in range(c0, gl.minimum(c1, count)):
            stage = i % STAGES
            chunk = first + c
            left = length - chunk * Q
            u, key, query = us.index(stage * 2 + HEAD), keys.index(stage), queries.index(stage)
            k = (stage * 2 + HEAD) * FACTORS
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            clear_both(u, key, left, P, N, Q)
            zero = gl.zeros([Q, Q], gl.float32, narrow)
            scores = warpgroup_mma(query, key.permute((1, 0)), zero, use_acc=False, is_async=True)
            carried = gl.convert_layout(state.to(gl.bfloat16), narrow_operand)
            zero = gl.zeros([P, Q], gl.float32, narrow)
            result = warpgroup_mma(carried, query.permute((1, 0)), zero, use_acc=False, is_async=True)
            to_factor = gl.expand_dims(by_row.index(k).load(gl.SliceLayout(1, narrow)), 1)
            of_factor = gl.expand_dims(by_row.index(k + 1).load(gl.SliceLayout(0, narrow)), 0)
            scores = warpgroup_mma_wait(1, deps=[scores])
            scores = gl.where(to >= of, scores * gl.exp2(to_factor - of_factor), 0.0)
            scores += gl.where(to == of, skip, 0.0)
            weights.store(scores.to(gl.bfloat16))
            tma.store_wait(0)
            fence_async_shared()
            inputs = u.permute((1, 0)).load(narrow_operand)
            weight = gl.expand_dims(by_row.index(k + 2).load(gl.SliceLayout(0, narrow_operand)), 0)
            inflow = gl.convert_layout((inputs.to(gl.float32) * weight).to(gl.bfloat16), wide_operand)
            at_end = (k + 4) * Q - 1
            state = state * gl.expand_dims(by_value.index(at_end).load(gl.SliceLayout(1, wide)), 1)
            state = warpgroup_mma(inflow, key, state, is_async=True)
            kept = gl.expand_dims(by_row.index(k + 3).load(gl.SliceLayout(0, narrow)), 0)
            result = warpgroup_mma_wait(1, deps=[result])
            result = result * kept
            result = warpgroup_mma(inputs, weights.permute((1, 0)), result, is_async=True)
            result, state = warpgroup_mma_wait(0, deps=[result, state])
            results.permute((1, 0)).store(result.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            if left < Q:
                at = out + (row * length + chunk * Q).to(gl.int64) * heads * P + head * P
                store_rows(at, results, heads, left, Q, P)
                barrier()
            else:
                copy_out(out_desc, [row * length + chunk * Q, head * P], results)
            i += 1
        if c1 < per_unit:
            mailbox = ticket * 2 + HEAD
            gl.store(handed + mailbox * (P * N) + cells, state)
            barrier()
            gl.atomic_xchg(flags + mailbox, 1, sem="release")
        elif final is not None:  # noqa: SIM102 (known at compile time, the other not)
            if segment == SEGMENTS - 1:
                gl.store(final + (row * heads + head).to(gl.int64) * (P * N) + cells, state)
    tma.store_wait(0)


# Sizes that happen to be 1 must not become constants: Triton 3.6 then fails to split the warps' tasks.
_SIZES = ("D_h", "length", "heads", "per_group", "slots", "total", "per_unit")


@gluon.jit(do_not_specialize=_SIZES)
def scan(
    u_desc, key_desc, query_desc, out_desc, out, D, initial, step, decay, ends, totals, final, handed,
    flags, D_h, length, heads, per_group, slots, total, per_unit,
    SEGMENTS: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """See plain Triton's `scan`. ``flags`` are zero: one per mailbox of ``handed``, then the count of tickets."""
    values: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    lines: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    us = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, Q, P], u_desc.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, Q, N], key_desc.layout)
    queries = gl.allocate_shared_memory(gl.bfloat16, [STAGES, Q, N], query_desc.layout)
    factors = gl.allocate_shared_memory(gl.float32, [4 * 2 * FACTORS, Q], values)  # for 4 stages: a power of two
    by_row = view(factors, [4 * 2 * FACTORS, Q], lines)
    by_value = view(factors, [4 * 2 * FACTORS * Q, 1], lines)
    weights = gl.allocate_shared_memory(gl.bfloat16, [2, Q, Q], u_desc.layout)
    results = gl.allocate_shared_memory(gl.bfloat16, [2, Q, P], out_desc.layout)
    full, empty = barriers(3, 2, STAGES)
    fence_async_shared()
    ticket = gl.atomic_add(flags + 2 * gl.num_programs(0), 1)
    gl.warp_specialize(
        [
            (
                compute,
                (
                    out_desc, out, D, initial, ends, totals, final, handed, flags,
                    us, keys, queries, by_row, by_value, weights.index(0), results.index(0), full, empty,
                    ticket, D_h, length, heads, total, per_unit, SEGMENTS, 0, STAGES, Q, P, N,
                ),
            ),
            (
                compute,
                (
                    out_desc, out, D, initial, ends, totals, final, handed, flags,
                    us, keys, queries, by_row, by_value, weights.index(1), results.index(1), full, empty,
                    ticket, D_h, length, heads, total, per_unit, SEGMENTS, 1, STAGES, Q, P, N,
                ),
            ),
            (
                copy,
                (
                    u_desc, key_desc, query_desc, us, keys, queries, full, empty, ticket, length, heads, per_group,
                    total, per_unit, SEGMENTS, STAGES, Q, P, N,
                ),
            ),
            (
                weigh,
                (
                    step, decay, by_row, full, empty, ticket, length, heads, slots, total, per_unit, SEGMENTS,
                    0, STAGES, Q,
                ),
            ),
            (
                weigh,
                (
                    step, decay, by_row, full, empty, ticket, length, heads, slots, total, per_unit, SEGMENTS,
                    1, STAGES, Q,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip


@gluon.jit
def fitting(most):
    """The power of two by which float16 holds values of up to ``most``, and its inverse; see plain Triton's."""
    bits = gl.maximum(most.to(gl.int32, bitcast=True) & 0x7F800000, 15 << 23)
    inverse = (254 << 23) - bits + (14 << 23)
    return (bits - (14 << 23)).to(gl.float32, bitcast=True), inverse.to(gl.float32, bitcast=True)


@gluon.jit
def first_head(pair, heads, per_group):
    """Of a pair of heads of one group: the group and the first head. Where their number is odd, some are in two pairs,
    which write the same."""
    pairs = (per_group + 1) // 2
    group = pair // pairs
    return group, group * per_group + gl.minimum(pair % pairs * 2, gl.maximum(per_group - 2, 0))


@gluon.jit
def copy_inflow(
    x_desc, dy_desc, keys_desc, queries_desc, us, keys, full, empty, reverse, token, count, group, head, second,
    STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    for i in range(count):
        stage = i % STAGES
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready, 2 * Q * (2 * P + N))
        if reverse:
            at = token + (count - 1 - i) * Q
            copy_in(queries_desc, [at, group * N], ready, keys.index(stage))
            copy_in(dy_desc, [at, head * P], ready, us.index(stage * 2))
            copy_in(dy_desc, [at, second * P], ready, us.index(stage * 2 + 1))
        else:
            at = token + i * Q
            copy_in(keys_desc, [at, group * N], ready, keys.index(stage))
            copy_in(x_desc, [at, head * P], ready, us.index(stage * 2))
            copy_in(x_desc, [at, second * P], ready, us.index(stage * 2 + 1))


@gluon.jit
def weigh_inflow(
    step, decay, lines, full, empty, reverse, slot, count, head, slots,
    HEAD: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr,
):  # fmt: skip
    """Of each chunk, by what its inputs are multiplied and by what the state."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    t = gl.arange(0, Q, layout)
    for i in range(count):
        stage = i % STAGES
        at = (head.to(gl.int64) * slots + slot + gl.where(reverse, count - 1 - i, i)) * Q
        sums = gl.load(decay + at + t)
        size = gl.load(step + at + t)
        total = gl.load(decay + at + Q - 1)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        k = (stage * 2 + HEAD) * 2
        lines.index(k).store(gl.where(reverse, gl.exp2(sums), gl.exp2(total - sums) * size))
        lines.index(k + 1).store(gl.full([Q], 1.0, gl.float32, layout) * gl.exp2(total))
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def follow_state(
    states_desc, scales, initial, dfinal, dinitial, us, keys, lines, kept, full, empty,
    reverse, row, tokens, slot, count, head, heads, slots,
    HEAD: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Store the states of one head of a row that enter its chunks, or the gradients of those that leave them."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    cells = gl.expand_dims(gl.arange(0, P, gl.SliceLayout(1, wide)), 1) * N
    cells += gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, wide)), 0)
    corner = (row * heads + head).to(gl.int64) * (P * N)
    state = gl.zeros([P, N], gl.float32, wide)
    if reverse:
        if dfinal is not None:
            state = gl.load(dfinal + corner + cells).to(gl.float32)
    else:
        if initial is not None:
            state = gl.load(initial + corner + cells).to(gl.float32)
    for i in range(count):
        stage = i % STAGES
        chunk = gl.where(reverse, count - 1 - i, i)
        left = tokens - chunk * Q
        u, key = us.index(stage * 2 + HEAD), keys.index(stage)
        k = (stage * 2 + HEAD) * 2
        scale, inverse = fitting(gl.max(gl.max(gl.abs(state), axis=1), axis=0))
        half = (state * inverse).to(gl.float16)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        clear_both(u, key, left, P, N, Q)
        weight = gl.expand_dims(lines.index(k).load(gl.SliceLayout(0, operand)), 0)
        inflow = u.permute((1, 0)).load(operand).to(gl.float32) * weight
        rounded = inflow.to(gl.bfloat16)
        rest = (inflow - rounded.to(gl.float32)).to(gl.bfloat16)
        state *= gl.expand_dims(lines.index(k + 1).load(gl.SliceLayout(1, wide)), 1)
        state = warpgroup_mma(rounded, key, state, is_async=True)
        state = warpgroup_mma(rest, key, state, is_async=True)
        tma.store_wait(0)
        barrier()
        kept.store(half)
        fence_async_shared()
        barrier()
        at = (gl.where(reverse, slots, 0) + slot + chunk) * heads + head
        copy_out(states_desc, [at * P, 0], kept)
        gl.store(scales + at, scale)
        state = warpgroup_mma_wait(0, deps=[state])
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    if dinitial is not None:  # noqa: SIM102 (known at compile time, the other not)
        if reverse:
            gl.store(dinitial + corner + cells, state)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("length", "heads", "per_group", "slots", "half"))
def states(
    x_desc, dy_desc, keys_desc, queries_desc, states_desc, scales, initial, dfinal, dinitial, cu_seqlens, step, decay,
    length, heads, per_group, slots, half,
    STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """States (2, slots, heads, p, n) and what they are divided by (2, slots, heads): the first ``half`` of the programs
    makes those that enter the chunks, the others the gradients of those that leave them."""
    program = gl.program_id(0)
    reverse = program >= half
    program -= gl.where(reverse, half, 0)
    pairs = heads // per_group * ((per_group + 1) // 2)
    row = program // pairs
    group, head = first_head(program % pairs, heads, per_group)
    second = gl.minimum(head + 1, group * per_group + per_group - 1)
    if cu_seqlens is None:
        token, tokens = row * length, length
        slot = row * ((length + Q - 1) // Q)
    else:
        token = gl.load(cu_seqlens + row)
        tokens = gl.load(cu_seqlens + row + 1) - token
        slot = token // Q + row
    count = (tokens + Q - 1) // Q
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    us = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, Q, P], x_desc.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, Q, N], keys_desc.layout)
    kept = gl.allocate_shared_memory(gl.float16, [2, P, N], states_desc.layout)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES * 4, Q], line)
    full, empty = barriers(3, 2, STAGES)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                follow_state,
                (
                    states_desc, scales, initial, dfinal, dinitial, us, keys, lines, kept.index(0), full, empty,
                    reverse, row, tokens, slot, count, head, heads, slots, 0, STAGES, Q, P, N,
                ),
            ),
            (
                follow_state,
                (
                    states_desc, scales, initial, dfinal, dinitial, us, keys, lines, kept.index(1), full, empty,
                    reverse, row, tokens, slot, count, second, heads, slots, 1, STAGES, Q, P, N,
                ),
            ),
            (
                copy_inflow,
                (
                    x_desc, dy_desc, keys_desc, queries_desc, us, keys, full, empty, reverse, token, count, group,
                    head, second, STAGES, Q, P, N,
                ),
            ),
            (
                weigh_inflow,
                (step, decay, lines, full, empty, reverse, slot, count, head, slots, 0, STAGES, Q),
            ),
            (
                weigh_inflow,
                (step, decay, lines, full, empty, reverse, slot, count, second, slots, 1, STAGES, Q),
            ),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip


# Of one head, a line of a value for each token: the sums of log decays, the steps; the factors of what the outputs read
# from the state, of what dB and dx get from the state's gradient, of what passes through; and D.
LINES = gl.constexpr(7)
SUMS, STEP, READ, KEYS, INFLOW, THROUGH, SKIP = (gl.constexpr(k) for k in range(7))


@gluon.jit
def locate(cu_seqlens, slot, length, rows, Q: gl.constexpr):
    """First token of a slot's chunk, in all rows, and how many it has; see plain Triton's `locate_slot`."""
    if cu_seqlens is None:
        chunks = (length + Q - 1) // Q
        begin = slot % chunks * Q
        token, left = slot // chunks * length + begin, length - begin
    else:
        low, high = slot * 0, slot * 0 + rows
        while high - low > 1:
            middle = (low + high) // 2
            if gl.load(cu_seqlens + middle) // Q + middle <= slot:
                low = middle
            else:
                high = middle
        start = gl.load(cu_seqlens + low)
        token = start + (slot - start // Q - low) * Q
        left = gl.load(cu_seqlens + low + 1) - token
    return token, left


@gluon.jit
def fit(keys, fitted, Q: gl.constexpr):
    """The keys as float16, divided by the power of two that is returned."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    low, high = keys.index(0).load(layout).to(gl.float32), keys.index(1).load(layout).to(gl.float32)
    scale, inverse = fitting(gl.max(gl.max(gl.maximum(gl.abs(low), gl.abs(high)), axis=1), axis=0))
    fitted.index(0).store((low * inverse).to(gl.float16))
    fitted.index(1).store((high * inverse).to(gl.float16))
    return scale


@gluon.jit
def copy_heads(
    x_desc, dy_desc, states_desc, inputs, states, full, empty, token, slot, first, count, heads, slots,
    STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    for i in range(count):
        stage = i % STAGES
        head = first + i
        corner = (slot * heads + head) * P
        dcorner = corner + slots * heads * P
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready, 4 * P * (Q + N))
        copy_in(x_desc, [token, head * P], ready, inputs.index(stage * 2))
        copy_in(dy_desc, [token, head * P], ready, inputs.index(stage * 2 + 1))
        for half in gl.static_range(2):
            copy_in(states_desc, [corner, half * (N // 2)], ready, states.index(stage * 4 + half))
            copy_in(states_desc, [dcorner, half * (N // 2)], ready, states.index(stage * 4 + 2 + half))


@gluon.jit
def weigh_heads(
    step, decay, scales, D, lines, full, empty, keys_by, slot, first, count, D_h, heads, slots,
    STAGES: gl.constexpr, Q: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    t = gl.arange(0, Q, layout)
    for i in range(count):
        stage = i % STAGES
        head = first + i
        at = (head.to(gl.int64) * slots + slot) * Q
        corner = slot * heads + head
        sums = gl.load(decay + at + t)
        size = gl.load(step + at + t)
        total = gl.load(decay + at + Q - 1)
        by, dby = gl.load(scales + corner), gl.load(scales + slots * heads + corner)
        skip = 0.0
        if D is not None:
            skip = gl.load(D + head * D_h).to(gl.float32)
        same = gl.full([Q], 1.0, gl.float32, layout)
        end = gl.exp2(total - sums)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        k = stage * LINES
        lines.index(k + SUMS).store(sums)
        lines.index(k + STEP).store(size)
        lines.index(k + READ).store(gl.exp2(sums) * by)
        lines.index(k + KEYS).store(end * size * dby)
        lines.index(k + INFLOW).store(end * (dby * keys_by))
        lines.index(k + THROUGH).store(same * gl.exp2(total) * (by * dby))
        lines.index(k + SKIP).store(same * skip)
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def sum_pairs(
    out, sums, skips, inputs, states, lines, places, own, others, dscores, full, empty, ready,
    token, left, slot, first, count, slots, group, groups, share, tokens,
    QUERIES: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """QUERIES: dC, what each output reads (heads, 3, slots, Q) and, if wanted, the products of x and dy (heads, 1,
    slots, Q); otherwise dB, and what passes (heads, 1, slots, P). ``own`` are the tiles of C or B, ``others`` those of
    B or C."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    inside = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(1, operand)) < left, 1)
    i_row = gl.arange(0, Q, gl.SliceLayout(1, layout))
    low = gl.zeros([Q, N // 2], gl.float32, layout)
    high = gl.zeros([Q, N // 2], gl.float32, layout)
    for i in range(count):
        stage = i % STAGES
        k = stage * LINES
        head = first + i
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        values = inputs.index(stage * 2 + (1 if QUERIES else 0)).load(operand).to(gl.float32)
        values = gl.where(inside, values, 0.0)
        if QUERIES:  # noqa: SIM102 (known at compile time, the other not)
            if skips is not None:
                x = gl.where(inside, inputs.index(stage * 2).load(operand).to(gl.float32), 0.0)
                i_operand = gl.arange(0, Q, gl.SliceLayout(1, operand))
                gl.store(skips + (head.to(gl.int64) * slots + slot) * Q + i_operand, gl.sum(values * x, axis=1))
        scale, inverse = fitting(gl.max(gl.abs(values), axis=1))
        values = (values * gl.expand_dims(inverse, 1)).to(gl.float16)
        factor = lines.index(k + (READ if QUERIES else KEYS)).load(gl.SliceLayout(1, layout))
        factor = gl.expand_dims(factor * gl.convert_layout(scale, gl.SliceLayout(1, layout)), 1)
        of = stage * 4 + (0 if QUERIES else 2)
        zero = gl.zeros([Q, N // 2], gl.float32, layout)
        new = warpgroup_mma(values, states.index(of), zero, use_acc=False, is_async=True)
        new = warpgroup_mma_wait(0, deps=[new])
        new *= factor
        low += new
        if QUERIES:
            reads = gl.sum(new * own.index(0).load(layout).to(gl.float32), axis=1)
        # What comes before a wait, even for what is there, is done before it. Left to ptxas all sums would come last.
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        new = warpgroup_mma(values, states.index(of + 1), zero, use_acc=False, is_async=True)
        new = warpgroup_mma_wait(0, deps=[new])
        new *= factor
        high += new
        if QUERIES:
            reads += gl.sum(new * own.index(1).load(layout).to(gl.float32), axis=1)
            gl.store(sums + (head.to(gl.int64) * 3 * slots + slot) * Q + i_row, reads)
        else:  # the trace of a product is the sum of all products of the elements
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            low_t, high_t = states.index(of).permute((1, 0)), states.index(of + 1).permute((1, 0))
            new = warpgroup_mma(states.index(of - 2), low_t, zero, use_acc=False, is_async=True)
            new = warpgroup_mma(states.index(of - 1), high_t, new, is_async=True)
            new = warpgroup_mma_wait(0, deps=[new])
            row, column = places.load(gl.SliceLayout(1, layout)), places.load(gl.SliceLayout(0, layout))
            through = gl.sum(gl.where(gl.expand_dims(row, 1) == gl.expand_dims(column, 0), new, 0.0), axis=1)
            through *= lines.index(k + THROUGH).load(gl.SliceLayout(1, layout))
            gl.store(sums + (head.to(gl.int64) * slots + slot) * P + i_row, through)
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    mbarrier.wait(ready.index(0), 0)
    within = dscores.permute((1, 0)).load(operand) if QUERIES else dscores.load(operand)
    low = warpgroup_mma(within, others.index(0), low, is_async=True)
    high = warpgroup_mma(within, others.index(1), high, is_async=True)
    low, high = warpgroup_mma_wait(0, deps=[low, high])
    row = gl.expand_dims(i_row, 1)
    n = gl.expand_dims(gl.arange(0, N // 2, gl.SliceLayout(0, layout)), 0)
    at = out + ((share.to(gl.int64) * tokens + token + row) * groups + group) * N + n
    gl.store(at, low.to(out.dtype.element_ty), mask=row + n * 0 < left)
    gl.store(at + N // 2, high.to(out.dtype.element_ty), mask=row + n * 0 < left)


@gluon.jit
def within_chunk(
    dx_desc, dx, crossing, writes, direct,
    inputs, states, lines, places, keys, queries, fitted, kept, results, full, empty, ready,
    token, left, slot, first, count, slots, heads,
    STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """dx and the sums token by token. Matrices of scores are transposed: (input token, output token)."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    i_row, i_column = gl.arange(0, Q, gl.SliceLayout(1, layout)), gl.arange(0, Q, gl.SliceLayout(0, layout))
    zero = gl.zeros([Q, Q], gl.float32, layout)
    scores = warpgroup_mma(keys.index(0), queries.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma(keys.index(1), queries.index(1).permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    of = gl.expand_dims(places.load(gl.SliceLayout(1, layout)), 1)
    to = gl.expand_dims(places.load(gl.SliceLayout(0, layout)), 0)
    kept.store(gl.where(to >= of, scores, 0.0))  # for want of registers
    changes = gl.zeros([Q, Q], gl.float32, layout)
    for i in range(count):
        stage = i % STAGES
        k = stage * LINES
        head = first + i
        x, dy = inputs.index(stage * 2), inputs.index(stage * 2 + 1)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        clear_both(x, dy, left, P, P, Q)
        zero = gl.zeros([Q, Q], gl.float32, layout)
        weights = warpgroup_mma(x, dy.permute((1, 0)), zero, use_acc=False, is_async=True)
        start_of = gl.expand_dims(lines.index(k + SUMS).load(gl.SliceLayout(1, layout)), 1)
        start_to = gl.expand_dims(lines.index(k + SUMS).load(gl.SliceLayout(0, layout)), 0)
        size = gl.expand_dims(lines.index(k + STEP).load(gl.SliceLayout(1, layout)), 1)
        at = (head.to(gl.int64) * slots + slot) * Q
        # Of inputs after the output it is no decay, but finite: what it is multiplied by is zero there, or made so.
        between = gl.exp2(gl.minimum(start_to - start_of, 0.0))
        shares = gl.convert_layout((kept.load(layout) * between).to(gl.bfloat16), operand)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        weights = warpgroup_mma_wait(0, deps=[weights])
        weights *= between
        changes += weights * size
        weights *= kept.load(layout)
        inward = gl.sum(weights, axis=1)
        crossed = gl.sum(weights * size, axis=0)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        zero = gl.zeros([Q, P], gl.float32, layout)
        low, high = states.index(stage * 4 + 2).permute((1, 0)), states.index(stage * 4 + 3).permute((1, 0))
        result = warpgroup_mma(fitted.index(0), low, zero, use_acc=False, is_async=True)
        result = warpgroup_mma(fitted.index(1), high, result, is_async=True)
        line = (head.to(gl.int64) * 3 * slots + slots + slot) * Q
        gl.store(crossing + line + i_column, crossed)
        factor = gl.expand_dims(lines.index(k + INFLOW).load(gl.SliceLayout(1, layout)), 1)
        result = warpgroup_mma_wait(0, deps=[result])
        result *= factor
        written = gl.sum(result * x.load(layout).to(gl.float32), axis=1)
        result = warpgroup_mma(shares, dy, result, is_async=True)
        of_step = lines.index(k + STEP).load(gl.SliceLayout(1, layout))
        gl.store(crossing + line + slots * Q + i_row, -inward * of_step)
        gl.store(writes + at + i_row, written * of_step)
        gl.store(direct + at + i_row, inward + written)
        skip = gl.expand_dims(lines.index(k + SKIP).load(gl.SliceLayout(1, layout)), 1)
        skipped = dy.load(layout).to(gl.float32) * skip
        result = warpgroup_mma_wait(0, deps=[result])
        result = result * size + skipped
        tma.store_wait(0)
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        results.store(result.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        if left < Q:
            store_rows(dx + (token.to(gl.int64) * heads + head) * P, results, heads, left, Q, P)
        else:
            copy_out(dx_desc, [token, head * P], results)
    tma.store_wait(0)
    barrier()
    # Loaded again: kept, the comparisons would take registers, of which there are too few.
    of = gl.expand_dims(places.load(gl.SliceLayout(1, layout)), 1)
    to = gl.expand_dims(places.load(gl.SliceLayout(0, layout)), 0)
    results.store(gl.where(to >= of, changes, 0.0).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    mbarrier.arrive(ready.index(0), count=1)


@gluon.jit(do_not_specialize=("D_h", "length", "heads", "per_group", "groups", "rows", "slots", "shares", "tokens"))
def chunks(
    x_desc, dy_desc, keys_desc, queries_desc, states_desc, dx_desc, dx, dB, dC, D, cu_seqlens, step, decay, scales,
    crossing, writes, direct, skips, passed,
    D_h, length, heads, per_group, groups, rows, slots, shares, tokens,
    STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """dx (b, l, h, p); dB and dC (shares, b l, g, n); crossing (h, 3, slots, Q); writes, direct and, with D, skips (h,
    1, slots, Q); passed (h, 1, slots, P)."""
    slot = gl.program_id(0) // (groups * shares)
    group = gl.program_id(0) // shares % groups
    share = gl.program_id(0) % shares
    token, left = locate(cu_seqlens, slot, length, rows, Q)
    each = (per_group + shares - 1) // shares
    first = gl.minimum(share * each, per_group)
    count = gl.where(left > 0, gl.minimum(first + each, per_group) - first, 0)
    first += group * per_group
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    inputs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, Q, P], x_desc.layout)
    states = gl.allocate_shared_memory(gl.float16, [STAGES * 4, P, N // 2], states_desc.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, Q, N // 2], keys_desc.layout)
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, Q, N // 2], queries_desc.layout)
    fitted = gl.allocate_shared_memory(gl.float16, [2, Q, N // 2], states_desc.layout)
    scores = gl.allocate_shared_memory(gl.float32, [1, Q, Q], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    results = gl.allocate_shared_memory(gl.bfloat16, [1, Q, P], dx_desc.layout)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES * LINES, Q], line)
    places = gl.allocate_shared_memory(gl.int32, [Q], line)
    full, empty = barriers(2, 3, STAGES)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    fence_async_shared()
    mbarrier.expect(ready.index(1), 4 * Q * N)
    for half in gl.static_range(2):
        copy_in(keys_desc, [token, group * N + half * (N // 2)], ready.index(1), keys.index(half))
        copy_in(queries_desc, [token, group * N + half * (N // 2)], ready.index(1), queries.index(half))
    mbarrier.wait(ready.index(1), 0)
    if left < Q:
        for half in gl.static_range(2):
            clear_rest(keys.index(half), left, N // 2, Q)
            clear_rest(queries.index(half), left, N // 2, Q)
    keys_by = fit(keys, fitted, Q)
    places.store(gl.arange(0, Q, gl.BlockedLayout([1], [32], [4], [0])))
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                within_chunk,
                (
                    dx_desc, dx, crossing, writes, direct,
                    inputs, states, lines, places, keys, queries, fitted, scores.index(0), results.index(0),
                    full, empty, ready, token, left, slot, first, count, slots, heads, STAGES, Q, P, N,
                ),
            ),
            (
                sum_pairs,
                (
                    dC, crossing, skips, inputs, states, lines, places, queries, keys, results.index(0), full, empty,
                    ready, token, left, slot, first, count, slots, group, groups, share, tokens, True, STAGES, Q, P, N,
                ),
            ),
            (
                sum_pairs,
                (
                    dB, passed, skips, inputs, states, lines, places, keys, queries, results.index(0), full, empty,
                    ready, token, left, slot, first, count, slots, group, groups, share, tokens, False, STAGES, Q, P, N,
                ),
            ),
            (
                copy_heads,
                (
                    x_desc, dy_desc, states_desc, inputs, states, full, empty,
                    token, slot, first, count, heads, slots, STAGES, Q, P, N,
                ),
            ),
            (
                weigh_heads,
                (
                    step, decay, scales, D, lines, full, empty, keys_by,
                    slot, first, count, D_h, heads, slots, STAGES, Q,
                ),
            ),
        ],
        [4, 4, 1, 1],
        [144, 176, 24, 24],
    )  # fmt: skip
