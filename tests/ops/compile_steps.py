"""`python -m tests.ops.compile_steps TARGET`: compiles the kernels of the decode step without a GPU.

As compile_ssd.py does; with the sizes of mamba-2.8b, falcon-mamba-7b and mamba2-2.7b.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambalm.ops import _triton_step_kernels as kernels
from mambalm.ops.triton_steps import Tiles

FLOATS = {"rates", "state", "BC", "logits"}
NUMBERS = {"rows_total", "first", "channels", "batch", "z_row", "inner_row", "heads_total", "per_group", "width"}
SCALARS = {"eps", "least", "most"}
TILES = Tiles()


def listed() -> Iterator[tuple[Any, dict[str, Any], set[str], int]]:
    """Kernel, compile-time arguments, arguments in float32 beside `FLOATS`, and warps."""
    for hidden, inner, rank, norm in ((2560, 5120, 160, False), (4096, 8192, 256, True)):
        columns = {"BLOCK": TILES.columns_of({hidden, inner})}
        shares = inner // columns["BLOCK"]
        lowering = {"N": 16, "STATES": 16, "RANK": rank, "K": triton.next_power_of_2(rank), "NORM": norm}
        one = lowering | {"SHARES": shares, "MOST": triton.next_power_of_2(shares)}
        enter = {"K": hidden, "TAPS": 4, "ROWS": TILES.enter_rows, **columns, "bias": None}
        yield kernels.enter_one, enter, {"x"}, TILES.warps
        yield kernels.split_one, {"K": inner, "ROWS": TILES.split_rows, **columns}, {"shares"}, TILES.warps
        yield kernels.scan_one, one | {"BLOCK": TILES.scan_channels}, {"shares"}, TILES.scan_warps
        leave = {"K": inner, "ROWS": TILES.leave_rows, **columns, "bias": None, "ADD": True}
        plain = {"scale": None, "NORM": False}
        yield kernels.project_one, leave | plain, {"y"}, TILES.warps
        yield kernels.project_one, leave | {"NORM": True}, {"y"}, TILES.warps
        head = {"K": hidden, "ROWS": TILES.head_rows, **columns, "bias": None, "ADD": False, "NORM": True}
        yield kernels.project_one, head, {"x", "y"}, TILES.warps
        yield kernels.lower, lowering | {"SHARES": 1, "MOST": 1}, set(), 4
        norms = {"K": hidden, "WIDTH": triton.next_power_of_2(hidden), "SHARES": 1, "bias": None}
        yield kernels.normalise, norms, {"x"}, 8
        yield kernels.normalise, norms | {"SHARES": 4}, {"x", "branch"}, 8
        yield kernels.normalise, norms | {"branch": None}, set(), 8
    yield kernels.scan, {"N": 16, "STATES": 16, "BLOCK": TILES.batch_channels}, set(), 4
    yield kernels.convolve, {"TAPS": 4, "BLOCK": TILES.conv_channels}, set(), 4
    yield kernels.heads, {"N": 128, "STATES": 128, "BLOCK": TILES.head_cells // 128}, {"bias", "D"}, 4
    yield kernels.gate, {"BLOCK": TILES.conv_channels}, set(), 4


def argument_type(name: str, floats: set[str]) -> str:
    """Triton's name for the type of a kernel's argument."""
    if name in NUMBERS:
        return "i32"
    return "fp32" if name in SCALARS else "*fp32" if name in FLOATS | floats else "*bf16"


def compiled(target: str) -> Iterator[tuple[str, Any]]:
    """Every kernel by its name, compiled; an exception is the failure."""
    nvidia = target.isdecimal()
    gpu = GPUTarget("cuda", int(target), 32) if nvidia else GPUTarget("hip", target, 64)
    overlap = {"OVERLAP": nvidia and int(target) >= 90}
    for kernel, constants, floats, warps in listed():
        names = kernel.arg_names
        constants = constants | overlap
        signature = {name: "constexpr" if name in constants else argument_type(name, floats) for name in names}
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        # Pointers and sizes that are multiples of 16, as they are in models: loads of many bytes at once.
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith(("*", "i"))}
        options = {"num_warps": warps} | ({"launch_pdl": True} if overlap["OVERLAP"] else {})
        done = triton.compile(ASTSource(kernel, signature, constexprs, aligned), target=gpu, options=options)
        yield kernel.__name__, done


def main(target: str) -> None:
    """Compile all, which are all that there are."""
    names = {name for name, binary in compiled(target) if binary.asm["cubin" if target.isdecimal() else "hsaco"]}
    defined = {
        name
        for name, value in vars(kernels).items()
        if isinstance(value, triton.JITFunction) and value.__module__ == kernels.__name__ and not name.startswith("_")
    }
    assert names == defined, f"not compiled: {defined - names}"


if __name__ == "__main__":
    main(sys.argv[1])
