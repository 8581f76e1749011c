"""selective_scan against floors and peers: `python -m benchmarks.selective_scan [--output FOLDER] [--draw JSON PNG]`.

bfloat16 activations with float32 A, D and Δ bias, n = 16, with z and softplus, random data; device time by events, L2
flushed, medians. A backend whose outputs or gradients fail the comparison with the reference is not timed. The floor is
the larger of two times: u, Δ, z and y once through memory (the backward: twice that), and n exponentials per element.
The peer is mamba_ssm 2.3.2.post1, measured on an H200. `--draw` draws the time against the length from a results file,
without a GPU.
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
from benchmarks.peers import Times, against_length, beside, draw
from benchmarks.timing import RESULTS, device_folder, device_ms, provenance
from mambalm import ops

# Of an H200, measured: copies in bytes per millisecond, and exponentials per millisecond.
_BYTES_PER_MS, _EXP_PER_MS = 4257e6, 4170e6


@dataclass(frozen=True)
class Row:
    """A shape with the peer's and the goals' milliseconds, forward and backward."""

    b: int
    d: int
    l: int
    peer: Times
    goal: Times
    n: int = 16

    @property
    def shape(self) -> dict[str, int]:
        """b, d, l and n by name."""
        return {"b": self.b, "d": self.d, "l": self.l, "n": self.n}

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


def measure(row: Row, backend: str, *, backward: bool) -> dict[str, Any]:
    """The row's times, those of the backward on request, and the wall time of the first call, which is
    that of compilation unless the kernels are cached."""
    values = arguments(row)
    leaves = {name: t.requires_grad_() for name, t in values.items()}
    dy = torch.randn_like(values["u"])

    def forward() -> Tensor:
        y = ops.selective_scan(**values, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
        assert isinstance(y, Tensor)
        return y

    def gradients(y: Tensor) -> object:
        return torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)

    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = forward()
    if backward:
        gradients(y)
    torch.cuda.synchronize()
    result: dict[str, Any] = {"first_call_s": round(time.perf_counter() - start, 2)}
    with torch.no_grad():
        result["forward_ms"] = device_ms(forward)
    if backward:
        result["forward_saving_ms"] = device_ms(forward)
        result["backward_ms"] = device_ms(lambda: gradients(y))
    return result


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
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="what is measured, where there is no git to ask")
    parser.add_argument("--backend", default="gluon", choices=("gluon", "triton"))
    parser.add_argument(
        "--draw", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw these results, measure nothing"
    )
    options = parser.parse_args()
    if options.draw:
        return draw(
            json.loads(options.draw[0].read_text()),
            options.draw[1],
            "selective_scan, 5120 channels",
            lambda row: row["d"] == 5120,
        )
    gate = Case("selective_scan", {"b": 2, "l": 67, "d": 48, "n": 16})
    if wrong := wrong_tensors(gate, torch.device("cuda"), torch.bfloat16, options.backend):
        raise SystemExit(f"the {options.backend} backend is wrong, so it is not timed: {wrong}")
    rows = []
    for row in ROWS:
        measured = measure(row, options.backend, backward=row.peer[1] is not None)
        rows.append(beside(row.shape | measured, row.floors, row.goal, row.peer))
        torch.cuda.empty_cache()
    print(table(rows))
    folder = device_folder(options.output)
    head = {**provenance(options.commit), "backend": options.backend, "dtype": "bfloat16"}
    results = {**head, "rows": rows, "lengths": []}

    def longer(l: int, backward: bool) -> dict[str, Any]:
        return measure(Row(1, 5120, l, (None, None), (None, None)), options.backend, backward=backward)

    for found in against_length(longer):
        results["lengths"].append(found)
        (folder / "selective_scan.json").write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
