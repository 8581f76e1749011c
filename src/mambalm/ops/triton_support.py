"""What the Triton backends share: when they can run, how they launch, the mathematics of their kernels."""

import contextlib
import functools
import os
import shutil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambalm.ops.backends import Call

LOG2E = tl.constexpr(1.4426950408889634)


def unsupported(call: Call) -> str | None:
    """Why no Triton kernel can run a call; None if one can."""
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, which is too coarse for {call.dtype}"
    if triton.knobs.runtime.interpret:
        return None
    if call.device.type not in ("cuda", "xpu"):
        return f"it needs a GPU, the tensors are on {call.device.type}"
    return _no_compiler()


@functools.cache
def _no_compiler() -> str | None:
    """Triton builds its launcher with the system's C compiler at the first launch."""
    if os.environ.get("CC") or any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return None
    return "Triton's first launch needs a C compiler (gcc or clang on the PATH), and there is none"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a usual number where torch does not say."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64


def dense_channels(t: Tensor) -> Tensor:
    """``t`` with its last axis contiguous; the others may have any stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x) in float32."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def silu_gradient(x):  # type: ignore[no-untyped-def]
    """The derivative of x sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))
