"""The causal convolution in plain torch on any device: one pass over the inputs per tap.

All documents, packed or batched, lie behind one another in one long row, each behind the k - 1 inputs of its state. No
tap reaches further back than that, so one convolution over the long row serves them all and nothing leaks.
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
    """Where things lie in the long row."""

    tokens: Tensor
    """(b l)"""
    initial: Tensor
    """(s, k-1): the inputs before each document's first"""
    final: Tensor
    """(s, k-1): its last inputs, which for a short document begin in its initial state"""


def _places(x: Tensor, k: int, cu_seqlens: Tensor | None) -> _Places:
    b, l, _ = x.shape
    edges = torch.arange(b + 1, device=x.device) * l if cu_seqlens is None else cu_seqlens.long()
    document = torch.arange(len(edges) - 1, device=x.device)
    taps = torch.arange(k - 1, device=x.device)
    # output_size spares a GPU the wait for the sum of the lengths.
    document_of_token = document.repeat_interleave(edges.diff(), output_size=b * l)
    return _Places(
        tokens=torch.arange(b * l, device=x.device) + (document_of_token + 1) * (k - 1),
        initial=(edges[:-1] + document * (k - 1))[:, None] + taps,
        final=(edges[1:] + document * (k - 1))[:, None] + taps,
    )


def _long_row(x: Tensor, initial_state: Tensor | None, places: _Places) -> Tensor:
    """The inputs of all documents, each behind its state: (b l + s (k-1), d), in the dtype of the arithmetic."""
    acc, channels = accumulation_dtype(x.dtype), x.shape[2]
    row = x.new_zeros(places.tokens.numel() + places.initial.numel(), channels, dtype=acc)
    row.index_copy_(0, places.tokens, x.reshape(-1, channels).to(acc))
    if initial_state is not None:
        row[places.initial] = initial_state.transpose(1, 2).to(x.dtype).to(acc)
    return row


def _convolve(row: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = bias + Σ_j weight_j row_{t+j} (r-k+1, d) of a row (r, d), wherever all k taps have an input."""
    k = weight.shape[1]
    width = max(row.shape[0] - (k - 1), 0)
    y = row.new_zeros(width, row.shape[1])
    if bias is not None:
        y += bias
    for j in range(k):
        y.addcmul_(row[j : j + width], weight[:, j].to(row.dtype))
    return y


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (s, d, k-1), both in x's dtype."""
    k = weight.shape[1]
    places = _places(x, k, cu_seqlens)
    row = _long_row(x, initial_state, places)
    y = _convolve(row, weight, bias).index_select(0, places.tokens - (k - 1))
    if silu:
        y = F.silu(y, inplace=True)
    return y.to(x.dtype).view(x.shape), row[places.final].to(x.dtype).transpose(1, 2).contiguous()


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
    k, channels = weight.shape[1], x.shape[2]
    places = _places(x, k, cu_seqlens)
    row = _long_row(x, initial_state, places)
    dout = dy.reshape(-1, channels).to(row.dtype)
    if silu:
        before = _convolve(row, weight, bias).index_select(0, places.tokens - (k - 1))
        dout = torch.ops.aten.silu_backward(dout, before)
    # The transpose of a convolution is the convolution with the taps reversed, over k - 1 more zeros at the end.
    spread = row.new_zeros(len(row) + k - 1, channels).index_copy_(0, places.tokens, dout)
    drow = _convolve(spread, weight.flip(1))
    if dfinal_state is not None:
        drow[places.final] += dfinal_state.transpose(1, 2)
    dweight = torch.stack([(spread[k - 1 : k - 1 + len(row) - j] * row[j:]).sum(0) for j in range(k)], dim=1)
    dx = drow.index_select(0, places.tokens).view(x.shape)
    return dx, dweight, dout.sum(0), drow[places.initial].transpose(1, 2)
