"""The ops under torch.func: vmap, gradients and both in each other; forward mode, which is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from benchmarks.cases import CPU_CASES, Case
from mambalm.ops import linear_cross_entropy

CASES = [replace(case.shrunk(), sizes={**case.shrunk().sizes, "l": 9}) for case in CPU_CASES]
of_each_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
of_two_backends = pytest.mark.parametrize("backend", ["portable", None])


def loss(case: Case, arguments: Mapping[str, Tensor], backend: str | None) -> Tensor:
    return case.call(arguments, backend).square().sum()


def varied(case: Case) -> tuple[str, Tensor, Callable[[str | None], Callable[[Tensor], Tensor]]]:
    """An argument's name, three values of it, and the loss by it on a backend."""
    arguments = case.arguments(torch.device("cpu"), torch.float32)
    name, value = next(iter(arguments.items()))
    values = torch.stack([value, -2 * value, value.flip(-1)])
    return name, values, lambda backend: lambda value: loss(case, arguments | {name: value}, backend)


@of_each_op
@of_two_backends
def test_vmap(case: Case, backend: str | None) -> None:
    _, values, by = varied(case)
    assert torch.equal(vmap(by(backend))(values), torch.stack([by(backend)(value) for value in values]))
    gradients = torch.stack([grad(by(backend))(value) for value in values])
    assert torch.equal(vmap(grad(by(backend)), in_dims=-1)(values.movedim(0, -1)), gradients)


@of_each_op
@of_two_backends
def test_vmap_of_nothing(case: Case, backend: str | None) -> None:
    _, values, by = varied(case)
    assert vmap(by(backend))(values[:0]).shape == (0,)
    assert vmap(grad(by(backend)))(values[:0]).shape == values[:0].shape


@of_each_op
@of_two_backends
@pytest.mark.parametrize("way", ["torch.func", "autograd", "compiled"])
def test_gradients_through_vmap(case: Case, backend: str | None, way: str) -> None:
    """vmap hides from an op that a gradient will be asked for."""
    _, values, by = varied(case)
    expected = torch.stack([grad(by("reference"))(value) for value in values])
    calls = vmap(by(backend))
    if way == "torch.func":
        found = grad(lambda values: calls(values).sum())(values)
    else:
        calls = torch.compile(calls, backend="aot_eager") if way == "compiled" else calls
        (found,) = torch.autograd.grad(calls(values.requires_grad_()).sum(), values)
    torch.testing.assert_close(found, expected)


@of_each_op
@of_two_backends
def test_gradients(case: Case, backend: str | None) -> None:
    arguments = case.arguments(torch.device("cpu"), torch.float32)
    found = grad(lambda given: loss(case, given, backend))(arguments)
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    loss(case, leaves, backend).backward()
    assert all(torch.equal(found[name], leaf.grad) for name, leaf in leaves.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_each_examples_loss(reduction: str) -> None:
    x, weight, labels = torch.randn(3, 4, 8), torch.randn(10, 8), torch.randint(10, (3, 4))

    def loss(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, reduction=reduction).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weight, x, labels)
    leaf = weight.clone().requires_grad_()
    expected = [torch.autograd.grad(loss(leaf, *row), leaf)[0] for row in zip(x, labels, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    losses = vmap(loss, in_dims=(None, 0, 0))
    torch.testing.assert_close(grad(lambda weight: losses(weight, x, labels).sum())(weight), sum(expected))
    torch.testing.assert_close(torch.autograd.grad(losses(leaf, x, labels).sum(), leaf)[0], sum(expected))


@of_each_op
@of_two_backends
def test_forward_mode_is_refused_since_kernels_drop_tangents(case: Case, backend: str | None) -> None:
    _, values, by = varied(case)
    value, function = values[0], by(backend)
    for call in (
        lambda: jvp(function, (value,), (value,)),
        lambda: jvp(grad(function), (value,), (value,)),
        lambda: jvp(vmap(function), (values,), (values,)),
        lambda: hessian(function)(value),
        lambda: torch.compile(jvp, backend="eager")(function, (value,), (value,)),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            call()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="backend='reference'"):
        function(forward_ad.make_dual(value, value))
    slope = jvp(by("reference"), (value,), (values[2],))[1]
    torch.testing.assert_close(slope, (grad(function)(value) * values[2]).sum(), rtol=1e-5, atol=0)
