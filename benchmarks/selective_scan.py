"""The selective scan against its floors and peers: `python -m benchmarks.selective_scan [--output FOLDER]`.

bfloat16 activations with float32 A, D and Δ bias, n = 16, with z and softplus, random data; device time by events, L2
flushed, medians. A backend whose outputs or gradients fail the comparison with the reference is not timed. The floor is
the larger of two times: u, Δ, z and y once through memory (the backward: twice that), and n exponentials per element.
The peer is mamba_ssm 2.3.2.post1, measured on the same kind of GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.__main__ import wrong_tensors
from benchmarks.cases import Case
from benchmarks.timing import device_ms, provenance
from mambalm import ops

# Of an H200, measured: copies in bytes per millisecond, and exponentials per millisecond.
_BYTES_PER_MS, _EXP_PER_MS = 4257e6, 4170e6


@dataclass(frozen=True)
class Row:
    """A shape with the peer's and the goals' milliseconds, forward and backward."""

    b: int
    d: int
    l: int
    peer: tuple[float, float | None]
    goal: tuple[float, float | None]
    n: int = 16

    @property
    def floors(self) -> tuple[float, float]:
        """The shortest possible forward and backward, ms."""
        elements = self.b * self.d * self.l
        memory, exponentials = 4 * 2 * elements / _BYTES_PER_MS, self.n * elements / _EXP_PER_MS
        return max(memory, exponentials), max(2 * memory, exponentials)


ROWS = (
    Row(8, 5120, 2048, (1.449, 5.639), (0.50, 1.5)),
    Row(8, 5120, 2044, (2.39, None), (0.50, None)),
    Row(1, 5120, 16384, (1.857, 6.214), (0.60, 1.8)),
    Row(1, 8192, 8192, (1.464, 5.169), (0.45, 1.3)),
    Row(8, 1536, 2048, (0.449, 1.745), (0.16, 0.45)),
    Row(1, 1536, 2048, (0.068, 0.284), (0.035, 0.12)),
    Row(1, 8192, 131072, (24.08, None), (7.0, None)),
)


def arguments(row: Row) -> dict[str, Tensor]:
    """Random arguments as a trained layer's are: decays and step sizes over their usual ranges."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    activations = {"u": draw(row.b, row.l, row.d), "delta": draw(row.b, row.l, row.d) / 2}
    matrices = {"B": draw(row.b, row.l, row.n), "C": draw(row.b, row.l, row.n), "z": draw(row.b, row.l, row.d)}
    decays = {"A": -15 * torch.rand(row.d, row.n, device="cuda") - 0.5, "D": torch.rand(row.d, device="cuda")}
    return {**activations, **matrices, **decays, "delta_bias": 4 * torch.rand(row.d, device="cuda") - 6}


def measure(row: Row, backend: str) -> dict[str, Any]:
    """The row's times, and the wall time of the first forward and backward (compilation, unless cached)."""
    values = arguments(row)
    leaves = {name: t.requires_grad_() for name, t in values.items()}
    dy = torch.randn_like(values["u"])

    def forward() -> Tensor:
        y = ops.selective_scan(**values, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
        assert isinstance(y, Tensor)
        return y

    start = time.perf_counter()
    y = forward()
    torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    torch.cuda.synchronize()
    result: dict[str, Any] = {"first_call_s": round(time.perf_counter() - start, 2)}
    with torch.no_grad():
        result["forward_ms"] = device_ms(forward)
    if row.peer[1] is not None:
        result["forward_saving_ms"] = device_ms(forward)
        result["backward_ms"] = device_ms(lambda: torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True))
    return result


def report(row: Row, measured: dict[str, Any]) -> dict[str, Any]:
    """The measured times beside floor, goal and peer."""
    found: dict[str, Any] = {"b": row.b, "d": row.d, "l": row.l, "n": row.n, **measured}
    for name, floor, goal, peer in zip(("forward", "backward"), row.floors, row.goal, row.peer, strict=True):
        if (ms := measured.get(f"{name}_ms")) is None:
            continue
        found[name] = {"floor_ms": round(floor, 4), "times_floor": round(ms / floor, 2), "goal_ms": goal}
        if peer is not None:
            found[name] |= {"mamba_ssm_ms": peer, "faster_than_mamba_ssm": round(peer / ms, 2)}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The results for a reader: ms, times the floor, goal, times the peer's speed."""
    lines = [f"{'b, d, l':>18} | {'forward':>8} xfloor   goal  xpeer | {'backward':>8} xfloor   goal  xpeer"]
    for row in rows:
        line = f"{row['b']:>3},{row['d']:>6},{row['l']:>7}"
        for name in ("forward", "backward"):
            if name in row:
                part = row[name]
                line += f" | {row[f'{name}_ms']:8.4f} {part['times_floor']:6} {part['goal_ms'] or '':>6}"
                line += f" {part.get('faster_than_mamba_ssm', ''):>6}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Gate, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selective_scan", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "h200")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git to ask")
    parser.add_argument("--backend", default="gluon", choices=("gluon", "triton"))
    options = parser.parse_args()
    gate = Case("selective_scan", {"b": 2, "l": 67, "d": 48, "n": 16})
    if wrong := wrong_tensors(gate, torch.device("cuda"), torch.bfloat16, options.backend):
        raise SystemExit(f"the {options.backend} backend is wrong, so it is not timed: {wrong}")
    rows = []
    for row in ROWS:
        rows.append(report(row, measure(row, options.backend)))
        torch.cuda.empty_cache()
    print(table(rows))
    options.output.mkdir(parents=True, exist_ok=True)
    results = {**provenance(options.commit), "backend": options.backend, "dtype": "bfloat16", "rows": rows}
    (options.output / "selective_scan.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
