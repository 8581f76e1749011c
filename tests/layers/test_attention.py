"""Attention against a naive restatement, token by token and head by head, and against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mambalm.layers import Attention, AttentionState
from tests.helpers import FLOAT32, cu_seqlens, relative_error
from tests.layers.cases import D_MODEL, build, contents


def naive_rotation(head: Tensor, position: int, dim: int, base: float) -> Tensor:
    """Channel i and i + dim / 2 are a complex number, turned by position / base^(2 i / dim)."""
    turned = head.clone()
    for i in range(dim // 2):
        angle = position / base ** (2 * i / dim)
        value = complex(head[i], head[i + dim // 2]) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[i + dim // 2] = value.real, value.imag
    return turned


def naive_attention(layer: Attention, x: Tensor) -> Tensor:
    """One sequence (l, embed_dim) in float64, as mamba_ssm's MHA computes it without a cache."""
    weights = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    h, g, p = layer.num_heads, layer.num_heads_kv, layer.head_dim
    projected = [weights["in_proj.weight"] @ row + weights["in_proj.bias"] for row in x.double()]
    convolved = []
    for t in range(len(projected)):
        row = projected[t][: layer.qkv_dim]
        if "conv1d.weight" in weights:
            kernel = weights["conv1d.weight"][:, 0]
            row = weights["conv1d.bias"].clone()
            for j in range(kernel.shape[1]):
                source = t - (kernel.shape[1] - 1) + j
                if source >= 0:
                    row += kernel[:, j] * projected[source][: layer.qkv_dim]
        convolved.append(row)
    scale = layer.softmax_scale or 1 / math.sqrt(p)

    def head(t: int, index: int) -> Tensor:
        found = convolved[t][index * p : (index + 1) * p]
        return naive_rotation(found, t, layer.rotary_emb_dim, layer.rotary_emb_base) if index < h + g else found

    outputs = []
    for t, row in enumerate(projected):
        context = []
        for i in range(h):
            shared = i * g // h
            scores = [math.exp(scale * float(head(t, i) @ head(s, h + shared))) for s in range(t + 1)]
            mixed = sum(score * head(s, h + g + shared) for s, score in enumerate(scores))
            context.append(mixed / sum(scores))
        if layer.mlp_dim:
            value, gate = row[layer.qkv_dim :].chunk(2)
            context.append(value * gate / (1 + (-gate).exp()))
        outputs.append(weights["out_proj.weight"] @ torch.cat(context) + weights["out_proj.bias"])
    return torch.stack(outputs)


@pytest.mark.parametrize("name", ["attention", "attention-gqa"])
def test_naive_restatement(name: str) -> None:
    layer = build(name)
    assert isinstance(layer, Attention)
    x = torch.randn(2, 6, D_MODEL)
    expected = torch.stack([naive_attention(layer, row) for row in x])
    assert relative_error(layer(x), expected) < FLOAT32


def identity(scale: float = 1.0, **options: int) -> Attention:
    """One head of two channels whose queries, keys and values are the input."""
    layer = Attention(2, 1, qkv_proj_bias=False, out_proj_bias=False, softmax_scale=scale, **options)
    with torch.no_grad():
        layer.in_proj.weight.copy_(torch.eye(2).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(2))
    return layer


def test_by_hand() -> None:
    """Scores 0 and log 3 give the weights 1/4 and 3/4."""
    root = math.sqrt(math.log(3))
    y = identity()(torch.tensor([[[1.0, 0.0], [0.0, root]]]))
    assert torch.allclose(y, torch.tensor([[[1.0, 0.0], [0.25, 0.75 * root]]]))


def test_rotation_by_hand() -> None:
    """One position apart, the same vectors score the cosine of one radian; keys are kept rotated."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    layer = identity(scale=2.0, rotary_emb_dim=2)
    x[0, 1] *= 3
    near, far = math.exp(2 * 9), math.exp(2 * 3 * math.cos(1))
    y, state = layer(x, return_state=True)
    assert torch.allclose(y[0, 1, 0], torch.tensor((near * 3 + far * 1) / (near + far)))
    assert torch.allclose(state.keys[0, 1, 0], 3 * torch.tensor([math.cos(1), math.sin(1)]))
    assert torch.equal(state.values[0, :, 0], x[0])


def test_layout_of_in_proj() -> None:
    """[queries, keys, values, MLP input, MLP gate], mlp_dim rounded up to 256; out_proj takes [context, MLP]."""
    layer = Attention(8, 4, 2, head_dim=3, mlp_dim=10, d_conv=4)
    assert layer.in_proj.weight.shape == (3 * (4 + 2 + 2) + 256, 8)
    assert layer.out_proj.weight.shape == (8, 3 * 4 + 128)
    assert layer.conv1d is not None
    assert layer.conv1d.weight.shape == (24, 1, 4)
    assert set(dict(layer.named_parameters())) == {
        *("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "out_proj.weight", "out_proj.bias")
    }


def test_rows_of_different_pasts() -> None:
    """A batch whose rows have read 1, 4 and 9 tokens goes on as each row does alone."""
    layer = build("attention-gqa")
    prefixes = [torch.randn(1, length, D_MODEL) for length in (1, 4, 9)]
    alone = [layer(prefix, return_state=True)[1] for prefix in prefixes]
    joined = AttentionState.cat(alone)
    x = torch.randn(3, 3, D_MODEL)
    for _ in range(2):
        y, joined = layer(x, joined, return_state=True)
        for i in range(3):
            row, alone[i] = layer(x[i : i + 1], alone[i], return_state=True)
            assert relative_error(y[i : i + 1], row) < FLOAT32
            for name, found in contents(joined[i]).items():
                assert relative_error(found, contents(alone[i])[name]) < FLOAT32


def test_what_does_not_count_is_not_seen() -> None:
    layer = build("attention")
    state = layer(torch.randn(1, 8, D_MODEL), cu_seqlens=cu_seqlens([0, 2, 8]), return_state=True)[1]
    x = torch.randn(2, 3, D_MODEL)
    expected = layer(x, state)
    spoiled = state.clone()
    spoiled.keys[0, 2:] = 100.0
    spoiled.values[0, 2:] = 100.0
    assert torch.equal(layer(x, spoiled), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"causal": False}, "causal=True"),
        ({"num_heads_kv": 3}, "num_heads_kv=3"),
        ({"rotary_emb_dim": 3}, "rotary_emb_dim must be even"),
        ({"rotary_emb_dim": 6}, "at most head_dim=4"),
    ],
    ids=str,
)
def test_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, 4, **arguments)  # type: ignore[arg-type]


def test_refuses_sizes() -> None:
    with pytest.raises(ValueError, match="give head_dim"):
        Attention(10, 4)
    with pytest.raises(TypeError, match="rotary_emb_interleaved"):
        Attention(16, 4, rotary_emb_interleaved=True)  # type: ignore[call-arg]
    layer = Attention(16, 4)
    with pytest.raises(ValueError, match="the state has 2 rows, the input 3"):
        layer(torch.zeros(3, 1, 16), layer.init_state(2))
