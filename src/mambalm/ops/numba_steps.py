"""The ops on one token of each row and on memory that stays where it is: jobs for a decode step, see ``numba_team``.

They run the kernels of the ops' CPU backends, or the inline functions those are made of; activations are float32,
one vector per row (b, d), whatever the model's dtype. States are updated in place, in the layout that suits the kernel.
"""

import numpy as np
import torch
from torch import Tensor

from mambalm.ops.causal_conv1d import _numba_kernels as conv_kernels
from mambalm.ops.numba_support import LOG2_E, exp2, f32, inline, part, sigmoid, softplus, sums
from mambalm.ops.numba_team import Job, float_of, floats_at, job, make
from mambalm.ops.rms_norm import _numba_kernels as norm_kernels
from mambalm.ops.selective_scan import _numba_kernels as scan_kernels


def _distance(x: Tensor | None) -> int:
    """Bytes between the rows of x (b, d)."""
    return 0 if x is None else x.stride(0) * x.itemsize


@job
def _norm(row, a):  # type: ignore[no-untyped-def]
    d, size = a[7], a[8]
    x, weight, y = floats_at(a[0] + row * a[1], d), floats_at(a[2], d), floats_at(a[3] + row * a[4], d)
    gate = floats_at(a[5] + row * a[6], d if a[5] else 0)
    none = floats_at(a[0], 0)
    eps = f32(float_of(a[9]))
    norm_kernels.forward(0, 1, 1, x, d, weight, gate, d, a[5] != 0, none, d, False, eps, size, y, none)


def norm(x: Tensor, weight: Tensor | None, y: Tensor, eps: float, gate: Tensor | None = None, size: int = 0) -> Job:
    """y (b, d) = weight x / rms(x), x silu(gate) in place of x if there is a gate, over groups of ``size`` channels."""
    b, d = x.shape
    weight = torch.ones(d) if weight is None else weight
    places = (x, _distance(x), weight, y, _distance(y), gate, _distance(gate))
    return make(_norm, b, *places, d, size or d, float(eps))


@inline
def _keep(kept, e, x):  # type: ignore[no-untyped-def]
    """Of channels from e on forget the oldest of the inputs kept (k - 1, d), and keep x."""
    last = kept.shape[0] - 1
    for i in range(last):
        older, newer = part(kept[i], e, x.size), part(kept[i + 1], e, x.size)
        for c in range(x.size):
            older[c] = newer[c]
    if last >= 0:
        newest = part(kept[last], e, x.size)
        for c in range(x.size):
            newest[c] = x[c]


@job
def _conv(chunk, a):  # type: ignore[no-untyped-def]
    d, taps, block = a[6], a[7], conv_kernels.BLOCK
    blocks = (d + block - 1) // block
    row, e = chunk // blocks, chunk % blocks * block
    width = min(block, d - e)
    x, y, bias = floats_at(a[0] + row * a[1], d), floats_at(a[5] + 4 * row * d, d), floats_at(a[4], d)
    kept = floats_at(a[2] + 4 * row * (taps - 1) * d, (taps - 1) * d).reshape(1, taps - 1, d)
    weight = floats_at(a[3], taps * d).reshape(taps, d)
    room, out = np.empty(block, f32), np.empty(block, f32)
    conv_kernels.convolve(0, 0, 0, e, width, x, d, weight, bias, kept, room, out)
    result = part(y, e, width)
    for c in range(width):
        result[c] = out[c] * sigmoid(out[c])
    _keep(kept[0], e, part(x, e, width))


def conv_silu(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Job:
    """y (b, d) = silu(convolution); ``kept`` (b, k - 1, d) are the inputs before x (b, d), weight is (k, d)."""
    b, d = x.shape
    chunks = b * -(-d // conv_kernels.BLOCK)
    return make(_conv, chunks, x, _distance(x), kept, weight, bias, y, d, len(weight))


class ScanState:
    """The states of a selective scan of b rows of d channels, laid out as its kernel works on them.

    Attributes:
        states: (b, blocks, n padded, BLOCK), zero in the padding.
        rates: A log2(e) in the same layout, without b.
    """

    def __init__(self, A: Tensor, rows: int) -> None:
        self.d, self.n = A.shape
        blocks = -(-self.d // scan_kernels.BLOCK)
        self.states = torch.zeros(rows, blocks, (self.n + 7) // 8 * 8, scan_kernels.BLOCK)
        self.rates = torch.zeros_like(self.states[0])
        self._write(self.rates, A * float(LOG2_E))

    def _write(self, target: Tensor, values: Tensor) -> None:
        padding = (0, 0, 0, target.shape[-3] * target.shape[-1] - self.d)
        padded = torch.nn.functional.pad(values.float(), padding)
        target[..., : self.n, :] = padded.unflatten(-2, (-1, target.shape[-1])).mT

    def write(self, state: Tensor) -> None:
        """Take the states (b, d, n)."""
        self._write(self.states, state)

    def read(self) -> Tensor:
        """A copy of the states (b, d, n)."""
        return self.states[..., : self.n, :].mT.flatten(1, 2)[:, : self.d].contiguous()


@job
def _scan(chunk, a):  # type: ignore[no-untyped-def]
    d, n, padded = a[12], a[13], a[14]
    block = scan_kernels.BLOCK
    blocks = (d + block - 1) // block
    row, e = chunk // blocks, chunk % blocks * block
    u, delta, z = floats_at(a[0] + 4 * row * d, d), floats_at(a[1] + 4 * row * d, d), floats_at(a[5] + row * a[6], d)
    B = floats_at(a[2] + row * a[4], n).reshape(1, 1, n)
    C = floats_at(a[3] + row * a[4], n).reshape(1, 1, n)
    D, bias, y = floats_at(a[7], d), floats_at(a[8], d), floats_at(a[9] + 4 * row * d, d)
    size = padded * block
    h = floats_at(a[10] + 4 * chunk * size, size).reshape(padded, block)
    rate = floats_at(a[11] + 4 * (chunk % blocks) * size, size).reshape(padded, block)
    rows, b, c = np.zeros((5, block), f32), np.zeros(padded, f32), np.zeros(padded, f32)
    width = min(block, d - e)
    scan_kernels.advance(0, 0, e, width, u, d, delta, d, z, d, True, True, B, C, D, bias, y, h, rate, rows, b, c)


def selective_scan(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, y: Tensor, state: ScanState
) -> Job:
    """y (b, d) of a step with softplus and gate; u, delta, z (b, d), D, bias (d), B and C (b, n) of one matrix."""
    b, blocks, padded, _ = state.states.shape
    inputs = (u, delta, B, C, _distance(B), z, _distance(z), D, bias)
    return make(_scan, b * blocks, *inputs, y, state.states, state.rates, state.d, state.n, padded)


@sums
def _head_channel(h, decay, inflow, b, c):  # type: ignore[no-untyped-def]
    """h = decay h + inflow b of one channel's states; C h."""
    y = f32(0)
    for i in range(h.size):
        value = h[i] * decay + inflow * b[i]
        h[i] = value
        y += value * c[i]
    return y


@job
def _ssd(chunk, a):  # type: ignore[no-untyped-def]
    heads, p, n, groups = a[12], a[13], a[14], a[15]
    row, head = chunk // heads, chunk % heads
    mixed, own = row * a[10], row * a[11]
    dt, A, bias = floats_at(a[1] + own, heads), floats_at(a[2], heads), floats_at(a[6], heads)
    group = 4 * (head // (heads // groups)) * n
    b, c = floats_at(a[3] + mixed + group, n), floats_at(a[4] + mixed + group, n)
    x, D = floats_at(a[0] + mixed + 4 * head * p, p), floats_at(a[5] + 4 * head * p, p)
    y, h = floats_at(a[7] + 4 * chunk * p, p), floats_at(a[8] + 4 * chunk * p * n, p * n)
    z = floats_at(a[9] + own + 4 * head * p, p if a[9] else 0)
    low, high = f32(float_of(a[16])), f32(float_of(a[17]))
    step = min(max(softplus(dt[head] + bias[head]), low), high)
    decay = exp2(step * A[head] * LOG2_E)
    for j in range(p):
        y[j] = _head_channel(part(h, j * n, n), decay, step * x[j], b, c) + D[j] * x[j]
    for j in range(z.size):
        y[j] *= z[j] / (f32(1) + exp2(-z[j] * LOG2_E))


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    y: Tensor,
    state: Tensor,
    z: Tensor | None,
    limits: tuple[float, float],
) -> Job:
    """y (r, h p) of a step of r rows with softplus; the state (r, h, p, n) in place.

    x (r, h p), B and C (r, g n) are of one matrix, as are dt (r, h) and z (r, h p); D (h p), A and bias (h).
    """
    rows, h, p, n = state.shape
    sizes = (h, p, n, B.shape[1] // n)
    places = (x, dt, A, B, C, D, bias, y, state, z, _distance(x), _distance(dt))
    return make(_ssd, rows * h, *places, *sizes, *map(float, limits))
