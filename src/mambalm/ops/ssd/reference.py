"""The specification of ssd: Listing 1 of the Mamba-2 paper in plain torch, and the recurrence that pins it.

Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060. The paper's functions take *discrete* parameters: X has been
multiplied by the step size, and A is the logarithm of the decay of each step. ``discretise`` makes them from the
continuous ones that the public function takes.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype

_CHUNK = 64


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


def discretise(x: Tensor, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's X = Δ x (b, l, h, p) and A = Δ A (b, l, h), from x (b, l, h, p), Δ (b, l, h) and A (h)."""
    return x * dt[..., None], dt * A


def segsum(A: Tensor) -> Tensor:
    """S[..., i, j] = A_{j+1} + ... + A_i, and -inf above the diagonal: (..., q) -> (..., q, q).

    The sums are accumulated for each j apart: a difference of two running sums would lose the small ones to rounding.
    """
    q = A.shape[-1]
    ones = torch.ones(q, q, dtype=torch.bool, device=A.device)
    sums = torch.where(ones.tril(-1), A[..., :, None], 0).cumsum(-2)
    return sums.masked_fill(ones.triu(1), -math.inf)


def listing1(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """Listing 1: Y (b, l, h, p) and the final state (b, h, p, n), quadratic within chunks, linear between them.

    X (b, l, h, p), A (b, l, h), B and C (b, l, h, n), the initial state (b, h, p, n). A length that is no multiple of
    the chunk is filled up with steps of size zero (X = 0, A = 0), which leave the state as it is.
    """
    length = X.shape[1]
    X, A, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, -length % chunk)) for t in (X, A, B, C))
    X, A, B, C = (t.unflatten(1, (-(-length // chunk), chunk)) for t in (X, A, B, C))  # (b, c, q, ...)
    A = A.permute(0, 3, 1, 2)  # (b, h, c, q)
    A_cumsum = A.cumsum(-1)

    # 1. Within each chunk: the masked attention form.
    L = torch.exp(segsum(A))
    Y_diag = torch.einsum("bcqhn,bckhn,bhcqk,bckhp->bcqhp", C, B, L, X)

    # 2. What each chunk adds to the state at its end.
    states = torch.einsum("bckhn,bhck,bckhp->bchpn", B, L[..., -1, :], X)

    # 3. The recurrence between chunks: the state that each chunk starts from, and the last one.
    states = torch.cat([state[:, None], states], dim=1)
    decay = torch.exp(segsum(F.pad(A_cumsum[..., -1], (1, 0))))
    *starts, final = torch.einsum("bhzc,bchpn->bzhpn", decay, states).unbind(1)

    # 4. What the state at the start of each chunk gives to its outputs.
    if not starts:
        return Y_diag.flatten(1, 2), final
    Y_off = torch.einsum("bcqhn,bchpn,bhcq->bcqhp", C, torch.stack(starts, dim=1), torch.exp(A_cumsum))
    return (Y_diag + Y_off).flatten(1, 2)[:, :length], final


def recurrence(X: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What ``listing1`` must equal, with its arguments: h_t = exp(A_t) h_{t-1} + X_t B_tᵀ, Y_t = h_t C_t."""
    Y = torch.zeros_like(X)
    for t in range(X.shape[1]):
        state = torch.exp(A[:, t, :, None, None]) * state + X[:, t, :, :, None] * B[:, t, :, None, :]
        Y[:, t] = (state * C[:, t, :, None, :]).sum(-1)
    return Y, state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the final state; shapes as in the interface. Differentiable through autograd."""
    dtype, acc = x.dtype, accumulation_dtype(x.dtype)
    x, dt, A, B, C = (t.to(acc) for t in (x, dt, A, B, C))
    B, C = (t.repeat_interleave(x.shape[2] // B.shape[2], dim=2) for t in (B, C))  # (b, l, h, n)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    if dt_softplus:
        dt = F.softplus(dt)
    X, log_decay = discretise(x, dt.clamp(dt_min, dt_max), A)

    edges = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = x.shape[0] if cu_seqlens is None else len(edges) - 1
    states = x.new_zeros(rows, *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state.to(acc)
    per_document = [states] if cu_seqlens is None else states.split(1)
    outputs = [
        listing1(X[:, i:j], log_decay[:, i:j], B[:, i:j], C[:, i:j], state)
        for (i, j), state in zip(itertools.pairwise(edges), per_document, strict=False)
    ]
    y = torch.cat([y for y, _ in outputs], dim=1) if outputs else torch.zeros_like(x)
    final_state = torch.cat([h for _, h in outputs]) if outputs else states.clone()
    if D is not None:
        y = y + D.to(acc).reshape(x.shape[2], -1) * x
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(dtype), final_state
