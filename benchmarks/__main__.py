"""`python -m benchmarks [--op NAME] [--dtype bfloat16] [--device cuda] [--output FOLDER]`.

A case is timed only when its backend passes the comparison with the reference, outputs and gradients. Results are one
JSON file per device and op: median milliseconds of forward and of forward with backward, and a GPU's peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CPU_CASES, GPU_CASES, Case
from mambalm import ops
from mambalm.diagnostics.verify import FLOAT32_TOLERANCE, HALF, HALF_PRECISION_FACTOR, relative_error
from mambalm.ops.backends import OPS

RESULTS = Path(__file__).parent / "results"
# float32 gradients that ssd makes by matrix products of half-precision operands: 11 bits, as in its tests.
_OF_PRODUCTS = 2**-11


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=OPS, help="this op only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    results = defaultdict(list)
    for case in CPU_CASES if device.type == "cpu" else GPU_CASES:
        if options.op in (None, case.op):
            row = run(case, device, dtype)
            results[case.op].append(row)
            print(case.op, json.dumps(row), flush=True)
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    folder = options.output / name.lower().removeprefix("nvidia ").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for op, rows in results.items():
        header = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        (folder / f"{op}.json").write_text(json.dumps({**header, "cases": rows}, indent=1) + "\n")


def run(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Time a case, or say which tensor its backend gets wrong."""
    reasons = ops.explain(case.op, device=device, dtype=dtype, **case.sizes)
    backend = next(name for name, reason in reasons.items() if reason is None)
    row = {"sizes": case.name, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
    if wrong := wrong_tensors(case.shrunk(), device, dtype, backend):
        return row | {"wrong": wrong}
    arguments = case.arguments(device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        row["forward_ms"] = median_ms(lambda: case.call(arguments, backend), device)
    row["forward_backward_ms"] = median_ms(lambda: gradients(case, arguments, backend), device)
    if device.type == "cuda":
        row["peak_MiB"] = torch.cuda.max_memory_allocated(device) // 2**20
    return row


def gradients(case: Case, arguments: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The output, and the gradient of the sum of its squares for every argument."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    output = case.call(leaves, backend)
    found = torch.autograd.grad(output, list(leaves.values()), output.detach())
    return {"output": output.detach()} | dict(zip(leaves, found, strict=True))


def wrong_tensors(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """The relative errors against the float64 reference that are not allowed, by the tensor's name."""
    arguments = case.arguments(device, dtype)
    exact = gradients(case, {name: tensor.double() for name, tensor in arguments.items()}, "reference")
    rounded = gradients(case, arguments, "reference") if dtype in HALF else {}
    found = gradients(case, arguments, backend)
    wrong = {}
    for name, truth in exact.items():
        reference = relative_error(rounded[name], truth) if rounded else 0.0
        error = relative_error(found[name], truth)
        allowed = _OF_PRODUCTS if case.op == "ssd" and dtype in HALF else FLOAT32_TOLERANCE
        if not error <= max(allowed, HALF_PRECISION_FACTOR * reference):
            wrong[name] = error
    return wrong


def median_ms(function: Callable[[], object], device: torch.device, seconds: float = 2.0) -> float:
    """The median time of a call in milliseconds, over at least 3 calls and about `seconds`, after two to warm up."""
    for _ in range(2):
        function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1000 * seconds and len(times) < 200):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 4)


if __name__ == "__main__":
    main()
