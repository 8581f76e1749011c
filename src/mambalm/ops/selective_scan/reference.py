"""The specification of the selective scan: a time loop in plain torch, in the notation of the Mamba paper."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the final state; shapes as in the interface, B and C with their group axis (b, l, g, n).

    Differentiable through autograd. Gu & Dao 2023, Mamba, equation 2 with the discretisation of section 3.3.
    """
    if cu_seqlens is not None:
        parts = []
        for s, (i, j) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            gate = None if z is None else z[:, i:j]
            state = None if initial_state is None else initial_state[s : s + 1]
            document = (u[:, i:j], delta[:, i:j], A, B[:, i:j], C[:, i:j], D, gate, delta_bias)
            parts.append(selective_scan(*document, delta_softplus, state))
        if not parts:
            return u.clone(), A.new_zeros(0, *A.shape, dtype=accumulation_dtype(u.dtype))
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([h for _, h in parts])

    dtype, acc = u.dtype, accumulation_dtype(u.dtype)
    u, delta, A, B, C = (t.to(acc) for t in (u, delta, A, B, C))
    per_group = u.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(per_group, dim=2) for t in (B, C))  # (b, l, d, n)
    if delta_bias is not None:
        delta = delta + delta_bias.to(acc)
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(acc)
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        ys.append((C[:, t] * h).sum(-1))
    y = torch.stack(ys, dim=1) if ys else torch.zeros_like(u)
    if D is not None:
        y = y + D.to(acc) * u
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(dtype), h.clone() if not ys else h
