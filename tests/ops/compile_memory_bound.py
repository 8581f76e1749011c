"""`python -m tests.ops.compile_memory_bound TARGET`: compiles kernels of the convolution, norms, loss and sums.

As compile_selective_scan.py does, for a GPU that is not there.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambalm.ops.causal_conv1d import _triton_kernels as convolution
from mambalm.ops.linear_cross_entropy import _triton_kernels as loss
from mambalm.ops.rms_norm import _triton_kernels as norm
from mambalm.ops.triton_sums import sum_shares

ACTIVATIONS = {"x", "y", "dy", "dy0", "dy1", "dy2", "dx", "gate", "dgate", "dbranch", "dlogits"}
FLOATS = {"weight", "bias", "initial", "final", "dfinal", "dinitial", "shares", "residual", "total", "dstream"}
FLOATS |= {"source", "dsource", "logits", "factors", "losses"}
OTHERS = {"cu_seqlens": "*i32", "labels": "*i64", "eps": "fp32", "z_loss": "fp32"}

TAPS = {"SILU": True, "K": 4, "PADDED": 4}
ALONE = {"initial": None, "cu_seqlens": None}
WHOLE = {"dy1": None, "dy2": None}
# Kernel, compile-time arguments, warps; arguments that are None are compile-time ones.
KERNELS: list[tuple[Any, dict[str, Any], int]] = [
    *((convolution.convolve_forward, {**TAPS, "BLOCK": 256, "ROWS": 8, **more}, 2) for more in ({}, ALONE)),
    *((convolution.convolve_backward, {**TAPS, "BLOCK": 128, "ROWS": 8, **more}, 1) for more in ({}, ALONE | WHOLE)),
    (norm.norm_forward, {"gate": None, "ROWS": 1, "PARTS": 1, "BLOCK": 1024, "PADDED": True}, 2),
    (norm.norm_forward, {"residual": None, "total": None, "ROWS": 1, "PARTS": 5, "BLOCK": 1024, "PADDED": False}, 8),
    (norm.norm_backward, {"ROWS": 1, "PARTS": 5, "BLOCK": 1024, "PADDED": False}, 8),
    (norm.norm_backward, {"gate": None, "dgate": None, "ROWS": 4, "PARTS": 1, "BLOCK": 256, "PADDED": True}, 2),
    (loss.softmax_losses, {"BLOCK": 8192}, 16),
    (sum_shares, {"BLOCK": 512, "ROWS": 16}, 4),
    (loss.softmax_losses, {"bias": None, "factors": None, "dlogits": None, "BLOCK": 8192}, 16),
]


def argument_type(name: str) -> str:
    """Triton's name for the type of a kernel's argument."""
    return "*bf16" if name in ACTIVATIONS else "*fp32" if name.rstrip("01234") in FLOATS else OTHERS.get(name, "i32")


def main(target: str) -> None:
    """Compile every kernel; an exception is the failure."""
    nvidia = target.isdecimal()
    gpu = GPUTarget("cuda", int(target), 32) if nvidia else GPUTarget("hip", target, 64)
    for kernel, constants, warps in KERNELS:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else argument_type(name) for name in names}
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(ASTSource(kernel, signature, constexprs), target=gpu, options={"num_warps": warps})
        assert compiled.asm["cubin" if nvidia else "hsaco"]


if __name__ == "__main__":
    main(sys.argv[1])
