"""In which dtype the matrix products of training run; the parameters are float32 in any case."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mambalm.ops.linear import measured

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

    Raises:
        ValueError: there is no such policy.
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


def fastest_dtype() -> torch.dtype:
    """bfloat16 if this CPU multiplies matrices much faster in it, else float32.

    Measured, in some milliseconds: instruction sets do not tell, since some CPUs have the instructions and are slow.
    """
    halves = measured(torch.bfloat16)
    floats = min(halves["float32"], *measured(torch.float32).values())
    return torch.bfloat16 if floats > _WORTHWHILE * halves["bfloat16"] else torch.float32
