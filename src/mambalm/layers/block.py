"""A residual block: norm, mixer, and for the hybrids a second norm and an MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambalm.layers.attention import Attention
from mambalm.layers.mamba import Mamba
from mambalm.layers.mamba2 import Mamba2
from mambalm.layers.norm import RMSNorm
from mambalm.layers.state import AttentionState, MambaState


class Block(nn.Module):
    """x + mixer(norm(x)), and on top of that x + mlp(norm2(x)) if there is an MLP.

    Args:
        norm: an RMSNorm or ``nn.LayerNorm``.
        mixer: Mamba, Mamba2 or Attention.
        norm2: given together with mlp.
        mlp: GatedMLP.
        residual_in_fp32: keep the residual stream in float32 whatever the weights' dtype: the output is float32 then,
            and the next block takes it as it is.

    Raises:
        ValueError: one of norm2 and mlp is given without the other.
    """

    def __init__(
        self,
        norm: RMSNorm | nn.LayerNorm,
        mixer: Mamba | Mamba2 | Attention,
        norm2: RMSNorm | nn.LayerNorm | None = None,
        mlp: nn.Module | None = None,
        *,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        if (norm2 is None) != (mlp is None):
            raise ValueError("norm2 and mlp belong together: give both or neither")
        self.norm = norm
        self.mixer = mixer
        self.norm2 = norm2
        self.mlp = mlp
        self.residual_in_fp32 = residual_in_fp32

    def forward(
        self,
        x: Tensor,
        state: MambaState | AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Read x (b, l, d) on from ``state``; see the mixer for the arguments.

        Returns:
            y (b, l, d), float32 if residual_in_fp32, else in x's dtype; (y, the mixer's new state) with return_state.
        """
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        mixed = self.mixer(_normalised(self.norm, x), state, cu_seqlens, return_state=return_state)
        y, new_state = mixed if return_state else (mixed, None)
        x = x + y
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.mlp(_normalised(self.norm2, x))
        return (x, new_state) if return_state else x

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MambaState | AttentionState:
        """The mixer's zero state."""
        return self.mixer.init_state(batch_size, dtype=dtype, device=device)


def _normalised(norm: RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    # A float32 stream meets half-precision weights here: the mixer is to run in theirs, as in mamba_ssm.
    return norm(x.to(norm.weight.dtype))
