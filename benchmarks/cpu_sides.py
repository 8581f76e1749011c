"""Our side and transformers' of `benchmarks.cpu`: `python -m benchmarks.cpu_sides SIDE FOLDER KIND THREADS`.

SIDE is mambalm or transformers, KIND a dtype or, for mambalm, int8 or int4 (on top of bfloat16). Answers `prefill N`
and `decode N` with seconds, `logits N V` with the logits after tokens 1..N.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambalm import load
from mambalm.generation.cpu_step import CPUStep
from mambalm.generation.engine import read


def ours(folder: str, kind: str) -> tuple[Callable[[Tensor], Any], Callable[[int], None]]:
    """Functions that read a prompt (l), and that many single tokens."""
    quantized = kind in ("int8", "int4")
    model = load(folder, dtype="bfloat16" if quantized else kind, quantization=kind if quantized else None)

    def decode(count: int) -> None:
        step = CPUStep(model, model.init_state(1))
        decode.start = time.perf_counter()  # type: ignore[attr-defined]
        for token in range(count):
            step(torch.tensor([token % 1000]))

    return lambda tokens: read(model, [tokens])[0], decode


def stock(folder: str, kind: str) -> tuple[Callable[[Tensor], Any], Callable[[int], None]]:
    """The same with transformers' own model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()

    def prefill(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens[None], use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits

    def decode(count: int) -> None:
        cache = model(torch.tensor([[1]]), use_cache=True).cache_params
        decode.start = time.perf_counter()  # type: ignore[attr-defined]
        for token in range(count):
            model(torch.tensor([[token % 1000]]), cache_params=cache, use_cache=True)

    return prefill, decode


@torch.no_grad()
def main(side: str, folder: str, kind: str, threads: str) -> None:
    """Load, say so, and answer."""
    torch.set_num_threads(int(threads))
    prefill, decode = (ours if side == "mambalm" else stock)(folder, kind)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        count = int(numbers[0])
        start = time.perf_counter()
        if what == "decode":
            decode(count)
            start = decode.start  # type: ignore[attr-defined]
        else:
            logits = prefill(1 + torch.arange(count) % 1000)
        seconds = time.perf_counter() - start
        print(json.dumps(logits[0].float().tolist() if what == "logits" else seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
