"""The Mamba-2 layer (Dao & Gu 2024, arXiv:2405.21060, section 7)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambalm.layers.convolution import CausalConv1d
from mambalm.layers.hooks import hooked
from mambalm.layers.initialization import (
    assign,
    reset_projection,
    residual_scale,
    step_bias,
    uniform,
    uniform_log,
)
from mambalm.layers.linear import Linear, in_parts
from mambalm.layers.mamba import full_precision
from mambalm.layers.norm import RMSNorm
from mambalm.layers.recomputation import Recomputation, is_wanted
from mambalm.layers.state import MambaState
from mambalm.ops import ssd


class Mamba2(nn.Module):
    """The Mamba-2 layer; arguments and parameter names are those of state-spaces/mamba and transformers.

    Args:
        d_model: input and output channels.
        d_state: state size n.
        d_conv: width k of the convolution.
        conv_init: draw the convolution's weight from ± conv_init; None: torch's range.
        expand: d_inner = expand * d_model, unless d_inner is given.
        headdim: channels p per head.
        d_ssm: channels that pass through the state space, the rest through a gated MLP; None: all d_inner.
        ngroups: groups g of B and C, and of the norm's channels.
        A_init_range: the range of the initial decay rates -A.
        D_has_hdim: D per channel instead of per head.
        rmsnorm: gate and normalise before out_proj; False: gate only.
        norm_before_gate: only False.
        dt_min, dt_max, dt_init_floor: the range of initial step sizes, and their least value.
        dt_limit: the range into which step sizes are clamped.
        bias, conv_bias: whether in_proj and out_proj have one; whether the convolution has.
        chunk_size: steps per chunk of the op.
        d_inner: inner channels, for checkpoints that state them beside ``expand``.
        norm_eps: the norm's eps.
        recompute: compute the convolution's output and the gated norm's (in a block also that of the norm before)
            again in the backward instead of keeping them; as in ``Mamba``.
        backend: the ops' backend; None: automatic choice.
        layer_idx: kept for the caller.

    Raises:
        ValueError: the sizes do not divide, or norm_before_gate is asked for.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = 256,
        *,
        d_inner: int | None = None,
        norm_eps: float = 1e-5,
        recompute: bool | None = None,
        backend: str | None = None,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model) if d_inner is None else d_inner
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.D_has_hdim = headdim, ngroups, D_has_hdim
        self._check_sizes(norm_before_gate)
        self.nheads = self.d_ssm // headdim
        self.conv_init, self.A_init_range = conv_init, A_init_range
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.chunk_size = chunk_size
        self.recompute, self.backend, self.layer_idx = recompute, backend, layer_idx
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        d_bc = ngroups * d_state
        d_conv_channels, d_mlp = self.d_ssm + 2 * d_bc, self.d_inner - self.d_ssm
        self._split = [d_mlp, d_mlp, self.d_ssm, d_conv_channels, self.nheads]
        self._split_conv = [self.d_ssm, d_bc, d_bc]
        self.in_proj = Linear(d_model, sum(self._split), bias=bias, **where)
        self.conv1d = CausalConv1d(d_conv_channels, d_conv, bias=conv_bias, activation="silu", backend=backend, **where)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **where))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **where))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads, **where))
        self.norm = (
            RMSNorm(self.d_ssm, norm_eps, group_size=self.d_ssm // ngroups, backend=backend, **where)
            if rmsnorm
            else None
        )
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **where)
        self.reset_parameters()

    def _check_sizes(self, norm_before_gate: bool) -> None:
        if norm_before_gate:
            raise ValueError("norm_before_gate=True is not supported: Mamba-2's checkpoints gate first, leave it False")
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"d_ssm must be between 1 and d_inner={self.d_inner}, got {self.d_ssm}")
        if self.d_ssm % self.headdim:
            raise ValueError(
                f"{self.d_ssm} channels cannot be split into heads of headdim={self.headdim}: "
                "choose a headdim that divides expand * d_model (or d_ssm)"
            )
        if (self.d_ssm // self.headdim) % self.ngroups:
            heads = self.d_ssm // self.headdim
            raise ValueError(f"{heads} heads cannot be split into ngroups={self.ngroups}: choose a divisor")

    def reset_parameters(self, residual_branches: int = 1) -> None:
        """Draw all parameters as state-spaces does, out_proj divided by sqrt(residual_branches)."""
        reset_projection(self.in_proj)
        reset_projection(self.conv1d)
        if self.conv_init is not None:
            weight = self.conv1d.weight
            assign(weight, uniform(weight.shape, -self.conv_init, self.conv_init, weight.device))
        reset_projection(self.out_proj, residual_scale(residual_branches))
        if self.norm is not None:
            self.norm.reset_parameters()
        device = self.A_log.device
        assign(self.dt_bias, step_bias(self.nheads, self.dt_min, self.dt_max, self.dt_init_floor, device))
        assign(self.A_log, uniform_log(self.nheads, self.A_init_range, device))
        assign(self.D, torch.ones(self.D.shape, device=device))

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Read x (b, l, d_model) on from ``state``; the contract is that of ``Mamba.forward``."""
        conv, ssm = MambaState.unpack(state)
        mlp_gate, mlp, z, xBC, dt = in_parts(self.in_proj, x, self._split)
        with Recomputation() if self.recomputes(x) else nullcontext() as again:
            y, conv, ssm = self._inner(z, xBC, dt, conv, ssm, cu_seqlens, return_state, again)
            if self.d_ssm < self.d_inner:
                y = torch.cat([F.silu(mlp_gate) * mlp, y], dim=-1)
            y = self.out_proj(y)
        return (y, MambaState(conv, ssm)) if return_state else y

    def recomputes(self, x: Tensor) -> bool:
        """Whether the backward of a call on ``x`` computes activations again."""
        return is_wanted(self.recompute, x)

    def _inner(
        self,
        z: Tensor,
        xBC: Tensor,
        dt: Tensor,
        conv: Tensor | None,
        ssm: Tensor | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
        again: Recomputation | None,
    ) -> Any:
        """The state-space part between in_proj and out_proj: y, the new conv, and with return_state the new ssm."""
        inputs = (xBC, conv, cu_seqlens)
        if hooked(self.conv1d):
            y, conv = self.conv1d(*inputs)
            parts = y.split(self._split_conv, dim=-1)
        else:
            parts, conv = self.conv1d(*inputs, sizes=self._split_conv)
        u, B, C = parts
        if again is not None:
            again.give(u, self.conv1d, lambda *inputs: self.conv1d(*inputs)[0], *inputs)
        heads, groups = (self.nheads, self.headdim), (self.ngroups, self.d_state)
        D = full_precision(self.D)
        # Packed documents are cheaper to read when nobody asks for their final states.
        scanned: Any = ssd(
            u.unflatten(-1, heads),
            dt,
            -full_precision(self.A_log).exp(),
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
            D.unflatten(0, heads) if self.D_has_hdim else D,
            z.unflatten(-1, heads) if self.norm is None else None,
            full_precision(self.dt_bias),
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=ssm,
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y, ssm = scanned if return_state else (scanned, None)
        y = y.flatten(-2)
        if self.norm is not None:
            norm = self.norm
            scanned, y = y, norm(y, gate=z)
            if again is not None:
                again.give(y, norm, lambda scanned, z: norm(scanned, gate=z), scanned, z)
        return y, conv, ssm

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MambaState:
        """The state before the first token; ``dtype`` is that of the activations."""
        conv = self.conv1d.init_state(batch_size, dtype, device)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return MambaState(conv, conv.new_zeros(shape, dtype=torch.promote_types(conv.dtype, torch.float32)))
