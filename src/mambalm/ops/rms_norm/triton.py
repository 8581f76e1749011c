"""The normalisation on any GPU that Triton knows, and in Triton's interpreter on a CPU."""

from typing import Any

import torch
from torch import Tensor

from mambalm.ops.backends import Call
from mambalm.ops.rms_norm._triton_kernels import norm_backward, norm_forward
from mambalm.ops.triton_support import ceil_div, dense_channels, launch, on, power_of_2, processors, unsupported

# A group is held in the registers of one program.
_MOST_CHANNELS = 65536

# Elements of a program's tile, where a group is no larger, and of a warp at most: the fewer warps wait for each other
# at the sums of a row the better.
_TILE, _WARP = 1024, 640
# Warps of the backward per multiprocessor, as many as have room beside each other: with a gate or without, of few or
# more elements a warp. Each program keeps a share of the weight's gradient.
_FEW = 384
_BACKWARD_WARPS = {(True, True): 32, (True, False): 24, (False, True): 24, (False, False): 16}


def supports(call: Call) -> str | None:
    """None, or why the call cannot run here."""
    d, g = call.sizes.get("d", 1), call.sizes.get("g", 1)
    if d // g > _MOST_CHANNELS:
        return f"it takes groups of at most {_MOST_CHANNELS} channels, the call has {d // g}"
    return unsupported(call)


def _rows(t: Tensor) -> Tensor:
    """(..., d) as (tokens, d) with the channels side by side: a view wherever one step leads from token to token."""
    return dense_channels(t.reshape(-1, t.shape[-1]))


def _tile(group_size: int) -> dict[str, Any]:
    """How a program holds a group: the least padded of 1, 3, 5 and 7 blocks of a power of two, or two of 2048."""
    whole = power_of_2(group_size)
    rows = max(_TILE // whole, 1)
    choices = ((parts * power_of_2(ceil_div(group_size, parts)), parts) for parts in (1, 3, 5, 7))
    held, parts = min(choices) if rows == 1 else (whole, 1)
    if held == 4096:
        parts = 2  # fewer registers
    warps = min(power_of_2(ceil_div(rows * held, _WARP)), 16)
    blocks = {"ROWS": rows, "PARTS": parts, "BLOCK": held // parts, "PADDED": held != group_size}
    return {**blocks, "num_warps": warps}


def _launch(kernel: Any, parts: int, group_size: int, inputs: dict[str, Tensor | None], **more: Any) -> None:
    """Run ``parts`` programs per group on ``inputs``, each (tokens, d), whose row strides it takes as well."""
    strides = {f"{name}_row": 0 if t is None else t.stride(0) for name, t in inputs.items()}
    first = next(t for t in inputs.values() if t is not None)
    tokens, d = first.shape
    sizes = {"channels": d, "group_size": group_size, "tokens": tokens}
    options = {"num_warps": more.pop("num_warps")}
    with on(first.device):
        launch(kernel, d // group_size * parts, {**inputs, **strides, **sizes, **more}, options)


def forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    group_size: int,
    stream_dtype: torch.dtype,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """y (..., d) in x's dtype, and x + residual (..., d) in ``stream_dtype``, empty without a residual or ``keep``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # The kernel is one whether it keeps the stream or not: the order of its sums must not depend on that.
    stream = torch.empty(x.shape if residual is not None and keep else (0,), dtype=stream_dtype, device=x.device)
    inputs = {name: None if t is None else _rows(t) for name, t in (("x", x), ("gate", gate), ("residual", residual))}
    tile = _tile(group_size)
    tokens = x.numel() // x.shape[-1]
    weight = None if weight is None else weight.contiguous()
    outputs = {"y": y, "total": stream, "kept": tokens if keep else 0}
    _launch(norm_forward, ceil_div(tokens, tile["ROWS"]), group_size, inputs, weight=weight, eps=eps, **outputs, **tile)
    return y, stream


def backward(
    dy: Tensor,
    dstream: Tensor | None,
    source: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    group_size: int,
    branch_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the ``source`` (x, or the residual stream), of weight and of gate, and the first of them once
    more in ``branch_dtype``, for what was added to the stream in that dtype."""
    d = source.shape[-1]
    tile = _tile(group_size)
    tiles = ceil_div(source.numel() // d, tile["ROWS"])
    few = tile["ROWS"] * tile["PARTS"] * tile["BLOCK"] <= _FEW * tile["num_warps"]
    # One block keeps more in registers than several.
    warps = _BACKWARD_WARPS[gate is not None and (few or tile["PARTS"] > 1), few]
    most = processors(source.device) * max(warps // tile["num_warps"], 1)
    programs = min(tiles, ceil_div(most, d // group_size))
    dsource = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    dbranch = None if branch_dtype is None else torch.empty(source.shape, dtype=branch_dtype, device=source.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    shares = None if weight is None else torch.empty(programs, d, dtype=torch.float32, device=source.device)
    given = {"dy": dy, "dstream": dstream, "source": source, "gate": gate}
    inputs = {name: None if t is None else _rows(t) for name, t in given.items()}
    weight = None if weight is None else weight.contiguous()
    outputs = {"dsource": dsource, "dbranch": dbranch, "dgate": dgate, "shares": shares, "programs": programs}
    _launch(norm_backward, programs, group_size, inputs, weight=weight, eps=eps, **outputs, **tile)
    # Summed in a fixed order, so that a run can be repeated bit for bit.
    return dsource, None if shares is None else shares.sum(0), dgate, dbranch
