"""What this machine has, how its CPU multiplies, which backend each op would run on and why none of the others."""

from __future__ import annotations

import platform
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mambalm import ops
from mambalm.ops import linear
from mambalm.ops.backends import OPS

CORE = ("mambalm", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "numba")
# And the extra that brings it; Triton comes with torch's builds for GPUs.
OPTIONAL = {
    "triton": None,
    "datasets": "train",
    "datatrove": "train",
    "peft": "train",
    "bitsandbytes": "quant",
    "torchao": "quant",
    "lm-eval": "eval",
}
COMPILERS = ("cc", "gcc", "clang", "cl")
NEEDS_COMPILER = "Triton's first launch and torch.compile on a CPU need a C compiler and Python's headers"


@dataclass(frozen=True)
class Backend:
    """A backend of an op on a device: `reason` says why it cannot run there, None that it can; one is `chosen`."""

    op: str
    device: torch.device
    name: str
    reason: str | None
    chosen: bool


def versions() -> dict[str, str]:
    """Version of Python and of every package that mambalm builds on; "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for package in (*CORE, *OPTIONAL):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    # With its build, such as +cpu or +cu130, which not every index puts into the package's version.
    return found | {"torch": torch.__version__}


def devices() -> dict[torch.device, str]:
    """The devices that torch can use, each with a description."""
    found = {torch.device("cpu"): f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        for index in range(torch.accelerator.device_count()):
            device = torch.device(kind.type if kind else "cuda", index)
            found[device] = _describe(device)
    return found


def compiler() -> str:
    """The C compiler and Python's headers, and what does not work without them."""
    path = next(filter(None, map(shutil.which, COMPILERS)), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if path is None:
        return f"none found (looked for {', '.join(COMPILERS)}). {NEEDS_COMPILER}"
    if not header.exists():
        return f"{path}, but {header} is missing. {NEEDS_COMPILER}"
    return f"{path}, with Python's headers"


def products() -> Iterator[tuple[str, str]]:
    """For each dtype in which a CPU's matrix products have a choice, what was chosen and by which measurement."""
    for dtype in (torch.float32, torch.bfloat16):
        if way := linear.chosen(dtype):
            times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in linear.measured(dtype).items())
            yield str(dtype).removeprefix("torch."), f"{way} (a product of {linear.MEASURED}: {times})"


def decoding() -> Iterator[tuple[str, str]]:
    """How the CPU's decode step multiplies each kind of weight, on which threads, and where its kernels are kept."""
    from mambalm.ops.numba_products import multiply
    from mambalm.ops.numba_support import pooled
    from mambalm.quantization import products
    from mambalm.quantization._numba_kernels import integer_products

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reason = products.refuses(torch.empty(64, 64, dtype=dtype))
        way = "read where they lie, x in float32" if reason is None else f"by calling the module: {reason}"
        yield str(dtype).removeprefix("torch."), way
    yield "int8, int4", f"read packed, x in 16 bits, products by {integer_products()}"
    reason = pooled()
    yield "threads", f"{torch.get_num_threads()}, " + ("torch's own" if reason is None else f"a pool's: {reason}")
    folder = multiply.stats.cache_path
    yield "kernels", f"kept in {folder}" if folder else "compiled in every process: see NUMBA_CACHE_DIR"


def backends() -> Iterator[Backend]:
    """Every backend of every op on one device of each kind; the first that can run is what automatic choice takes."""
    kinds = {device.type: device for device in reversed(devices())}
    for device in reversed(kinds.values()):
        for op in OPS:
            reasons = ops.explain(op, device=device)
            chosen = next((name for name, reason in reasons.items() if reason is None), None)
            for name, reason in reasons.items():
                yield Backend(op, device, name, reason, chosen=name == chosen)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
