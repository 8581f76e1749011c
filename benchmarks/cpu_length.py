"""Reading prompts of growing length on a CPU: `python -m benchmarks.cpu_length [--llama PYTHON] [--figure FILE]`.

mamba-130m with random weights, the sides of `benchmarks.cpu`, each in a process of its own, in turn: tokens per second,
the median of a few rounds. A side stops at the length from which it takes minutes or its memory. `--figure` draws the
results file, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import RESULTS
from benchmarks.cpu import Side, checkpoint, commands, folder_of, processor, round_

LENGTHS = tuple(2**power for power in range(7, 16, 2))  # 128 to 32,768 tokens
LONGEST = {"mambalm": 2**15, "llama.cpp": 2**11, "transformers": 2**9}


def measure(sides: list[Side], rounds: int) -> dict[str, dict[int, float]]:
    """The median tokens per second of each side at each length that it is asked for."""
    for side in sides:
        side.ask("prefill", LENGTHS[0])  # warms up
    found: dict[str, dict[int, float]] = {side.name: {} for side in sides}
    for length in LENGTHS:
        asked = [side for side in sides if length <= LONGEST[side.name.split()[0]]]
        seconds = [[side.ask("prefill", length) for side in asked] for _ in range(rounds)]
        for side, times in zip(asked, zip(*seconds, strict=True), strict=True):
            found[side.name][length] = round_(length / statistics.median(times))
        print(length, {side.name: found[side.name][length] for side in asked}, flush=True)
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens per second against the length into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, rates in results["sides"].items():
        axes.plot([int(length) for length in rates], list(rates.values()), marker="o", label=name)
    axes.set(xlabel="tokens of the prompt", ylabel="tokens per second", ylim=(0, None))
    axes.set_title(f"{results['model']}, {results['threads']} threads of {results['cpu']}")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the sides and write the results, or draw what was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_length", description=__doc__)
    parser.add_argument("--llama", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, help="draw the results of this processor into this PNG")
    options = parser.parse_args()
    options.ours, options.stock, options.formats, options.plain = ["float32", "bfloat16"], ["float32"], ["F16"], False
    file = options.output / folder_of(processor()) / "mamba-130m-cpu-length.json"
    if options.figure:
        return draw(json.loads(file.read_text()), options.figure)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint("mamba-130m", Path(folder))
        sides = [Side(*item) for item in commands(options, Path(folder)).items()]
        found = measure(sides, options.rounds)
        for side in sides:
            side.stop()
    head = {"model": "mamba-130m", "cpu": processor(), "threads": options.threads, "rounds": options.rounds}
    head |= {"versions": {package: version(package) for package in ("torch", "transformers", "numba")}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**head, "unit": "tokens per second, median", "sides": found}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
