"""No Triton kernel's argument has a name that its launch takes for something else, which compiling it does not show."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

from mambalm import ops

pytest.importorskip("triton")

RESERVED = {"device", "device_type", "grid", "stream", "warmup", "debug", "instrumentation_mode"}
RESERVED |= {"num_warps", "num_ctas", "num_stages", "maxnreg", "launch_pdl"}


def kernels() -> Iterator[tuple[str, Any]]:
    """Everything that Triton made of a function."""
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if module.name.endswith("_kernels") and "numba" not in module.name:
            for name, value in vars(importlib.import_module(module.name)).items():
                if hasattr(value, "arg_names"):
                    yield f"{module.name}.{name}", value


def test_no_argument_is_the_launches() -> None:
    found = {name: set(kernel.arg_names) for name, kernel in kernels()}
    assert "mambalm.ops.few_rows._gluon_kernels.project" in found
    assert "mambalm.ops._triton_step_kernels.scan" in found
    assert {name: names & RESERVED for name, names in found.items() if names & RESERVED} == {}
