"""Initial values of parameters: S4D-real decay rates, inverse-softplus step biases, torch's uniform projections.

Values are made as plain float32 tensors on the parameter's device, from torch's generator, and then assigned: so they
are the same for a parameter that is whole, sharded (DTensor) or in half precision, and on the meta device they cost
nothing and are made again by ``reset_parameters`` after ``to_empty``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy ``value``, of the parameter's whole shape, into the parameter (with DTensors, rank 0's value on all ranks).

    A parameter that transformers has marked as read from a checkpoint keeps what it holds: its loading calls the
    initialisation of any module of which one tensor was missing.
    """
    if getattr(parameter, "_is_hf_initialized", False):
        return
    value = value.to(parameter.dtype)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def uniform(shape: torch.Size | tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    """float32 values drawn uniformly from [low, high)."""
    return torch.rand(shape, device=device, dtype=torch.float32) * (high - low) + low


def reset_projection(module: nn.Linear | nn.Conv1d, scale: float = 1.0) -> None:
    """Weight and bias uniform within ± 1 / sqrt(fan_in), torch's own choice; the weight times ``scale``."""
    weight, bias = module.weight, module.bias
    bound = 1 / math.sqrt(max(1, weight.shape[1:].numel()))
    assign(weight, scale * uniform(weight.shape, -bound, bound, weight.device))
    if bias is not None:
        assign(bias, uniform(bias.shape, -bound, bound, bias.device))


def residual_scale(residual_branches: int) -> float:
    """The factor on a weight whose output is added to a residual stream, one of ``residual_branches`` to be (GPT-2).

    Raises:
        ValueError: there is not one branch.
    """
    if residual_branches < 1:
        raise ValueError(f"residual_branches must be at least 1 (1: no rescaling), got {residual_branches}")
    return 1 / math.sqrt(residual_branches)


def s4d_real_log(channels: int, d_state: int, device: torch.device) -> Tensor:
    """log(1 .. n) for every channel (d, n): A = -exp(A_log) is S4D-real (Gu et al. 2022, arXiv:2206.11893)."""
    return torch.arange(1, d_state + 1, device=device, dtype=torch.float32).log().expand(channels, d_state)


def step_bias(size: int, dt_min: float, dt_max: float, floor: float, device: torch.device) -> Tensor:
    """Biases whose softplus is log-uniform in [dt_min, dt_max] and at least ``floor`` (Mamba, section 3.6).

    Raises:
        ValueError: not 0 < dt_min <= dt_max, or the floor is not positive.
    """
    if not 0 < dt_min <= dt_max or floor <= 0:
        raise ValueError(
            f"step sizes need 0 < dt_min <= dt_max and dt_init_floor > 0, "
            f"got dt_min={dt_min}, dt_max={dt_max}, dt_init_floor={floor}"
        )
    dt = uniform((size,), math.log(dt_min), math.log(dt_max), device).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def uniform_log(size: int, bounds: tuple[float, float], device: torch.device) -> Tensor:
    """Logarithms of rates drawn uniformly from ``bounds``: Mamba-2's A_log.

    Raises:
        ValueError: not 0 < lower bound <= upper bound.
    """
    low, high = bounds
    if not 0 < low <= high:
        raise ValueError(f"A_init_range must be two numbers with 0 < low <= high, got {bounds}")
    return uniform((size,), low, high, device).log()
