"""ssd against its floors and peers: `python -m benchmarks.ssd [--output FOLDER] [--draw JSON PNG]`.

bfloat16 activations with float32 A, D and Δ bias, heads of 64 channels, 128 states, one group, random data; x, B and C
are views of one tensor, as in a layer. Device time by events, L2 flushed, medians; wall time of eager calls one after
the other. A backend whose outputs or gradients fail the comparison with the reference is not timed. The floor is the
larger of two times: x and y once through memory, and the operations of chunks of 64 tokens on the tensor cores (the
backward: 2.6 times the operations, twice the bytes). The peer is mamba_ssm 2.3.2.post1 on an H200.
`--draw` draws the time against the length from a results file, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.__main__ import wrong_tensors
from benchmarks.cases import Case
from benchmarks.peers import against_length, beside, draw
from benchmarks.timing import RESULTS, device_folder, device_ms, provenance
from mambalm import ops

# Of an H200, measured: copies in bytes and bfloat16 products in operations per millisecond.
_BYTES_PER_MS, _OPERATIONS_PER_MS = 4257e6, 730e9
_CHANNELS, _STATES, _CHUNK = 64, 128, 64


@dataclass(frozen=True)
class Row:
    """A shape with the peer's and the goals' milliseconds, forward and backward."""

    b: int
    l: int
    h: int
    peer: tuple[float, float]
    goal: tuple[float, float]

    @property
    def floors(self) -> tuple[float, float]:
        """The shortest possible forward and backward, ms."""
        elements = self.b * self.l * self.h * _CHANNELS
        within, between = _CHUNK * (_STATES + _CHANNELS) / _CHANNELS, 2 * _STATES
        operations = 2 * elements * (within + between) / _OPERATIONS_PER_MS
        memory = 2 * 2 * elements / _BYTES_PER_MS
        return max(operations, memory), max(2.6 * operations, 2 * memory)


ROWS = (
    Row(8, 2048, 80, (0.693, 2.35), (0.19, 1.0)),
    Row(1, 16384, 80, (0.710, 2.40), (0.25, 1.0)),
    Row(8, 2048, 24, (0.229, 0.86), (0.08, 0.36)),
    Row(1, 2048, 80, (0.101, 0.43), (0.05, 0.18)),
)
# One step of 80 heads: batch and mamba_ssm's microseconds in a graph.
STEPS = ((1, 3.84), (64, 106), (256, 414))


def arguments(b: int, l: int, h: int) -> dict[str, Tensor]:
    """Random arguments as a trained layer's are: decays and step sizes over their usual ranges."""
    inner = h * _CHANNELS
    wide = torch.randn(b, l, inner + 2 * _STATES, device="cuda").bfloat16()
    x, B, C = wide.split([inner, _STATES, _STATES], dim=-1)
    dt = torch.randn(b, l, h, device="cuda").bfloat16() / 2
    step = torch.exp(torch.rand(h, device="cuda") * math.log(100) + math.log(1e-3))
    return {
        "x": x.unflatten(-1, (h, _CHANNELS)),
        "dt": dt,
        "A": -15 * torch.rand(h, device="cuda") - 1,
        "B": B.unsqueeze(2),
        "C": C.unsqueeze(2),
        "D": torch.rand(h, device="cuda"),
        "dt_bias": torch.log(torch.expm1(step)),
    }


def calls(b: int, l: int, h: int, backend: str | None) -> tuple[Callable[[], Tensor], Callable[[Tensor], object]]:
    """A forward, and a backward of its output that keeps the graph."""
    leaves = {name: t.detach().requires_grad_() for name, t in arguments(b, l, h).items()}
    dy = torch.randn(b, l, h, _CHANNELS, device="cuda").bfloat16()

    def forward() -> Tensor:
        y = ops.ssd(**leaves, dt_softplus=True, backend=backend)  # type: ignore[arg-type]
        assert isinstance(y, Tensor)
        return y

    return forward, lambda y: torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)


def measure(b: int, l: int, h: int, backend: str | None, *, backward: bool = True) -> dict[str, Any]:
    """Device times, the wall time of an eager forward and backward, and the memory that they take."""
    forward, gradients = calls(b, l, h, backend)
    with torch.no_grad():
        found: dict[str, Any] = {"forward_ms": device_ms(forward)}
    if not backward:
        return found
    y = forward()
    found["backward_ms"] = device_ms(lambda: gradients(y))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(y)
    found["backward_peak_GB"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
    repeats = 20
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        gradients(forward())
    torch.cuda.synchronize()
    found["eager_ms"] = round((time.perf_counter() - start) / repeats * 1000, 4)
    found["eager_of_device"] = round(found["eager_ms"] / (found["forward_ms"] + found["backward_ms"]), 2)
    return found


def step(b: int, peer: float, backend: str | None) -> dict[str, Any]:
    """A decode step, captured and replayed, beside the state once in and out."""
    values = arguments(b, 1, 80)
    values["initial_state"] = torch.randn(b, 80, _CHANNELS, _STATES, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        ops.ssd(**values, dt_softplus=True, return_final_state=True, backend=backend)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            ops.ssd(**values, dt_softplus=True, return_final_state=True, backend=backend)  # type: ignore[arg-type]
    floor = 2 * values["initial_state"].nbytes / _BYTES_PER_MS
    us = round(1000 * device_ms(graph.replay), 2)
    return {"b": b, "step_us": us, "floor_us": round(1000 * floor, 2), "mamba_ssm_us": peer}


def main() -> None:
    """Gate, measure, print and write; or draw what was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ssd", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="what is measured, where there is no git to ask")
    parser.add_argument("--backend", choices=("gluon", "triton"), help="by default the automatic choice")
    parser.add_argument(
        "--draw", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw these results, measure nothing"
    )
    options = parser.parse_args()
    if options.draw:
        return draw(
            json.loads(options.draw[0].read_text()),
            options.draw[1],
            "ssd, 80 heads of 64 channels, 128 states",
            lambda row: row["h"] == 80,
        )
    reasons = ops.explain("ssd", "cuda", torch.bfloat16)
    backend = options.backend or next(name for name, reason in reasons.items() if reason is None)
    gate = Case("ssd", {"b": 2, "l": 167, "h": 32, "p": _CHANNELS, "g": 1, "n": _STATES})
    if wrong := wrong_tensors(gate, torch.device("cuda"), torch.bfloat16, backend):
        raise SystemExit(f"the {backend} backend is wrong, so it is not timed: {wrong}")
    rows = []
    for row in ROWS:
        shape = {"b": row.b, "l": row.l, "h": row.h}
        rows.append(beside(shape | measure(**shape, backend=backend), row.floors, row.goal, row.peer))
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    steps = [step(b, peer, backend) for b, peer in STEPS]
    print(json.dumps(steps), flush=True)
    head = {**provenance(options.commit), "backend": backend, "dtype": "bfloat16"}
    folder = device_folder(options.output)
    results = {**head, "rows": rows, "steps": steps, "lengths": []}
    for found in against_length(lambda l, backward: measure(1, l, 80, backend, backward=backward)):
        results["lengths"].append(found)
        (folder / "ssd.json").write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
