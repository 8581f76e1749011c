"""A chunk of the loss on any GPU that Triton knows: one kernel behind the matrix product reads each logit twice."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype
from mambalm.ops.linear_cross_entropy._triton_kernels import softmax_losses
from mambalm.ops.triton_support import launch, on, unsupported

# Logits that a program holds at once, and its warps.
_BLOCK, _WARPS = 8192, 16
# Rows begin at multiples of so many logits, for wide loads; what is between them is -inf.
_ALIGNMENT = 16


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    return unsupported(call)


class Chunks:
    """As ``portable.Chunks``. The logits of one chunk have their memory for all of them."""

    def __init__(self, size: int, weight: Tensor, bias: Tensor | None, z_loss: float) -> None:
        v = weight.shape[0]
        self._padding = -v % _ALIGNMENT
        acc = accumulation_dtype(weight.dtype)
        self._logits = weight.new_empty(size, v + self._padding, dtype=acc)
        self._logits[:, v:] = -math.inf
        self._dlogits: Tensor | None = None
        self.weight, self.z_loss = weight, z_loss
        self._bias = None if bias is None else F.pad(bias.to(acc), (0, self._padding))

    def losses(self, rows: Tensor, label: Tensor) -> Tensor:
        """The losses (c)."""
        return self._launch(rows, label, None, None)

    def gradients(self, rows: Tensor, label: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (c), and the gradient of Σ factor (c, 1) losses for the logits (c, v), in the rows' dtype."""
        if self._dlogits is None:
            self._dlogits = torch.empty_like(self._logits, dtype=rows.dtype)
        dlogits = self._dlogits[: rows.shape[0]]
        losses = self._launch(rows, label, factor.contiguous(), dlogits)
        return losses, dlogits[:, : self.weight.shape[0]]

    def _launch(self, rows: Tensor, label: Tensor, factor: Tensor | None, dlogits: Tensor | None) -> Tensor:
        c, v = rows.shape[0], self.weight.shape[0]
        logits = self._logits[:c]
        if rows.dtype == logits.dtype:
            torch.mm(rows, self.weight.T, out=logits[:, :v])
        else:
            torch.ops.aten.mm.dtype_out(rows, self.weight.T, logits.dtype, out=logits[:, :v])
        losses = logits.new_empty(c)
        given = {"logits": logits, "bias": self._bias, "labels": label.contiguous(), "factors": factor}
        results = {"losses": losses, "dlogits": dlogits}
        sizes = {"width": v + self._padding, "z_loss": self.z_loss, "BLOCK": _BLOCK}
        if c:
            with on(rows.device):
                launch(softmax_losses, c, {**given, **results, **sizes}, {"num_warps": _WARPS})
        return losses
