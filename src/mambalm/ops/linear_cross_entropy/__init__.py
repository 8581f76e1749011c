"""Cross-entropy of a linear layer's outputs, without the logits of all tokens in memory."""

from mambalm.ops.linear_cross_entropy.interface import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
