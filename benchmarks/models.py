"""Whole models with random weights: `python -m benchmarks.models [--mode training] [--output FOLDER]`.

Training: tokens per second and peak memory of a step under bfloat16 autocast with float32 parameters and fused AdamW.
Prefill: tokens per second and peak memory of reading a prompt at batch 1 in bfloat16, and handing out the state.
The peers' figures are those of mamba_ssm 2.3.2 on an H200.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS, device_folder, provenance
from mambalm.models.shapes import random_model, shape

PEAK_FLOPS = 989e12  # bfloat16, dense, of an H100 or H200 by its datasheet

# What the cases call the shapes of `mambalm.models.shapes`.
NAMES = {"130m": "mamba-130m", "1.4b": "mamba-1.4b", "2.8b": "mamba-2.8b", "falcon-7b": "falcon-mamba-7b"}


@dataclass(frozen=True)
class Training:
    """A case: mamba_ssm's tokens per second and peak GB, our goal in tokens per second, what is computed again."""

    model: str
    batch: int
    peer: float | None
    peer_peak: float | None
    goal: float | None
    recompute: bool = True  # as in `mambalm.layers.Mamba`
    kept: int = 0  # blocks that compute nothing again
    scans: int = 0  # blocks that compute the scan again as well
    layers: int = 0  # blocks of which nothing but the residual stream is kept
    length: int = 2048


TRAINING = (
    Training("130m", 32, 188e3, 64, 330e3),
    Training("130m", 32, 188e3, 64, 330e3, recompute=False),
    Training("1.4b", 16, 32.2e3, 98, 52e3, kept=16),
    Training("2.8b", 8, 17.6e3, 98, 28e3, kept=5),
    Training("2.8b", 16, 14.3e3, 86, 24e3, scans=34, layers=30),
    Training("mamba2-130m", 32, None, None, None),
    Training("mamba2-130m", 32, None, None, None, recompute=False),
    Training("mamba2-2.7b", 8, None, None, None),
    Training("mamba2-2.7b", 8, None, None, None, recompute=False),
)
# (model, length, mamba_ssm's tokens per second, our goal)
PREFILL = (
    ("2.8b", 2048, 40.9e3, None),
    ("2.8b", 8192, 67.0e3, 88e3),
    ("falcon-7b", 2048, 33.0e3, None),
    ("falcon-7b", 8192, 32.6e3, 41e3),
)


def model(name: str, dtype: torch.dtype) -> Any:
    """A model of this size, on the GPU."""
    return random_model(shape(NAMES.get(name, name)), dtype, "cuda")


def timed(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The wall time of a first call, and the median of more after a second; a call ends when the device does."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[2:])


def training(case: Training) -> dict[str, Any]:
    """Steps of a model in training."""
    trained = model(case.model, torch.float32).train()
    blocks = trained.backbone.layers
    for index, block in enumerate(blocks):
        block.mixer.recompute = case.recompute and index < len(blocks) - case.kept
        if index < case.layers + case.scans:
            block.mixer.recompute = "layer" if index < case.layers else "scan"
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(50280, (case.batch, case.length), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = trained(ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    first, seconds = timed(step, 9)
    speed = case.batch * case.length / seconds
    parameters = sum(p.numel() for p in trained.parameters())
    return {
        **{name: getattr(case, name) for name in ("model", "batch", "length", "recompute", "kept", "scans", "layers")},
        "tokens_per_second": round(speed),
        "mfu": round(6 * parameters * speed / PEAK_FLOPS, 4),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "first_step_seconds": round(first, 2),
        "mamba_ssm": {"tokens_per_second": case.peer, "peak_GB": case.peer_peak},
        "goal_tokens_per_second": case.goal,
    }


@torch.no_grad()
def prefill(name: str, length: int, peer: float, goal: float | None) -> dict[str, Any]:
    """Reading one prompt in one chunk."""
    reader = model(name, torch.bfloat16).eval()
    ids = torch.randint(50280, (1, length), device="cuda")
    state = reader.init_state(1)
    torch.cuda.reset_peak_memory_stats()
    first, seconds = timed(lambda: reader(ids, cache_params=state, use_cache=True, logits_to_keep=1), 7)
    return {
        "model": name,
        "length": length,
        "tokens_per_second": round(length / seconds),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "first_call_seconds": round(first, 2),
        "mamba_ssm": {"tokens_per_second": peer},
        "goal_tokens_per_second": goal,
    }


MODES: dict[str, tuple[Callable[..., dict[str, Any]], tuple[tuple[Any, ...], ...]]] = {
    "training": (training, tuple((case,) for case in TRAINING)),
    "prefill": (prefill, PREFILL),
}


def main() -> None:
    """Run the modes asked for and write a JSON file each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--mode", choices=MODES, help="this one only")
    parser.add_argument("--model", help="cases that name this one only")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    options = parser.parse_args()
    folder = device_folder(options.output)
    for mode in [options.mode] if options.mode else MODES:
        function, cases = MODES[mode]
        rows = []
        for case in cases:
            if options.model and options.model not in str(case):
                continue
            try:
                rows.append(function(*case))
            except torch.cuda.OutOfMemoryError:
                rows.append({"case": str(case), "out_of_memory": True})
            print(mode, json.dumps(rows[-1]), flush=True)
            text = json.dumps({**provenance(options.commit), "cases": rows}, indent=1)
            (folder / f"{mode}.json").write_text(text + "\n")
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
