"""Matrix times a vector, or up to COLUMNS of them, at the speed of memory: weights in float32, bfloat16, 8 and 4 bits.

The innermost loops are written in LLVM's vectors, which every processor has or is given in pieces: left to itself, LLVM
does not vectorise products of small integers. A thread reads its weights from one end to the other, which memory
answers a quarter faster than four rows at once, and fetches them into cache long before they are multiplied. Packed
weights lie so that ROWS outputs are computed together and share the loads of x; they meet an x rounded to 16 bits in
integers (pmaddwd, or vpdpwssd where there is VNNI: LLVM knows the pattern).
"""

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mambalm.ops.numba_support import f32, kernel, narrow, part, sums, widen
from mambalm.ops.numba_team import floats_at, job, shorts_at, words_at
from mambalm.quantization.layout import ROWS

LANES = 16
COLUMNS = 4  # vectors that share a reading of the weights
_AHEAD = 4096  # bytes from a weight to what is fetched meanwhile
_LINE = 64
_UNROLLED = 4  # vectors of a plain row per turn
_LARGEST = f32(32767)
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(size) for size in (8, 16, 32, 64))


def integer_products() -> str:
    """By what this processor adds up products of 16-bit integers, as LLVM is told of it."""
    features = binding.get_host_cpu_features()
    by_name = {"avx512vnni": "vpdpwssd (AVX512-VNNI)", "avxvnni": "vpdpwssd (AVX-VNNI)", "avx2": "vpmaddwd (AVX2)"}
    return next((way for name, way in by_name.items() if features.get(name)), "generic vector instructions")


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


def _widened(builder, address, offset, kind):  # type: ignore[no-untyped-def]
    """A vector of float32, or of bfloat16 as float32."""
    if kind is _F32:
        return _load(builder, address, offset, _vector(_F32))
    bits = builder.zext(_load(builder, address, offset // 2, _vector(_I16)), _vector(_I32))
    return builder.bitcast(builder.shl(bits, _constant(_I32, 16)), _vector(_F32))


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


def _sum_up(context, builder, totals, result):  # type: ignore[no-untyped-def]
    """The sums of vectors, as a tuple."""
    kind = ir.FunctionType(_F32, [_F32, _vector(_F32)])
    add_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    zero = ir.Constant(_F32, -0.0)
    sums = [builder.call(add_up, [zero, builder.load(total)], fastmath=("reassoc",)) for total in totals]
    return context.make_tuple(builder, result, sums)


def _columns(builder, address, stride, last, count):  # type: ignore[no-untyped-def]
    """The addresses of ``count`` columns; ``last`` is the last that there is, and stands in for those after it."""
    for c in range(count):
        there = builder.icmp_signed("<", _I64(c), last)
        yield builder.add(address, builder.mul(builder.select(there, _I64(c), last), stride))


def _plain_dot(kind, columns):  # type: ignore[no-untyped-def]
    """An intrinsic: the products of a row of ``count`` vectors, float32 or bfloat16, with each of the columns of x."""
    size = LANES * (4 if kind is _F32 else 2)

    def turn(builder, row, inputs, index, vectors, totals):  # type: ignore[no-untyped-def]
        here = builder.add(row, builder.mul(index, _I64(size)))
        for line in range(0, size * vectors, _LINE):
            _fetch(builder, builder.add(here, _I64(_AHEAD + line)))
        for k in range(vectors):
            weight = _widened(builder, here, 4 * LANES * k, kind)
            for c, x in enumerate(inputs):
                values = _load(
                    builder, builder.add(x, builder.mul(index, _I64(4 * LANES))), 4 * LANES * k, _vector(_F32)
                )
                total = totals[c * _UNROLLED + k]
                builder.store(_multiply_add(builder, weight, values, builder.load(total)), total)

    @intrinsic
    def dot(context, row, x, x_stride, x_last, count):  # type: ignore[no-untyped-def]
        result = types.UniTuple(types.float32, columns)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            row, x, stride, last, count = arguments
            totals = [cgutils.alloca_once_value(builder, _constant(_F32, 0.0)) for _ in range(columns * _UNROLLED)]
            inputs = list(_columns(builder, x, stride, last, columns))
            whole = builder.sdiv(count, _I64(_UNROLLED))
            with cgutils.for_range(builder, whole, intp=_I64) as loop:
                turn(builder, row, inputs, builder.mul(loop.index, _I64(_UNROLLED)), _UNROLLED, totals)
            done = builder.mul(whole, _I64(_UNROLLED))
            with cgutils.for_range(builder, builder.sub(count, done), intp=_I64) as loop:
                turn(builder, row, inputs, builder.add(done, loop.index), 1, totals)
            for c in range(columns):
                first, *others = totals[c * _UNROLLED : (c + 1) * _UNROLLED]
                for other in others:
                    builder.store(builder.fadd(builder.load(first), builder.load(other)), first)
            return _sum_up(context, builder, totals[::_UNROLLED], result)

        return result(*[types.int64] * 5), generate

    return dot


def _packed_dot(vectors, scale_bytes, add, columns):  # type: ignore[no-untyped-def]
    """An intrinsic: the products of ROWS packed rows with each of the columns of x, a column's side by side.

    A turn reads ``vectors`` of x (32 int16), 64 bytes of each row and ``scale_bytes`` of its scales, and does ``add``.
    """

    @intrinsic
    def dot(context, weights, scales, x, x_stride, offset, offset_stride, x_last, turns):  # type: ignore[no-untyped-def]
        result = types.UniTuple(types.float32, ROWS * columns)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            weights, scales, x, x_stride, offset, offset_stride, last, turns = arguments
            totals = [cgutils.alloca_once_value(builder, _constant(_F32, 0.0)) for _ in range(ROWS * columns)]
            inputs = list(_columns(builder, x, x_stride, last, columns))
            starts = list(_columns(builder, offset, offset_stride, last, columns))
            with cgutils.for_range(builder, turns, intp=_I64) as loop:

                def at(base, size):  # type: ignore[no-untyped-def]
                    return builder.add(base, builder.mul(loop.index, _I64(size)))

                here, scale = at(weights, ROWS * _LINE), at(scales, ROWS * scale_bytes)
                for r in range(ROWS):
                    row = builder.add(here, _I64(r * _LINE))
                    _fetch(builder, builder.add(row, _I64(_AHEAD)))
                    for c in range(columns):
                        column = at(inputs[c], _LINE * vectors)
                        values = [_load(builder, column, _LINE * k, _vector(_I16, 2 * LANES)) for k in range(vectors)]
                        total = totals[c * ROWS + r]
                        start = at(starts[c], 8 * LANES)
                        builder.store(add(builder, row, scale, values, start, r, builder.load(total)), total)
            return _sum_up(context, builder, totals, result)

        return result(*[types.int64] * 8), generate

    return dot


_float32_1, _float32_4 = _plain_dot(_F32, 1), _plain_dot(_F32, COLUMNS)
_bfloat16_1, _bfloat16_4 = _plain_dot(_I16, 1), _plain_dot(_I16, COLUMNS)
_int8_1, _int8_4 = _packed_dot(2, 2, _int8, 1), _packed_dot(2, 2, _int8, COLUMNS)
_int4_1, _int4_4 = _packed_dot(4, 4, _int4, 1), _packed_dot(4, 4, _int4, COLUMNS)

# The arguments of a product: addresses (0: none), distances between columns in bytes, flags and sizes, in this order.
# FACTOR is the address of what the sums of each column are multiplied with.
WEIGHT, ROW_BYTES, SCALES, SCALE_BYTES, X, X_STRIDE, OFFSET, OFFSET_STRIDE, FACTOR = range(9)
Y, Y_STRIDE, BIAS, ADDED, OUT, TURNS, PER_CHUNK, LAST_COLUMN = range(9, 17)


@njit(nogil=True, inline="always")
def _share(chunk, count, a):  # type: ignore[no-untyped-def]
    return chunk * a[PER_CHUNK], min((chunk + 1) * a[PER_CHUNK], count)


@njit(nogil=True, inline="always")
def _finish(first, rows, sums, a):  # type: ignore[no-untyped-def]
    bias, factors = floats_at(a[BIAS], a[OUT]), floats_at(a[FACTOR], a[LAST_COLUMN] + 1)
    for c in range(a[LAST_COLUMN] + 1):
        y = floats_at(a[Y] + c * a[Y_STRIDE], a[OUT])
        for r in range(min(rows, a[OUT] - first)):
            value = sums[c * rows + r] * factors[c]
            if a[BIAS]:
                value += bias[first + r]
            if a[ADDED]:
                value += y[first + r]
            y[first + r] = value


@njit(nogil=True, inline="always")
def _plain(dot, row, a):  # type: ignore[no-untyped-def]
    _finish(row, 1, dot(a[WEIGHT] + row * a[ROW_BYTES], a[X], a[X_STRIDE], a[LAST_COLUMN], a[TURNS]), a)


@njit(nogil=True, inline="always")
def _packed(dot, block, a):  # type: ignore[no-untyped-def]
    row = block * ROWS
    weights, scales = a[WEIGHT] + row * a[ROW_BYTES], a[SCALES] + row * a[SCALE_BYTES]
    inputs = (a[X], a[X_STRIDE], a[OFFSET], a[OFFSET_STRIDE], a[LAST_COLUMN], a[TURNS])
    _finish(row, ROWS, dot(weights, scales, *inputs), a)


@job
def float32(chunk, a):  # type: ignore[no-untyped-def]
    """y = W x + bias, or added to y, for a chunk of W's rows."""
    begin, end = _share(chunk, a[OUT], a)
    for row in range(begin, end):
        _plain(_float32_1, row, a)


@job
def float32_columns(chunk, a):  # type: ignore[no-untyped-def]
    """The same for up to COLUMNS x."""
    begin, end = _share(chunk, a[OUT], a)
    for row in range(begin, end):
        _plain(_float32_4, row, a)


@job
def bfloat16(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a weight in bfloat16; x, bias and y are float32."""
    begin, end = _share(chunk, a[OUT], a)
    for row in range(begin, end):
        _plain(_bfloat16_1, row, a)


@job
def bfloat16_columns(chunk, a):  # type: ignore[no-untyped-def]
    """The same for up to COLUMNS x."""
    begin, end = _share(chunk, a[OUT], a)
    for row in range(begin, end):
        _plain(_bfloat16_4, row, a)


@job
def int8(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a packed weight of 8 bits; x comes from ``prepare``."""
    begin, end = _share(chunk, (a[OUT] + ROWS - 1) // ROWS, a)
    for block in range(begin, end):
        _packed(_int8_1, block, a)


@job
def int8_columns(chunk, a):  # type: ignore[no-untyped-def]
    """The same for up to COLUMNS x."""
    begin, end = _share(chunk, (a[OUT] + ROWS - 1) // ROWS, a)
    for block in range(begin, end):
        _packed(_int8_4, block, a)


@job
def int4(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a packed weight of 4 bits."""
    begin, end = _share(chunk, (a[OUT] + ROWS - 1) // ROWS, a)
    for block in range(begin, end):
        _packed(_int4_1, block, a)


@job
def int4_columns(chunk, a):  # type: ignore[no-untyped-def]
    """The same for up to COLUMNS x."""
    begin, end = _share(chunk, (a[OUT] + ROWS - 1) // ROWS, a)
    for block in range(begin, end):
        _packed(_int4_4, block, a)


@job
def prepare(chunk, a):  # type: ignore[no-untyped-def]
    """x (a[0], of a[1] values) rounded to 16 bits (a[2], of a[3] values: whole turns), and its scale (a[4]).

    For 4 bits also the sums' offset (a[5], lanes for each group), which takes 8 times the inputs away again. A chunk
    is a column; those of x are a[6] bytes apart.
    """
    size, padded = a[1], a[3]
    x, rounded = floats_at(a[0] + chunk * a[6], size), shorts_at(a[2] + 2 * chunk * padded, padded)
    factor = floats_at(a[4] + 4 * chunk, 1)
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
    groups = padded // 64
    offset = words_at(a[5] + 4 * chunk * groups * LANES, groups * LANES)
    for group in range(groups):
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
