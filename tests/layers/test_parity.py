"""Outputs and gradients of transformers' own mixers, with the same weights, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from mambalm.layers import Mamba, Mamba2
from tests.helpers import assert_close

SIZES: dict[str, Any] = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 1, "conv_kernel": 4, "vocab_size": 8}


def mamba(**options: Any) -> tuple[nn.Module, nn.Module]:
    config = MambaConfig(**SIZES, **options)
    ours = Mamba(32, d_state=8, bias=config.use_bias, conv_bias=config.use_conv_bias)
    return ours, MambaMixer(config, layer_idx=0)


def falcon_mamba() -> tuple[nn.Module, nn.Module]:
    """As falcon-mamba-7b: an ``expand`` of 16 that does not count, the intermediate size does."""
    config = FalconMambaConfig(**SIZES, expand=16, intermediate_size=64, mixer_rms_eps=1e-3, time_step_rank=4)
    ours = Mamba(32, d_state=8, dt_rank=4, d_inner=64, bcdt_rms_eps=config.mixer_rms_eps)
    return ours, FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False)


def mamba2(groups: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    config = Mamba2Config(
        **SIZES, num_heads=16, head_dim=4, n_groups=groups, chunk_size=8, layer_norm_epsilon=1e-3, **options
    )
    limit = options.get("time_step_limit", (0.0, float("inf")))
    ours = Mamba2(
        32, d_state=8, headdim=4, ngroups=groups, norm_eps=1e-3, chunk_size=8, dt_limit=limit, bias=config.use_bias
    )
    return ours, Mamba2Mixer(config, layer_idx=0)


PAIRS = {
    "mamba": mamba,
    "mamba-biases": lambda: mamba(use_bias=True, use_conv_bias=False),
    "falcon-mamba": falcon_mamba,
    "mamba2": lambda: mamba2(1),
    "mamba2-groups": lambda: mamba2(8, use_bias=True, time_step_limit=(0.001, 0.02)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("length", [1, 21])
def test_parity(pair: Any, length: int) -> None:
    ours, theirs = pair()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    theirs.load_state_dict(ours.state_dict())
    x, weight = torch.randn(2, length, 32), torch.randn(2, length, 32)
    results = []
    for layer in (ours, theirs):
        inputs = {"x": x.clone().requires_grad_()} | dict(layer.named_parameters())
        y = layer(inputs["x"])
        found = torch.autograd.grad((y * weight).sum(), list(inputs.values()))
        results.append({"y": y} | {f"d {name}": g for name, g in zip(inputs, found, strict=True)})
    mine, stock = results
    assert_close({name: mine[name] for name in stock}, stock)
