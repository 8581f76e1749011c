"""What the layers compute again in the backward on a GPU: by the same kernels, so the same bits."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from mambalm.layers import Block, Mamba, Mamba2, RMSNorm

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "recompute"), [(Mamba, True), (Mamba, "scan"), (Mamba, "layer"), (Mamba2, True)])
def test_the_gradients_are_the_same_bit_for_bit(
    kind: type[Mamba] | type[Mamba2], recompute: bool | str, dtype: torch.dtype
) -> None:
    blocks = nn.ModuleList(Block(RMSNorm(64), kind(64), residual_in_fp32=True) for _ in range(3)).cuda()
    x = torch.randn(2, 509, 64, device="cuda", requires_grad=True)
    results = []
    for again in (False, recompute):
        stream, branch = x, None
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            for block in blocks:
                block.mixer.recompute = again
                stream, branch = block(stream, branch=branch, apart=True)
            loss = (stream + branch).square().sum()
        results.append([loss, *torch.autograd.grad(loss, [x, *blocks.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("recompute", "fewer", "scans", "within"), [(True, 10, 0, 0.02), ("scan", 14, 1, 0.02), ("layer", 22, 1, 0.03)]
)
def test_memory(recompute: bool | str, fewer: int, scans: int, within: float) -> None:
    """The allocator's figure between forward and backward, per token and channel: so many bytes less of 26, and those
    of the scan's states."""
    kept = []
    layer = Block(RMSNorm(512), Mamba(512), residual_in_fp32=True).cuda()
    stream = torch.randn(4, 2048, 512, device="cuda", requires_grad=True)
    branch = torch.randn(4, 2048, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for layer.mixer.recompute in (False, recompute):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outputs = layer(stream, branch=branch, apart=True)
        kept.append(torch.cuda.memory_allocated() - before)
        del outputs
    launching = import_module("mambalm.ops.selective_scan._launch")
    states = 4 * 2 * layer.mixer.d_state / launching.checkpoint_steps(4, 2048, layer.mixer.d_inner)
    assert kept[0] - kept[1] == pytest.approx((fewer + scans * states) * stream.numel(), rel=within)
