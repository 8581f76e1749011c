"""A training step on a CPU beside transformers': `python -m benchmarks.cpu_training [--threads N]`.

mamba-130m with random weights in float32: forward, backward and AdamW on one sequence. Every side is a process of its
own; they take turns, and only ratios of medians within one run mean something. transformers keeps every state of every
token, so it is timed on 128 tokens, where it still fits; we are timed there too, and on 512. The losses of the
first steps must agree. "mambalm-lean" steps in the backward and computes activations again, for least memory. Memory is
the process's peak, Python and the libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import RESULTS
from benchmarks.cpu import Side, checkpoint, folder_of, processor, round_

SHORT, LONG = 128, 512  # tokens
TOLERANCE = 1e-4  # of the losses, relative


class Stepper:
    """A model with its optimizer."""

    def __init__(self, side: str, folder: str, length: int) -> None:
        if side != "transformers":
            from mambalm import load

            model: Any = load(folder, dtype="float32")
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self.model = model.train()
        self.tokens = torch.randint(50280, (1, length), generator=torch.Generator().manual_seed(0))
        # Without logits, which transformers returns in any case: a training loop does not ask for them.
        self.options = {"use_cache": False} if side == "transformers" else {"skip_logits": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if side == "mambalm-lean":
            from mambalm.training.optimizer import step_in_backward

            model.gradient_checkpointing_enable()
            step_in_backward(self.optimizer)

    def step(self) -> float:
        """One step; its loss."""
        loss = self.model(self.tokens, labels=self.tokens, **self.options).loss
        loss.backward()
        self.optimizer.step()  # of the lean side nothing is left to step
        self.optimizer.zero_grad()
        return float(loss.detach())


def serve(side: str, folder: str, length: str, threads: str) -> None:
    """Answer `step N` with seconds and losses, `peak` with the process's peak memory in bytes."""
    torch.set_num_threads(int(threads))
    stepper = Stepper(side, folder, int(length))
    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        if what == "peak":
            print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
            continue
        start = time.perf_counter()
        losses = [stepper.step() for _ in range(int(numbers[0]))]
        print(json.dumps([time.perf_counter() - start, losses]), flush=True)


def measure(sides: dict[tuple[str, int], Side], rounds: int) -> dict[str, dict[str, float]]:
    """The median tokens per second and the peak memory of each side."""
    losses: dict[tuple[str, int], list[float]] = {key: [] for key in sides}
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in sides}
    for round in range(rounds + 1):
        for (name, length), side in sides.items():
            seconds, few = side.ask("step", 1)
            losses[name, length] += few
            if round:  # the first warms up
                rates[name, length].append(length / seconds)
    for a, b in (("mambalm", SHORT), ("transformers", SHORT)), (("mambalm", LONG), ("mambalm-lean", LONG)):
        if any(abs(one / other - 1) > TOLERANCE for one, other in zip(losses[a], losses[b], strict=True)):
            raise SystemExit(f"the sides train differently: {a} {losses[a]}, {b} {losses[b]}")
    return {
        f"{name} 1 x {length}": {
            "tokens_per_second": round_(statistics.median(rates[name, length])),
            "peak_GB": round_(side.ask("peak") / 1e9),
        }
        for (name, length), side in sides.items()
    }


def main() -> None:
    """Run the sides and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_training", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint("mamba-130m", Path(folder))
        sides = {}
        for name, length in (("mambalm", SHORT), ("mambalm", LONG), ("mambalm-lean", LONG), ("transformers", SHORT)):
            here = [sys.executable, "-m", "benchmarks.cpu_training", name, folder, str(length), str(options.threads)]
            sides[name, length] = Side(f"{name} float32", here)
        results = measure(sides, options.rounds)
        for side in sides.values():
            side.stop()
    header = {
        "cpu": processor(),
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": {package: version(package) for package in ("torch", "transformers", "numba")},
        "unit": "tokens per second of a training step (forward, backward, AdamW), median",
    }
    folder_ = options.output / folder_of(processor())
    folder_.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**header, "sides": results}, indent=1)
    (folder_ / "mamba-130m-training-cpu.json").write_text(text + "\n")
    print(text, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:]) if sys.argv[1:2] and not sys.argv[1].startswith("-") else main()
