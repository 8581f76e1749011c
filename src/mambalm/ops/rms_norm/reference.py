"""The specification of the normalisation, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    group_size: int,
    stream_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y in x's dtype and the residual stream x + residual in ``stream_dtype`` (x itself without a residual).

    What is normalised is the stream as it is kept, after rounding. Differentiable through autograd. Zhang & Sennrich
    2019, arXiv:1910.07467, equation 4; the gate is that of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060).
    """
    acc = accumulation_dtype(x.dtype)
    stream = x if residual is None else (x.to(acc) + residual.to(acc)).to(stream_dtype)
    h = stream.to(acc)
    if gate is not None:
        h = h * F.silu(gate.to(acc))
    groups = h.unflatten(-1, (-1, group_size))
    rms = (groups.square().mean(-1, keepdim=True) + eps).sqrt()
    y = (groups / rms).flatten(-2)
    if weight is not None:
        y = y * weight.to(acc)
    return y.to(x.dtype), stream
