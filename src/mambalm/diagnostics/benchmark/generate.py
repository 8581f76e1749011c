"""Time to the first token and time per token, by the options of the state-spaces project's own script."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from mambalm.diagnostics.benchmark.measuring import Memory, clock
from mambalm.diagnostics.benchmark.subjects import Subject
from mambalm.generation import Settings


def measure_generate(subject: Subject, prompts: Tensor, settings: Settings, repeats: int = 3) -> dict[str, Any]:
    """Continue prompts (b, l), once to warm up and `repeats` times to measure.

    Returns:
        Medians: seconds until the first tokens are known, how many times as many as reading the prompts in the same way
        takes without choosing any, and milliseconds between each two tokens after; the peak of memory; the tokens of
        the last repeat.

    Raises:
        ValueError: fewer than two new tokens, or no repeat.
    """
    if settings.max_new_tokens < 2 or repeats < 1:
        raise ValueError("a time per token needs two new tokens at least, and one repeat")
    settings = replace(settings, end_tokens=frozenset())
    memory = Memory(subject.device)
    first: list[float] = []
    above: list[float] = []
    between: list[float] = []
    told: list[list[int]] = []
    batch, length = prompts.shape
    for repeat in range(repeats + 1):
        memory.reset()
        started = clock(subject.device)
        subject.read(prompts)
        began = clock(subject.device)
        bare = began - started
        told, times = [], list[float]()

        def heard(row: list[int], told: list[list[int]] = told, times: list[float] = times) -> None:
            told.append(row)
            times.append(time.perf_counter())

        subject.generate(prompts, settings, heard)
        if repeat:
            first.append(times[0] - began)
            above.append(first[-1] / bare)
            between.append((times[-1] - times[0]) / (len(times) - 1))
    prompt, step = statistics.median(first), statistics.median(between)
    return {
        "batch": batch,
        "prompt_length": length,
        "generated": len(told),
        "sampling": asdict(settings.sampling),
        "repeats": repeats,
        "prompt_seconds": round(prompt, 6),
        "prompt_over_bare_reading": round(statistics.median(above), 4),
        "prompt_tokens_per_second": round(batch * length / prompt, 1),
        "decode_ms_per_token": round(1000 * step, 4),
        "decode_tokens_per_second": round(batch / step, 2),
        "peak_bytes": memory.peak(),
        "tokens": [list(row) for row in zip(*told, strict=True)],
    }
