"""Causal self-attention as mamba_ssm's hybrids have it: rotary, grouped queries, optional convolution and gated MLP."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambalm.layers.convolution import CausalConv1d
from mambalm.layers.initialization import reset_projection, residual_scale
from mambalm.layers.linear import Linear
from mambalm.layers.state import AttentionState, expect

# mamba_ssm rounds the in-layer MLP's two widths together up to a multiple of this.
_MLP_MULTIPLE = 256


class _Packing(NamedTuple):
    """Where each token of a packed row belongs: document (l), place in it (l); the documents' lengths (s)."""

    document: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int) -> _Packing:
        token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        return cls(document, (token - cu_seqlens[document]).long(), cu_seqlens.diff().long())

    def unpack(self, x: Tensor) -> Tensor:
        """(1, l, d) -> (s, longest, d), filled up with zeros. The longest length is read, a wait on a GPU."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        rows = x.new_zeros(len(self.lengths), longest, x.shape[-1])
        return rows.index_put((self.document, self.place), x[0])

    def pack(self, rows: Tensor) -> Tensor:
        """(s, longest, d) -> (1, l, d)."""
        return rows[self.document, self.place].unsqueeze(0)


class Attention(nn.Module):
    """Multi-head attention; arguments, parameter names and layout are those of mamba_ssm's ``MHA``.

    in_proj gives [queries, keys, values, MLP input, MLP gate], the convolution runs over the first three without an
    activation, the rotation turns the first rotary_emb_dim channels of each head in two halves, out_proj takes
    [context, MLP].

    Args:
        embed_dim: input and output channels.
        num_heads, num_heads_kv: heads of queries, and of keys and values (None: as many).
        head_dim: channels per head; None: embed_dim / num_heads.
        mlp_dim: width of the MLP's input and gate together, rounded up to a multiple of 256; 0: no MLP.
        qkv_proj_bias, out_proj_bias: whether in_proj and out_proj have one.
        softmax_scale: None: 1 / sqrt(head_dim).
        causal: only True: a state can be read on from only where nothing looks ahead.
        layer_idx: kept for the caller.
        d_conv: width k of the convolution; 0: none.
        rotary_emb_dim: even, at most head_dim; 0: no rotation.
        rotary_emb_base: the longest wavelength is 2π times almost this.
        backend: the convolution's backend; None: automatic choice.

    Raises:
        ValueError: the sizes do not divide, or causal is False.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = True,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.softmax_scale, self.causal = softmax_scale, causal
        self._check_sizes(head_dim)
        self.layer_idx = layer_idx
        self.mlp_dim = -(-mlp_dim // _MLP_MULTIPLE) * _MLP_MULTIPLE
        self.qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Linear(embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **where)
        self.conv1d = CausalConv1d(self.qkv_dim, d_conv, backend=backend, **where) if d_conv else None
        out_dim = self.head_dim * num_heads + self.mlp_dim // 2
        self.out_proj = Linear(out_dim, embed_dim, bias=out_proj_bias, **where)
        self.reset_parameters()

    def _check_sizes(self, head_dim: int | None) -> None:
        if not self.causal:
            raise ValueError("causal=False is not supported: a state cannot look ahead; pass causal=True")
        if head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}: give head_dim")
        if self.num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_heads_kv={self.num_heads_kv}")
        if self.rotary_emb_dim % 2 or not 0 <= self.rotary_emb_dim <= self.head_dim:
            raise ValueError(
                f"rotary_emb_dim must be even and at most head_dim={self.head_dim}, got {self.rotary_emb_dim}"
            )

    def reset_parameters(self, residual_branches: int = 1) -> None:
        """Draw all parameters as torch does, out_proj divided by sqrt(residual_branches)."""
        reset_projection(self.in_proj)
        if self.conv1d is not None:
            reset_projection(self.conv1d)
        reset_projection(self.out_proj, residual_scale(residual_branches))

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Read x (b, l, embed_dim) on from ``state``; the contract is that of ``Mamba.forward``.

        The rows of a state may have read different numbers of tokens.
        """
        y, new_state = self.mix(self.in_proj(x), state, cu_seqlens)
        y = self.out_proj(y)
        return (y, new_state) if return_state else y

    def mix(
        self, x: Tensor, state: AttentionState | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """What is between the projections: of in_proj's output (b, l, ...) out_proj's input and the new state."""
        before = expect(AttentionState, state)
        qkv, mlp, gate = x.split([self.qkv_dim, self.mlp_dim // 2, self.mlp_dim // 2], dim=-1)
        conv = None
        if self.conv1d is not None:
            qkv, conv = self.conv1d(qkv, None if before is None else before.conv, cu_seqlens)
        if cu_seqlens is None:
            context, new_state = self._attend(qkv, before, None, conv)
        else:
            packing = _Packing.of(cu_seqlens, x.shape[1])
            context, new_state = self._attend(packing.unpack(qkv), before, packing.lengths, conv)
            context = packing.pack(context)
        if self.mlp_dim:
            context = torch.cat([context, mlp * F.silu(gate)], dim=-1)
        return context, new_state

    def _attend(
        self, qkv: Tensor, before: AttentionState | None, counts: Tensor | None, conv: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """Attention of rows (b, l, qkv_dim), of which the first ``counts`` (b) tokens are real (None: all).

        What stands behind a row's real tokens is seen by none of them, and overwritten by the tokens to come.
        """
        b, l = qkv.shape[:2]
        start = qkv.new_zeros(b, dtype=torch.long) if before is None else before.lengths
        if start.shape != (b,):
            raise ValueError(f"the state has {start.shape[0]} rows, the input {b}: one per row (per packed document)")
        position = start[:, None] + torch.arange(l, device=qkv.device)
        heads = [self.num_heads, self.num_heads_kv, self.num_heads_kv]
        q, keys, values = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        q, keys = self._rotate(position, q, keys)
        seen = None
        if before is not None:
            keys, values = before.appended(keys, values, position)
            seen = (torch.arange(keys.shape[1], device=qkv.device) <= position[..., None]).unsqueeze(1)
        context = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=seen,
            is_causal=seen is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        )
        lengths = start + (l if counts is None else counts)
        return context.transpose(1, 2).flatten(2), AttentionState(keys, values, lengths, conv)

    def _rotate(self, position: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """Turn (b, l, h, head_dim) by the position (b, l): RoFormer (Su et al. 2021, arXiv:2104.09864), in halves."""
        half = self.rotary_emb_dim // 2
        if half == 0:
            return heads
        dtype = torch.promote_types(heads[0].dtype, torch.float32)
        exponent = torch.arange(half, device=position.device, dtype=dtype) / half
        angle = (position[..., None] * self.rotary_emb_base**-exponent).unsqueeze(2)
        cos, sin = angle.cos(), angle.sin()

        def turn(x: Tensor) -> Tensor:
            a, b, rest = x.split([half, half, self.head_dim - 2 * half], dim=-1)
            return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), rest], dim=-1)

        return tuple(turn(x) for x in heads)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> AttentionState:
        """The state before the first token; ``dtype`` is that of the activations."""
        weight = getattr(self.in_proj, "weight", None)  # a packed one has none of its own
        if device is None and weight is not None:
            device = weight.device
        if dtype is None and weight is not None and weight.is_floating_point():
            dtype = weight.dtype
        none = torch.zeros(batch_size, 0, self.num_heads_kv, self.head_dim, device=device, dtype=dtype)
        conv = None if self.conv1d is None else self.conv1d.init_state(batch_size, dtype, device)
        return AttentionState(none, none, torch.zeros(batch_size, device=device, dtype=torch.long), conv)
