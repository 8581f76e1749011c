"""The gated MLP of state-spaces' hybrid and Transformer++ models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambalm.layers.initialization import reset_projection, residual_scale
from mambalm.layers.linear import Linear


class GatedMLP(nn.Module):
    """fc2(y * silu(gate)) with (y, gate) = fc1(x): SwiGLU (Shazeer 2020, arXiv:2002.05202).

    Args:
        in_features: the number of channels d.
        hidden_features: the width, rounded up to a multiple of ``multiple_of``; None: 8/3 of in_features.
        out_features: None: in_features.
        bias: whether both projections have one.
        multiple_of: see hidden_features.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self, residual_branches: int = 1) -> None:
        """Draw the projections as torch does, fc2 divided by sqrt(residual_branches)."""
        reset_projection(self.fc1)
        reset_projection(self.fc2, residual_scale(residual_branches))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))
