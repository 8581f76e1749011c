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
# log1p(e) / e on [0, 1] to 2e-7, least squares weighted towards equal relative error, rising powers.
LOG1P = tl.constexpr(
    (0.999999806, -0.499974053, 0.332754776, -0.244954498, 0.177452043, -0.10768117, 0.0440892381, -0.00853909631)
)


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


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have; a usual number where torch does not say."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", 1 << 16)


@functools.cache
def multiplies_from_shared(device: torch.device) -> bool:
    """Whether matrix products read their operands from shared memory, as on Hopper and data centre Blackwell; where
    they read them from registers, a program of as many warps has room for less."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10, 11)


def dense_channels(t: Tensor) -> Tensor:
    """``t`` with its last axis contiguous; the others may have any stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it ``device``."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, made for kernels as well, costs the host microseconds; so does the next."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


_compiled: dict[tuple[Any, ...], Any] = {}
_constants: dict[int, list[bool]] = {}  # of a kernel, which parameters are known at compile time


def launch(kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """``kernel[(programs,)](**arguments, **options)`` on the current device. Triton's own way to the compiled kernel
    takes the host longer than many a kernel takes the device; here it is one look-up."""
    values = [arguments[name] for name in kernel.arg_names]
    if triton.knobs.runtime.interpret:
        kernel[(programs,)](*values, **options)
        return
    if (constants := _constants.get(id(kernel))) is None:
        _constants[id(kernel)] = constants = [p.is_constexpr for p in kernel.params]
    kinds = [v if fixed or v is None else _kind(v) for v, fixed in zip(values, constants, strict=True)]
    key = (id(kernel), triton.runtime.driver.active.get_current_device(), *kinds, *options.values())
    if (compiled := _compiled.get(key)) is None:
        _compiled[key] = kernel[(programs,)](*values, **options)
    else:
        compiled[(programs, 1, 1)](*values)


def _kind(value: Any) -> Any:
    """What Triton compiles for: a tensor's dtype and alignment; whether an integer is 1, a multiple of 16, or wide; a
    descriptor's dtype, tile and layout."""
    if type(value) is int:
        return 1 if value == 1 else (value % 16 == 0, value < 2**31)
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,)
    if hasattr(value, "block_shape"):
        return value.base.dtype, *value.block_shape, value.layout
    return value


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x) in float32."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def silu_gradient(x):  # type: ignore[no-untyped-def]
    """The derivative of x sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """max(x, 0) + log1p(exp(-|x|)): relative accuracy at both ends, where log(1 + exp(x)) has none."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = e * LOG1P[7] + LOG1P[6]
    for i in tl.static_range(6):
        p = p * e + LOG1P[5 - i]
    return tl.maximum(x, 0.0) + e * p
