"""The specification of the causal convolution: a time loop in plain torch."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the final state; shapes as in the interface. Differentiable through autograd.

    The state is cast to x's dtype, because it stands for inputs.
    """
    (_, l, d), k = x.shape, weight.shape[1]
    if cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        state = x.new_zeros(len(edges) - 1, d, k - 1) if initial_state is None else initial_state
        documents = [
            causal_conv1d(x[:, start:end], weight, bias, silu, state[s : s + 1])
            for s, (start, end) in enumerate(pairwise(edges))
        ]
        ys, finals = ([x[:, :0]], [x.new_zeros(0, d, k - 1)]) if not documents else zip(*documents, strict=True)
        return torch.cat(ys, dim=1), torch.cat(finals)

    acc = accumulation_dtype(x.dtype)
    state = x.new_zeros(x.shape[0], d, k - 1) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([state.transpose(1, 2), x], dim=1)
    taps = weight.to(acc).T  # (k, d)
    steps = [(taps * inputs[:, t : t + k].to(acc)).sum(1) for t in range(l)]
    y = torch.stack(steps, dim=1) if steps else x.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), inputs[:, l:].transpose(1, 2).clone()
