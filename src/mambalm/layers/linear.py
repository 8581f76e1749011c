"""The projections' Linear."""

from __future__ import annotations

from torch import Tensor, nn

from mambalm.ops.linear import linear


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies on a CPU in the way that is fast there; see ``mambalm.ops.linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)
