"""A chunk of the loss in plain torch on any device: matrix products and a few passes."""

import torch
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype
from mambalm.ops.linear import linear


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


class Chunks:
    """The losses of chunks of at most ``size`` tokens, rows (c, d) and labels (c, 1), and the gradients of the logits.

    weight is (v, d) in the dtype of the rows, bias (v); z_loss as in the interface.
    """

    def __init__(self, size: int, weight: Tensor, bias: Tensor | None, z_loss: float) -> None:
        self.weight, self.bias, self.z_loss = weight, bias, z_loss

    def losses(self, rows: Tensor, label: Tensor) -> Tensor:
        """The losses (c)."""
        return self._losses(rows, label)[0].squeeze(1)

    def gradients(self, rows: Tensor, label: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (c), and the gradient of Σ factor (c, 1) losses for the logits (c, v), in the rows' dtype."""
        losses, log_p, log_normaliser = self._losses(rows, label)
        slope = factor * (1 + 2 * self.z_loss * log_normaliser)
        # The label's own entry is made apart, in full precision: p - 1 in half precision would lose a p close to 1.
        at_label = slope * log_p.gather(1, label).exp() - factor
        # The gradients take the memory of the log-probabilities if they can.
        dlogits = log_p if log_p.dtype == rows.dtype else torch.empty_like(log_p, dtype=rows.dtype)
        dlogits = torch.mul(log_p.exp_(), slope, out=dlogits).scatter_(1, label, at_label.to(rows.dtype))
        return losses.squeeze(1), dlogits

    def _losses(self, rows: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The losses (c, 1), the log-probabilities (c, v) and the log-normalisers (c, 1)."""
        logits = product(rows, self.weight.T)
        if self.bias is not None:
            logits += self.bias
        log_p = logits.log_softmax(1)
        at_label = log_p.gather(1, label)
        log_normaliser = logits.gather(1, label) - at_label
        return self.z_loss * log_normaliser.square() - at_label, log_p, log_normaliser


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, in float32 from half-precision factors."""
    return linear(a, b.T) if a.dtype == accumulation_dtype(a.dtype) else torch.mm(a, b, out_dtype=torch.float32)
