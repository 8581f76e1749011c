"""Capturing CUDA graphs while other threads are at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A capture begins by waiting for the device, which is an error while another one is on its way.
_LOCK = threading.Lock()


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what this thread does on the stream; what others do meanwhile is no part of it, and no mistake."""
    with _LOCK, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        yield
