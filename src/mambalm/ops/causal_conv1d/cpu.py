"""The causal convolution on a CPU, by numba, in (b, l, d): a batch is packed documents of equal length."""

import numpy as np
import torch
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.causal_conv1d import _numba_kernels as kernels
from mambalm.ops.numba_support import document_offsets, floats, parallel, readable, rows, unsupported


def supports(call: Call) -> str | None:
    """float32, bfloat16 and float16 on a CPU."""
    return unsupported(call)


def _states(state: Tensor | None, documents: int, d: int, width: int) -> np.ndarray:
    """(s, d, k-1) as float32 (s, k-1, d)."""
    if state is None:
        return np.zeros((documents, width, d), np.float32)
    return floats(state.transpose(1, 2))


class _Inputs:
    """The arguments as a kernel reads them."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.d, self.k = weight.shape
        self.offsets = document_offsets(x, cu_seqlens)
        self.documents = len(self.offsets) - 1
        self.read = readable(x)
        self.work = x.numel() * self.k
        self.leading = (*rows(x.to(self.read)), floats(weight.T), floats(bias, self.d), silu)
        self.initial = _states(initial_state, self.documents, self.d, self.k - 1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (s, d, k-1), both in x's dtype."""
    inputs = _Inputs(x, weight, bias, silu, initial_state, cu_seqlens)
    y = torch.empty(x.shape, dtype=inputs.read)
    tiles = np.concatenate([[0], -(-np.diff(inputs.offsets) // kernels.TILE)]).cumsum()
    arguments = (inputs.offsets, tiles, *inputs.leading, inputs.initial, rows(y)[0])
    parallel(kernels.forward, int(tiles[-1]), inputs.work, arguments)
    return y.to(x.dtype), _final_state(x, initial_state, inputs)


def _final_state(x: Tensor, initial_state: Tensor | None, inputs: _Inputs) -> Tensor:
    """The last k-1 inputs of each document, (s, d, k-1)."""
    width = inputs.k - 1
    if x.shape[0] == inputs.documents:  # each a row: no index to make, which a decode step would feel
        before = x.new_zeros(len(x), inputs.d, width) if initial_state is None else initial_state.to(x.dtype)
        joined = torch.cat([before, x[:, max(x.shape[1] - width, 0) :].transpose(1, 2)], dim=-1)
        return joined[..., joined.shape[-1] - width :].contiguous()
    offsets = torch.from_numpy(inputs.offsets)
    place = offsets[1:, None] + torch.arange(-width, 0)  # (s, k-1)
    tokens = x.reshape(-1, inputs.d)
    inside = place >= offsets[:-1, None]
    states = x.new_zeros(inputs.documents, width, inputs.d)
    states[inside] = tokens[place[inside]]
    if initial_state is not None:
        document, slot = (~inside).nonzero().unbind(1)
        states[document, slot] = initial_state.to(x.dtype)[document, :, slot + (offsets[1:] - offsets[:-1])[document]]
    return states.transpose(1, 2).contiguous()


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial_state. What the activation needs is computed again, not kept."""
    inputs = _Inputs(x, weight, bias, silu, initial_state, cu_seqlens)
    d, k, s = inputs.d, inputs.k, inputs.documents
    dx = torch.empty(x.shape, dtype=inputs.read)
    dweight, dbias, dinitial = torch.zeros(k, d), torch.zeros(d), torch.zeros(s, k - 1, d)
    leading = (*rows(dy.to(inputs.read)), _states(dfinal_state, s, d, k - 1), inputs.offsets, *inputs.leading)
    outputs = (rows(dx)[0], dweight.numpy(), dbias.numpy(), dinitial.numpy())
    parallel(kernels.backward, -(-d // kernels.BLOCK), 3 * inputs.work, (*leading, inputs.initial, *outputs))
    return dx, dweight.T, dbias, dinitial.transpose(1, 2)
