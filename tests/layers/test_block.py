"""Blocks, norms and the MLP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mambalm.layers import Attention, Block, GatedMLP, Mamba, RMSNorm
from tests.layers.cases import D_MODEL


@pytest.mark.parametrize("norm", [RMSNorm, nn.LayerNorm])
def test_sums(norm: type[RMSNorm] | type[nn.LayerNorm]) -> None:
    block = Block(norm(D_MODEL), Mamba(D_MODEL), norm(D_MODEL), GatedMLP(D_MODEL))
    x = torch.randn(2, 5, D_MODEL)
    assert block.norm2 is not None
    assert block.mlp is not None
    middle = x + block.mixer(block.norm(x))
    assert torch.equal(block(x), middle + block.mlp(block.norm2(middle)))
    without = Block(block.norm, block.mixer)
    assert torch.equal(without(x), middle)
    assert not [name for name, _ in without.named_parameters() if "norm2" in name or "mlp" in name]


@pytest.mark.parametrize("norm", [RMSNorm, nn.LayerNorm])
def test_residual_in_float32(norm: type[RMSNorm] | type[nn.LayerNorm]) -> None:
    """A step too small for bfloat16 is kept in the stream, and the mixer still runs in bfloat16."""
    mixer = Mamba(D_MODEL)
    kept = Block(norm(D_MODEL), mixer, residual_in_fp32=True).bfloat16()
    rounded = Block(kept.norm, mixer)
    with torch.no_grad():
        mixer.out_proj.weight.mul_(1e-3)
    x = torch.full((1, 4, D_MODEL), 256.0, dtype=torch.bfloat16)
    x += torch.randn_like(x) * 8
    y = kept(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, x + mixer(kept.norm(x)).float())
    assert not torch.equal(y, x.float())
    assert torch.equal(rounded(x), x)
    again = kept(y)
    assert again.dtype == torch.float32
    assert rounded(x).dtype == torch.bfloat16


def test_float64_is_not_cut_down() -> None:
    block = Block(RMSNorm(D_MODEL), Mamba(D_MODEL), residual_in_fp32=True).double()
    assert block(torch.randn(1, 2, D_MODEL).double()).dtype == torch.float64


def test_norm2_and_mlp_belong_together() -> None:
    with pytest.raises(ValueError, match="give both or neither"):
        Block(RMSNorm(D_MODEL), Attention(D_MODEL, 2), mlp=GatedMLP(D_MODEL))


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    x = torch.tensor([3.0, 4.0])
    root = math.sqrt(12.5)
    assert torch.allclose(norm(x), torch.tensor([3 / root, 8 / root]))
    y, total = norm(x - 1, residual=torch.ones(2))
    assert torch.allclose(y, torch.tensor([3 / root, 8 / root]))
    assert torch.equal(total, x)
    with pytest.raises(ValueError, match="group_size=3"):
        RMSNorm(4, group_size=3)


def test_gated_mlp() -> None:
    """fc1 gives (value, gate) in this order; the width is 8/3 of the input, up to a multiple of 128."""
    assert GatedMLP(96).fc1.weight.shape == (512, 96)
    assert GatedMLP(96, 130).fc2.weight.shape == (96, 256)
    assert GatedMLP(8, out_features=3, bias=True)(torch.randn(2, 8)).shape == (2, 3)
    mlp = GatedMLP(2, 1, multiple_of=1)
    with torch.no_grad():
        mlp.fc1.weight.copy_(torch.eye(2))
        mlp.fc2.weight.copy_(torch.tensor([[1.0], [2.0]]))
    value = 3 * 2 / (1 + math.exp(-2))
    assert torch.allclose(mlp(torch.tensor([3.0, 2.0])), torch.tensor([value, 2 * value]))
