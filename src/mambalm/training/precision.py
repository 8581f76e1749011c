"""In which dtype the matrix products of training run; the parameters are float32 in any case."""

from __future__ import annotations

import time

import torch
from torch import Tensor

# bfloat16 costs casts around every product and some accuracy: it has to win clearly.
_WORTHWHILE = 1.5


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model of float32 parameters computes in ``dtype``."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def fastest_dtype(rows: int = 1024, width: int = 512) -> torch.dtype:
    """bfloat16 if this CPU multiplies matrices (rows, width) x (width, width) much faster in it, else float32.

    Measured, in some milliseconds: instruction sets do not tell, since some CPUs have the instructions and are slow.
    """
    floats = torch.ones(rows, width), torch.ones(width, width)
    halves = floats[0].bfloat16(), floats[1].bfloat16()
    return torch.bfloat16 if _best_time(*floats) > _WORTHWHILE * _best_time(*halves) else torch.float32


def _best_time(a: Tensor, b: Tensor, repeats: int = 5) -> float:
    """The shortest time of a product in seconds; the first, which sets things up, does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return min(times[1:])
