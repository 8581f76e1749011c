"""The selective scan of Mamba (S6)."""

from mambalm.ops.selective_scan.interface import selective_scan

__all__ = ["selective_scan"]
