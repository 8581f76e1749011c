"""`python -m tests.ops.compile_few_rows TARGET`: compiles what a step of a few rows launches on a Hopper GPU.

As compile_ssd.py does; for other targets than 90 there is nothing to compile.
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
from triton.experimental.gluon._runtime import GluonASTSource

from mambalm.ops.few_rows import _gluon_kernels, gluon
from tests.ops.compile_ssd import DEVICES, HOPPER, specialised

# Rows, and (outputs, width) of in_proj, out_proj, x_proj and dt_proj of mamba-130m, mamba-2.8b and falcon-mamba-7b, of
# in_proj of mamba2-2.7b, and odd ones.
CASES = (
    (64, ((3072, 768), (768, 1536), (80, 1536), (1536, 48))),
    (64, ((10240, 2560), (2560, 5120), (192, 5120), (5120, 160))),
    (8, ((16384, 4096), (4096, 8192), (288, 8192), (8192, 256))),
    (64, ((10576, 2560), (777, 1000))),
)
Launch = tuple[Any, dict[str, Any], dict[str, Any]]


class Noted:
    """In place of a kernel: a launch becomes a line in ``found``."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.note

    def note(self, *values: Any, **named: Any) -> None:
        """A launch's arguments and options."""
        names = self.kernel.arg_names
        given = dict(zip(names, values, strict=False)) | named
        arguments = {name: given.pop(name) for name in names}
        self.found.append((self.kernel, arguments, given))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(processors: int) -> list[Launch]:
    """Kernel, arguments and options of every launch."""
    found: list[Launch] = []
    options = {"OVERLAP": True, "launch_pdl": True}
    with (
        mock.patch.object(gluon, "processors", return_value=processors),
        mock.patch.object(_gluon_kernels, "project", Noted(_gluon_kernels.project, found)),
    ):
        for batch, sizes in CASES:
            for outputs, width in sizes:
                weight, bias = empty(outputs, width), empty(outputs)
                whole, parts = gluon.cut_of(weight, 1), gluon.cut_of(weight)
                gluon.project(empty(batch, width), weight, bias, empty(batch, outputs), whole, options)
                shares = empty(parts.shares, batch, outputs, dtype=torch.float32)
                gluon.project(empty(batch, width), weight, None, shares, parts, options)
    return found


def compiled(target: str) -> Iterator[tuple[Any, Any]]:
    """Every kernel that differs, and its binary; an exception is the failure."""
    seen = set()
    for launch in launches(DEVICES[target][1]) if target == HOPPER else ():
        key = repr((launch[0], specialised(launch), launch[2]))
        if key not in seen:
            seen.add(key)
            source = GluonASTSource(launch[0], *specialised(launch))
            yield launch[0], triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch[2])


def main(target: str) -> None:
    """Compile all."""
    for kernel, binary in compiled(target):
        assert binary.asm["cubin"]
        room, needed = DEVICES[target][0], binary.metadata.shared
        assert needed <= room, f"{kernel.__name__} takes {needed} bytes of the {room} of {target}"


if __name__ == "__main__":
    main(sys.argv[1])
