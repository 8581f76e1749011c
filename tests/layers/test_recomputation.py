"""What the Mamba layer computes again in the backward: the same gradients from fewer kept bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mambalm.layers import Mamba
from mambalm.layers.state import MambaState


def run(layer: Mamba, x: Tensor, state: MambaState) -> list[Tensor]:
    """Outputs, and the gradients of x, the state and all parameters."""
    y, after = layer(x, state, return_state=True)
    sources = [x, state.conv, state.ssm, *layer.parameters()]
    outputs = [y, after.conv, after.ssm]
    torch.manual_seed(1)
    total = torch.stack([(out.float() * torch.randn(out.shape)).sum() for out in outputs]).sum()
    return [*outputs, *torch.autograd.grad(total, sources)]


def both_ways(layer: Mamba, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    x = torch.randn(2, 37, layer.d_model, requires_grad=True)
    state = layer.init_state(2)
    state = MambaState(torch.randn_like(state.conv).requires_grad_(), torch.randn_like(state.ssm).requires_grad_())
    results = []
    for layer.recompute in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            results.append(run(layer, x, state))
    return results


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_the_gradients_are_the_same_bit_for_bit(eps: float | None, dtype: torch.dtype | None) -> None:
    kept, computed_again = both_ways(Mamba(16, bcdt_rms_eps=eps), dtype)
    assert all(torch.equal(a, b) for a, b in zip(kept, computed_again, strict=True))


def test_dropout_falls_on_the_same_elements() -> None:
    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5))

    layer = Mamba(16)
    dropping = Dropping(layer.d_inner, layer.x_proj.out_features, bias=False)
    dropping.load_state_dict(layer.x_proj.state_dict())
    layer.x_proj = dropping
    kept, computed_again = both_ways(layer)
    assert all(torch.equal(a, b) for a, b in zip(kept, computed_again, strict=True))


def test_fewer_bytes_are_kept() -> None:
    """Neither the convolution's output nor Δ, (b, l, d) each: what is left is in_proj's input and output, and y."""

    def kept(layer: Mamba, x: Tensor) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x)
        return sum(sizes.values())

    x = torch.randn(1, 256, 64, requires_grad=True)
    activations = 4 * 256 * 128
    saved = kept(Mamba(64, recompute=False), x) - kept(Mamba(64, recompute=True), x)
    assert saved >= 2 * activations


def test_nothing_is_kept_without_gradients() -> None:
    layer = Mamba(16, recompute=True)
    with torch.no_grad():
        assert not layer(torch.randn(1, 5, 16)).requires_grad
