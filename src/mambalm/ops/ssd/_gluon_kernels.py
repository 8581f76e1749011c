"""ssd's scan for Hopper GPUs in Gluon, Triton's lower level: one launch, warps with one task each.

What plain Triton's `scan` computes, for heads of P = 64 channels, N = 128 states and bfloat16, transposed throughout:
the state (p, n) stays in a warpgroup's accumulator, and rounded it is the register operand of the outputs' product, so
that the recurrence from chunk to chunk never goes through memory.

A program has two warpgroups that compute, one head each, and share the tiles of keys and queries; a warp that copies
tiles in, STAGES chunks ahead; and two warps that make the decays of a chunk from their running sums, one per head.

Units (a pair of heads, a row, one of SEGMENTS pieces of it) times chunks are cut into equal ranges, one per program. A
range ends in the middle of a unit: the program takes that part first and hands the state to the next program through
memory, so that none waits while ranges are longer than units. Ranges are given out in the order in which programs
start: one that waits, waits for one that runs.
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
def clear_rest(tile, left, WIDTH: gl.constexpr, Q: gl.constexpr):
    """Zero the rows of a tile from ``left`` on: they are another row's tokens. Two warpgroups may do it at once."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    i = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(1, layout)), 1)
    values = tile.load(layout)
    tile.store(gl.where(i < left, values, gl.zeros_like(values)))


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
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
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
            if left < Q:
                clear_rest(u, left, P, Q)
                clear_rest(key, left, N, Q)
                fence_async_shared()
                barrier()
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
                token = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(1, rows)), 1)
                p = gl.expand_dims(gl.arange(0, P, gl.SliceLayout(0, rows)), 0)
                at = out + (row * length + chunk * Q).to(gl.int64) * heads * P + head * P
                values = results.load(rows)
                gl.store(at + token * heads * P + p, values, mask=token + p * 0 < left)
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
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(full.index(k), count=3)
        mbarrier.init(empty.index(k), count=2)
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
