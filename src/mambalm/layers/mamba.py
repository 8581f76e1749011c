"""The Mamba layer (Gu & Dao 2023, arXiv:2312.00752, figure 3), with FalconMamba's norms on request."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambalm.layers.convolution import CausalConv1d
from mambalm.layers.initialization import (
    assign,
    reset_projection,
    residual_scale,
    s4d_real_log,
    step_bias,
    uniform,
)
from mambalm.layers.linear import Linear, beside, in_parts, product
from mambalm.layers.recomputation import Recomputation, is_wanted
from mambalm.layers.state import MambaState
from mambalm.ops import rms_norm, selective_scan

_HALF = (torch.bfloat16, torch.float16)


class StepProjection(Linear):
    """``dt_proj``: leaves its bias to the scan, which adds it in float32, unless the bias is half precision anyway.

    Called alone it returns its output less ``scan_bias``.
    """

    @property
    def scan_bias(self) -> Tensor | None:
        """The bias that ``forward`` leaves out."""
        # With accelerate's hooks (an offloaded model) a parameter may be there during this module's own call only.
        kept = self.bias is None or self.bias.dtype in _HALF or hasattr(self, "_hf_hook")
        return None if kept else self.bias

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # it is never called in parts
        """(..., dt_rank) -> (..., d), in x's dtype: float32 weights may meet bfloat16 activations under FSDP2."""
        # As rows: of a slice with more axes torch would add the bias in a pass of its own.
        rows = x.reshape(-1, x.shape[-1])
        if self.scan_bias is None:
            y = super().forward(rows)
        else:
            cast = torch.is_autocast_enabled(x.device.type)
            y = product(rows, self.weight if cast else self.weight.to(x.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])


# A projection of these types is its weight and bias, nothing else.
PLAIN_PROJECTIONS = (nn.Linear, Linear, StepProjection)


def full_precision(parameter: Tensor) -> Tensor:
    """The parameter as the scans take it: float32, or float64 if it is."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


class Mamba(nn.Module):
    """The Mamba layer; arguments and parameter names are those of state-spaces/mamba and transformers.

    Args:
        d_model: input and output channels.
        d_state: state size n.
        d_conv: width k of the convolution.
        expand: d_inner = expand * d_model, unless d_inner is given.
        dt_rank: rank of the step projection; "auto": d_model / 16, rounded up.
        dt_min, dt_max, dt_init_floor: the range of initial step sizes, and their least value.
        dt_init, dt_scale: "random" or "constant" initial dt_proj weight of size dt_scale / sqrt(dt_rank).
        conv_bias, bias: whether the convolution has one; whether in_proj and out_proj have.
        d_inner: inner channels d, for checkpoints that state them beside ``expand``.
        bcdt_rms_eps: normalise Δ, B and C by their root mean square, with this eps and without weights (FalconMamba).
        recompute: compute the convolution's output and Δ (in a block also the norm's output) again in the backward
            instead of keeping them; "scan": all that lies between the projections; "layer": in_proj's product too, so
            that only the input is kept (in a block the residual stream); None: on a GPU the first of these. Hooks on
            saved tensors that are around the layer, such as checkpointing's, take precedence. See
            docs/decisions/2026-11-27-recomputation.md.
        backend: the ops' backend; None: automatic choice.
        layer_idx: kept for the caller.

    Raises:
        ValueError: dt_init or the range of step sizes is none of the above.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        d_inner: int | None = None,
        bcdt_rms_eps: float | None = None,
        recompute: bool | Literal["scan", "layer"] | None = None,
        backend: str | None = None,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model) if d_inner is None else d_inner
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self.bcdt_rms_eps = bcdt_rms_eps
        self.recompute = recompute
        self.backend = backend
        self.layer_idx = layer_idx
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **where)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, bias=conv_bias, activation="silu", backend=backend, **where)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **where)
        self.dt_proj = StepProjection(self.dt_rank, self.d_inner, bias=True, **where)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **where))
        self.D = nn.Parameter(torch.empty(self.d_inner, **where))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **where)
        self.reset_parameters()

    def reset_parameters(self, residual_branches: int = 1) -> None:
        """Draw all parameters as the paper does, out_proj divided by sqrt(residual_branches)."""
        for module in (self.in_proj, self.conv1d, self.x_proj):
            reset_projection(module)
        reset_projection(self.out_proj, residual_scale(residual_branches))
        device = self.A_log.device
        size = self.dt_scale / math.sqrt(self.dt_rank)
        shape = self.dt_proj.weight.shape
        random = self.dt_init == "random"
        weight = uniform(shape, -size, size, device) if random else torch.full(shape, size, device=device)
        assign(self.dt_proj.weight, weight)
        assign(self.dt_proj.bias, step_bias(self.d_inner, self.dt_min, self.dt_max, self.dt_init_floor, device))
        assign(self.A_log, s4d_real_log(self.d_inner, self.d_state, device))
        assign(self.D, torch.ones(self.d_inner, device=device))

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Read x on from ``state``, at any length; nothing is changed in place.

        Args:
            x: (b, l, d_model).
            state: what was read before, b rows; None: nothing.
            cu_seqlens: int32 offsets (s + 1) of documents packed into one row (b = 1); the states have s rows then.
            return_state: return the new state too.

        Returns:
            y (b, l, d_model); (y, MambaState) with return_state.

        Raises:
            TypeError: the state is of another kind of layer.
            ValueError: a shape does not fit; the message names the tensor.
        """
        conv, ssm = MambaState.unpack(state)
        with Recomputation() if self.recomputes(x) else nullcontext() as again:
            if again is not None and self.recompute == "layer":
                y, conv, ssm = self._again(again, self._to_scan, x, conv, ssm, cu_seqlens)
            else:
                y, conv, ssm = self._to_scan(x, conv, ssm, cu_seqlens, again)
            y = self.out_proj(y)
        return (y, MambaState(conv, ssm)) if return_state else y

    def recomputes(self, x: Tensor) -> bool:
        """Whether the backward of a call on ``x`` computes activations again."""
        return is_wanted(self.recompute, x)

    def _to_scan(
        self,
        x: Tensor,
        conv: Tensor | None,
        ssm: Tensor | None,
        cu_seqlens: Tensor | None,
        again: Recomputation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What lies before out_proj: y (b, l, d), and the new conv and ssm."""
        u, z = in_parts(self.in_proj, x, (self.d_inner, self.d_inner))
        if again is not None and self.recompute == "scan":
            return self._again(again, self._inner, u, z, conv, ssm, cu_seqlens)
        return self._inner(u, z, conv, ssm, cu_seqlens, again)

    def _again(self, again: Recomputation, function: Any, *arguments: Tensor | None) -> Any:
        """``function(*arguments)``, to be computed again as a whole."""
        # What stands in a projection's place (an adapter with dropout) may draw random numbers.
        if all(type(module) in PLAIN_PROJECTIONS for module in (self.in_proj, self.x_proj, self.dt_proj)):
            parameters = (p for name, p in self.named_parameters() if not name.startswith("out_proj."))
            return again.run(parameters, function, *arguments)
        return checkpoint(function, *arguments, use_reentrant=False)

    def _inner(
        self,
        u: Tensor,
        z: Tensor,
        conv: Tensor | None,
        ssm: Tensor | None,
        cu_seqlens: Tensor | None,
        again: Recomputation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What lies between in_proj and out_proj: y (b, l, d), and the new conv and ssm."""
        inputs = (u, conv, cu_seqlens)
        u, conv = self.conv1d(*inputs)
        if again is not None:
            again.give(u, self.conv1d, lambda *inputs: self.conv1d(*inputs)[0], *inputs)
        u, projected = beside(self.x_proj, u)
        delta, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.bcdt_rms_eps is not None:
            delta, B, C = (rms_norm(t, eps=self.bcdt_rms_eps, backend=self.backend) for t in (delta, B, C))
        step = self.dt_proj(delta)
        # What stands in dt_proj's place (an adapter with dropout) may draw random numbers.
        if again is not None and type(self.dt_proj) is StepProjection:
            again.give(step, self.dt_proj, self.dt_proj, delta)
        y, ssm = selective_scan(
            u,
            step,
            -full_precision(self.A_log).exp(),
            B,
            C,
            full_precision(self.D),
            z,
            self._scan_bias(),
            delta_softplus=True,
            initial_state=ssm,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
            backend=self.backend,
        )
        return y, conv, ssm

    def _scan_bias(self) -> Tensor | None:
        """The part of dt_proj's output that its module leaves to the scan.

        An adapter (PEFT) is asked for the layer inside it; a replacement of another kind keeps its bias to itself.
        """
        module: Any = self.dt_proj
        module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        return getattr(module, "scan_bias", None)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MambaState:
        """The state before the first token; ``dtype`` is that of the activations."""
        conv = self.conv1d.init_state(batch_size, dtype, device)
        ssm = torch.promote_types(conv.dtype, torch.float32)
        return MambaState(conv, conv.new_zeros(batch_size, self.d_inner, self.d_state, dtype=ssm))
