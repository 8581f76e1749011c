"""A long prompt under a memory cap: `python -m benchmarks.long_prompt [--tokens 1048576] [--output FOLDER]`.

falcon-mamba-7b's shape with random bfloat16 weights reads prompts through `mambalm.generation.read`, in a process that
may allocate 24 GiB, and then decodes: speed, peak memory beyond the weights, and the step's time behind each prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS, device_folder, provenance
from mambalm.generation import Engine, Settings, read
from mambalm.generation.reading import chosen_chunk_size
from mambalm.models.shapes import random_model, shape

CAP = 24 * 2**30
SHORT = 8192


def reading(model: Any, length: int) -> tuple[dict[str, Any], torch.Tensor, Any]:
    """Speed and peak of reading a prompt of this length; the logits and the state behind it."""
    prompt = torch.randint(65024, (length,))
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    logits, state = read(model, [prompt])
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    row = {
        "tokens": length,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(length / seconds),
        "peak_beyond_weights_GB": round((torch.cuda.max_memory_allocated() - weights) / 1e9, 3),
    }
    return row, logits, state


def main() -> None:
    """Read the short and the long prompt and write `long_prompt.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_prompt", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    options = parser.parse_args()
    torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)
    model = random_model(shape("falcon-mamba-7b"), torch.bfloat16, "cuda")
    engine, rows = Engine(model), []
    for length in (SHORT, SHORT, SHORT, options.tokens):
        row, logits, state = reading(model, length)
        assert bool(logits.isfinite().all())
        settings = Settings(max_new_tokens=100)
        for _ in range(2):
            start = time.perf_counter()
            count = sum(1 for _ in engine.go_on(logits, state, engine.chooser(1, settings), settings))
            row["decode_ms_per_token"] = round(1e3 * (time.perf_counter() - start) / count, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    head = {**provenance(options.commit), "cap_GiB": CAP / 2**30, "chunk_size": chosen_chunk_size(model)}
    head["weights_GB"] = round(sum(p.nbytes for p in model.parameters()) / 1e9, 3)
    # The first rounds compile kernels.
    text = json.dumps({**head, "cases": rows[2:]}, indent=1)
    folder = device_folder(options.output)
    (folder / "long_prompt.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
