"""The causal convolution in plain torch on any device: one pass over the inputs per tap.

Every document, a row of the batch or a part of a packed row, is laid behind the k - 1 inputs of its state. No tap
reaches further back than that, so one convolution over such a row serves all documents in it, and nothing leaks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


class _Places(NamedTuple):
    """Where things lie along the second axis of the laid-out rows (b, r, d): slices of a batch, indices when packed."""

    tokens: slice | Tensor
    outputs: slice | Tensor
    """the same, in what the convolution leaves: k - 1 earlier"""
    initial: slice | Tensor
    """the k - 1 inputs before each document's first"""
    final: slice | Tensor
    """its last k - 1 inputs, which for a short document begin in its initial state"""
    documents: int
    """in a row"""


def _places(x: Tensor, k: int, cu_seqlens: Tensor | None) -> _Places:
    l = x.shape[1]
    if cu_seqlens is None:
        return _Places(slice(k - 1, None), slice(None), slice(0, k - 1), slice(l, None), 1)
    edges = cu_seqlens.long()
    document = torch.arange(len(edges) - 1, device=x.device)
    # output_size spares a GPU the wait for the sum of the lengths.
    document_of_token = document.repeat_interleave(edges.diff(), output_size=l)
    outputs = torch.arange(l, device=x.device) + document_of_token * (k - 1)
    initial, final = (
        ((edge + document * (k - 1))[:, None] + torch.arange(k - 1, device=x.device)).flatten()
        for edge in (edges[:-1], edges[1:])
    )
    return _Places(outputs + (k - 1), outputs, initial, final, len(edges) - 1)


def _lay_out(x: Tensor, initial_state: Tensor | None, k: int, places: _Places) -> Tensor:
    """Rows (b, r, d) of documents behind their states, in the dtype of the arithmetic."""
    b, l, d = x.shape
    rows = x.new_zeros(b, l + places.documents * (k - 1), d, dtype=accumulation_dtype(x.dtype))
    rows[:, places.tokens] = x.to(rows.dtype)
    if initial_state is not None:
        rows[:, places.initial] = _end_to_end(initial_state.to(x.dtype), b, places).to(rows.dtype)
    return rows


def _end_to_end(states: Tensor, b: int, places: _Places) -> Tensor:
    """States (s, d, k-1) as rows hold them: (b, documents (k-1), d)."""
    _, d, width = states.shape
    return states.transpose(1, 2).reshape(b, places.documents * width, d)


def _apart(rows: Tensor, k: int, places: _Places) -> Tensor:
    """The inverse of ``_end_to_end``, in memory of its own."""
    b, _, d = rows.shape
    states = rows.reshape(b * places.documents, k - 1, d).transpose(1, 2)
    return states.clone(memory_format=torch.contiguous_format)


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = bias + Σ_j weight_j rows_{t+j} (b, r-k+1, d), wherever all k taps have an input."""
    (b, r, d), k = rows.shape, weight.shape[1]
    width = max(r - (k - 1), 0)
    y = rows.new_zeros(b, width, d)
    if bias is not None:
        y += bias
    for j in range(k):
        y.addcmul_(rows[:, j : j + width], weight[:, j].to(rows.dtype))
    return y


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (s, d, k-1), both in x's dtype."""
    k = weight.shape[1]
    places = _places(x, k, cu_seqlens)
    rows = _lay_out(x, initial_state, k, places)
    y = _convolve(rows, weight, bias)[:, places.outputs]
    if silu:
        y = F.silu(y, inplace=True)
    return y.to(x.dtype), _apart(rows[:, places.final], k, places).to(x.dtype)


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
    (b, _, d), k = x.shape, weight.shape[1]
    places = _places(x, k, cu_seqlens)
    rows = _lay_out(x, initial_state, k, places)
    r = rows.shape[1]
    dout = dy.to(rows.dtype)
    if silu:
        dout = torch.ops.aten.silu_backward(dout, _convolve(rows, weight, bias)[:, places.outputs])
    # The transpose of a convolution is the convolution with the taps reversed, over k - 1 more zeros at the end.
    spread = rows.new_zeros(b, r + k - 1, d)
    spread[:, :r][:, places.tokens] = dout
    drows = _convolve(spread, weight.flip(1))
    if dfinal_state is not None:
        drows[:, places.final] += _end_to_end(dfinal_state, b, places)
    dweight = torch.stack([(spread[:, k - 1 : k - 1 + r - j] * rows[:, j:]).sum((0, 1)) for j in range(k)], dim=1)
    dx = drows[:, places.tokens].clone(memory_format=torch.contiguous_format)
    return dx, dweight, dout.sum((0, 1)), _apart(drows[:, places.initial], k, places)
