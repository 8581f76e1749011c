"""ssd on a CPU, by numba: the block decomposition in chunks whose matrices stay in cache.

Batches are packed documents of equal length, so there is one path: a job of the forward is (document, head), one of the
backward (document, block of a group's heads). ``chunk_size`` is not used: the chunk is what fits the cache.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.numba_products import LANES, padded
from mambalm.ops.numba_support import document_offsets, floats, parallel, readable, rows, unsupported
from mambalm.ops.ssd import _numba_kernels as kernels
from mambalm.ops.ssd.arguments import Arguments

_KEPT = kernels.CHUNK * kernels.KEPT_EVERY  # tokens


def supports(call: Call) -> str | None:
    """float32, bfloat16 and float16 on a CPU."""
    return unsupported(call)


def checkpoint_shape(call: Call) -> tuple[int, ...]:
    """A state every KEPT_EVERY chunks of each document, (slots, h, n p) in the kernels' layout and filled up."""
    b, l, h = (call.sizes[letter] for letter in "blh")
    size = padded(call.sizes["p"], LANES) * padded(call.sizes["n"], LANES)
    return (b * l // _KEPT + call.sizes.get("s", b), h, size)


class _Inputs:
    """The arguments as a kernel reads them."""

    def __init__(self, given: Arguments) -> None:
        x, B = given.x, given.B
        b, l, self.h, self.p = x.shape
        self.groups, self.n = B.shape[2:]
        self.tokens = b * l
        self.offsets = document_offsets(x, given.cu_seqlens)
        self.documents = len(self.offsets) - 1
        self.read = readable(x, given.z)
        none = torch.empty(0, 1, dtype=self.read)
        self.activations = [self.flat(x), rows(none) if given.z is None else self.flat(given.z)]
        D = None if given.D is None else given.D.reshape(self.h, -1).expand(self.h, self.p)
        self.dt, self.A = floats(given.dt).reshape(self.tokens, self.h), floats(given.A)
        self.D, self.bias = floats(D, self.h * self.p).reshape(self.h, self.p), floats(given.dt_bias, self.h)
        self.steps = (given.dt_softplus, np.float32(given.dt_min), np.float32(given.dt_max))
        self.gated = given.z is not None
        counts = -(-np.diff(self.offsets) // kernels.CHUNK)
        self.chunks = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])  # of each document, the first
        self.work = self.tokens * self.h * self.p * self.n
        self.prepared = self._prepare(B, given.C, counts)

    def flat(self, t: Tensor) -> tuple[np.ndarray, int]:
        """(b, l, h, p) in the dtype that the kernels read, as ``rows`` of tokens."""
        return rows(t.to(self.read).flatten(2))

    def _prepare(self, B: Tensor, C: Tensor, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """B, C, C turned and C Bᵀ of each chunk and group."""
        documents = np.repeat(np.arange(self.documents), counts)
        within = np.arange(len(documents)) - self.chunks[documents]
        begins = self.offsets[documents] + within * kernels.CHUNK
        ends = np.minimum(begins + kernels.CHUNK, self.offsets[documents + 1])
        jobs, q, n = len(documents) * self.groups, kernels.CHUNK, padded(self.n, LANES)
        found = tuple(np.zeros((jobs, size), np.float32) for size in (q * n, q * n, q * n, q * q))
        given = [floats(t).reshape(self.tokens, self.groups, self.n) for t in (B, C)]
        parallel(kernels.prepare, jobs, jobs * q * q * n, (begins, ends, *given, *found))
        return found

    def states(self, t: Tensor | None) -> np.ndarray:
        """A state of each document; zero if None."""
        shape = (self.documents, self.h, self.p, self.n)
        return np.zeros(shape, np.float32) if t is None else floats(t)

    def leading(self) -> tuple[object, ...]:
        flat = itertools.chain(*self.activations)
        return (self.offsets, self.chunks, *flat, self.gated, self.dt, self.A, self.D, self.bias, *self.steps)


def forward(*arguments, final: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """y, the final state (empty unless asked for) and, if ``save``, the states that the backward starts from."""
    given = Arguments(*arguments)
    inputs = _Inputs(given)
    b, c, _, scores = inputs.prepared
    y = torch.empty(given.x.shape, dtype=inputs.read)
    initial = inputs.states(given.initial_state)
    final_state = torch.empty(initial.shape)
    slots = inputs.tokens // _KEPT + inputs.documents if save else 0
    kept = torch.zeros(slots, inputs.h, padded(inputs.p, LANES) * padded(inputs.n, LANES))
    rest = (b, c, scores, inputs.groups, initial, rows(y)[0], final_state.numpy(), save, kept.numpy())
    parallel(kernels.forward, inputs.documents * inputs.h, inputs.work, (*inputs.leading(), *rest))
    return y.to(given.x.dtype), final_state if final else torch.empty(0), kept if save else torch.empty(0)


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of x, dt, A, B, C, D, z, dt_bias and initial_state.

    Sums over heads are taken per block, then over the blocks; sums over documents per document, then over them: the
    order is fixed, so the result does not depend on the number of threads.
    """
    *tensors, kept = arguments
    given = Arguments(*tensors)
    inputs = _Inputs(given)
    b, c, turned, scores = inputs.prepared
    h, p, n, s = inputs.h, inputs.p, inputs.n, inputs.documents
    blocks = -(-h // inputs.groups // kernels.HEADS)  # of a group
    dx, dz = (torch.empty(given.x.shape, dtype=inputs.read) for _ in range(2))
    ddt = torch.empty(inputs.tokens, h)
    dB, dC = (torch.empty(inputs.groups * blocks, inputs.tokens, n) for _ in range(2))
    dA, dD, dinitial = torch.empty(s, h), torch.empty(s, h, p), torch.empty(s, h, p, n)
    leading = (*inputs.flat(dy), inputs.states(dfinal_state), kept.numpy(), *inputs.leading())
    rest = (b, c, scores, turned, inputs.groups, blocks)
    outputs = (rows(dx)[0], ddt.numpy(), rows(dz)[0], *(t.numpy() for t in (dA, dB, dC, dD, dinitial)))
    parallel(kernels.backward, s * inputs.groups * blocks, inputs.work, (*leading, *rest, *outputs))

    def over_blocks(t: Tensor) -> Tensor:
        summed = t.view(inputs.groups, blocks, inputs.tokens, n).sum(1)
        return summed.transpose(0, 1).contiguous().view(given.B.shape)

    return (
        dx,
        ddt.view(given.dt.shape),
        dA.sum(0),
        over_blocks(dB),
        over_blocks(dC),
        None if given.D is None else dD.sum(0).view(h, -1, given.D.numel() // h).sum(1).view(given.D.shape),
        None if given.z is None else dz,
        None if given.dt_bias is None else ddt.sum(0),
        None if given.initial_state is None else dinitial,
    )
