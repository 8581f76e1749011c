"""The selective scan on a CPU, by numba: a block of channels keeps its states in cache and walks through time.

Batches are packed documents of equal length, so there is one path: a job is (document, block of channels).
"""

import numpy as np
import torch
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.numba_support import document_offsets, floats, parallel, readable, rows, unsupported
from mambalm.ops.selective_scan import _numba_kernels as kernels
from mambalm.ops.selective_scan.arguments import Arguments


def supports(call: Call) -> str | None:
    """float32, bfloat16 and float16 on a CPU."""
    return unsupported(call)


def checkpoint_shape(call: Call) -> tuple[int, ...]:
    """A state every KEPT_EVERY steps of each document, (slots, n, d); slots as in ``_numba_kernels``."""
    b, l = call.sizes["b"], call.sizes["l"]
    return (b * l // kernels.KEPT_EVERY + call.sizes.get("s", b), call.sizes["n"], call.sizes["d"])


class _Inputs:
    """The arguments as a kernel reads them."""

    def __init__(self, given: Arguments) -> None:
        u, A, B, C, z = given.u, given.A, given.B, given.C, given.z
        b, l, d = u.shape
        self.n, self.groups = A.shape[1], B.shape[2]
        self.offsets = document_offsets(u, given.cu_seqlens)
        self.documents = len(self.offsets) - 1
        self.read = readable(u, given.delta, z)
        none = torch.empty(0, 1, dtype=self.read)
        self.activations = [rows(none if t is None else t.to(self.read)) for t in (u, given.delta, z)]
        self.flags = (z is not None, given.delta_softplus)
        self.parameters = (floats(A), floats(B), floats(C), floats(given.D, d), floats(given.delta_bias, d))
        shape = (self.documents, d, self.n)
        self.initial = np.zeros(shape, np.float32) if given.initial_state is None else floats(given.initial_state)
        self.blocks = -(-d // self.groups // kernels.BLOCK)  # of a group
        self.jobs = self.documents * self.groups * self.blocks
        self.work = b * l * d * self.n

    def leading(self) -> tuple[object, ...]:
        flat = [part for pair in self.activations for part in pair]
        b, c = (t.reshape(-1, self.groups, self.n) for t in self.parameters[1:3])
        return (self.offsets, *flat, *self.flags, self.parameters[0], b, c, *self.parameters[3:], self.initial)


def forward(*arguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """y, the final state and, if ``save``, the states that the backward starts from; arguments as in the interface."""
    given = Arguments(*arguments)
    inputs = _Inputs(given)
    u, A = given.u, given.A
    y = torch.empty(u.shape, dtype=inputs.read)
    final_state = torch.empty(inputs.documents, *A.shape)
    slots = inputs.offsets[-1] // kernels.KEPT_EVERY + inputs.documents if save else 0
    kept = torch.zeros(slots, A.shape[1], A.shape[0])
    outputs = (rows(y)[0], final_state.numpy(), save, kept.numpy())
    parallel(kernels.forward, inputs.jobs, inputs.work, (*inputs.leading(), *outputs))
    return y.to(u.dtype), final_state, kept if save else torch.empty(0)


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state.

    Sums over channels are taken per block, then over the blocks; sums over documents per document, then over them:
    the order is fixed, so the result does not depend on the number of threads.
    """
    *tensors, kept = arguments
    given = Arguments(*tensors)
    inputs = _Inputs(given)
    u, n, s = given.u, given.A.shape[1], inputs.documents
    l, d = u.shape[0] * u.shape[1], u.shape[2]
    du, ddelta, dz = (torch.empty(u.shape, dtype=inputs.read) for _ in range(3))
    dB, dC = (torch.zeros(inputs.groups * inputs.blocks, l, n) for _ in range(2))
    dA, dinitial = torch.empty(s, d, n), torch.empty(s, d, n)
    dD, dbias = torch.empty(s, d), torch.empty(s, d)
    dfinal = np.zeros((s, d, n), np.float32) if dfinal_state is None else floats(dfinal_state)
    outputs = (*(rows(t)[0] for t in (du, ddelta, dz)), *(t.numpy() for t in (dA, dB, dC, dD, dbias, dinitial)))
    leading = (*rows(dy.to(inputs.read)), dfinal, kept.numpy(), *inputs.leading())
    parallel(kernels.backward, inputs.jobs, inputs.work, (*leading, *outputs))

    def over_blocks(t: Tensor) -> Tensor:
        summed = t.view(inputs.groups, inputs.blocks, l, n).sum(1)
        return summed.transpose(0, 1).contiguous().view(given.B.shape)

    return (
        du,
        ddelta,
        dA.sum(0),
        over_blocks(dB),
        over_blocks(dC),
        None if given.D is None else dD.sum(0),
        None if given.z is None else dz,
        None if given.delta_bias is None else dbias.sum(0),
        None if given.initial_state is None else dinitial,
    )
