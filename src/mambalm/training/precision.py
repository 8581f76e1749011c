"""In which dtype the matrix products of training run; the parameters are float32 in any case."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

# bfloat16 costs casts around every product and some accuracy: it has to win clearly.
_WORTHWHILE = 1.5


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model of float32 parameters computes in ``dtype``."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Policy:
    """How a recipe computes; its parameters are float32 masters in any case.

    Attributes:
        device: where.
        compute_dtype: of the matrix products.
        reduce_dtype: in which gradients are summed over ranks.
        scaler: of the loss, where gradients may be too small for float16.
    """

    device: torch.device
    compute_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler | None = None

    def autocast(self) -> torch.autocast:
        """The context of a forward."""
        return autocast(self.device, self.compute_dtype)


def policy(name: str, device: torch.device) -> Policy:
    """The policy of that name in a recipe.

    "bf16" computes in bfloat16; "fp16" in float16 with a scaled loss; "v100" (Kotomamba's) computes in float32 and sums
    gradients over ranks in float16; "fp32" does all in float32.
    """
    if name == "bf16":
        return Policy(device, torch.bfloat16)
    if name == "fp16":
        return Policy(device, torch.float16, scaler=torch.amp.GradScaler(device.type))
    if name == "v100":
        return Policy(device, reduce_dtype=torch.float16)
    if name == "fp32":
        return Policy(device)
    raise ValueError(f"unknown precision {name!r}: choose bf16, fp16, v100 or fp32")


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
