"""Decoding with random weights on a GPU: `python -m benchmarks.decode [--model 2.8b] [--kernels] [--output FOLDER]`.

Milliseconds of a step of `mambalm.generation.Engine`, the choice of the token included, in bfloat16: the time of many
steps in a row divided by their number. The floor is the time to read the weights, and to read and write the states, at
the speed of a copy on that device.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import model
from benchmarks.timing import RESULTS, device_folder, device_ms, provenance
from mambalm.generation import Engine, Sampling, Settings
from mambalm.generation.sampling import Plan
from mambalm.generation.steps import Captured

PLANS = {"greedy": Sampling(), "top-p": Sampling(temperature=1.0, top_p=0.9)}
# (model, batch, how tokens are chosen, mamba_ssm's ms and our goal in ms on an H200)
CASES = (
    ("2.8b", 1, "greedy", 3.26, 2.0),
    ("2.8b", 1, "top-p", None, None),
    ("2.8b", 8, "greedy", None, None),
    ("2.8b", 64, "greedy", 4.59, 3.0),
    ("falcon-7b", 1, "greedy", 5.22, 4.2),
    ("falcon-7b", 64, "greedy", 7.48, 5.6),
    ("mamba2-2.7b", 1, "greedy", None, None),
    ("mamba2-2.7b", 64, "greedy", None, None),
    ("mamba2attn-2.7b", 1, "greedy", None, None),
    ("mamba2attn-2.7b", 64, "greedy", None, None),
)
MODELS = tuple(dict.fromkeys(name for name, *_ in CASES))
PROMPT = 2048


def _graph(engine: Engine, batch: int, sampling: Sampling) -> Captured:
    assert engine.graphs is not None, "on a GPU steps are captured"
    return engine.graphs.take(batch, Plan.of([sampling], None))


def step_ms(engine: Engine, batch: int, sampling: Sampling, steps: int = 200) -> float:
    """The time of a step on the device, back to back."""
    captured = _graph(engine, batch, sampling)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        captured.replay()
    begin.record()
    for _ in range(steps):
        captured.replay()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) / steps, 4)


def kernels(engine: Engine, batch: int, sampling: Sampling, steps: int = 10) -> list[dict[str, Any]]:
    """Where the time of a step goes: a row per kernel, the costliest first."""
    captured = _graph(engine, batch, sampling)
    captured.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            captured.replay()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {
            "kernel": event.key,
            "launches": event.count // steps,
            "us_per_launch": round(event.self_device_time_total / event.count, 3),
            "ms_per_step": round(event.self_device_time_total / steps / 1e3, 4),
        }
        for event in events
        if event.self_device_time_total
    ]


def seconds(engine: Engine, batch: int, tokens: int, sampling: Sampling) -> tuple[float, float]:
    """Until the first token of a prompt and from there to the last, as a caller sees them."""
    ids = torch.randint(50000, (batch, PROMPT // batch))
    start = time.perf_counter()
    first = 0.0
    for _ in engine.generate(list(ids), Settings(max_new_tokens=tokens, sampling=sampling)):
        first = first or time.perf_counter() - start
    return first, time.perf_counter() - start - first


def copy_bytes_per_ms() -> float:
    """What a copy within the device reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_ms(lambda: target.copy_(source))


def case(
    engine: Engine, speed: float, name: str, batch: int, how: str, peer: float | None, goal: float | None
) -> dict[str, Any]:
    """One row of the results; ``speed`` is that of a copy, in bytes per millisecond."""
    embeddings: Any = engine.model.get_input_embeddings()
    weights = sum(p.nbytes for p in engine.model.parameters()) - embeddings.weight.nbytes
    if engine.model.config.tie_word_embeddings:
        weights += embeddings.weight.nbytes
    floor = (weights + 2 * engine.model.init_state(batch, device="meta").nbytes) / speed
    ms = step_ms(engine, batch, PLANS[how])
    beside = {"mamba_ssm_ms": peer, "goal_ms": goal} if "H200" in torch.cuda.get_device_name() else {}
    seconds(engine, batch, 8, PLANS[how])
    first, rest = seconds(engine, batch, 201, PLANS[how])
    return {
        "model": name,
        "batch": batch,
        "choice": how,
        "step_ms": ms,
        "floor_ms": round(floor, 3),
        "seen_by_the_caller_ms": round(1e3 * rest / 200, 4),
        "prompt": PROMPT // batch,
        "first_token_ms": round(1e3 * first, 2),
        **beside,
    }


def main() -> None:
    """Run the cases and write `decode.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="this one only")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a step with their times as well")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    options = parser.parse_args()
    rows, speed = [], copy_bytes_per_ms()
    for name in [options.model] if options.model else MODELS:
        engine = Engine(model(name, torch.bfloat16).eval())
        for sizes in CASES:
            if sizes[0] == name:
                rows.append(case(engine, speed, *sizes))
                if options.kernels:
                    rows[-1]["kernels"] = kernels(engine, sizes[1], PLANS[sizes[2]])
                print(json.dumps(rows[-1]), flush=True)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    folder = device_folder(options.output)
    (folder / "decode.json").write_text(json.dumps({**provenance(options.commit), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
