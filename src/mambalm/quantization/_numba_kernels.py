"""Matrix times vector at the speed of memory, for weights in float32, bfloat16, 8 and 4 bits.

The innermost loops are written in LLVM's vectors of 16 floats, which every processor has or is given in pieces: left to
itself, LLVM does not vectorise products of small integers. Weights become float32 in registers, so nothing of the
activations is rounded. ROWS outputs are computed together and share the loads of x.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mambalm.ops.numba_support import f32
from mambalm.ops.numba_team import floats_at, job
from mambalm.quantization.schemes import ROWS

LANES = 16
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(size) for size in (8, 16, 32, 64))


def _vector(kind):  # type: ignore[no-untyped-def]
    return ir.VectorType(kind, LANES)


def _constant(kind, value):  # type: ignore[no-untyped-def]
    return ir.Constant(_vector(kind), [value] * LANES)


def _load(builder, address, offset, kind):  # type: ignore[no-untyped-def]
    pointer = builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())
    loaded = builder.load(pointer)
    loaded.align = 1
    return loaded


def _multiply_add(builder, a, b, c):  # type: ignore[no-untyped-def]
    kind = ir.FunctionType(_vector(_F32), [_vector(_F32)] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [a, b, c])


def _widen(builder, bits, kind, count=None):  # type: ignore[no-untyped-def]
    """bfloat16 bits as float32: a number, or a vector."""
    wide, target = (_I32, _F32) if count is None else (_vector(_I32), _vector(_F32))
    sixteen = _I32(16) if count is None else _constant(_I32, 16)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), sixteen), target)


def _scale(builder, address, index):  # type: ignore[no-untyped-def]
    """A bfloat16 scale in all lanes."""
    value = _widen(builder, _load(builder, address, 2 * index, _I16), _F32)
    single = builder.insert_element(ir.Constant(_vector(_F32), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(single, single, _constant(_I32, 0))


def _plain(load):  # type: ignore[no-untyped-def]
    """One vector of a weight that needs no scale, times x, added to the sum of a row."""

    def add(builder, weights, scales, x, offset, row, total):  # type: ignore[no-untyped-def]
        return _multiply_add(builder, load(builder, weights), x[0], total)

    return add


def _int8(builder, weights, scales, x, offset, row, total):  # type: ignore[no-untyped-def]
    part = _constant(_F32, 0.0)
    for k, values in enumerate(x):
        integers = _load(builder, weights, LANES * k, _vector(_I8))
        part = _multiply_add(builder, builder.sitofp(integers, _vector(_F32)), values, part)
    return _multiply_add(builder, part, _scale(builder, scales, row), total)


def _int4(builder, weights, scales, x, offset, row, total):  # type: ignore[no-untyped-def]
    """Nibbles stay where they are in their words: x comes divided by what that multiplies them with."""
    words = _load(builder, weights, 0, _vector(_I32))
    for half in range(2):
        part = _load(builder, offset, 4 * LANES * half, _vector(_F32))
        for k in range(4 * half, 4 * half + 4):
            if k < 7:
                integers = builder.and_(words, _constant(_I32, 15 << (4 * k)))
            else:
                integers = builder.lshr(words, _constant(_I32, 28))  # its highest bit would be a sign
            part = _multiply_add(builder, builder.sitofp(integers, _vector(_F32)), x[k], part)
        total = _multiply_add(builder, part, _scale(builder, scales, 2 * row + half), total)
    return total


class Format:
    """How a loop goes through a weight: vectors of x and bytes of weights and scales per row and turn, what it adds."""

    def __init__(self, vectors, weight_bytes, scale_bytes, add):  # type: ignore[no-untyped-def]
        self.vectors, self.weight_bytes, self.scale_bytes, self.add = vectors, weight_bytes, scale_bytes, add


_FORMATS = {
    "float32": Format(1, 64, 0, _plain(lambda b, w: _load(b, w, 0, _vector(_F32)))),
    "bfloat16": Format(1, 32, 0, _plain(lambda b, w: _widen(b, _load(b, w, 0, _vector(_I16)), _F32, LANES))),
    "int8": Format(4, 64, 2, _int8),
    "int4": Format(8, 64, 4, _int4),
}


def _dot(form):  # type: ignore[no-untyped-def]
    """ROWS sums over ``turns`` turns; row r of turn t is at weights + r * row_stride + t * turn_stride."""

    @intrinsic
    def dot(context, weights, row_stride, turn_stride, scales, x, offset, turns):  # type: ignore[no-untyped-def]
        result = types.UniTuple(types.float32, ROWS)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            weights, row_stride, turn_stride, scales, x, offset, turns = arguments
            totals = [cgutils.alloca_once_value(builder, _constant(_F32, 0.0)) for _ in range(ROWS)]
            with cgutils.for_range(builder, turns, intp=_I64) as loop:

                def at(base, stride):  # type: ignore[no-untyped-def]
                    return builder.add(base, builder.mul(loop.index, stride))

                here = at(weights, turn_stride)
                scale = at(scales, _I64(ROWS * form.scale_bytes))
                start = at(x, _I64(4 * LANES * form.vectors))
                vectors = [_load(builder, start, 4 * LANES * k, _vector(_F32)) for k in range(form.vectors)]
                for r, total in enumerate(totals):
                    row = builder.add(here, builder.mul(row_stride, _I64(r)))
                    arguments = (row, scale, vectors, at(offset, _I64(8 * LANES)), r, builder.load(total))
                    builder.store(form.add(builder, *arguments), total)
            kind = ir.FunctionType(_F32, [_F32, _vector(_F32)])
            add_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
            start = ir.Constant(_F32, -0.0)
            sums = [builder.call(add_up, [start, builder.load(t)], fastmath=("reassoc",)) for t in totals]
            return context.make_tuple(builder, result, sums)

        return result(*[types.int64] * 7), generate

    return dot


_dot_float32, _dot_bfloat16, _dot_int8, _dot_int4 = (_dot(form) for form in _FORMATS.values())

# The arguments of a product: addresses (0: none), flags, sizes and distances in bytes, in this order. Output row r is
# at WEIGHT + r ROW_BYTES for the first of a block; the others of the block, and their turns, are STRIDEs away.
(
    WEIGHT,
    SCALES,
    X,
    OFFSET,
    Y,
    BIAS,
    ADDED,
    OUT,
    ROWS_STORED,
    ROW_BYTES,
    SCALE_BYTES,
    ROW_STRIDE,
    TURN_STRIDE,
    TURNS,
    PER_CHUNK,
) = range(15)


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
    for r in range(block * ROWS - first, min(ROWS, a[OUT] - first)):
        value = sums[r]
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
        _finish(block, _dot_float32(row, a[ROW_STRIDE], a[TURN_STRIDE], 0, a[X], 0, a[TURNS]), a)


@job
def bfloat16(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a weight in bfloat16; x, bias and y are float32."""
    begin, end = _blocks(chunk, a)
    for block in range(begin, end):
        row = a[WEIGHT] + _first(block, a) * a[ROW_BYTES]
        _finish(block, _dot_bfloat16(row, a[ROW_STRIDE], a[TURN_STRIDE], 0, a[X], 0, a[TURNS]), a)


@job
def int8(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a packed weight of 8 bits; x comes from ``prepare``."""
    begin, end = _blocks(chunk, a)
    for block in range(begin, end):
        first = _first(block, a)
        row, scales = a[WEIGHT] + first * a[ROW_BYTES], a[SCALES] + first * a[SCALE_BYTES]
        _finish(block, _dot_int8(row, a[ROW_STRIDE], a[TURN_STRIDE], scales, a[X], a[OFFSET], a[TURNS]), a)


@job
def int4(chunk, a):  # type: ignore[no-untyped-def]
    """The same for a packed weight of 4 bits."""
    begin, end = _blocks(chunk, a)
    for block in range(begin, end):
        first = _first(block, a)
        row, scales = a[WEIGHT] + first * a[ROW_BYTES], a[SCALES] + first * a[SCALE_BYTES]
        _finish(block, _dot_int4(row, a[ROW_STRIDE], a[TURN_STRIDE], scales, a[X], a[OFFSET], a[TURNS]), a)


@job
def prepare(chunk, a):  # type: ignore[no-untyped-def]
    """x (a[0], of a[3] values) as a packed product reads it (a[1], whole vectors); for 4 bits (a[4]) also a[2].

    There, the k-th vector of eight is divided by 16^k, but for the last, and ``offset`` makes up for the 8 that is
    added to every value: a vector of lanes for each group.
    """
    size = a[3]
    x, padded = floats_at(a[0], size), floats_at(a[1], size)
    for i in range(size):
        padded[i] = x[i]
    if not a[4]:
        return
    turns = (size + 8 * LANES - 1) // (8 * LANES)
    vectors = floats_at(a[1], turns * 8 * LANES).reshape(turns, 8, LANES)
    offset = floats_at(a[2], turns * 2 * LANES).reshape(turns, 2, LANES)
    for t in range(turns):
        offset[t] = f32(0)
        factor = f32(1)
        for k in range(8):
            for lane in range(LANES):
                offset[t, k // 4, lane] -= f32(8) * vectors[t, k, lane]
                vectors[t, k, lane] *= factor
            factor = factor * f32(0.0625) if k < 6 else f32(1)
