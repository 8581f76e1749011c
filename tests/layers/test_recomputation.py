"""What the Mamba layer computes again in the backward: the same gradients from fewer kept bytes."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from mambalm.layers import Block, Mamba, Mamba2, RMSNorm
from mambalm.layers import block as block_module
from mambalm.layers import mamba as mamba_module
from mambalm.layers import mamba2 as mamba2_module
from mambalm.layers.recomputation import Recomputation, _Kept
from mambalm.layers.state import MambaState


def run(layer: Mamba | Mamba2, x: Tensor, state: MambaState) -> list[Tensor]:
    """Outputs, and the gradients of x, the state and all parameters."""
    y, after = layer(x, state, return_state=True)
    sources = [x, state.conv, state.ssm, *layer.parameters()]
    outputs = [y, after.conv, after.ssm]
    torch.manual_seed(1)
    total = torch.stack([(out.float() * torch.randn(out.shape)).sum() for out in outputs]).sum()
    return [*outputs, *torch.autograd.grad(total, sources)]


def both_ways(
    layer: Mamba | Mamba2, dtype: torch.dtype | None = None, recompute: bool | str = True
) -> list[list[Tensor]]:
    x = torch.randn(2, 37, layer.d_model, requires_grad=True)
    state = layer.init_state(2)
    state = MambaState(torch.randn_like(state.conv).requires_grad_(), torch.randn_like(state.ssm).requires_grad_())
    results = []
    for layer.recompute in (False, recompute):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            results.append(run(layer, x, state))
    return results


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("recompute", [True, "scan", "layer"])
def test_the_gradients_are_the_same_bit_for_bit(
    recompute: bool | str, eps: float | None, dtype: torch.dtype | None
) -> None:
    kept, computed_again = both_ways(Mamba(16, bcdt_rms_eps=eps), dtype, recompute)
    assert all(torch.equal(a, b) for a, b in zip(kept, computed_again, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"rmsnorm": False}, {"d_ssm": 16, "ngroups": 2}])
def test_the_gradients_of_mamba2_are_the_same_bit_for_bit(options: dict, dtype: torch.dtype | None) -> None:
    kept, computed_again = both_ways(Mamba2(16, headdim=8, d_state=8, **options), dtype)
    assert all(torch.equal(a, b) for a, b in zip(kept, computed_again, strict=True))


@pytest.mark.parametrize("recompute", [True, "scan", "layer"])
def test_dropout_falls_on_the_same_elements(recompute: bool | str) -> None:
    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5))

    layer = Mamba(16)
    dropping = Dropping(layer.d_inner, layer.x_proj.out_features, bias=False)
    dropping.load_state_dict(layer.x_proj.state_dict())
    layer.x_proj = dropping
    kept, computed_again = both_ways(layer, recompute=recompute)
    assert all(torch.equal(a, b) for a, b in zip(kept, computed_again, strict=True))


class Noting(Recomputation):
    """Notes the bytes of what operators keep in it."""

    kept: ClassVar[dict[int, int]] = {}

    def _pack(self, tensor: Tensor) -> Any:
        kept = super()._pack(tensor)
        if isinstance(kept, _Kept):
            self.kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return kept

    def give(self, *arguments: Any) -> None:
        if self.gives:
            super().give(*arguments)

    gives: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("mixer", "channels"),
    [
        (Mamba(64, recompute=True), 64 + 128 + 128),  # the norm's output, the convolution's, Δ
        (Mamba(64, recompute=True, bcdt_rms_eps=1e-6), 64 + 128 + 128),
        (Mamba2(64, d_state=16, recompute=True), 64 + 160 + 128),  # the norm's, the convolution's, the gated norm's
    ],
)
def test_fewer_bytes_are_kept(monkeypatch: pytest.MonkeyPatch, mixer: Mamba | Mamba2, channels: int) -> None:
    for module in (block_module, mamba_module, mamba2_module):
        monkeypatch.setattr(module, "Recomputation", Noting)
    block = Block(RMSNorm(64), mixer)
    x = torch.randn(1, 256, 64, requires_grad=True)
    kept = []
    for Noting.gives in (False, True):
        Noting.kept = {}
        y = block(x, apart=True)
        kept.append(sum(Noting.kept.values()))
        del y
    assert kept[0] - kept[1] == 4 * 256 * channels


class NotingArguments(Noting):
    """And of what it is computed from."""

    def _keep(self, arguments: Any) -> list[Any]:
        kept = super()._keep(arguments)
        storages = [t.untyped_storage() for t in kept if isinstance(t, Tensor)]
        self.kept.update({storage.data_ptr(): storage.nbytes() for storage in storages})
        return kept


@pytest.mark.parametrize(("recompute", "channels"), [(True, 64 + 256 + 128), ("scan", 64 + 256), ("layer", 64)])
def test_what_is_left(monkeypatch: pytest.MonkeyPatch, recompute: str, channels: int) -> None:
    """Of activations the residual stream, with it u and z, with them y: (257, channels) in float32."""
    for module in (block_module, mamba_module):
        monkeypatch.setattr(module, "Recomputation", NotingArguments)
    Noting.kept, Noting.gives = {}, True
    block, x = Block(RMSNorm(64), Mamba(64, recompute=recompute)), torch.randn(1, 257, 64, requires_grad=True)
    outputs = block(x, apart=True)
    large = [size for size in Noting.kept.values() if size % (4 * 257 * 64) == 0]
    assert sum(large) == 4 * 257 * channels, outputs


def test_a_layer_that_changed_is_noticed() -> None:
    layer = Mamba(16, recompute="layer")
    loss = layer(torch.randn(1, 9, 16, requires_grad=True)).sum()
    layer.bcdt_rms_eps = 1e-6
    with pytest.raises(RuntimeError, match="must not change between"):
        loss.backward()


@pytest.mark.parametrize("again", [True, "scan", "layer"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_blocks_give_the_same_gradients(dtype: torch.dtype | None, again: bool | str) -> None:
    blocks = nn.ModuleList(Block(RMSNorm(16), Mamba(16), residual_in_fp32=True) for _ in range(2))
    x = torch.randn(2, 19, 16, requires_grad=True)
    results = []
    for recompute in (False, again):
        for block in blocks:
            block.mixer.recompute = recompute
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            stream, branch = blocks[0](x, apart=True)
            y = blocks[1](stream, branch=branch)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_around_the_layer_comes_first() -> None:
    """It would keep nothing, and so does the layer in it; the gradients are the same."""
    layer, x = Mamba(16, recompute=True), torch.randn(1, 9, 16, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sum(tensor.shape == (1, 9, 32) for tensor in kept) >= 4
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), [x, *layer.parameters()])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("recompute", [True, "scan", "layer"])
def test_a_graph_is_read_twice(recompute: bool | str) -> None:
    layer, x = Mamba(16, recompute=recompute), torch.randn(1, 9, 16, requires_grad=True)
    loss = layer(x).sum()
    first, second = (torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_change_in_place_is_noticed() -> None:
    again, x = Recomputation(), torch.randn(3, requires_grad=True)
    source = x * 2
    with again:
        y = source.sin()
        again.give(y, nn.Identity(), torch.sin, source)
        loss = y.square().sum()
    with torch.no_grad():
        source += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize(
    "layer",
    [*(Mamba(16, recompute=again) for again in (True, "scan", "layer")), Mamba2(16, headdim=8, recompute=True)],
    ids=["mamba", "scan", "layer", "mamba2"],
)
def test_a_change_of_a_parameter_in_place_is_noticed(layer: Mamba | Mamba2) -> None:
    """Of every one whose value the gradient of x needs."""
    for name, parameter in layer.named_parameters():
        x = torch.randn(1, 9, 16, requires_grad=True)
        loss = layer(x).square().sum()
        with torch.no_grad():
            parameter.mul_(1.5)
        if name == "A_log" and layer.recompute is True:
            continue  # its exponential is kept
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
            torch.autograd.grad(loss, x)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_torch_func(kind: type[Mamba] | type[Mamba2]) -> None:
    """It takes no hooks on saved tensors, which a layer on a GPU has by default."""
    layer, x = kind(32, recompute=True), torch.randn(2, 9, 32, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    per_row = torch.func.vmap(torch.func.grad(lambda row: layer(row[None]).square().sum()))(x.detach())
    assert torch.allclose(per_row, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv1d", "norm"])
def test_a_hook_is_called_once(name: str) -> None:
    layer, calls = Mamba2(16, headdim=8, recompute=True), []
    layer.get_submodule(name).register_forward_hook(lambda *arguments: calls.append(arguments))
    layer(torch.randn(1, 9, 16, requires_grad=True)).sum().backward()
    assert len(calls) == 1


def test_nothing_is_kept_without_gradients() -> None:
    layer = Mamba(16, recompute=True)
    with torch.no_grad():
        assert not layer(torch.randn(1, 5, 16)).requires_grad


@pytest.mark.parametrize("recompute", [True, "scan", "layer"])
def test_under_fsdp2(mesh: DeviceMesh, recompute: bool | str) -> None:
    """The weights that the backward computes with are gathered again by then."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    gradients = []
    for again in (False, recompute):
        torch.manual_seed(0)
        block = Block(RMSNorm(16), Mamba(16, recompute=again), residual_in_fp32=True)
        large = [block.mixer.in_proj, block.mixer.x_proj, block.mixer.out_proj]
        fully_shard(large, mesh=mesh, mp_policy=half)
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        block(torch.randn(2, 9, 16)).square().sum().backward()
        gradients.append([parameter.grad.full_tensor() for parameter in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
