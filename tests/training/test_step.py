"""The step: accumulation, clipping behind the scaler, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mambalm.training.step import Stepper


def make(scaler: torch.amp.GradScaler | None = None, clip: float = 1e9) -> tuple[nn.Linear, Stepper, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    return model, Stepper(optimizer, clip, scaler=scaler), torch.randn(5, 3)


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=1024.0)])
def test_gradients_are_accumulated_unscaled_and_clipped(scaler: torch.amp.GradScaler | None) -> None:
    model, stepper, x = make(scaler, clip=0.5)
    loss, norm = stepper.gradients([lambda: model(x[:2]).square().sum(), lambda: model(x[2:]).square().sum()])
    found = [parameter.grad.clone() for parameter in model.parameters()]
    reference = make()[0]
    expected = reference(x).square().sum()
    wanted = torch.autograd.grad(expected, list(reference.parameters()))
    length = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    assert loss.item() == pytest.approx(expected.item())
    assert norm.item() == pytest.approx(length.item())
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two * 0.5 / length)


def test_a_scaler_leaves_parameters_alone_when_gradients_overflow() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, stepper, x = make(scaler)
    before = model.weight.clone()
    _, norm = stepper.gradients([lambda: model(x).sum() * float("inf")])
    assert not torch.isfinite(norm)
    stepper.apply(0.1)
    assert torch.equal(model.weight, before)
    assert scaler.get_scale() == 512.0
    stepper.gradients([lambda: model(x).sum()])
    stepper.apply(0.1)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("begun", [False, True])
def test_what_the_device_refuses_changes_nothing(begun: bool) -> None:
    model, stepper, x = make()
    if begun:
        stepper.gradients([lambda: model(x).sum()])
        stepper.apply(0.1, unless=torch.tensor(0.0))
        assert not torch.equal(model.weight, make()[0].weight)
    before = model.weight.clone(), copy.deepcopy(stepper.optimizer.state.get(model.weight))
    stepper.gradients([lambda: model(2 * x).square().sum()])
    stepper.apply(0.1, unless=torch.tensor(1.0))
    assert torch.equal(model.weight, before[0])
    after = stepper.optimizer.state[model.weight]
    for name in after:
        assert torch.equal(after[name], before[1][name] if before[1] else torch.zeros_like(after[name]))
    stepper.apply(0.1)
    assert not torch.equal(model.weight, before[0])


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one loss"):
        make()[1].gradients([])


def test_left_steps_keep_no_gradients() -> None:
    model, stepper, x = make()
    stepper.gradients([lambda: model(x).sum()])
    stepper.leave()
    assert model.weight.grad is None
