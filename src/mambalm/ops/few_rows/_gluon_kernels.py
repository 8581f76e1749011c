"""The product of a decode step in Gluon, Triton's lower level, for Hopper GPUs: a few rows times a weight.

Time goes by the bytes of the weight. A warp of every program copies tiles in, STAGES ahead of the warps that multiply:
first as many of the weight as shared memory holds, and only then it waits for the kernel before, whose results are the
other factor. So the weights are on their way while that kernel still runs (programmatic dependent launch, as in
``_triton_step_kernels``).
"""

from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mambalm.ops.gluon_support import barrier, copy_in, gl, gluon


@gluon.jit
def fetch(
    first_desc, second_desc, firsts, seconds, ready, stage, tile, block,
    BYTES: gl.constexpr, FIRST: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Ask for a block of columns of the weight's rows; the stage is ready when its block of x is there as well."""
    mbarrier.expect(ready, BYTES)
    copy_in(first_desc, [tile, block * BLOCK], ready, firsts.index(stage))
    if second_desc is not None:
        copy_in(second_desc, [tile + FIRST, block * BLOCK], ready, seconds.index(stage))


@gluon.jit
def copy(
    x_desc, first_desc, second_desc, xs, firsts, seconds, full, empty, tile, begin, count,
    BYTES: gl.constexpr, FIRST: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    ahead = gl.minimum(count, STAGES)
    for i in range(ahead):
        fetch(first_desc, second_desc, firsts, seconds, full.index(i), i, tile, begin + i, BYTES, FIRST, BLOCK)
    if OVERLAP:
        gdc_wait()
    for i in range(ahead):
        copy_in(x_desc, [0, (begin + i) * BLOCK], full.index(i), xs.index(i))
    for i in range(ahead, count):
        stage, block = i % STAGES, begin + i
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        fetch(first_desc, second_desc, firsts, seconds, ready, stage, tile, block, BYTES, FIRST, BLOCK)
        copy_in(x_desc, [0, block * BLOCK], ready, xs.index(stage))


@gluon.jit
def write(total, y, bias, tile, batch, outputs, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1)
    column = tile + gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    if bias is not None:
        total += gl.load(bias + column, mask=column < outputs, other=0.0).to(gl.float32)
    mask = (row < batch) & (column < outputs)
    gl.store(y + row.to(gl.int64) * outputs + column, total.to(y.dtype.element_ty), mask=mask)


@gluon.jit
def multiply(
    bias, y, xs, firsts, seconds, full, empty, tile, count, batch, outputs,
    ROWS: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = SECOND if SECOND > 0 else FIRST
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    other: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    total = gl.zeros([ROWS, FIRST], gl.float32, layout)
    rest = gl.zeros([ROWS, WIDTH], gl.float32, other)
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        x = xs.index(stage)
        total = warpgroup_mma(x, firsts.index(stage).permute((1, 0)), total, is_async=True)
        if SECOND > 0:
            rest = warpgroup_mma(x, seconds.index(stage).permute((1, 0)), rest, is_async=True)
            total, rest = warpgroup_mma_wait(2, deps=[total, rest])
        else:
            total = warpgroup_mma_wait(1, deps=[total])
        # This stage's products may still be on their way, those of the one before are done.
        if i > 0:
            barrier()
            mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
    if SECOND > 0:
        total, rest = warpgroup_mma_wait(0, deps=[total, rest])
    else:
        total = warpgroup_mma_wait(0, deps=[total])
    write(total, y, bias, tile, batch, outputs, ROWS, FIRST, layout)
    if SECOND > 0:
        write(rest, y, bias, tile + FIRST, batch, outputs, ROWS, SECOND, other)


# Sizes that happen to be 1 must not become constants: Triton 3.6 then fails to split the warps' tasks.
@gluon.jit(do_not_specialize=("batch", "blocks"))
def project(
    x_desc, first_desc, second_desc, bias, y, batch, outputs, blocks,
    ROWS: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """Shares (s, batch, outputs), in y's dtype, of x (batch, k) times the transposed weight (outputs, k).

    Program (i, j) takes FIRST + SECOND outputs, and of the ``blocks`` of BLOCK columns the j-th part of s.
    """
    if OVERLAP:
        gdc_launch_dependents()
    BYTES: gl.constexpr = (ROWS + FIRST + SECOND) * BLOCK * 2
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, BLOCK], x_desc.layout)
    firsts = gl.allocate_shared_memory(x_desc.dtype, [STAGES, FIRST, BLOCK], first_desc.layout)
    seconds = firsts
    if SECOND > 0:
        seconds = gl.allocate_shared_memory(x_desc.dtype, [STAGES, SECOND, BLOCK], second_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(full.index(k), count=1)
        mbarrier.init(empty.index(k), count=1)
    fence_async_shared()
    tile, share = gl.program_id(0) * (FIRST + SECOND), gl.program_id(1)
    begin = share * blocks // gl.num_programs(1)
    count = (share + 1) * blocks // gl.num_programs(1) - begin
    at = y + share.to(gl.int64) * batch * outputs
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    bias, at, xs, firsts, seconds, full, empty, tile, count, batch, outputs,
                    ROWS, FIRST, SECOND, STAGES,
                ),
            ),
            (
                copy,
                (
                    x_desc, first_desc, second_desc, xs, firsts, seconds, full, empty, tile, begin, count,
                    BYTES, FIRST, BLOCK, STAGES, OVERLAP,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
