"""Products of small float32 matrices inside numba kernels: a tile of the result stays in registers.

Matrices lie in flat arrays, at an offset and with a distance between rows; the left one also has a distance between
columns, so that it may be the transpose of what lies in memory. The pattern is written in LLVM's generic vectors, of
which it makes what the processor has.
"""

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mambalm.ops.numba_support import CACHE, FAST, f32

_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f"))
# A tile of ROWS times two vectors of LANES must fit into the registers with its operands.
LANES = 16 if _AVX512 else 8
ROWS = 8 if _AVX512 else 4
# Which tiles and terms a product takes: all; with a lower or upper triangular left factor; the lower tiles only.
FULL, LOWER, UPPER, BELOW = 0, 1, 2, 3

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_I64 = ir.IntType(64)


def _load(builder, base, offset):  # type: ignore[no-untyped-def]
    pointer = builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())
    loaded = builder.load(pointer)
    loaded.align = 4
    return loaded


def _store(builder, value, base, offset):  # type: ignore[no-untyped-def]
    stored = builder.store(value, builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer()))
    stored.align = 4


def _spread(builder, value):  # type: ignore[no-untyped-def]
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _sum_of_products(builder, first, last, left, right, width):  # type: ignore[no-untyped-def]
    """The sums over k from first to last, as ROWS lists of ``width`` vectors."""
    (a, a_at, a_row, a_step), (b, b_at, b_row) = left, right
    rows = [builder.add(a_at, builder.mul(_I64(i), a_row)) for i in range(ROWS)]
    before = builder.basic_block
    check, body, after = (builder.append_basic_block(name) for name in ("check", "body", "after"))
    builder.branch(check)
    builder.position_at_end(check)
    k = builder.phi(_I64)
    sums = [[builder.phi(_VECTOR) for _ in range(width)] for _ in range(ROWS)]
    builder.cbranch(builder.icmp_signed("<", k, last), body, after)
    builder.position_at_end(body)
    b_start, a_start = builder.add(b_at, builder.mul(k, b_row)), builder.mul(k, a_step)
    vectors = [_load(builder, b, builder.add(b_start, _I64(LANES * v))) for v in range(width)]
    k.add_incoming(first, before)
    for row, totals in zip(rows, sums, strict=True):
        factor = _spread(builder, builder.load(builder.gep(a, [builder.add(row, a_start)])))
        for total, vector in zip(totals, vectors, strict=True):
            product = builder.fmul(factor, vector, flags=("contract",))
            total.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
            total.add_incoming(builder.fadd(total, product, flags=("contract",)), body)
    k.add_incoming(builder.add(k, _I64(1)), body)
    builder.branch(check)
    builder.position_at_end(after)
    return sums


def _tile(width):  # type: ignore[no-untyped-def]
    """c = beta c + the sum over k from first to last of a[:, k] b[k, :], for ROWS rows and ``width`` vectors.

    c is not read if beta is 0.
    """

    @intrinsic
    def tile(context, a, a_at, a_row, a_step, b, b_at, b_row, first, last, c, c_at, c_row, beta):  # type: ignore[no-untyped-def]
        flat, i64 = types.Array(types.float32, 1, "C"), types.int64
        signature = types.void(flat, i64, i64, i64, flat, i64, i64, i64, i64, flat, i64, i64, types.float32)

        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            a, b, c = (context.make_array(flat)(context, builder, values[i]).data for i in (0, 4, 9))
            left, right = (a, *values[1:4]), (b, *values[5:7])
            sums = _sum_of_products(builder, values[7], values[8], left, right, width)
            places = [
                [
                    builder.add(builder.add(values[10], _I64(LANES * v)), builder.mul(_I64(i), values[11]))
                    for v in range(width)
                ]
                for i in range(ROWS)
            ]
            nothing = ir.Constant(ir.FloatType(), 0.0)
            with builder.if_else(builder.fcmp_ordered("==", values[12], nothing)) as (fresh, kept):
                with fresh:
                    for totals, row in zip(sums, places, strict=True):
                        for total, place in zip(totals, row, strict=True):
                            _store(builder, total, c, place)
                with kept:
                    factor = _spread(builder, values[12])
                    for totals, row in zip(sums, places, strict=True):
                        for total, place in zip(totals, row, strict=True):
                            old = builder.fmul(factor, _load(builder, c, place), flags=("contract",))
                            _store(builder, builder.fadd(old, total, flags=("contract",)), c, place)
            return context.get_dummy_value()

        return signature, generate

    return tile


_wide, _narrow = _tile(2), _tile(1)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def multiply(rows, columns, depth, a, a_at, a_row, a_step, b, b_at, b_row, c, c_at, c_row, beta, mode):  # type: ignore[no-untyped-def]
    """c (rows, columns) = beta c + a (rows, depth) b (depth, columns).

    rows are rounded up to a multiple of ROWS and columns to one of LANES: what lies there is read and written. c is not
    read if beta is 0. LOWER: a[i, k] counts as 0 for k > i; UPPER: for k < i; BELOW: tiles above the diagonal of c stay
    as they are. In all of these the tiles on the diagonal are computed whole.
    """
    beta = f32(beta)
    for j in range(0, columns, 2 * LANES):
        for i in range(0, rows, ROWS):
            first = i if mode == UPPER else 0
            last = min(i + ROWS, depth) if mode == LOWER else depth
            if mode == BELOW and j >= i + ROWS:
                continue
            left, target = a_at + i * a_row, c_at + i * c_row + j
            if j + LANES < columns:
                _wide(a, left, a_row, a_step, b, b_at + j, b_row, first, last, c, target, c_row, beta)
            else:
                _narrow(a, left, a_row, a_step, b, b_at + j, b_row, first, last, c, target, c_row, beta)


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up."""
    return -(-size // multiple) * multiple
