"""Hybrids against a naive restatement of mamba_ssm's model: one token, one head, one channel group at a time, float64.

There is no package on a CPU to compare with, so this is written a second time here, from the description alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu, softplus
from transformers import AutoConfig

from mambalm.models.hybrid import HybridConfig, MambaHybridForCausalLM
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import ATTENTION, FAMILIES, tokens

pytestmark = pytest.mark.usefixtures("portable")

Weights = dict[str, Tensor]

LAYOUTS: dict[str, dict[str, Any]] = {
    # state-spaces/mamba2attn-2.7b: six attention layers among 64, with a convolution; rotary on half of each head.
    "mamba2attn": {
        "num_hidden_layers": 3,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2},
        "attn_layer_idx": [1],
        "attn_cfg": ATTENTION | {"d_conv": 4, "num_heads_kv": 4},
        "d_intermediate": 0,
    },
    # state-spaces/transformerpp-2.7b: attention everywhere, rotary on whole heads, gated MLPs.
    "transformerpp": {
        "ssm_cfg": {},
        "attn_layer_idx": [0, 1],
        "attn_cfg": ATTENTION | {"d_conv": 0, "rotary_emb_dim": 8},
        "d_intermediate": 128,
    },
    # OpenLM's: Mamba with LayerNorms that have biases.
    "layernorm": {"ssm_cfg": {"d_state": 4}, "attn_layer_idx": [], "rms_norm": False, "d_intermediate": 0},
    "everything": {
        "num_hidden_layers": 4,
        "ssm_cfg": {"layer": "Mamba1", "d_state": 4, "bias": True},
        "attn_layer_idx": [1, 3],
        "attn_cfg": ATTENTION | {"d_conv": 3, "qkv_proj_bias": True, "out_proj_bias": True, "mlp_dim": 256},
        "rms_norm": False,
        "d_intermediate": 128,
        "tie_word_embeddings": False,
    },
}


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def normalised(x: Tensor, weights: Weights, eps: float = 1e-5) -> Tensor:
    if "bias" in weights:
        return layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], eps)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights["weight"]


def convolved(x: Tensor, weights: Weights) -> Tensor:
    """y[t] = bias + Σ_j w[j] x[t - (k-1) + j]."""
    kernel = weights["conv1d.weight"][:, 0]
    width = kernel.shape[1]
    rows = []
    for t in range(len(x)):
        seen = [kernel[:, j] * x[t - width + 1 + j] for j in range(width) if t - width + 1 + j >= 0]
        rows.append(sum(seen, weights["conv1d.bias"]))
    return torch.stack(rows)


def mamba(x: Tensor, w: Weights, config: HybridConfig) -> Tensor:
    n, rank = w["A_log"].shape[1], w["dt_proj.weight"].shape[1]
    u, z = linear(x, w, "in_proj").chunk(2, -1)
    u = silu(convolved(u, w))
    h, rows = torch.zeros_like(w["A_log"]), []
    for t in range(len(x)):
        delta, B, C = linear(u[t], w, "x_proj").split([rank, n, n])
        step = softplus(linear(delta, w, "dt_proj"))[:, None]
        h = (-w["A_log"].exp() * step).exp() * h + step * B * u[t][:, None]
        rows.append((h @ C + w["D"] * u[t]) * silu(z[t]))
    return linear(torch.stack(rows), w, "out_proj")


def mamba2(x: Tensor, w: Weights, config: HybridConfig) -> Tensor:
    heads, n = len(w["A_log"]), config.ssm_cfg["d_state"]
    p, groups = config.ssm_cfg["headdim"], config.ssm_cfg.get("ngroups", 1)
    inner = heads * p
    z, xbc, dt = linear(x, w, "in_proj").split([inner, inner + 2 * groups * n, heads], -1)
    xbc = silu(convolved(xbc, w))
    states, rows = [torch.zeros(p, n, dtype=x.dtype) for _ in range(heads)], []
    for t in range(len(x)):
        values, B, C = xbc[t].split([inner, groups * n, groups * n])
        outputs = []
        for head in range(heads):
            group = slice((head * groups // heads) * n, (head * groups // heads + 1) * n)
            step = softplus(dt[t, head] + w["dt_bias"][head])
            value = values[head * p : (head + 1) * p]
            decay = (-w["A_log"][head].exp() * step).exp()
            states[head] = decay * states[head] + step * torch.outer(value, B[group])
            outputs.append(states[head] @ C[group] + w["D"][head] * value)
        gated = torch.cat(outputs) * silu(z[t])
        size = inner // groups
        parts = [
            normalised(gated[i : i + size], {"weight": w["norm.weight"][i : i + size]}) for i in range(0, inner, size)
        ]
        rows.append(torch.cat(parts))
    return linear(torch.stack(rows), w, "out_proj")


def rotated(head: Tensor, position: int, dim: int) -> Tensor:
    """Channel i and channel i + dim/2 turn together by position / 10000^(2i/dim)."""
    out = head.clone()
    for i in range(dim // 2):
        angle = position / 10000 ** (2 * i / dim)
        a, b = head[i], head[i + dim // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + dim // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def attention(x: Tensor, w: Weights, config: HybridConfig) -> Tensor:
    cfg = config.attn_cfg
    heads, kv, p, turn = cfg["num_heads"], cfg["num_heads_kv"], cfg["head_dim"], cfg["rotary_emb_dim"]
    mlp = cfg.get("mlp_dim", 0)
    qkv, gated = linear(x, w, "in_proj").split([(heads + 2 * kv) * p, mlp], -1)
    qkv = convolved(qkv, w) if cfg["d_conv"] else qkv
    q, k, v = (piece.unflatten(-1, (-1, p)) for piece in qkv.split([heads * p, kv * p, kv * p], -1))
    rows = []
    for t in range(len(x)):
        context = []
        for head in range(heads):
            shared = head * kv // heads
            query = rotated(q[t, head], t, turn)
            scores = torch.stack([query @ rotated(k[s, shared], s, turn) / math.sqrt(p) for s in range(t + 1)])
            context.append(scores.softmax(0) @ v[: t + 1, shared])
        rows.append(torch.cat(context))
    up, gate = gated.chunk(2, -1)
    return linear(torch.cat([torch.stack(rows), up * silu(gate)], -1), w, "out_proj")


def restated(model: MambaHybridForCausalLM, ids: Tensor) -> Tensor:
    """Logits (l, v) of one row (l)."""
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    config = model.config
    recurrent = {"Mamba1": mamba, "Mamba2": mamba2}[config.ssm_cfg.get("layer", "Mamba1")]
    x = weights["backbone.embeddings.weight"][ids]
    for index in range(config.num_hidden_layers):
        w = part(weights, f"backbone.layers.{index}.")
        mixer = attention if index in config.attn_layer_idx else recurrent
        x = x + mixer(normalised(x, part(w, "norm.")), part(w, "mixer."), config)
        if config.d_intermediate:
            y, gate = linear(normalised(x, part(w, "norm2.")), part(w, "mlp."), "fc1").chunk(2, -1)
            x = x + linear(y * silu(gate), part(w, "mlp."), "fc2")
    return linear(normalised(x, part(weights, "backbone.norm_f.")), weights, "lm_head")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_restatement(layout: str) -> None:
    model = FAMILIES["hybrid"].model(**LAYOUTS[layout])
    row = tokens(11)
    expected = restated(model, row)
    assert relative_error(model(row[None]).logits[0], expected) <= FLOAT32
    # And with what stands before it in a state, beside a row that has read less.
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    before = torch.stack([row[:7], torch.cat([row[:3], row[:4]])])
    state = model(before, attention_mask=mask, cache_params=model.init_state(2)).cache_params
    output = model(torch.stack([row[7:], row[4:8]]), cache_params=state)
    assert relative_error(output.logits[0], expected[7:]) <= FLOAT32
    assert relative_error(output.logits[1], expected[4:8]) <= FLOAT32
    assert output.cache_params.position.tolist() == [11, 8]


def test_the_layout_is_mamba_ssms() -> None:
    """The names that a mamba_ssm checkpoint has, but for the embeddings."""
    model = MambaHybridForCausalLM(FAMILIES["hybrid"].config(**LAYOUTS["everything"]))
    names = set(model.state_dict())
    for name in ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.weight", "norm.bias"):
        assert f"backbone.layers.0.{name}" in names
    assert {"backbone.norm_f.bias", "lm_head.weight", "backbone.layers.1.mixer.in_proj.bias"} <= names


@pytest.mark.usefixtures("registered")
def test_config_of_its_own_model_type(tmp_path: Path) -> None:
    config = FAMILIES["hybrid"].config(**LAYOUTS["everything"])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HybridConfig)
    assert loaded.model_type == "mambalm_hybrid"
    assert loaded.attn_cfg == config.attn_cfg
    assert loaded.layer_types == ["linear_attention", "full_attention"] * 2


def test_initial_values_of_attention_and_mlp() -> None:
    """torch's own bounds, and those of what ends a residual branch divided by the root of the branches."""
    model = MambaHybridForCausalLM(FAMILIES["hybrid"].config(rescale_prenorm_residual=True))
    for block in model.backbone.layers:
        ends = {block.mixer.out_proj: model.residual_branches}
        ends |= {} if block.mlp is None else {block.mlp.fc1: 1, block.mlp.fc2: model.residual_branches}
        for module, branches in ends.items():
            bound = (module.in_features * branches) ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
