"""A product in parts is the product, cut; so are its gradients, and none is rounded on its way into a wider weight.

One beside another reader of its input has the gradients of both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mambalm.diagnostics.verify import relative_error
from mambalm.layers import Mamba, Mamba2
from mambalm.layers.hooks import kind_of, sharded
from mambalm.layers.linear import Linear, beside, in_parts
from mambalm.ops.linear_parts import linear_beside, linear_parts

SIZES = (5, 0, 7, 3)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def arguments(device: str, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((2, 9, 11), (sum(SIZES), 11), (sum(SIZES),))
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("unused", [(), (0,), (1, 3), (0, 2, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gradients_of_parts(device: str, has_bias: bool, unused: tuple[int, ...]) -> None:
    x, weight, bias = arguments(device, torch.float64)
    leaves = [x, weight, bias] if has_bias else [x, weight]
    given = bias if has_bias else None
    whole = F.linear(x, weight, given).split(SIZES, dim=-1)
    parts = linear_parts(x, weight, given, SIZES)
    weights = [torch.randn_like(part) for part in whole]

    def loss(found: tuple[Tensor, ...]) -> Tensor:
        return sum((p * w).sum() for i, (p, w) in enumerate(zip(found, weights, strict=True)) if i not in unused)

    for part, truth in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, truth)
    found_truth = zip(torch.autograd.grad(loss(parts), leaves), torch.autograd.grad(loss(whole), leaves), strict=True)
    for found, truth in found_truth:
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_autocast_keeps_the_weight_gradient_unrounded(device: str) -> None:
    x, weight, bias = arguments(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        parts = linear_parts(x, weight, bias, SIZES)
    weights = [torch.randn_like(part) for part in parts]
    assert {part.dtype for part in parts} == {torch.bfloat16}
    found = torch.autograd.grad(parts, [x, weight, bias], weights)
    assert [g.dtype for g in found] == [torch.float32] * 3
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight, bias)]
    whole = F.linear(*exact).split(SIZES, dim=-1)
    truth = torch.autograd.grad(whole, exact, [w.double() for w in weights])
    unrounded = device == "cuda" and torch.version.hip is None
    assert relative_error(found[1], truth[1]) < (1e-5 if unrounded else 2**-8)
    assert relative_error(found[0], truth[0]) < 2**-7  # dx is rounded after every part
    assert relative_error(found[2], truth[2]) < 2**-8


def test_output_of_one_part_can_be_changed_in_place() -> None:
    x, weight, bias = arguments("cpu", torch.float64)
    (y,) = linear_parts(x, weight, bias, weight.shape[:1])
    found = torch.autograd.grad(y.mul_(3).sum(), [x, weight, bias])
    for g, truth in zip(
        found, torch.autograd.grad(3 * F.linear(x, weight, bias).sum(), [x, weight, bias]), strict=True
    ):
        torch.testing.assert_close(g, truth)


def test_frozen_weight_has_no_gradient() -> None:
    x, weight, bias = arguments("cpu", torch.float32)
    weight.requires_grad_(False)
    sum(part.sum() for part in linear_parts(x, weight, bias, SIZES)).backward()
    assert [t.grad is None for t in (x, weight, bias)] == [False, True, False]


@pytest.mark.parametrize("readers", ["both", "product", "other"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gradients_beside_another_reader(device: str, transposed: bool, readers: str) -> None:
    x, weight, _ = arguments(device, torch.float64)
    factors, other = torch.randn(2, 9, sum(SIZES), device=device), torch.randn(2, 11, 9, device=device).mT
    other = other if transposed else other.contiguous()

    def gradients(u: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        parts = {"product": (y * factors).sum(), "other": (u.square() * other).sum()}
        loss = parts["product"] + parts["other"] if readers == "both" else parts[readers]
        return torch.autograd.grad(loss, [x, weight], allow_unused=True)

    found = gradients(*linear_beside(x * 3, weight))  # of no leaf, as in a layer
    truth = gradients(u := x * 3, F.linear(u, weight))
    for g, expected in zip(found, truth, strict=True):
        assert (g is None) == (expected is None)
        if g is not None:
            torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_autocast_beside_another_reader(device: str) -> None:
    x, weight, _ = arguments(device, torch.float32)
    u = x.bfloat16()
    with torch.autocast(device, torch.bfloat16):
        other, y = linear_beside(u, weight)
    weights = [torch.randn_like(t) for t in (other, y)]
    du, dweight = torch.autograd.grad((other, y), (u, weight), [w.clone() for w in weights])
    dy, rounded = weights[1].double().flatten(0, 1), weight.detach().bfloat16().double()
    assert dweight.dtype == torch.float32
    unrounded = device == "cuda" and torch.version.hip is None
    assert relative_error(dweight, dy.T @ u.double().flatten(0, 1)) < (1e-5 if unrounded else 2**-8)
    assert relative_error(du, weights[0].double() + (dy @ rounded).view(u.shape)) < 2**-8


def test_frozen_weight_beside_another_reader() -> None:
    x, weight, _ = arguments("cpu", torch.float32)
    weight.requires_grad_(False)
    other, y = linear_beside(x * 1, weight)
    (other.sum() + y.sum()).backward()
    torch.testing.assert_close(x.grad, (1 + weight.sum(0)).expand_as(x))


@pytest.mark.gpu
def test_layer_has_the_gradients_of_the_product_alone() -> None:
    torch.manual_seed(0)
    mixer = Mamba(64, device="cuda")
    x = torch.randn(2, 65, 64, device="cuda", requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mixer(x).square().sum(), [x, *mixer.parameters()])

    joined = gradients()
    assert beside(mixer.x_proj, torch.zeros(1, 1, 128, device="cuda"))[1].grad_fn.name() == "_BesideBackward"
    mixer.x_proj.register_forward_hook(lambda *_: None)
    for found, truth in zip(joined, gradients(), strict=True):
        assert relative_error(found, truth.double()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [Mamba, Mamba2])
def test_layer_has_the_gradients_of_the_uncut_product(layer: type) -> None:
    torch.manual_seed(0)
    sizes = {"headdim": 32} if layer is Mamba2 else {}
    mixer = layer(64, d_state=16, device="cuda", **sizes)
    x = torch.randn(2, 65, 64, device="cuda", requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mixer(x).square().sum(), [x, *mixer.parameters()])

    cut = gradients()
    handle = mixer.in_proj.register_forward_hook(lambda *_: None)
    uncut = gradients()
    handle.remove()
    for found, truth in zip(cut, uncut, strict=True):
        assert relative_error(found, truth.double()) < 1e-5


@pytest.mark.gpu
def test_autocast_on_a_gpu_rounds_no_projection_s_weight_gradient() -> None:
    projection = Linear(64, 48, device="cuda")
    x = torch.randn(2, 33, 64, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        y = projection(x)
    y.add_(1)  # no view of something else
    dy = torch.randn_like(y)
    y.backward(dy)
    assert projection.weight.grad is not None
    assert relative_error(projection.weight.grad, dy.double().flatten(0, 1).T @ x.double().flatten(0, 1)) < 1e-5


@pytest.mark.gpu
def test_hooks_see_the_call() -> None:
    projection, seen = Linear(8, 6, device="cuda"), []
    x = torch.randn(1, 3, 8, device="cuda")
    projection.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    assert [part.shape for part in in_parts(projection, x, (2, 4))] == [(1, 3, 2), (1, 3, 4)]
    assert seen == [(1, 3, 6)]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(8, 6), Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*self.first(x, (2, 4)), self.second(x))


def test_a_sharded_projection_is_called_in_parts(tmp_path: Path) -> None:
    """Its parameters are there in its own call only, which gives the parts; other hooks see one output."""
    torch.manual_seed(0)
    pair, x = Pair(), torch.randn(2, 5, 8, requires_grad=True)
    whole = pair(x)
    gradients = [torch.randn_like(part) for part in whole]
    truth = torch.autograd.grad(whole, [x, pair.first.weight], gradients)
    assert not sharded(pair.first)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard([pair.first, pair.second], mesh=mesh)
        fully_shard(pair, mesh=mesh)
        assert kind_of(pair.first) is Linear
        assert sharded(pair.first)
        parts = pair(x)
        assert [part.shape[-1] for part in parts] == [2, 4, 6]
        assert all(relative_error(part, one.double()) < 1e-6 for part, one in zip(parts, whole, strict=True))
        torch.autograd.backward(parts, gradients)
        assert x.grad is not None
        assert relative_error(x.grad, truth[0].double()) < 1e-6
        found: Any = pair.first.weight.grad
        assert relative_error(found.full_tensor(), truth[1].double()) < 1e-6
        pair.first.register_forward_hook(lambda *_: None)
        assert not sharded(pair.first)
    finally:
        dist.destroy_process_group()
