"""Speed and memory of writing one token after the other, from the first to the 130,000th."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from mambalm.diagnostics.benchmark.measuring import Memory, attempt, clock, release
from mambalm.diagnostics.benchmark.subjects import Run, Subject
from mambalm.generation import Settings

# Steps before the first measurement, in which kernels are compiled and graphs captured, and before the others.
_WARM_UP, _WARM_AGAIN = 32, 8
_FIRST = 128


def sample_points(tokens: int) -> list[int]:
    """128, then 2,000 and its doublings, up to so many tokens."""
    doublings = (2000 * 2**power for power in range(32))
    return [_FIRST, *(point for point in doublings if point <= tokens)]


def measure_throughput(
    subject: Subject, tokens: int = 130_000, *, steps: int = 256, chunk_size: int | None = None, seconds: float = 250.0
) -> dict[str, Any]:
    """Measure at sampled positions, then write all of the tokens if that fits the time.

    Args:
        subject: the model; batch 1.
        tokens: how many in all.
        steps: measured at each sampled position, to which the model reads random tokens.
        chunk_size: of them at once; None: the subject's.
        seconds: what the whole may take, by the sampled speeds.

    Returns:
        "sampled": rows of position, milliseconds and tokens per second, bytes allocated and their peak. "paired": by
        how much a step at the end is slower than one at the beginning, the two measured in turn, so that a machine's
        drift is in both. "whole": as "sampled" for every 1,024 tokens written from one token on, or why it was not
        done.
    """
    late, sampled = _sampled(subject, sample_points(tokens), steps, chunk_size)
    result: dict[str, Any] = {"tokens": tokens, "sampled_by": f"prefill and {steps} bare steps", "sampled": sampled}
    if late is not None:
        result["paired"] = attempt(functools.partial(_paired, late, tokens, steps, chunk_size), subject.device)
    del late
    release(subject.device)
    expected = _expected_seconds(sampled, tokens)
    if expected is None:
        result["whole"], result["whole_skipped"] = None, "out of memory at a sampled position"
    elif expected > seconds:
        result["whole"] = None
        result["whole_skipped"] = f"by the sampled speeds it takes {expected:.0f} s of {seconds:.0f} s"
    else:
        result["whole"] = _whole(subject, tokens)
        result |= _steadiness(result["whole"])
    release(subject.device)
    return result


def _sampled(
    subject: Subject, points: Sequence[int], steps: int, chunk_size: int | None
) -> tuple[Run | None, list[dict[str, Any]]]:
    """A run at the last point, None if it came to none behind the first; a row per point."""
    memory, run, rows = Memory(subject.device), subject.begin(1), list[dict[str, Any]]()
    chunk = (chunk_size or subject.chunk_size) if subject.reads_in_chunks else None
    for point in points:
        if attempt(lambda at=point: _advance(run, at, chunk), subject.device) is None:  # type: ignore[misc]
            return None, [*rows, {"position": point, "out_of_memory": True}]
        memory.reset()
        row = attempt(lambda: _timed(run, steps, memory), subject.device)
        rows.append({"position": point, **(row or {"out_of_memory": True})})
        if row is None or not subject.reads_in_chunks:
            return None, rows
    return run, rows


def _paired(late: Run, tokens: int, steps: int, chunk_size: int | None, rounds: int = 9) -> dict[str, Any]:
    """A run brought to the last tokens beside one at the first point, in turn for a quarter of the steps each."""
    subject, count = late.subject, max(1, steps // 4)
    early, chunk = subject.begin(1), chunk_size or subject.chunk_size
    _advance(early, _FIRST, chunk)
    _advance(late, tokens - (rounds + 1) * count, chunk)
    memory, times = Memory(subject.device), dict[Run, list[float]]()
    places = [one.position for one in (early, late)]
    for turn in range(rounds + 1):
        for one in (early, late) if turn % 2 else (late, early):
            times.setdefault(one, []).append(_timed(one, count, memory)["ms_per_token"])
    # The first of each warms up.
    early_ms, late_ms = (statistics.median(times[one][1:]) for one in (early, late))
    ratio = statistics.median(b / a for a, b in zip(times[early][1:], times[late][1:], strict=True))
    return {"positions": places, "ms_per_token": [early_ms, late_ms], "slower_at_the_end_by": round(ratio - 1, 4)}


def _advance(run: Run, position: int, chunk_size: int | None) -> bool:
    warm_up = _WARM_AGAIN if run.position else _WARM_UP
    if position > run.position + warm_up:
        run.read(position - warm_up - run.position, chunk_size)
    for _ in run.write(max(0, position - run.position)):
        pass
    return True


def _timed(run: Run, steps: int, memory: Memory) -> dict[str, Any]:
    """The speed of so many steps."""
    began = clock(run.subject.device)
    for _ in run.write(steps):
        pass
    return _row(clock(run.subject.device) - began, steps, memory)


def _row(seconds: float, steps: int, memory: Memory) -> dict[str, Any]:
    return {
        "ms_per_token": round(1000 * seconds / steps, 4),
        "tokens_per_second": round(steps / seconds, 2),
        "peak_bytes": memory.peak(),
    }


def _expected_seconds(rows: Sequence[dict[str, Any]], tokens: int) -> float | None:
    """The integral of the sampled times; None where a sample ran out of memory."""
    if any("ms_per_token" not in row for row in rows):
        return None
    last = rows[-1]
    points = [(0, rows[0]["ms_per_token"]), *((row["position"], row["ms_per_token"]) for row in rows)]
    points.append((max(tokens, last["position"]), last["ms_per_token"]))
    return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(points)) / 1000


def _whole(subject: Subject, tokens: int, block: int = 1024) -> list[dict[str, Any]]:
    """All tokens from one token on, in one go, as a user has them; a row per block."""
    memory, rows = Memory(subject.device), list[dict[str, Any]]()
    count, began = 0, clock(subject.device)

    def heard(_: list[int]) -> None:
        nonlocal count, began
        count += 1
        if count == 128 or count % block == 0 or count == tokens:
            now = time.perf_counter()
            steps = count - (rows[-1]["position"] if rows else 0)
            rows.append({"position": count, **_row(now - began, steps, memory)})
            memory.reset()
            began = time.perf_counter()

    memory.reset()
    subject.generate(torch.ones(1, 1, dtype=torch.long), Settings(max_new_tokens=tokens), heard)
    return rows


def _steadiness(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last block's speed and memory beside the first's behind the warm-up."""
    early = rows[1] if len(rows) > 1 else rows[0]
    return {
        "slower_at_the_end_by": round(rows[-1]["ms_per_token"] / early["ms_per_token"] - 1, 4),
        "peak_grew_by_bytes": rows[-1]["peak_bytes"] - early["peak_bytes"],
    }
