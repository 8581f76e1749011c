"""What a benchmark found of one model, in a line for the terminal; the JSON file has the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Result = Mapping[str, Any]


def summary(kind: str, model: Result) -> str:
    """The line of a model of a report of this kind."""
    return f"{model['name']}: {_SAID[kind](model)}"


def short(count: int) -> str:
    """A power of two as 64k or 1M."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if count >= unit:
            return f"{count // unit}{letter}"
    return str(count)


def _generate(model: Result) -> str:
    return (
        f"first token after {1000 * model['prompt_seconds']:.3g} ms ({model['prompt_over_bare_reading']:.2f} times the "
        f"reading alone), then {model['decode_ms_per_token']:.3g} ms per token, "
        f"{model['decode_tokens_per_second']:,.0f} tokens/s"
    )


def _memory(model: Result) -> str:
    return "; ".join(f"{mode['mode']}: {_longest(mode)}" for mode in model["modes"])


def _longest(mode: Result) -> str:
    if "refused" in mode:
        return str(mode["refused"])
    read = f"{short(mode['longest'])} tokens" if mode["longest"] else "nothing"
    return f"{read}, then stopped by {mode['stopped_by']}"


def _throughput(model: Result) -> str:
    points = [
        f"{row['position']:,}: {row['tokens_per_second']:,.0f}"
        if "ms_per_token" in row
        else f"{row['position']:,}: out"
        for row in model["sampled"]
    ]
    said = f"tokens/s at {', '.join(points)}"
    if model["whole"] is None:
        return f"{said}; not all written: {model['whole_skipped']}"
    grew = model["peak_grew_by_bytes"] / 2**20
    return (
        f"{said}; all {model['tokens']:,} written, at the end {model['slower_at_the_end_by']:+.1%} in time and "
        f"{grew:+,.0f} MiB of memory"
    )


def _restore(model: Result) -> str:
    same = "the same" if model["next_logits_equal"] else "OTHER"
    return (
        f"saved in {1000 * model['save_seconds']:.3g} ms, restored in {1000 * model['restore_seconds']:.3g} ms, "
        f"{model['file_bytes'] / 2**20:,.1f} MiB; {same} logits next"
    )


_SAID: dict[str, Callable[[Result], str]] = {
    "generate": _generate,
    "memory": _memory,
    "restore": _restore,
    "throughput": _throughput,
}
