"""A residual block: norm, mixer, and for the hybrids a second norm and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambalm.layers.attention import Attention
from mambalm.layers.mamba import Mamba
from mambalm.layers.mamba2 import Mamba2
from mambalm.layers.norm import RMSNorm
from mambalm.layers.recomputation import Recomputation
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
        branch: Tensor | None = None,
        apart: bool = False,
    ) -> Any:
        """Read x (b, l, d) on from ``state``; see the mixer for the arguments.

        Args:
            branch: the output of the block before, still to be added to x: one pass then adds and normalises.
            apart: return the residual stream and the output to be added to it, for the next block, instead of the sum.

        Returns:
            y (b, l, d), float32 if residual_in_fp32, else in x's dtype, or with ``apart`` a pair of which y is the sum;
            (that, the mixer's new state) with return_state.
        """
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        normed, x = add_and_normalise(self.norm, x, branch)
        if isinstance(self.norm, RMSNorm) and isinstance(self.mixer, Mamba | Mamba2) and self.mixer.recomputes(x):
            with Recomputation() as again:
                again.give(normed, self.norm, _normalise_again(self.norm, normed.dtype, branch is not None), x)
                mixed = self.mixer(normed, state, cu_seqlens, return_state=return_state)
        else:
            mixed = self.mixer(normed, state, cu_seqlens, return_state=return_state)
        branch, new_state = mixed if return_state else (mixed, None)
        if self.norm2 is not None and self.mlp is not None:
            normed, x = add_and_normalise(self.norm2, x, branch)
            branch = self.mlp(normed)
        y = (x, branch) if apart else x + branch
        return (y, new_state) if return_state else y

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MambaState | AttentionState:
        """The mixer's zero state, by default in the dtype in which the norm gives it activations."""
        weight = self.norm.weight
        return self.mixer.init_state(batch_size, dtype=dtype or weight.dtype, device=device or weight.device)


def _normalise_again(norm: RMSNorm, dtype: torch.dtype, added: bool) -> Callable[[Tensor], Tensor]:
    """norm(x) in ``dtype``, by the same kernel as before: the one that adds has another order of summation."""

    def function(x: Tensor) -> Tensor:
        if not added:
            return norm(x).to(dtype)
        nothing = x.new_zeros(x.shape[-1], dtype=dtype).expand(x.shape)
        again: Tensor = norm(nothing, residual=x, return_residual=False)
        return again

    return function


def add_and_normalise(norm: RMSNorm | nn.LayerNorm, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """norm(x + branch), for the mixer to run in the weights' dtype whatever that of the stream is, and x + branch."""
    if isinstance(norm, RMSNorm) and branch is not None and torch.promote_types(x.dtype, branch.dtype) == x.dtype:
        normed, x = norm(branch, residual=x)
        return normed, x
    x = x if branch is None else x + branch
    normed = norm(x) if isinstance(norm, RMSNorm) else norm(x.to(norm.weight.dtype))
    return normed.to(norm.weight.dtype), x
