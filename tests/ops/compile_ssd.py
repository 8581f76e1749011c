"""`python -m tests.ops.compile_ssd TARGET`: compiles ssd's kernels without a GPU.

TARGET is a compute capability (80, 90, 100) or an AMD architecture (gfx942). It is a program of its own, because
Triton's interpreter, under which the other tests run, is chosen when a kernel is defined.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambalm.ops.ssd import _triton_kernels

ACTIVATIONS = {"x", "u", "key", "query", "B", "C", "z", "y", "dy", "dt", "ddt", "out", "dB", "dC", "states", "dstates"}
NUMBERS = {"length", "heads", "per_group", "groups", "channels", "state_size", "rows", "slots", "tokens", "shares"}
NUMBERS |= {"blocks"}

SEQUENCES = ("u", "key", "query", "z", "dy", "x", "B", "C")
SIZES = {"heads": 80, "per_group": 80, "groups": 1, "channels": 64, "state_size": 128}
SIZES |= {f"{name}_l": 5376 for name in SEQUENCES}
SEGMENT = {"SEGMENTS": 1, "ends": None, "totals": None}
Kernel = tuple[Any, str, dict[str, Any], int]


def kernels(target: str) -> Iterator[Kernel]:
    """Kernel, type of the activations, compile-time arguments and warps."""
    steps = {"SOFTPLUS": True, "Q": 64, "HEADS": 16}
    yield _triton_kernels.prepare, "bf16", steps | {"whole": None}, 2
    yield _triton_kernels.finish, "bf16", steps, 2
    yield _triton_kernels.advance, "bf16", {"SOFTPLUS": True, "P": 16, "N": 128}, 4
    yield from products(
        "bf16", {"Q": 64, "P": 64, "OPERAND": tl.bfloat16, "PRECISION": "ieee", "whole": None, "within": None}
    )
    if target in ("90", "gfx942"):
        precision = "tf32x3" if target == "90" else "ieee"
        for activations in ("fp32", "fp16") if target == "90" else ("fp32",):
            yield from products(activations, {"Q": 32, "P": 32, "OPERAND": tl.float32, "PRECISION": precision})


def products(activations: str, tiles: dict[str, Any]) -> Iterator[Kernel]:
    """The kernels with matrix products."""
    tiles = SIZES | tiles | {"N": 128, "STAGES": 2}
    walk = tiles | SEGMENT | {"SUMMARY": False, "dy": None, "z": None}
    yield _triton_kernels.scan, activations, walk | {"REVERSE": False, "states": None}, 4
    yield _triton_kernels.scan, activations, walk | {"REVERSE": True, "final": None}, 4
    yield _triton_kernels.pairs, activations, tiles, 8
    yield _triton_kernels.sums, activations, tiles, 4


def argument_type(name: str, activations: str) -> str:
    """Triton's name for the type of a kernel's argument."""
    if name in ACTIVATIONS:
        return f"*{activations}"
    if name in ("least", "most"):
        return "fp32"
    if name in NUMBERS or name[-2:-1] == "_":
        return "i32"
    return "*i32" if name == "cu_seqlens" else "*fp32"


def compiled(target: str) -> Iterator[tuple[Any, str, Any]]:
    """Every kernel that can run on the target, compiled; an exception is the failure."""
    nvidia = target.isdecimal()
    gpu = GPUTarget("cuda", int(target), 32) if nvidia else GPUTarget("hip", target, 64)
    for kernel, activations, constants, warps in kernels(target):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else argument_type(n, activations) for n in names}
        constexprs = {(names.index(name),): value for name, value in constants.items() if name in names}
        # Pointers, strides and sizes that are multiples of 16, as they are in models: loads of many bytes at once.
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith(("*", "i"))}
        done = triton.compile(
            ASTSource(kernel, signature, constexprs, aligned), target=gpu, options={"num_warps": warps}
        )
        yield kernel, activations, done


def main(target: str) -> None:
    """Compile all."""
    for _, _, binary in compiled(target):
        assert binary.asm["cubin" if target.isdecimal() else "hsaco"]


if __name__ == "__main__":
    main(sys.argv[1])
