"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambalm.training.curve import plot_bits_per_byte, smoothed
from mambalm.training.progress import duration


def test_smoothing_by_hand() -> None:
    # Weights halve with each step back: 1; (1/2 · 4 + 1)/(3/2); ...
    assert smoothed([4.0, 1.0, 2.5], 2) == pytest.approx([4.0, 2.0, (4 / 4 + 1 / 2 + 2.5) / 1.75])
    assert smoothed([3.0, 1.0], 1) == [3.0, 1.0]


def test_writes_a_png(tmp_path: Path) -> None:
    plot_bits_per_byte([2.0, 1.5], 100, {"xz -9": 1.6}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError, match=r"cannot write .*missing"):
        plot_bits_per_byte([2.0], 100, {}, tmp_path / "missing" / "loss.png")


def test_durations() -> None:
    assert [duration(s) for s in (-1, 0, 59.6, 125)] == ["0:00", "0:00", "1:00", "2:05"]
