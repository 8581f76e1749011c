"""What the benchmarks of the two scans share: a time beside its floor, goal and peer, and time against length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

DIRECTIONS = ("forward", "backward")
Times = tuple[float | None, float | None]  # milliseconds of forward and backward
LENGTHS = tuple(2**power for power in range(8, 21, 2))
_LONGEST_BACKWARD = 2**16


def beside(measured: dict[str, Any], floors: tuple[float, float], goals: Times, peers: Times) -> dict[str, Any]:
    """``measured``, and for each direction that it has the floor, the goal and mamba_ssm, in milliseconds."""
    found = dict(measured)
    for name, floor, goal, peer in zip(DIRECTIONS, floors, goals, peers, strict=True):
        if (ms := measured.get(f"{name}_ms")) is None:
            continue
        found[name] = {"floor_ms": round(floor, 4), "times_floor": round(ms / floor, 2), "goal_ms": goal}
        if peer is not None:
            found[name] |= {"mamba_ssm_ms": peer, "faster_than_mamba_ssm": round(peer / ms, 2)}
    return found


def against_length(measure: Callable[[int, bool], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each of `LENGTHS`, by ``measure(length, with backward)``."""
    for length in LENGTHS:
        row = {"l": length, **measure(length, length <= _LONGEST_BACKWARD)}
        print(json.dumps(row), flush=True)
        yield row
        torch.cuda.empty_cache()


def draw(results: dict[str, Any], path: Path, title: str, chosen: Callable[[dict[str, Any]], bool]) -> None:
    """Nanoseconds per token against the length into a PNG: flat is linear in the length.

    Args:
        results: of the file: ``lengths``, and the ``rows`` with the peer's times.
        path: the PNG.
        title: the shape.
        chosen: whether a row of ``rows`` is of that shape.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in results["rows"] if chosen(row)]
    for color, name in zip(("tab:blue", "tab:orange"), DIRECTIONS, strict=True):
        points = [(row["l"], 1e6 * row[f"{name}_ms"] / row["l"]) for row in results["lengths"] if f"{name}_ms" in row]
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=f"mambalm, {name}")
        beside = [(row["l"], 1e6 / (row["b"] * row["l"]), row[name]) for row in rows if name in row]
        peers = [(length, scale * found["mamba_ssm_ms"]) for length, scale, found in beside if "mamba_ssm_ms" in found]
        axes.plot(*zip(*peers, strict=True), "x", color=color, label=f"mamba_ssm, {name}")
        floor = min(scale * found["floor_ms"] for _, scale, found in beside)
        axes.axhline(floor, linestyle=":", color=color, label=f"floor, {name}")
    axes.set(xlabel="tokens", ylabel="ns per token", title=f"{title}, {results['device']}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(ncols=2, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
