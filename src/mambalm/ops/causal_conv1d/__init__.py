"""The depthwise causal convolution in front of the state-space model."""

from mambalm.ops.causal_conv1d.interface import causal_conv1d

__all__ = ["causal_conv1d"]
