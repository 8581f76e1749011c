"""Captures of several threads, which must not meet; what is captured is tested on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mambalm.generation.capture import capturing


def test_one_capture_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    now, most, modes = [0], [0], []

    @contextmanager
    def graph(graph: object, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        now[0] += 1
        most[0] = max(most[0], now[0])
        modes.append(capture_error_mode)
        yield
        now[0] -= 1

    monkeypatch.setattr(torch.cuda, "graph", graph)

    def work(number: int) -> None:
        nothing: Any = None
        with capturing(nothing, nothing, nothing):
            time.sleep(0.005)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert most == [1]
    assert modes == ["thread_local"] * 8
