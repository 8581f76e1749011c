"""The ways in which an op's computation is called give the same, and each is taken where it must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import gradients
from benchmarks.cases import CPU_CASES, Case
from mambalm.ops import backends, linear_cross_entropy, selective_scan


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
def test_the_registered_op_gives_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case.shrunk()
    arguments = case.arguments(torch.device("cpu"), torch.float32)
    direct = gradients(case, arguments, "portable")
    monkeypatch.setattr(backends, "is_plain", lambda *_: False)
    registered = gradients(case, arguments, "portable")
    assert direct.keys() == registered.keys()
    assert all(torch.equal(direct[name], registered[name]) for name in direct)


def test_each_way_is_taken() -> None:
    def way(*tensors: Tensor | None) -> str:
        gradients = backends.Differentiable(lambda: "with gradient", lambda: "transformed")
        return backends.way(lambda: "run", lambda: "op", tensors, gradients)()

    plain, wanted = torch.ones(2), torch.ones(2, requires_grad=True)
    assert way(plain, None) == way(torch.nn.Parameter(plain, requires_grad=False)) == "run"
    assert way(plain, wanted) == "with gradient"
    assert way(plain, torch.ones(2, device="meta")) == "op"
    assert backends.way(way, print, (wanted,)) is print
    with torch.no_grad():
        assert way(wanted) == "run"
    ways: list[str] = []
    torch.func.vmap(lambda t: (ways.append(way(t)), t)[1])(plain)
    torch.compile(lambda t: (ways.append(way(t)), t)[1], backend="eager")(plain)
    assert ways == ["transformed", "op"]


def scan(u: Tensor) -> Tensor:
    B = torch.linspace(-1, 1, 15).view(1, 5, 3)
    y = selective_scan(u, u.abs(), -torch.ones(4, 3), B, B)
    assert isinstance(y, Tensor)
    return y


def test_a_second_derivative_is_refused() -> None:
    u = torch.randn(1, 5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(scan(u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan has no second derivative"):
        gradient.sum().backward()


def test_vmap() -> None:
    u = torch.randn(3, 1, 5, 4)
    assert torch.equal(torch.func.vmap(scan)(u), torch.stack([scan(row) for row in u]))
    gradient = torch.func.grad(lambda row: scan(row).square().sum())
    assert torch.equal(torch.func.vmap(gradient)(u), torch.stack([gradient(row) for row in u]))


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
@pytest.mark.parametrize("backend", ["portable", None])
def test_gradients_by_torch_func(case: Case, backend: str | None) -> None:
    case = case.shrunk()
    arguments = case.arguments(torch.device("cpu"), torch.float32)
    given = {name: value for name, value in arguments.items() if value.is_floating_point()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        result = case.call(arguments | given, backend)
        return sum((y.square().sum() for y in ([result] if isinstance(result, Tensor) else result)), torch.zeros(()))

    found = torch.func.grad(loss)(given)
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    loss(leaves).backward()
    assert all(torch.equal(found[name], leaf.grad) for name, leaf in leaves.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_each_examples_loss(reduction: str) -> None:
    x, weight, labels = torch.randn(3, 4, 8), torch.randn(10, 8), torch.randint(10, (3, 4))

    def loss(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, reduction=reduction).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, x, labels)
    leaf = weight.clone().requires_grad_()
    for gradient, row, label in zip(found, x, labels, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, row, label), leaf)[0])


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.op)
@pytest.mark.parametrize("backend", ["portable", None])
def test_forward_mode_is_refused_since_kernels_drop_tangents(case: Case, backend: str | None) -> None:
    case = case.shrunk()
    arguments = case.arguments(torch.device("cpu"), torch.float32)
    name, value = next((name, value) for name, value in arguments.items() if value.is_floating_point())

    def call(tensor: Tensor) -> Tensor:
        return case.call(arguments | {name: tensor}, backend)

    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(call, (value,), (value,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="backend='reference'"):
        call(torch.autograd.forward_ad.make_dual(value, value))
