"""Layers under torch.func: a batch of batches, and the gradients through it."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_close
from tests.layers.cases import D_MODEL, LAYERS, build


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_is_call_by_call(name: str) -> None:
    layer = build(name, backend="portable").double()
    x = torch.randn(3, 2, 5, D_MODEL, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def outcome(x: torch.Tensor, *, by_vmap: bool) -> dict[str, torch.Tensor]:
        x = x.clone().requires_grad_()
        y = torch.func.vmap(layer)(x) if by_vmap else torch.stack([layer(batch) for batch in x])
        found = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
        return {"y": y} | {f"d{key}": value for key, value in zip(("x", *parameters), found, strict=True)}

    assert_close(outcome(x, by_vmap=True), outcome(x, by_vmap=False), 1e-12)
    per_batch = torch.func.vmap(torch.func.grad(lambda batch: layer(batch).square().sum()))(x)
    assert_close({"dx": per_batch}, {"dx": outcome(x, by_vmap=False)["dx"]}, 1e-12)
