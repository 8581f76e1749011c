"""What every GPU benchmark measures with: device time on cold caches, and where and with what it was measured."""

from __future__ import annotations

import platform
import statistics
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"

# More than any L2.
_FLUSH_BYTES = 256 << 20
# Cycles that the device is kept busy for: about a millisecond at first, a quarter of a second at most.
_HEAD_START, _LONGEST_HEAD_START = 1 << 21, 1 << 29


def device_ms(function: Callable[[], object], repeats: int = 15) -> float:
    """The median device time of ``function`` in milliseconds: the L2 is flushed, and the device kept busy while the
    host launches, so that neither its overhead nor warm caches are in the figure.

    The head start doubles until the host has launched everything before the device gets to it; where it never has, as
    with a function that waits for the device, a warning tells that the figure has the host's time in it.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    times: list[float] = []
    head_start, late = _HEAD_START, False
    while len(times) < repeats:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(head_start)
        begin.record()
        function()
        end.record()
        late = begin.query()
        end.synchronize()
        if late and head_start < _LONGEST_HEAD_START:
            head_start *= 2
        else:
            times.append(begin.elapsed_time(end))
    if late:
        warnings.warn("the device waited for the host: the figure is no device time", stacklevel=2)
    return round(statistics.median(times), 4)


def device_folder(results: Path) -> Path:
    """The folder of this GPU's results, made if need be: such as ``results``/h200."""
    folder = results / torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def provenance(commit: str = "") -> dict[str, str]:
    """Device, versions and commit, for the head of a results file; a copy without git is told its ``commit``."""
    import triton

    described = subprocess.run(
        ["git", "--no-optional-locks", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or described.stdout.strip() or "unknown",
    }
