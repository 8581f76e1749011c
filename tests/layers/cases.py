"""Small layers of every kind, and what a reading of them yields: outputs, final state, all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mambalm.layers import Attention, AttentionState, Block, GatedMLP, Mamba, Mamba2, RMSNorm
from tests.helpers import cu_seqlens

D_MODEL = 16

# Every case reads and gives (b, l, D_MODEL).
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mamba": lambda **kw: Mamba(D_MODEL, d_state=4, **kw),
    "falcon": lambda **kw: Mamba(D_MODEL, d_state=4, d_conv=3, dt_rank=6, bias=True, bcdt_rms_eps=1e-6, **kw),
    "mamba2": lambda **kw: Mamba2(D_MODEL, d_state=8, headdim=8, chunk_size=8, **kw),
    "mamba2-groups": lambda **kw: Mamba2(
        D_MODEL, d_state=4, headdim=8, ngroups=2, D_has_hdim=True, dt_limit=(0.003, 0.05), chunk_size=8, **kw
    ),
    "mamba2-mlp": lambda **kw: Mamba2(D_MODEL, d_state=4, headdim=8, d_ssm=16, rmsnorm=False, bias=True, **kw),
    "attention": lambda **kw: Attention(D_MODEL, 2, rotary_emb_dim=8, **kw),
    "attention-gqa": lambda **kw: Attention(
        D_MODEL, 4, 2, head_dim=6, d_conv=3, rotary_emb_dim=4, mlp_dim=200, softmax_scale=0.5, **kw
    ),
    "block": lambda **kw: Block(RMSNorm(D_MODEL, **kw), Mamba(D_MODEL, d_state=4, **kw)),
    "block-mlp": lambda **kw: Block(
        nn.LayerNorm(D_MODEL),
        Attention(D_MODEL, 2, d_conv=2, **kw),
        nn.LayerNorm(D_MODEL),
        GatedMLP(D_MODEL),
        residual_in_fp32=True,
    ),
}

Read = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]


def build(name: str, **options: Any) -> nn.Module:
    """The layer with noise on all parameters, so that none is a neutral one or zero."""
    layer = LAYERS[name](**options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return layer


def same_weights(layer: nn.Module, name: str, **options: Any) -> nn.Module:
    """Another layer of the kind, with other options and copies of the weights."""
    other = LAYERS[name](**options)
    other.load_state_dict(layer.state_dict())
    return other


def past(layer: nn.Module) -> Any:
    """The state of three rows that have read 3, 0 and 5 tokens."""
    with torch.no_grad():
        return layer(torch.randn(1, 8, D_MODEL), cu_seqlens=cu_seqlens([0, 3, 3, 8]), return_state=True)[1]


def read_whole(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    return layer(x, state, return_state=True)


def read_pieces(*lengths: int) -> Read:
    """Read piece by piece, handing on the state.

    The pieces are contiguous: torch's half-precision Linear rounds twice, before and after its bias, when they are not.
    """

    def read(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs = []
        for piece in x.split(list(lengths), dim=1):
            y, state = layer(piece.contiguous(), state, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return read


def read_packed(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Read the rows as documents of one row."""
    b, l, d = x.shape
    offsets = cu_seqlens([i * l for i in range(b + 1)])
    y, state = layer(x.reshape(1, b * l, d), state, offsets, return_state=True)
    return y.view(b, l, d), state


def contents(state: Any) -> dict[str, Tensor]:
    """The tensors of a layer's state; of keys and values the valid entries only."""
    if not isinstance(state, AttentionState):
        return {"conv": state.conv, "ssm": state.ssm}
    valid = torch.arange(state.keys.shape[1]) < state.lengths[:, None]
    found = {"keys": state.keys[valid], "values": state.values[valid], "lengths": state.lengths}
    return found if state.conv is None else found | {"conv": state.conv}


def outcome(layer: nn.Module, x: Tensor, state: Any, read: Read) -> dict[str, Tensor]:
    """y, the final state, and the gradients of their weighted sum in x, the first state and the parameters."""
    x = x.detach().requires_grad_()
    state = pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), state)
    y, final = read(layer, x, state)
    outputs = {"y": y} | contents(final)
    fixed = torch.Generator().manual_seed(1)
    total = sum((out * torch.randn(out.shape, generator=fixed).to(out.dtype)).sum() for out in outputs.values())
    inputs = {"x": x} | dict(layer.named_parameters())
    if state is not None:
        fields = {f"first {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(state)) if leaf is not None}
        inputs |= {name: leaf for name, leaf in fields.items() if leaf.requires_grad}
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    grads = {f"d {name}": gradient for name, gradient in zip(inputs, found, strict=True)}
    return {name: out.detach() for name, out in outputs.items()} | grads


def exact(layer: nn.Module, x: Tensor, state: Any) -> dict[str, Tensor]:
    """The outcome of one pass in float64."""
    state = None if state is None else state.to(dtype=torch.float64)
    return outcome(copy.deepcopy(layer).double(), x.double(), state, read_whole)
