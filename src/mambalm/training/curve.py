"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mambalm.training.files import replacing
from mambalm.training.metrics import read_metrics


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving averages over about ``span`` values, free of the bias of the first ones."""
    keep = 1 - 1 / span
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def plot_bits_per_byte(values: Sequence[float], tokens_per_step: int, lines: Mapping[str, float], path: Path) -> None:
    """Draw the training loss over tokens, and other figures to compare it with as lines, into a PNG.

    Args:
        values: the loss of each step in bits per byte; at least one.
        tokens_per_step: what each step read.
        lines: bits per byte by name.
        path: where to; replaced atomically.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    tokens = [tokens_per_step * (step + 1) for step in range(len(values))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, values, color="0.8", linewidth=0.6, label="training, each step")
    axes.plot(tokens, smoothed(values, max(1, math.isqrt(len(values)))), color="C0", label="training, smoothed")
    for number, (name, value) in enumerate(lines.items(), 1):
        axes.axhline(value, color=f"C{number}", linestyle="--", label=f"{name}: {value:.3f}")
    axes.set(xlabel="tokens", ylabel="bits per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_run(metrics: Path, path: Path) -> None:
    """Draw a run's losses, learning rate and gradient norm over its tokens into a PNG.

    Args:
        metrics: the metrics.jsonl of the run; nothing is drawn of one without a step.
        path: where to; replaced atomically.
    """
    from matplotlib.figure import Figure

    lines = list(read_metrics(metrics))
    steps = [line for line in lines if isinstance(line.get("loss"), float) and "verdict" not in line]
    if not steps:
        return
    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, rates, norms = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    tokens = [line["tokens"] for line in steps]
    values = [line["loss"] for line in steps]
    losses.plot(tokens, values, color="0.8", linewidth=0.6, label="training")
    losses.plot(tokens, smoothed(values, max(1, math.isqrt(len(values)))), color="C0", label="training, smoothed")
    held_out = [line for line in lines if "held_out/loss" in line]
    losses.plot(
        [line["tokens"] for line in held_out],
        [line["held_out/loss"] for line in held_out],
        color="C1",
        marker=".",
        label="held out",
    )
    losses.set(ylabel="nats per token")
    losses.legend()
    rates.plot(tokens, [line["learning_rate"] for line in steps])
    rates.set(ylabel="learning rate")
    norms.plot(tokens, [line["gradient_norm"] for line in steps], linewidth=0.6)
    norms.set(ylabel="gradient norm", xlabel="tokens", yscale="log")
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_runs(runs: Mapping[str, Path], lines: Mapping[str, float], path: Path) -> None:
    """Draw several runs into one PNG: smoothed training losses and, where there are, held-out bits per byte.

    Args:
        runs: the metrics.jsonl of each, by name.
        lines: bits per byte to compare with, by name.
        path: where to; replaced atomically.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7 if lines else 4), layout="constrained")
    panels = figure.subplots(2 if lines else 1, squeeze=False, sharex=True)[:, 0]
    for number, (name, metrics) in enumerate(runs.items()):
        found = list(read_metrics(metrics))
        steps = [line for line in found if isinstance(line.get("loss"), float) and "verdict" not in line]
        values = [line["loss"] for line in steps]
        smooth = smoothed(values, max(1, math.isqrt(len(values))))
        panels[0].plot([line["tokens"] for line in steps], smooth, color=f"C{number}", label=name)
        if lines:
            held_out = [line for line in found if "held_out/bits_per_byte" in line]
            values = [line["held_out/bits_per_byte"] for line in held_out]
            label = f"{name}: {values[-1]:.3f}" if values else name
            panels[1].plot([line["tokens"] for line in held_out], values, f"C{number}.-", label=label)
    for name, value in lines.items():
        panels[-1].axhline(value, color="0.4", linestyle="--", label=f"{name}: {value:.3f}")
    panels[0].set(ylabel="training loss, nats per token")
    panels[-1].set(xlabel="tokens", **({"ylabel": "held out, bits per byte"} if lines else {}))
    for axes in panels:
        axes.legend()
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
