"""The state-space duality scan of Mamba-2 (SSD)."""

from mambalm.ops.ssd.interface import ssd

__all__ = ["ssd"]
