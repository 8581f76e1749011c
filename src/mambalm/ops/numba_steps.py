"""The ops on one token and on memory that stays where it is: jobs for a decode step, see ``numba_team``.

They run the kernels of the ops' CPU backends, or the inline functions those are made of; activations are float32
vectors whatever the model's dtype. States are updated in place, in the layout that suits the kernel.
"""

import numpy as np
import torch
from torch import Tensor

from mambalm.ops.causal_conv1d import _numba_kernels as conv_kernels
from mambalm.ops.numba_support import LOG2_E, exp2, f32, inline, part, softplus, sums
from mambalm.ops.numba_team import Job, float_of, floats_at, integers_at, job, make
from mambalm.ops.rms_norm import _numba_kernels as norm_kernels
from mambalm.ops.selective_scan import _numba_kernels as scan_kernels

_ONE_TOKEN = np.array([0, 1], np.int64)  # offsets of documents, or of their tiles


@job
def _norm(chunk, a):  # type: ignore[no-untyped-def]
    d, size = a[4], a[5]
    x, weight, y = floats_at(a[0], d), floats_at(a[1], d), floats_at(a[2], d)
    gate = floats_at(a[3], d if a[3] else 0)
    none = floats_at(a[0], 0)
    eps = f32(float_of(a[6]))
    norm_kernels.forward(0, 1, 1, x, d, weight, gate, d, a[3] != 0, none, d, False, eps, size, y, none)


def norm(x: Tensor, weight: Tensor | None, y: Tensor, eps: float, gate: Tensor | None = None, size: int = 0) -> Job:
    """y (d) = weight x / rms(x), x silu(gate) in place of x if there is a gate, over groups of ``size`` channels."""
    d = x.numel()
    weight = torch.ones(d) if weight is None else weight
    return make(_norm, 1, x, weight, y, gate, d, size or d, float(eps))


@inline
def _keep(kept, x):  # type: ignore[no-untyped-def]
    """Forget the oldest of the inputs kept (k - 1, d) and keep x."""
    last = kept.shape[0] - 1
    for i in range(last):
        for c in range(x.size):
            kept[i, c] = kept[i + 1, c]
    if last >= 0:
        for c in range(x.size):
            kept[last, c] = x[c]


@job
def _conv(chunk, a):  # type: ignore[no-untyped-def]
    d, taps = a[5], a[6]
    x, y, bias = floats_at(a[0], d), floats_at(a[4], d), floats_at(a[3], d)
    kept = floats_at(a[1], (taps - 1) * d).reshape(1, taps - 1, d)
    weight = floats_at(a[2], taps * d).reshape(taps, d)
    one = integers_at(a[7], 2)
    conv_kernels.forward(0, 1, one, one, x, d, weight, bias, True, kept, y)
    _keep(kept[0], x)


def conv_silu(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Job:
    """y (d) = silu(convolution); ``kept`` (k - 1, d) are the inputs before x, weight is (k, d)."""
    return make(_conv, 1, x, kept, weight, bias, y, x.numel(), len(weight), _ONE_TOKEN)


class ScanState:
    """The states of a selective scan of d channels, laid out as its kernel works on them.

    Attributes:
        states: (blocks, n padded, BLOCK), zero in the padding.
        rates: A log2(e) in the same layout.
    """

    def __init__(self, A: Tensor) -> None:
        self.d, self.n = A.shape
        blocks = -(-self.d // scan_kernels.BLOCK)
        self.states = torch.zeros(blocks, (self.n + 7) // 8 * 8, scan_kernels.BLOCK)
        self.rates = torch.zeros_like(self.states)
        self._write(self.rates, A * float(LOG2_E))

    def _write(self, target: Tensor, values: Tensor) -> None:
        padding = (0, 0, 0, target.shape[0] * target.shape[2] - self.d)
        padded = torch.nn.functional.pad(values.float(), padding)
        target[:, : self.n] = padded.unflatten(0, (-1, target.shape[2])).mT

    def write(self, state: Tensor) -> None:
        """Take the states (d, n)."""
        self._write(self.states, state)

    def read(self) -> Tensor:
        """A copy of the states (d, n)."""
        return self.states[:, : self.n].mT.flatten(0, 1)[: self.d].contiguous()


@job
def _scan(chunk, a):  # type: ignore[no-untyped-def]
    d, n, padded = a[9], a[10], a[11]
    block = scan_kernels.BLOCK
    u, delta, z, y = floats_at(a[0], d), floats_at(a[1], d), floats_at(a[4], d), floats_at(a[7], d)
    B, C = floats_at(a[2], n).reshape(1, 1, n), floats_at(a[3], n).reshape(1, 1, n)
    D, bias = floats_at(a[5], d), floats_at(a[6], d)
    size = padded * block
    h = floats_at(a[8] + 4 * chunk * size, size).reshape(padded, block)
    rate = floats_at(a[12] + 4 * chunk * size, size).reshape(padded, block)
    rows, b, c = np.zeros((5, block), f32), np.zeros(padded, f32), np.zeros(padded, f32)
    e = chunk * block
    width = min(block, d - e)
    scan_kernels.advance(0, 0, e, width, u, d, delta, d, z, d, True, True, B, C, D, bias, y, h, rate, rows, b, c)


def selective_scan(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, y: Tensor, state: ScanState
) -> Job:
    """y (d) of a step with softplus and gate; u, delta, z, D, bias (d), B and C (n)."""
    blocks, padded, _ = state.states.shape
    sizes = (state.d, state.n, padded)
    return make(_scan, blocks, u, delta, B, C, z, D, bias, y, state.states, *sizes, state.rates)


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
    heads, p, n, groups = a[10], a[11], a[12], a[13]
    dt, A, bias = floats_at(a[1], heads), floats_at(a[2], heads), floats_at(a[6], heads)
    group = chunk // (heads // groups)
    b, c = floats_at(a[3] + 4 * group * n, n), floats_at(a[4] + 4 * group * n, n)
    x, D = floats_at(a[0] + 4 * chunk * p, p), floats_at(a[5] + 4 * chunk * p, p)
    y, h = floats_at(a[7] + 4 * chunk * p, p), floats_at(a[8] + 4 * chunk * p * n, p * n)
    z = floats_at(a[9] + 4 * chunk * p, p if a[9] else 0)
    low, high = f32(float_of(a[14])), f32(float_of(a[15]))
    step = min(max(softplus(dt[chunk] + bias[chunk]), low), high)
    decay = exp2(step * A[chunk] * LOG2_E)
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
    """y (h p) of a step with softplus; x, D, z (h p), dt, A, bias (h), B and C (g n), state (h, p, n) in place."""
    h, p, n = state.shape
    sizes = (h, p, n, B.numel() // n)
    return make(_ssd, h, x, dt, A, B, C, D, bias, y, state, z, *sizes, *map(float, limits))
