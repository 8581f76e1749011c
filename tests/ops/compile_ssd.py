"""`python -m tests.ops.compile_ssd TARGET`: compiles what ssd launches, without a GPU.

TARGET is a compute capability (80, 89, 90, 100) or an AMD architecture (gfx942). It is a program of its own, because
Triton's interpreter, under which the other tests run, is chosen when a kernel is defined. The backend is called with
tensors that have no data, its launches are noted and compiled as Triton would, and each has to fit into the shared
memory of the target.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mambalm.ops import triton_sums, triton_support
from mambalm.ops.ssd import _gluon_kernels, _launch, gluon
from mambalm.ops.ssd import triton as backend

# Bytes of shared memory that a program can have, and multiprocessors.
DEVICES = {"80": (166912, 108), "89": (101376, 128), "90": (232448, 132), "100": (232448, 148), "gfx942": (65536, 304)}
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
# dtype, (b, l, h, p, n, g), which of the gate, the states and the packing are there
CASES: tuple[tuple[torch.dtype, tuple[int, ...], str], ...] = (
    (torch.bfloat16, (8, 2048, 80, 64, 128, 1), ""),
    (torch.bfloat16, (1, 2000, 16, 64, 128, 2), "states"),
    (torch.float32, (1, 2000, 16, 64, 128, 2), "states"),
    (torch.bfloat16, (1, 1200, 16, 64, 128, 2), "gate states packed"),
    (torch.bfloat16, (1, 200, 8, 256, 256, 1), "gate"),
    (torch.float16, (1, 200, 8, 256, 256, 1), "gate"),
    (torch.bfloat16, (2, 37, 16, 64, 128, 2), "gate states"),
)
MOST = "90"  # the target for which all of them are compiled, for others the first
HOPPER = "90"  # the target for which the outputs and the gradients of some are made by kernels of its own
GLUON = (_gluon_kernels.scan, _gluon_kernels.states, _gluon_kernels.chunks)
Launch = tuple[Any, dict[str, Any], dict[str, Any]]


def launches(dtype: torch.dtype, sizes: tuple[int, ...], there: str, target: str) -> list[Launch]:
    """Kernel, arguments and options of every launch of a forward, its backward and one step."""
    b, l, h, p, n, g = sizes
    found: list[Launch] = []

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def arguments(l: int) -> tuple[Any, ...]:
        x, B, C = empty(b, l, h * p + 2 * g * n).split([h * p, g * n, g * n], -1)
        few = [empty(h, dtype=torch.float32) for _ in range(3)]
        offsets = empty(3, dtype=torch.int32) if "packed" in there and l > 1 else None
        state = empty(b if offsets is None else 2, h, p, n, dtype=torch.float32) if "states" in there else None
        z = empty(b, l, h, p) if "gate" in there else None
        B, C = B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
        x = x.unflatten(-1, (h, p))
        return x, empty(b, l, h), few[0], B, C, few[1], z, few[2], True, 0.0, float("inf"), state, offsets, None

    def note(kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        found.append((kernel, arguments, options))

    shared, processors = DEVICES[target]
    with (
        mock.patch.object(backend, "launch", note),
        mock.patch.object(triton_sums, "launch", note),
        mock.patch.object(triton_support, "shared_memory", return_value=shared),
        mock.patch.object(backend, "multiplies_from_shared", return_value=target not in ("80", "89")),
        mock.patch.object(_launch, "processors", return_value=processors),
        mock.patch.object(gluon, "processors", return_value=processors),
        mock.patch.object(gluon, "launch", note),
        mock.patch.object(torch.version, "hip", None if target.isdecimal() else "6"),
    ):
        given = arguments(l)
        _, final, _ = backend.forward(*given, final="states" in there, save=True)
        backend.backward(empty(b, l, h, p), final if "states" in there else None, *given, None)
        backend.forward(*arguments(1), final=True, save=False)
        if target == HOPPER:
            gluon.forward(*given, final="states" in there, save=True)
            gluon.backward(empty(b, l, h, p), final if "states" in there else None, *given, None)
    return found


def compile_launch(launch: Launch, target: str) -> Any:
    """The launch compiled, specialised to its arguments as Triton does."""
    kernel, _, options = launch
    gpu = GPUTarget("cuda", int(target), 32) if target.isdecimal() else GPUTarget("hip", target, 64)
    source = GluonASTSource if kernel in GLUON else ASTSource
    return triton.compile(source(kernel, *specialised(launch)), target=gpu, options=options)


def specialised(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """The types of a launch's arguments, those known at compile time, and which are multiples of 16."""
    kernel, arguments, _ = launch
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else argument_type(value, parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        elif parameter.do_not_specialize:
            pass
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def argument_type(value: Any, general: bool) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, Tensor):
        return NAMES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{NAMES[value.base.dtype][1:]}{list(value.block_shape)},{value.layout!r}>"
    if value is None or (isinstance(value, int) and value == 1 and not general):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"


def compiled(target: str, cases: Any = None) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]:
    """Kernel, case and arguments of every launch that differs, compiled; an exception is the failure."""
    seen = set()
    for case in cases or (CASES if target == MOST else CASES[:1]):
        for launch in launches(*case, target):
            key = repr((launch[0], specialised(launch), launch[2]))
            if key not in seen:
                seen.add(key)
                yield launch[0], case, launch[1], compile_launch(launch, target)


def main(target: str) -> None:
    """Compile all."""
    for kernel, case, _, binary in compiled(target):
        assert binary.asm["cubin" if target.isdecimal() else "hsaco"]
        room, needed = DEVICES[target][0], binary.metadata.shared
        assert needed <= room, f"{kernel.__name__} takes {needed} bytes of the {room} of {target}: {case}"


if __name__ == "__main__":
    main(sys.argv[1])
