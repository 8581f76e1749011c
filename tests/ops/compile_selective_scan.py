"""`python -m tests.ops.compile_selective_scan TARGET`: compiles the selective scan's kernels without a GPU.

TARGET is a compute capability (80, 90, 100) or an AMD architecture (gfx942). It is a program of its own, because
Triton's interpreter, under which the other tests run, is chosen when a kernel is defined.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mambalm.ops.selective_scan import _gluon_kernels, _triton_kernels

ACTIVATIONS = {"u", "delta", "B", "C", "z", "y", "dy", "du", "ddelta", "dz"}
FLOATS = {"A", "D", "bias", "initial", "final", "checkpoints", "dfinal", "dA", "dBC", "dD", "dbias", "dinitial"}
FLOATS |= {"scratch", "ends", "totals"}
COMMON = {"SOFTPLUS": True, "PIECE": 32, "STATES": 16}
STAGED = COMMON | {"LANES": 4, "SEVERAL": 2}


def kernels(staged: bool) -> list[tuple[Any, type[ASTSource], dict[str, Any], int]]:
    """Kernel, kind of source, compile-time arguments and warps."""
    found: list[tuple[Any, type[ASTSource], dict[str, Any], int]] = [
        (_triton_kernels.scan_forward, ASTSource, COMMON | {"BLOCK": 64, "AHEAD": 4}, 1),
        (_triton_kernels.scan_backward, ASTSource, COMMON | {"BLOCK": 32}, 1),
    ]
    if staged:
        found += [
            (_gluon_kernels.scan_forward, GluonASTSource, STAGED | {"BLOCK": 64, "TILE": 16, "CHUNKS": 2}, 4),
            (_gluon_kernels.scan_backward, GluonASTSource, STAGED | {"BLOCK": 32, "CHUNKS": 2}, 2),
            (_gluon_kernels.scan_backward, GluonASTSource, STAGED | {"LANES": 8, "BLOCK": 16, "CHUNKS": 2}, 2),
            (_gluon_kernels.scan_ends, GluonASTSource, STAGED | {"BLOCK": 32, "CHUNKS": 2}, 2),
        ]
    return found


def argument_type(name: str) -> str:
    """Triton's name for the type of a kernel's argument."""
    if name in ACTIVATIONS:
        return "*bf16"
    return "*fp32" if name in FLOATS else "*i32" if name == "cu_seqlens" else "i32"


def main(target: str) -> None:
    """Compile every kernel that can run on the target; an exception is the failure."""
    nvidia = target.isdecimal()
    gpu = GPUTarget("cuda", int(target), 32) if nvidia else GPUTarget("hip", target, 64)
    for kernel, source, constants, warps in kernels(staged=nvidia):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else argument_type(name) for name in names}
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(source(kernel, signature, constexprs), target=gpu, options={"num_warps": warps})
        assert compiled.asm["cubin" if nvidia else "hsaco"]


if __name__ == "__main__":
    main(sys.argv[1])
