"""The short causal convolution that the layers share, as a module of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambalm.layers.initialization import reset_projection
from mambalm.ops import causal_conv1d


class CausalConv1d(nn.Conv1d):
    """A depthwise convolution of width k over (b, l, d) that sees the present and the k - 1 inputs before.

    It holds its parameters as ``nn.Conv1d`` does, weight (d, 1, k) and bias (d), so that checkpoints fit.

    Raises:
        ValueError: k is less than 1.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size < 1:
            raise ValueError(f"the convolution's width d_conv must be at least 1, got {kernel_size}")
        self.activation = activation
        self.backend = backend
        super().__init__(channels, channels, kernel_size, groups=channels, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch does."""
        reset_projection(self)

    def forward(
        self,
        x: Tensor,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Any:
        """Convolve x (b, l, d).

        Args:
            x: the inputs.
            initial_state: the k - 1 inputs before them, oldest first (b, d, k - 1); zero if None.
            cu_seqlens: int32 offsets (s + 1) of packed documents (b = 1); the states then have s rows.
            sizes: of parts into which the output is cut.

        Returns:
            y (b, l, d), or with ``sizes`` a tuple of its parts, and the last k - 1 inputs (b, d, k - 1).
        """
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            self.activation,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
            sizes=sizes,
            backend=self.backend,
        )

    def init_state(self, batch_size: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
        """Zero inputs (b, d, k - 1), by default in the weight's dtype and on its device."""
        shape = (batch_size, self.in_channels, self.kernel_size[0] - 1)
        return torch.zeros(shape, dtype=dtype or self.weight.dtype, device=device or self.weight.device)
