"""Triton kernels of a decode step on memory that stays where it is; ``triton_steps`` says what each computes.

Sums are float32 and in a fixed order. With ``OVERLAP`` (programmatic dependent launch: CUDA programming guide, section
4.5) a kernel starts while the one before it still runs, fetches the weights that it needs, which no kernel writes, and
waits for that one only then. Its own state may be fetched early too: the kernel that wrote it is a whole step away.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mambalm.ops.ssd._triton_kernels import limited
from mambalm.ops.triton_support import sigmoid, softplus


@triton.jit
def _begin(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start as soon as every program of this one has."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def _wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the kernels before are done and what they wrote can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def _fetch(matrix, rows, valid, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a matrix (r, K) as a tuple of tiles."""
    tiles = ()
    for start in tl.static_range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = valid[:, None] & (columns < K)[None, :]
        at = matrix + rows.to(tl.int64)[:, None] * K + columns[None, :]
        tile = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005, Triton knows no stars
    return tiles


@triton.jit
def _across(vector, columns, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A piece of a vector (K), repeated (ROWS, BLOCK): every thread loads what it needs for its part of a matrix, since
    exchanging it between threads would take barriers."""
    at = tl.broadcast_to((vector + columns)[None, :], (ROWS, BLOCK))
    mask = tl.broadcast_to((columns < K)[None, :], (ROWS, BLOCK))
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _product(tiles, x, scale, eps, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tiles times x (K), which is normalised and scaled first with NORM."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        columns = i * BLOCK + tl.arange(0, BLOCK)
        part = _across(x, columns, K, ROWS, BLOCK)
        if NORM:
            squares += part * part
            part = part * _across(scale, columns, K, ROWS, BLOCK)
        total += tiles[i].to(tl.float32) * part
    y = tl.sum(total, 1)
    if NORM:
        y = y * tl.rsqrt(tl.sum(squares, 1) / K + eps)
    return y


@triton.jit
def _fetch_taps(channel, inside, on, row, state, weight, bias, channels, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a convolution needs beside the newest input: the inputs before it at (channel, row), weights and bias."""
    older, taps = (), ()
    kept = state + row.to(tl.int64) * channels * (TAPS - 1) + channel
    for tap in tl.static_range(TAPS - 1):
        older = older + (tl.load(kept + tap * channels, mask=on, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    for tap in tl.static_range(TAPS):
        part = tl.load(weight + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        taps = taps + (part,)  # type: ignore[assignment]  # noqa: RUF005
    shift = tl.zeros_like(taps[0])  # type: ignore[misc]
    if bias is not None:
        shift += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return older, taps, shift


@triton.jit
def _convolved(x, older, taps, shift, channel, on, row, state, channels, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu of the convolution at channels whose newest input is x; the state (b, TAPS - 1, d) moves on."""
    newest = x.to(state.dtype.element_ty)
    y = shift + newest.to(tl.float32) * taps[TAPS - 1]
    kept = state + row.to(tl.int64) * channels * (TAPS - 1) + channel
    for tap in tl.static_range(TAPS - 1):
        y += older[tap].to(tl.float32) * taps[tap]
        if tap > 0:
            tl.store(kept + (tap - 1) * channels, older[tap], mask=on)
    if TAPS > 1:
        tl.store(kept + (TAPS - 2) * channels, newest, mask=on)
    return y * sigmoid(y)


@triton.jit
def enter_one(  # type: ignore[no-untyped-def]
    x,
    scale,
    eps,
    weight,
    bias,
    conv_weight,
    conv_bias,
    conv_state,
    u,
    rest,
    rows_total,
    first,
    channels,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The rows [first, first + channels) pass the convolution into u, the others go into rest, one behind the other."""
    _begin(OVERLAP)
    begin = tl.program_id(0) * ROWS
    rows = begin + tl.arange(0, ROWS)
    valid = rows < rows_total
    tiles = _fetch(weight, rows, valid, K, BLOCK)
    channel = rows - first
    inner = (channel >= 0) & (channel < channels)
    older, taps, shift = _fetch_taps(
        channel, inner, inner, rows * 0, conv_state, conv_weight, conv_bias, channels, TAPS
    )
    _wait(OVERLAP)
    y = _product(tiles, x, scale, eps, K, BLOCK, ROWS, True)
    if bias is not None:
        y += tl.load(bias + rows, mask=valid, other=0.0).to(tl.float32)
    if (begin + ROWS > first) & (begin < first + channels):
        gated = _convolved(y, older, taps, shift, channel, inner, rows * 0, conv_state, channels, TAPS)
        tl.store(u + channel, gated.to(u.dtype.element_ty), mask=inner)
    apart = (channel < 0) | (channel >= channels)
    at = tl.where(channel < 0, rows, rows - channels)
    tl.store(rest + at, y.to(rest.dtype.element_ty), mask=valid & apart)


@triton.jit
def split_one(  # type: ignore[no-untyped-def]
    x, weight, shares, rows_total, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    _begin(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < rows_total
    mask = valid[:, None] & (columns < K)[None, :]
    tile = tl.load(weight + rows[:, None] * K + columns[None, :], mask=mask, other=0.0)
    _wait(OVERLAP)
    y = tl.sum(tile.to(tl.float32) * _across(x, columns, K, ROWS, BLOCK), 1)
    tl.store(shares + tl.program_id(1) * rows_total + rows, y, mask=valid)


@triton.jit
def project_one(  # type: ignore[no-untyped-def]
    x,
    scale,
    eps,
    weight,
    bias,
    y,
    rows_total,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < rows_total
    tiles = _fetch(weight, rows, valid, K, BLOCK)
    before = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        before += tl.load(bias + rows, mask=valid, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    if ADD:
        before += tl.load(y + rows, mask=valid, other=0.0).to(tl.float32)
    result = before + _product(tiles, x, scale, eps, K, BLOCK, ROWS, NORM)
    tl.store(y + rows, result.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _summed(shares, columns, on, row, batch, width, SHARES: tl.constexpr, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of shares (SHARES, batch, width) at a row's columns, in their order within a tree."""
    share = tl.arange(0, MOST)
    at = shares + (share[:, None] * batch + row) * width + columns[None, :]
    return tl.sum(tl.load(at, mask=(share < SHARES)[:, None] & on[None, :], other=0.0).to(tl.float32), 0)


@triton.jit
def _advanced(h, step, x, gate, B, C, rate, skip):  # type: ignore[no-untyped-def]
    """The states (channels, n) after a step, and the gated output; step and bias are summed already."""
    step = softplus(step)
    h = h * tl.exp2(step[:, None] * rate) + (step * x)[:, None] * B[None, :]
    y = tl.sum(h * C[None, :], 1) + skip * x
    return h, y * gate * sigmoid(gate)


@triton.jit
def _lowered(  # type: ignore[no-untyped-def]
    shares,
    row,
    batch,
    eps,
    N: tl.constexpr,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    SHARES: tl.constexpr,
    MOST: tl.constexpr,
    NORM: tl.constexpr,
):
    """A row's input of dt_proj, B and C from the shares of x_proj's output; normalised on request."""
    column, n = tl.arange(0, K), tl.arange(0, STATES)
    width: tl.constexpr = RANK + 2 * N
    low = _summed(shares, column, column < RANK, row, batch, width, SHARES, MOST)
    B = _summed(shares, RANK + n, n < N, row, batch, width, SHARES, MOST)
    C = _summed(shares, RANK + N + n, n < N, row, batch, width, SHARES, MOST)
    if NORM:
        low = low * tl.rsqrt(tl.sum(low * low) / RANK + eps)
        B = B * tl.rsqrt(tl.sum(B * B) / N + eps)
        C = C * tl.rsqrt(tl.sum(C * C) / N + eps)
    return low, B, C


@triton.jit
def scan_one(  # type: ignore[no-untyped-def]
    shares,
    weight,
    bias,
    rates,
    D,
    u,
    z,
    state,
    y,
    eps,
    channels,
    N: tl.constexpr,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    SHARES: tl.constexpr,
    MOST: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column, n = tl.arange(0, K), tl.arange(0, STATES)
    inner, ranked = channel < channels, column < RANK
    tile = tl.load(weight + channel[:, None] * RANK + column[None, :], mask=inner[:, None] & ranked[None, :], other=0.0)
    both = inner[:, None] & (n < N)[None, :]
    offset = channel[:, None] * N + n[None, :]
    rate = tl.load(rates + offset, mask=both, other=0.0)
    skip = tl.load(D + channel, mask=inner, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inner, other=0.0).to(tl.float32)
    h = tl.load(state + offset, mask=both, other=0.0)
    _wait(OVERLAP)
    x = tl.load(u + channel, mask=inner, other=0.0).to(tl.float32)
    gate = tl.load(z + channel, mask=inner, other=0.0).to(tl.float32)
    low, B, C = _lowered(shares, 0, 1, eps, N, STATES, RANK, K, SHARES, MOST, NORM)
    step = tl.sum(tile.to(tl.float32) * low[None, :], 1) + shift
    h, result = _advanced(h, step, x, gate, B, C, rate, skip)
    tl.store(state + offset, h, mask=both)
    tl.store(y + channel, result.to(y.dtype.element_ty), mask=inner)


@triton.jit
def lower(  # type: ignore[no-untyped-def]
    shares,
    low,
    BC,
    batch,
    eps,
    N: tl.constexpr,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    SHARES: tl.constexpr,
    MOST: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    row, column, n = tl.program_id(0), tl.arange(0, K), tl.arange(0, STATES)
    _wait(OVERLAP)
    rank, B, C = _lowered(shares, row, batch, eps, N, STATES, RANK, K, SHARES, MOST, NORM)
    tl.store(low + row * RANK + column, rank.to(low.dtype.element_ty), mask=column < RANK)
    tl.store(BC + row * 2 * N + n, B, mask=n < N)
    tl.store(BC + row * 2 * N + N + n, C, mask=n < N)


@triton.jit
def scan(  # type: ignore[no-untyped-def]
    steps,
    BC,
    bias,
    rates,
    D,
    u,
    z,
    state,
    y,
    channels,
    z_row,
    N: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    channel, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    row = tl.program_id(1)
    inner, kept = channel < channels, n < N
    both = inner[:, None] & kept[None, :]
    offset = channel[:, None] * N + n[None, :]
    own = state + row.to(tl.int64) * channels * N + offset
    rate = tl.load(rates + offset, mask=both, other=0.0)
    skip = tl.load(D + channel, mask=inner, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inner, other=0.0).to(tl.float32)
    h = tl.load(own, mask=both, other=0.0)
    _wait(OVERLAP)
    at = row.to(tl.int64) * channels + channel
    step = shift + tl.load(steps + at, mask=inner, other=0.0).to(tl.float32)
    x = tl.load(u + at, mask=inner, other=0.0).to(tl.float32)
    gate = tl.load(z + row.to(tl.int64) * z_row + channel, mask=inner, other=0.0).to(tl.float32)
    B = tl.load(BC + row * 2 * N + n, mask=kept, other=0.0)
    C = tl.load(BC + row * 2 * N + N + n, mask=kept, other=0.0)
    h, result = _advanced(h, step, x, gate, B, C, rate, skip)
    tl.store(own, h, mask=both)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inner)


@triton.jit
def normalise(  # type: ignore[no-untyped-def]
    x,
    branch,
    bias,
    scale,
    y,
    eps,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A group of K channels of a row; a row has as many groups as there are programs along axis 1. The shares of the
    branch (SHARES, b, ...) are added first."""
    _begin(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    on = column < K
    weight = tl.load(scale + group * K + column, mask=on, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    at = (row * tl.num_programs(1) + group) * K + column
    stream = tl.load(x + at, mask=on, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + at, mask=on, other=0.0).to(tl.float32)
        for share in tl.static_range(1, SHARES):
            more = share * tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * K
            added += tl.load(branch + more + at, mask=on, other=0.0).to(tl.float32)
        stream += added
        if bias is not None:
            stream += tl.load(bias + column, mask=on, other=0.0).to(tl.float32)
        rounded = stream.to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=on)
        stream = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(stream * stream) / K + eps)
    tl.store(y + at, (stream * root * weight).to(y.dtype.element_ty), mask=on)


@triton.jit
def convolve(  # type: ignore[no-untyped-def]
    inner,
    conv_weight,
    conv_bias,
    conv_state,
    u,
    channels,
    inner_row,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    channel, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    on = channel < channels
    older, taps, shift = _fetch_taps(channel, on, on, row, conv_state, conv_weight, conv_bias, channels, TAPS)
    _wait(OVERLAP)
    x = tl.load(inner + row.to(tl.int64) * inner_row + channel, mask=on, other=0.0).to(tl.float32)
    gated = _convolved(x, older, taps, shift, channel, on, row, conv_state, channels, TAPS)
    tl.store(u + row.to(tl.int64) * channels + channel, gated.to(u.dtype.element_ty), mask=on)


@triton.jit
def heads(  # type: ignore[no-untyped-def]
    xBC,
    z,
    dt,
    bias,
    rates,
    D,
    state,
    y,
    least,
    most,
    heads_total,
    per_group,
    channels,
    z_row,
    N: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A step of Mamba-2: BLOCK channels of a head; z and dt are z_row elements apart from row to row."""
    _begin(OVERLAP)
    blocks = tl.cdiv(channels, BLOCK)
    head, row = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    p, n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    inside, known = p < channels, n < N
    both = inside[:, None] & known[None, :]
    cells = state + (row * heads_total + head) * channels * N + p[:, None] * N + n[None, :]
    channel, total = head * channels + p, heads_total * channels
    rate = tl.load(rates + head)
    shift = tl.load(bias + head)
    skip = tl.load(D + channel, mask=inside, other=0.0)
    h = tl.load(cells, mask=both, other=0.0)
    _wait(OVERLAP)
    groups = heads_total // per_group
    own = xBC + row * (total + 2 * groups * N)
    of_group = own + total + head // per_group * N + n
    x = tl.load(own + channel, mask=inside, other=0.0).to(tl.float32)
    B = tl.load(of_group, mask=known, other=0.0).to(tl.float32)
    C = tl.load(of_group + groups * N, mask=known, other=0.0).to(tl.float32)
    _, step = limited(tl.load(dt + row * z_row + head).to(tl.float32) + shift, least, most, True)
    gate = tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32)
    h = tl.exp2(step * rate) * h + (step * x)[:, None] * B[None, :]
    result = (tl.sum(h * C[None, :], 1) + skip * x) * gate * sigmoid(gate)
    tl.store(cells, h, mask=both)
    tl.store(y + row * total + channel, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate(  # type: ignore[no-untyped-def]
    inner, y, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """A gated MLP between its projections: y (b, width) of inner (b, 2 width)."""
    _begin(OVERLAP)
    channel, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    on = channel < width
    _wait(OVERLAP)
    x = tl.load(inner + row * 2 * width + channel, mask=on, other=0.0).to(tl.float32)
    opening = tl.load(inner + row * 2 * width + width + channel, mask=on, other=0.0).to(tl.float32)
    tl.store(y + row * width + channel, (x * opening * sigmoid(opening)).to(y.dtype.element_ty), mask=on)
