"""Root-mean-square normalisation: plain, gated, per group, with the residual add."""

from mambalm.ops.rms_norm.interface import rms_norm

__all__ = ["rms_norm"]
