"""Mamba and Mamba-2: README usage, sums by hand, precision, replaced projections, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mambalm.layers import Mamba, Mamba2
from mambalm.layers import mamba as mamba_module
from tests.helpers import FLOAT32, relative_error
from tests.layers.cases import D_MODEL, build


def test_readme_usage() -> None:
    x = torch.randn(2, 64, 16)
    assert Mamba(d_model=16, d_state=16, d_conv=4, expand=2)(x).shape == x.shape
    assert Mamba(d_model=16)(x).shape == x.shape
    assert Mamba2(d_model=16, d_state=64, d_conv=4, expand=2, headdim=8)(x).shape == x.shape
    y, state = Mamba2(d_model=64, headdim=16)(torch.randn(2, 3, 64), return_state=True)
    assert y.shape == (2, 3, 64)
    assert state.conv.shape == (2, 128 + 2 * 64, 3)
    assert state.ssm.shape == (2, 8, 16, 64)


def test_parameter_names() -> None:
    names = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "out_proj.weight"}
    assert set(dict(Mamba(16).named_parameters())) == names | {"x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    assert set(dict(Mamba2(64).named_parameters())) == names | {"dt_bias", "norm.weight"}
    assert Mamba(16).conv1d.weight.shape == (32, 1, 4)
    assert Mamba(16, d_inner=24, dt_rank=3).dt_proj.weight.shape == (24, 3)


def hand_computed(x: Tensor) -> Tensor:
    """With Δ = 1, A = -log 2, D = 1 and B = C = u = silu(x): h halves at each step, y = (u h + u) silu(x)."""
    u, h, outputs = F.silu(x), torch.zeros(()), []
    for value in u:
        h = h / 2 + value * value
        outputs.append((value * h + value) * value)
    return torch.stack(outputs)


def set_all(layer: nn.Module, **values: Any) -> None:
    for name, parameter in layer.named_parameters():
        value = torch.as_tensor(values[name.replace(".", "_")], dtype=torch.float32)
        parameter.data = value.expand(parameter.shape).clone()


SOFTPLUS_IS_ONE = math.log(math.e - 1)
A_LOG = math.log(math.log(2))


def test_mamba_by_hand() -> None:
    layer = Mamba(1, d_state=1, d_conv=1, expand=1)
    set_all(
        layer,
        in_proj_weight=1,
        conv1d_weight=1,
        conv1d_bias=0,
        x_proj_weight=[[0], [1], [1]],
        dt_proj_weight=1,
        dt_proj_bias=SOFTPLUS_IS_ONE,
        A_log=A_LOG,
        D=1,
        out_proj_weight=1,
    )
    x = torch.tensor([1.0, -2.0, 3.0])
    assert torch.allclose(layer(x.view(1, 3, 1)).flatten(), hand_computed(x), rtol=1e-5)


def test_mamba2_by_hand() -> None:
    layer = Mamba2(1, d_state=1, d_conv=1, expand=1, headdim=1, rmsnorm=False)
    set_all(
        layer,
        in_proj_weight=[[1], [1], [1], [1], [0]],
        conv1d_weight=1,
        conv1d_bias=0,
        dt_bias=SOFTPLUS_IS_ONE,
        A_log=A_LOG,
        D=1,
        out_proj_weight=1,
    )
    x = torch.tensor([1.0, -2.0, 3.0])
    assert torch.allclose(layer(x.view(1, 3, 1)).flatten(), hand_computed(x), rtol=1e-5)


def test_step_limits() -> None:
    """dt_limit clamps: with both ends equal, the step projection has no say."""
    layer = Mamba2(D_MODEL, headdim=8, d_state=4, dt_limit=(0.02, 0.02))
    x = torch.randn(1, 5, D_MODEL)
    before = layer(x)
    with torch.no_grad():
        layer.dt_bias.add_(3)
    assert torch.equal(layer(x), before)
    layer.dt_limit = (0.0, math.inf)
    assert relative_error(layer(x), before) > 1e-2


def test_norm_is_per_group() -> None:
    """Scaling the channels of one group leaves the other group's output as it was (V#9292)."""
    layer = Mamba2(D_MODEL, headdim=8, d_state=4, ngroups=2)
    assert layer.norm is not None
    y = torch.randn(1, 3, 32)
    scaled = torch.cat([y[..., :16] * 100, y[..., 16:]], dim=-1)
    gate = torch.randn(1, 3, 32)
    assert torch.equal(layer.norm(y, gate=gate)[..., 16:], layer.norm(scaled, gate=gate)[..., 16:])


@pytest.mark.parametrize("training", [True, False])
def test_falcon_norms_act_in_every_path(training: bool) -> None:
    """Scaling Δ, B and C's projection changes nothing when each is normalised, in training, prefill and decoding."""
    layer = Mamba(D_MODEL, d_state=4, dt_rank=6, bcdt_rms_eps=1e-12).train(training)
    x = torch.randn(2, 5, D_MODEL)
    expected, state = layer(x, return_state=True)
    step = layer(x[:, :1], state)
    with torch.no_grad():
        layer.x_proj.weight.mul_(10)
    assert relative_error(layer(x), expected) < FLOAT32
    assert relative_error(layer(x[:, :1], state), step) < FLOAT32


def test_other_step_projection_keeps_its_bias() -> None:
    """What a quantised Linear, of a class of its own, adds inside is not added again by the scan."""
    layer = build("mamba")
    x = torch.randn(2, 5, D_MODEL)
    expected = layer(x)
    replacement = nn.Linear(layer.dt_rank, layer.d_inner)
    replacement.load_state_dict(layer.dt_proj.state_dict())
    layer.dt_proj = replacement
    assert relative_error(layer(x), expected) < FLOAT32


PROJECTIONS = [
    *((name, module) for name in ("mamba", "falcon") for module in ("in_proj", "x_proj", "dt_proj", "out_proj")),
    *((name, module) for name in ("mamba2", "attention-gqa") for module in ("in_proj", "out_proj")),
]


@pytest.mark.parametrize(("name", "module"), PROJECTIONS)
def test_lora_on_every_projection(name: str, module: str) -> None:
    """An adapter's output is that of the weights merged: no projection is read past its module."""
    layer = build(name)
    x = torch.randn(2, 5, D_MODEL)
    plain = layer(x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[module], init_lora_weights=False), layer)
    adapted = layer(x)
    assert relative_error(adapted, plain) > 1e-3
    getattr(layer, module).merge()
    assert relative_error(layer(x), adapted) < FLOAT32


def test_step_projection_trained_whole_by_peft() -> None:
    """PEFT's modules_to_save is a wrapper of another kind; the bias is neither lost nor added twice."""
    layer = nn.ModuleDict({"mixer": build("mamba")})
    x = torch.randn(2, 5, D_MODEL)
    expected = layer["mixer"](x)
    config = LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=["dt_proj"])
    inject_adapter_in_model(config, layer)
    assert not isinstance(layer["mixer"].dt_proj, mamba_module.StepProjection)
    assert relative_error(layer["mixer"](x), expected) < FLOAT32


def test_refuses() -> None:
    with pytest.raises(TypeError, match="use_fast_path"):
        Mamba(16, use_fast_path=False)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="dt_init must be"):
        Mamba(16, dt_init="zeros")
    with pytest.raises(ValueError, match="d_conv must be at least 1"):
        Mamba(16, d_conv=0)
    with pytest.raises(ValueError, match="leave it False"):
        Mamba2(64, norm_before_gate=True)
    with pytest.raises(ValueError, match="headdim that divides"):
        Mamba2(16, headdim=64)
    with pytest.raises(ValueError, match="ngroups=3"):
        Mamba2(64, ngroups=3)
    with pytest.raises(ValueError, match="d_ssm must be between"):
        Mamba2(64, d_ssm=256)
    with pytest.raises(ValueError, match="A_init_range"):
        Mamba2(64, A_init_range=(0, 1))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_wrong_state_is_named(name: str) -> None:
    layer = build(name)
    with pytest.raises(ValueError, match="initial_state"):
        layer(torch.zeros(3, 2, D_MODEL), layer.init_state(2))
