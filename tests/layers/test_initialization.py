"""Initial values: the papers' distributions, on the meta device, after re-initialisation, and for DTensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mambalm.layers import Attention, GatedMLP, Mamba, Mamba2, RMSNorm
from mambalm.layers.initialization import step_bias
from tests.layers.cases import LAYERS

RESETTABLE: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: Mamba(64),
    "mamba-constant": lambda: Mamba(64, dt_init="constant", dt_scale=0.5),
    "mamba2": lambda: Mamba2(64, headdim=8, conv_init=0.1, D_has_hdim=True),
    "attention": lambda: Attention(64, 4, d_conv=4, mlp_dim=256),
    "mlp": lambda: GatedMLP(64),
    "norm": lambda: RMSNorm(64),
}
every_kind = pytest.mark.parametrize("kind", RESETTABLE)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def reset(module: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    module.reset_parameters()  # type: ignore[operator]
    return values(module)


def test_mamba() -> None:
    """S4D-real, log-uniform steps, a variance-preserving dt_proj: arXiv:2312.00752, sections 3.6 and E.2."""
    layer = Mamba(256, d_state=8)
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 9).expand(512, 8))
    assert torch.equal(layer.D, torch.ones(512))
    steps = F.softplus(layer.dt_proj.bias).detach()
    assert steps.min() >= 0.001 * (1 - 1e-4)
    assert steps.max() <= 0.1 * (1 + 1e-4)
    middle = math.sqrt(0.001 * 0.1)
    assert 0.4 < (steps < middle).float().mean() < 0.6
    assert layer.dt_proj.weight.abs().max() <= 16**-0.5
    assert layer.dt_proj.weight.abs().max() > 0.9 * 16**-0.5
    assert torch.equal(Mamba(256, dt_init="constant", dt_scale=2).dt_proj.weight, torch.full((512, 16), 0.5))


def test_mamba2() -> None:
    layer = Mamba2(256, headdim=2, A_init_range=(2, 4), conv_init=0.01)
    rates = layer.A_log.exp().detach()
    assert 2 <= rates.min() < 2.2
    assert 3.8 < rates.max() <= 4
    assert layer.conv1d.weight.abs().max() <= 0.01
    assert layer.D.shape == (256,)
    assert Mamba2(256, headdim=2, D_has_hdim=True).D.shape == (512,)


def test_step_bias() -> None:
    bias = step_bias(1000, 0.001, 0.1, 0.01, torch.device("cpu"))
    steps = F.softplus(bias)
    assert torch.isclose(steps.min(), torch.tensor(0.01), rtol=1e-3)
    with pytest.raises(ValueError, match="dt_min"):
        step_bias(1, 0.1, 0.01, 1e-4, torch.device("cpu"))


@every_kind
def test_torch_seed_decides(kind: str) -> None:
    module = RESETTABLE[kind]()
    first, second = reset(module), reset(module)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(7)
    module.reset_parameters()  # type: ignore[operator]
    torch.manual_seed(8)
    fresh = values(RESETTABLE[kind]())
    assert kind == "norm" or any(not torch.equal(first[name], fresh[name]) for name in first)


@every_kind
def test_meta_device(kind: str) -> None:
    """Made on the meta device and materialised, the same seed gives the same values as made at once."""
    expected = reset(RESETTABLE[kind]())
    with torch.device("meta"):
        module = RESETTABLE[kind]()
    assert all(parameter.is_meta for parameter in module.parameters())
    found = reset(module.to_empty(device="cpu"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_parameter_is_reset() -> None:
    for kind, make in RESETTABLE.items():
        module = make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
        found = reset(module)
        assert not [name for name, value in found.items() if value.isnan().any()], kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_rounds_the_same_values(dtype: torch.dtype) -> None:
    expected, found = reset(Mamba(32)), reset(Mamba(32).to(dtype))
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)


def test_rescaled_out_proj() -> None:
    layer = Mamba(32)
    plain = reset(layer)
    torch.manual_seed(7)
    layer.reset_parameters(residual_branches=4)
    scaled = values(layer)
    assert torch.equal(scaled.pop("out_proj.weight"), plain.pop("out_proj.weight") / 2)
    assert all(torch.equal(scaled[name], plain[name]) for name in plain)
    with pytest.raises(ValueError, match="residual_branches"):
        layer.reset_parameters(residual_branches=0)


def test_loaded_parameters_survive_a_reset() -> None:
    """transformers re-initialises a whole module when its checkpoint lacks one of its tensors."""
    layer = Mamba(32)
    loaded = {"A_log": layer.A_log, "dt_proj.bias": layer.dt_proj.bias, "in_proj.weight": layer.in_proj.weight}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(3)
    for parameter in loaded.values():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    found = reset(layer)
    assert {name for name, value in found.items() if (value == 3).all()} == loaded.keys()


@every_kind
def test_dtensor(kind: str, mesh: DeviceMesh) -> None:
    """Sharded parameters get the values that whole ones get."""
    expected = reset(RESETTABLE[kind]())
    module = RESETTABLE[kind]()
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            sharded = distribute_tensor(torch.full_like(parameter, float("nan")), mesh, [Shard(0)])
            setattr(owner, name, nn.Parameter(sharded))
    found = reset(module)
    for name, value in found.items():
        assert isinstance(value, DTensor)
        assert torch.equal(value.full_tensor(), expected[name])


def test_gradient_needed_after_reset() -> None:
    for make in LAYERS.values():
        assert all(parameter.requires_grad for parameter in make().parameters())
