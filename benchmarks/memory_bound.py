"""What the benchmarks of ops that only move memory share: the gate, and both directions against the bytes' floor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.__main__ import wrong_tensors
from benchmarks.cases import Case
from benchmarks.timing import RESULTS, device_folder, device_ms, provenance

# A copy on an H200, measured.
_BYTES_PER_MS = 4257e6


def measure(
    function: Callable[..., Any], arguments: dict[str, Tensor], passes: tuple[float, float], element_bytes: float
) -> dict[str, Any]:
    """Milliseconds and times the floor, which is ``passes`` (forward, backward) over ``element_bytes``."""
    leaves = {name: t.requires_grad_() for name, t in arguments.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(out) for out in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, list(leaves.values()), weights, retain_graph=True)

    with torch.no_grad():
        times = {"forward": device_ms(lambda: function(**leaves)), "backward": device_ms(backward)}
    floors = [count * element_bytes / _BYTES_PER_MS for count in passes]
    return {
        name: {"ms": ms, "floor_ms": round(floor, 4), "times_floor": round(ms / floor, 2)}
        for (name, ms), floor in zip(times.items(), floors, strict=True)
    }


def write(op: str, gate: Case, rows: Callable[[], list[dict[str, Any]]]) -> None:
    """Compare the Triton backend with the reference, then measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=f"{op} against the floor of its bytes")
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    options = parser.parse_args()
    if wrong := wrong_tensors(gate, torch.device("cuda"), torch.bfloat16, "triton"):
        raise SystemExit(f"the triton backend is wrong, so it is not timed: {wrong}")
    found = rows()
    for row in found:
        print(json.dumps(row))
    results = {**provenance(options.commit), "backend": "triton", "dtype": "bfloat16", "rows": found}
    (device_folder(RESULTS) / f"{op}.json").write_text(json.dumps(results, indent=1) + "\n")
