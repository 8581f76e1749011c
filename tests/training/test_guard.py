"""Steps that are left out, and when the last checkpoint is brought back."""

from __future__ import annotations

import math

import pytest
import torch

from mambalm.training.guard import DivergedError, Guard, Verdict
from mambalm.training.recipe import OptimizerSection

SECTION = OptimizerSection(patience=3, rewinds=1, spike=2.0)


def test_losses_that_are_not_finite_and_spikes_are_left_out() -> None:
    guard = Guard()
    # Before it has seen enough losses to know what is usual, a high one is none.
    assert guard.judge(SECTION, 9.0, 1.0, False) is Verdict.APPLY
    for _ in range(1000):
        assert guard.judge(SECTION, 2.0, 1.0, False) is Verdict.APPLY
    assert guard.mean == pytest.approx(2.0, abs=1e-3)
    assert guard.judge(SECTION, 3.9, 1.0, False) is Verdict.APPLY
    for loss, norm in ((4.5, 1.0), (math.nan, 1.0)):
        assert guard.judge(SECTION, loss, norm, False) is Verdict.LEAVE
    assert guard.judge(SECTION, 2.0, math.inf, False) is Verdict.REWIND
    assert (guard.skipped, guard.in_row) == (3, 3)


@pytest.mark.parametrize("seen", [99, 100])
def test_the_device_decides_as_the_guard(seen: int) -> None:
    mean = 1.7
    edge = torch.tensor(2 * mean)
    losses = [1.0, edge.item(), edge.nextafter(torch.tensor(9.0)).item(), edge.nextafter(torch.tensor(0.0)).item()]
    for loss in (*losses, math.nan, math.inf, -math.inf):
        for norm in (1.0, math.nan, math.inf):
            guard = Guard(mean=mean, seen=seen)
            refused = guard.refuses(SECTION, torch.tensor([loss, norm])).item()
            assert refused == float(guard.judge(SECTION, loss, norm, False) is not Verdict.APPLY), (loss, norm)


def test_a_good_step_ends_a_row() -> None:
    guard = Guard()
    for _ in range(5):
        assert guard.judge(SECTION, math.nan, 1.0, False) is Verdict.LEAVE
        assert guard.judge(SECTION, 1.0, 1.0, False) is Verdict.APPLY


def test_overflows_of_float16_are_the_scalers() -> None:
    guard = Guard()
    assert guard.judge(SECTION, 2.0, math.inf, True) is Verdict.APPLY
    assert (guard.skipped, guard.overflows) == (0, 1)
    assert guard.judge(SECTION, math.nan, math.nan, True) is Verdict.LEAVE


def test_rewinds_have_an_end() -> None:
    guard = Guard(in_row=3)
    guard.count_rewind(SECTION, 7.0, 1.0, 12)
    assert guard.in_row == 0
    with pytest.raises(DivergedError, match=r"step 12: loss 7\.0.*the last checkpoint is intact"):
        guard.count_rewind(SECTION, 7.0, 1.0, 12)
    with pytest.raises(DivergedError, match=r"no checkpoint yet to return to\. Lower schedule\.peak"):
        Guard().count_rewind(SECTION, math.nan, 1.0, 1, saved=False)
