"""Root-mean-square normalisation with a learned weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambalm.layers.initialization import assign
from mambalm.ops import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, the mean over all channels or over groups of neighbouring ones.

    Args:
        d_model: the number of channels d.
        eps: added to the mean square.
        group_size: the channels that share a mean; None: all d.
        backend: the op's backend; None: automatic choice.

    Raises:
        ValueError: d_model is no multiple of group_size.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        group_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and d_model % group_size:
            raise ValueError(f"d_model={d_model} is no multiple of group_size={group_size}")
        self.eps = eps
        self.group_size = group_size
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        assign(self.weight, torch.ones(self.weight.shape, device=self.weight.device))

    def forward(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        residual_in_fp32: bool = False,
        return_residual: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x (..., d), gated first as x * silu(gate), or added first to ``residual``.

        Returns:
            y in x's dtype; (y, x + residual) if ``residual`` or ``residual_in_fp32`` is given and ``return_residual``.
        """
        return rms_norm(
            x,
            self.weight,
            eps=self.eps,
            gate=gate,
            group_size=self.group_size,
            residual=residual,
            residual_in_fp32=residual_in_fp32,
            return_residual=return_residual,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The sizes, for print(model)."""
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{self.weight.shape[0]}, eps={self.eps}{groups}"
