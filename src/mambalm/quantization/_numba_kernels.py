"""Matrix times vector at the speed of memory, for weights in float32, bfloat16, 8 and 4 bits.

The innermost loops are written in LLVM's vectors, which every processor has or is given in pieces: left to itself, LLVM
does not vectorise products of small integers. ROWS outputs are computed together and share the loads of x; the next
weights are fetched into cache long before they are multiplied, which is worth a factor of two to a single core. Weights
of few bits meet an x rounded to 16 bits in integers (pmaddwd, or vpdpwssd where there is VNNI: LLVM knows the pattern).
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mambalm.ops.numba_support import f32, kernel, narrow, part, sums, widen
from mambalm.ops.numba_team import floats_at, job, shorts_at, words_at
from mambalm.quantization.layout import ROWS

LANES = 16
AHEAD = 4096  # bytes from a packed weight to what is fetched meanwhile
_LARGEST = f32(32767)
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(size) for size in (8, 16, 32, 64))


def _vector(kind, lanes=LANES):  # type: ignore[no-untyped-def]
    return ir.VectorType(kind, lanes)


def _constant(kind, value, lanes=LANES):  # type: ignore[no-untyped-def]
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def _load(builder, address, offset, kind):  # type: ignore[no-untyped-def]
    pointer = builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())
    loaded = builder.load(pointer)
    loaded.align = 1
    return loaded


def _fetch(builder, address):  # type: ignore[no-untyped-def]
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [builder.inttoptr(address, _I8.as_pointer()), _I32(0), _I32(3), _I32(1)])


def _multiply_add(builder, a, b, c):  # type: ignore[no-untyped-def]
    kind = ir.FunctionType(_vector(_F32), [_vector(_F32)] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [a, b, c])


def _multiply_add_pairs(builder, a, b, c):  # type: ignore[no-untyped-def]
    """c (16 int32) plus the sums of two neighbouring products of a and b (32 int16)."""
    wide = _vector(_I32, 2 * LANES)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (
        builder.shuffle_vector(products, products, ir.Constant(_vector(_I32), list(range(start, 2 * LANES, 2))))
        for start in range(2)
    )
    return builder.add(c, builder.add(even, odd))


def _float32(builder, weights, scales, x, offset, row, total):  # type: ignore[no-untyped-def]
    return _multiply_add(builder, _load(builder, weights, 0, _vector(_F32)), x[0], total)


def _bfloat16(builder, weights, scales, x, offset, row, total):  # type: ignore[no-untyped-def]
    bits = builder.zext(_load(builder, weights, 0, _vector(_I16)), _vector(_I32))
    weight = builder.bitcast(builder.shl(bits, _constant(_I32, 16)), _vector(_F32))
    return _multiply_add(builder, weight, x[0], total)


def _add_group(builder, part, scales, index, total):  # type: ignore[no-untyped-def]
    """total plus a group's sums (16 int32) times its bfloat16 scale."""
    bits = builder.zext(_load(builder, scales, 2 * index, _I16), _I32)
    scale = builder.bitcast(builder.shl(bits, _I32(16)), _F32)
    single = builder.insert_element(ir.Constant(_vector(_F32), ir.Undefined), scale, _I32(0))
    everywhere = builder.shuffle_vector(single, single, _constant(_I32, 0))
    return _multiply_add(builder, builder.sitofp(part, _vector(_F32)), everywhere, total)


def _int8(builder, weights, scales, x, offset, row, total):  # type: ignore[no-untyped-def]
    part = _constant(_I32, 0)
    for k, values in enumerate(x):
        integers = _load(builder, weights, 2 * LANES * k, _vector(_I8, 2 * LANES))
        part = _multiply_add_pairs(builder, builder.sext(integers, _vector(_I16, 2 * LANES)), values, part)
    return _add_group(builder, part, scales, row, total)


def _int4(builder, weights, scales, x, offset, row, total):  # type: ignore[no-untyped-def]
    """The sums start at ``offset``, which makes up for the 8 in every nibble."""
    words = _load(builder, weights, 0, _vector(_I16, 2 * LANES))
    for half in range(2):
        part = _load(builder, offset, 4 * LANES * half, _vector(_I32))
        for k in (2 * half, 2 * half + 1):
            shifted = builder.lshr(words, _constant(_I16, 4 * k, 2 * LANES))
            nibbles = builder.and_(shifted, _constant(_I16, 15, 2 * LANES))
            part = _multiply_add_pairs(builder, nibbles, x[k], part)
        total = _add_group(builder, part, scales, 2 * row + half, total)
    return total


def _dot(vectors, lanes, scale_bytes, add):  # type: ignore[no-untyped-def]
    """An intrinsic: ROWS sums over ``turns`` turns; row r of turn t is at weights + r * row_stride + t * turn_stride.

    A turn reads ``vectors`` of x (16 float32 or 32 int16), ``scale_bytes`` of scales per row, and does ``add``.
    """

    def prepared(builder, loop, arguments):  # type: ignore[no-untyped-def]
        weights, _, turn_stride, _, scales, x, offset, _ = arguments

        def at(base, stride):  # type: ignore[no-untyped-def]
            return builder.add(base, builder.mul(loop.index, stride))

        kind = _vector(_F32) if lanes == LANES else _vector(_I16, lanes)
        start = at(x, _I64(64 * vectors))
        inputs = [_load(builder, start, 64 * k, kind) for k in range(vectors)]
        return at(weights, turn_stride), at(scales, _I64(ROWS * scale_bytes)), inputs, at(offset, _I64(8 * LANES))

    @intrinsic
    def dot(context, weights, row_stride, turn_stride, ahead, scales, x, offset, turns):  # type: ignore[no-untyped-def]
        result = types.UniTuple(types.float32, ROWS)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            totals = [cgutils.alloca_once_value(builder, _constant(_F32, 0.0)) for _ in range(ROWS)]
            with cgutils.for_range(builder, arguments[-1], intp=_I64) as loop:
                here, scale, inputs, start = prepared(builder, loop, arguments)
                for r, total in enumerate(totals):
                    row = builder.add(here, builder.mul(arguments[1], _I64(r)))
                    _fetch(builder, builder.add(row, arguments[3]))
                    builder.store(add(builder, row, scale, inputs, start, r, builder.load(total)), total)
            kind = ir.FunctionType(_F32, [_F32, _vector(_F32)])
            add_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
            zero = ir.Constant(_F32, -0.0)
            sums = [builder.call(add_up, [zero, builder.load(t)], fastmath=("reassoc",)) for t in totals]
            return context.make_tuple(builder, result, sums)

        return result(*[types.int64] * 8), generate

    return dot


_dot_float32, _dot_bfloat16 = _dot(1, LANES, 0, _float32), _dot(1, LANES, 0, _bfloat16)
_dot_int8, _dot_int4 = _dot(2, 2 * LANES, 2, _int8), _dot(4, 2 * LANES, 4, _int4)

# The arguments of a product: addresses (0: none), flags, sizes and distances in bytes, in this order. Output row r is
# at WEIGHT + r ROW_BYTES for the first of a block; the others of the block, and their turns, are STRIDEs away. FACTOR
# is the address of what all sums are multiplied with.
WEIGHT, SCALES, X, OFFSET, FACTOR, Y, BIAS, ADDED, OUT = range(9)
ROWS_STORED, ROW_BYTES, SCALE_BYTES, ROW_STRIDE, TURN_STRIDE, FETCHED, TURNS, PER_CHUNK = range(9, 17)


@njit(nogil=True, inline="always")
def _blocks(chunk, a):  # type: ignore[no-untyped-def]
    return chunk * a[PER_CHUNK], min((chunk + 1) * a[PER_CHUNK], (a[OUT] + ROWS - 1) // ROWS)


@njit(nogil=True, inline="always")
def _first(block, a):  # type: ignore[no-untyped-def]
    """The last block begins early if it would not be full."""
    return min(block * ROWS, a[ROWS_STORED] - ROWS)


@njit(nogil=True, inline="always")
def _finish(block, sums, a):  # type: ignore[no-untyped-def]
    first = _first(block, a)
    y, bias = floats_at(a[Y], a[OUT]), floats_at(a[BIAS], a[OUT])
    factor = floats_at(a[FACTOR], 1)[0]
    for r in range(block * ROWS - first, min(ROWS, a[OUT] - first)):
        value = sums[r] * factor
        if a[BIAS]:
            value += bias[first + r]
        if a[ADDED]:
            value += y[first + r]
        y[first + r] = value


@job
def float32(chunk, a):  # type: ignore[no-untyped-def]
    """y = W x + bias, or added to y, for a chunk of W's rows."""
    begin, end = _blocks(chunk, a)
    for block in range(begin, end):
        row = a[WEIGHT] + _first(block, a) * a[ROW_BYTES]
        _finish(block, _dot_float32(row, a[ROW_STRIDE], a[TURN_STRIDE], a[FETCHED], 0, a[X], 0, a[TURNS]), a)


@job
def bfloat16(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a weight in bfloat16; x, bias and y are float32."""
    begin, end = _blocks(chunk, a)
    for block in range(begin, end):
        row = a[WEIGHT] + _first(block, a) * a[ROW_BYTES]
        _finish(block, _dot_bfloat16(row, a[ROW_STRIDE], a[TURN_STRIDE], a[FETCHED], 0, a[X], 0, a[TURNS]), a)


@job
def int8(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a packed weight of 8 bits; x comes from ``prepare``."""
    begin, end = _blocks(chunk, a)
    for block in range(begin, end):
        first = _first(block, a)
        row, scales = a[WEIGHT] + first * a[ROW_BYTES], a[SCALES] + first * a[SCALE_BYTES]
        _finish(block, _dot_int8(row, a[ROW_STRIDE], a[TURN_STRIDE], a[FETCHED], scales, a[X], a[OFFSET], a[TURNS]), a)


@job
def int4(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a packed weight of 4 bits."""
    begin, end = _blocks(chunk, a)
    for block in range(begin, end):
        first = _first(block, a)
        row, scales = a[WEIGHT] + first * a[ROW_BYTES], a[SCALES] + first * a[SCALE_BYTES]
        _finish(block, _dot_int4(row, a[ROW_STRIDE], a[TURN_STRIDE], a[FETCHED], scales, a[X], a[OFFSET], a[TURNS]), a)


@job
def prepare(chunk, a):  # type: ignore[no-untyped-def]
    """x (a[0], of a[1] values) rounded to 16 bits (a[2], of a[3] values: whole turns), and its scale (a[4]).

    For 4 bits also the sums' offset (a[5], lanes for each group), which takes 8 times the inputs away again.
    """
    size, padded = a[1], a[3]
    x, rounded, factor = floats_at(a[0], size), shorts_at(a[2], padded), floats_at(a[4], 1)
    largest, poison = f32(0), f32(0)
    for i in range(size):
        largest = max(largest, abs(x[i]))
        poison += x[i] * f32(0)  # NaN if one is not finite: integers would not tell
    factor[0] = largest / _LARGEST + poison
    scale = _LARGEST / largest if largest > f32(0) else f32(0)
    for i in range(size):
        rounded[i] = np.int16(np.rint(x[i] * scale))
    if not a[5]:
        return
    offset = words_at(a[5], padded // 64 * LANES)
    for group in range(padded // 64):
        for lane in range(LANES):
            total = np.int32(0)
            for k in (64 * group, 64 * group + 32):
                total += np.int32(rounded[k + 2 * lane]) + np.int32(rounded[k + 2 * lane + 1])
            offset[group * LANES + lane] = np.int32(-8) * total


@kernel
def unpack8(first, last, values, scales, weight):  # type: ignore[no-untyped-def]
    """Blocks first..last of a packed weight of 8 bits as weight (rows, in): float32, or bfloat16 as its bits."""
    for block in range(first, last):
        for turn in range(values.shape[1]):
            for r in range(ROWS):
                scale = widen(scales[block, turn, r])
                source = values[block, turn, r]
                row = part(weight[block * ROWS + r], turn * 64, 64)
                for k in range(64):
                    row[k] = narrow(row, f32(source[k]) * scale)


@kernel
def unpack4(first, last, values, scales, weight):  # type: ignore[no-untyped-def]
    """The same for 4 bits."""
    for block in range(first, last):
        for turn in range(values.shape[1]):
            for r in range(ROWS):
                source = values[block, turn, r]
                for k in range(4):
                    scale = widen(scales[block, turn, r, k // 2])
                    row = part(weight[block * ROWS + r], turn * 128 + 32 * k, 32)
                    shift = np.int16(4 * k)
                    for j in range(32):
                        nibble = np.int16(source[j] >> shift) & np.int16(15)
                        row[j] = narrow(row, f32(np.int16(nibble) - np.int16(8)) * scale)


@sums
def _squared_error(source, inverse, scale, lowest, highest):  # type: ignore[no-untyped-def]
    error = f32(0)
    for k in range(source.size):
        difference = min(max(np.rint(source[k] * inverse), lowest), highest) * scale - source[k]
        error += difference * difference
    return error


@kernel
def quantize(first, last, groups, steps, ends, values, scales):  # type: ignore[no-untyped-def]
    """Groups first..last of weights (count, GROUP) as int8 values and bfloat16 scales (count).

    A scale maps the largest weight to one of ``steps``: to the one that leaves the least error. It is rounded before
    the weights are, so that its rounding is no error of its own.
    """
    lowest, highest = ends[0], ends[1]
    for g in range(first, last):
        source = groups[g]
        extreme = f32(0)
        for k in range(source.size):
            if abs(source[k]) > abs(extreme):
                extreme = source[k]
        least = f32(np.inf)
        for step in steps:
            rounded = narrow(scales, extreme / step)
            scale = widen(rounded)
            inverse = f32(1) / scale if scale != f32(0) else f32(0)
            error = _squared_error(source, inverse, scale, lowest, highest)
            if error < least:
                least = error
                scales[g] = rounded
        scale = widen(scales[g])
        inverse = f32(1) / scale if scale != f32(0) else f32(0)
        for k in range(source.size):
            values[g, k] = np.int8(min(max(np.rint(source[k] * inverse), lowest), highest))
