"""The figures of the benchmarks, as PNGs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambalm.diagnostics.benchmark.measuring import GIB
from mambalm.diagnostics.benchmark.summary import short
from mambalm.training.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]


def draw(kind: str, report: Result, path: Path) -> None:
    """Draw a report, as it stands in the JSON file, into a PNG that is replaced atomically.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _DRAWN[kind](left, right, report)
    environment = report["environment"]
    figure.suptitle(f"{environment['device']}, torch {environment['versions']['torch']}", fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _memory(left: Axes, right: Axes, report: Result) -> None:
    """The longest prompt as bars; the peak of memory against the prompt's length."""
    cap, shortest, longest = (report["settings"][name] for name in ("memory_gib", "shortest", "longest"))
    bars = [
        (f"{model['name']}\n{mode['mode']}", mode, f"C{index}")
        for index, model in enumerate(report["models"])
        for mode in model["modes"]
        if "longest" in mode
    ]
    for at, (_, mode, color) in enumerate(bars):
        left.barh(at, max(mode["longest"], 1), color=color)
        sign = "" if mode["stopped_by"] == "memory" else "≥ "
        read = f"{sign}{short(mode['longest'])}" if mode["longest"] else "nothing"
        left.annotate(f" {read}", (max(mode["longest"], shortest / 2), at), va="center", fontsize=7)
    left.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=6)
    _powers_of_two(left)
    left.set_xlim(left=shortest / 2, right=8 * longest)
    left.invert_yaxis()
    left.set(xlabel=f"longest prompt in {cap:g} GiB (≥: not stopped by memory)")
    styles = dict(zip(("parallel", "chunked", "token by token"), ("-", "--", ":"), strict=True))
    for label, mode, color in bars:
        lengths = [row["length"] for row in mode["lengths"]]
        peaks = [row["peak_bytes"] / GIB for row in mode["lengths"]]
        style = styles[mode["mode"]]
        right.plot(lengths, peaks, style, color=color, marker=".", label=label.replace("\n", ", "))
    right.axhline(cap, color="0.5", linewidth=0.8)
    right.set_xlim(left=shortest / 1.5, right=1.5 * longest)  # matplotlib finds no limits where nothing was read
    _powers_of_two(right)
    right.set(xlabel="tokens of the prompt", ylabel="peak memory, GiB", ylim=(0, 1.1 * cap))
    _legend(right)


def _throughput(left: Axes, right: Axes, report: Result) -> None:
    """Speed and memory against the number of tokens written: lines where all were, markers where it was sampled."""
    for index, model in enumerate(report["models"]):
        color, sampled = f"C{index}", [row for row in model["sampled"] if "ms_per_token" in row]
        whole = (model["whole"] or [])[1:]
        for axes, value in ((left, _speed), (right, _peak)):
            line = "" if whole else ":"
            axes.plot(
                *_points(sampled, value), f"o{line}", color=color, label=f"{model['name']}, sampled", markersize=4
            )
            if whole:
                axes.plot(*_points(whole, value), color=color, label=f"{model['name']}, written")
    for axes, label in ((left, "tokens per second, batch 1"), (right, "peak memory, GiB")):
        axes.set(xlabel="tokens written", ylabel=label, xlim=(0, None), ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    _legend(left)


def _generate(left: Axes, right: Axes, report: Result) -> None:
    """Time to the first token, and time per token."""
    names = [model["name"] for model in report["models"]]
    panels = (
        (left, "prompt_seconds", 1000.0, "ms to the first token"),
        (right, "decode_ms_per_token", 1.0, "ms per token after it"),
    )
    for axes, key, scale, label in panels:
        values = [scale * model[key] for model in report["models"]]
        bars = axes.bar(range(len(names)), values, color=[f"C{index}" for index in range(len(names))])
        axes.bar_label(bars, fmt="%.3g")
        _name(axes, names)
        axes.set(ylabel=label)


def _restore(left: Axes, right: Axes, report: Result) -> None:
    """Milliseconds of saving and restoring, and the file's size."""
    names = [model["name"] for model in report["models"]]
    for offset, key in ((-0.2, "save_seconds"), (0.2, "restore_seconds")):
        values = [1000 * model[key] for model in report["models"]]
        bars = left.bar([at + offset for at in range(len(names))], values, 0.4, label=key.removesuffix("_seconds"))
        left.bar_label(bars, fmt="%.3g")
    left.set(ylabel="ms")
    left.legend()
    right.bar(range(len(names)), [model["file_bytes"] / 2**20 for model in report["models"]])
    right.set(ylabel="state file, MiB")
    for axes in (left, right):
        _name(axes, names)


_DRAWN: dict[str, Callable[[Any, Any, Result], None]] = {
    "generate": _generate,
    "memory": _memory,
    "restore": _restore,
    "throughput": _throughput,
}


def _name(axes: Axes, names: Sequence[str]) -> None:
    """Models' names below the bars, the long ones in two lines."""
    axes.set_xticks(range(len(names)), [name.replace(" beside ", " beside\n") for name in names], fontsize=7)


def _legend(axes: Axes) -> None:
    """Below both panels, where it hides nothing."""
    assert axes.figure is not None
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if len(labels) > 4 else max(1, len(labels))
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7)


def _powers_of_two(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: short(int(value)))


def _speed(row: Result) -> float:
    return float(row["tokens_per_second"])


def _peak(row: Result) -> float:
    return float(row["peak_bytes"]) / GIB


def _points(rows: Sequence[Result], value: Callable[[Result], float]) -> tuple[list[int], list[float]]:
    return [row["position"] for row in rows], [value(row) for row in rows]
