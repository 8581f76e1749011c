"""Learning rates by hand."""

from __future__ import annotations

import math

import pytest

from mambalm.training.budget import TimeBudget
from mambalm.training.schedule import Cosine, WarmupStableDecay


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (50, 0.5), (100, 1.0), (325, 0.55), (550, 0.1), (900, 0.1)],
)
def test_cosine(tokens: int, expected: float) -> None:
    assert Cosine(peak=1.0, warmup=100, floor=0.1)(tokens, 550) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "floor", "values"),
    [
        ("linear", 0.0, {0: 0.0, 5: 1.0, 10: 2.0, 80: 2.0, 85: 1.5, 90: 1.0, 100: 0.0, 130: 0.0}),
        ("linear", 0.4, {80: 2.0, 90: 1.2, 100: 0.4}),
        ("1-sqrt", 0.0, {80: 2.0, 85: 1.0, 100: 0.0}),
        ("exponential", 2 / 256, {80: 2.0, 85: 2 / 4, 90: 2 / 16, 100: 2 / 256}),
    ],
)
def test_warmup_stable_decay(shape: str, floor: float, values: dict[int, float]) -> None:
    schedule = WarmupStableDecay(peak=2.0, warmup=10, decay=0.2, floor=floor, shape=shape)
    for tokens, expected in values.items():
        assert schedule(tokens, 100) == pytest.approx(expected), tokens


def test_without_a_horizon_nothing_falls() -> None:
    assert WarmupStableDecay(peak=2.0, warmup=10)(10**9, math.inf) == 2.0
    assert Cosine(peak=2.0, warmup=10)(10**9, math.inf) == 2.0


def test_a_time_budget_forecasts_from_the_speed_so_far() -> None:
    budget = TimeBudget(60)
    assert budget.horizon(0, 0.0) == math.inf
    assert budget.horizon(1000, 10.0) == 6000
    assert not budget.is_spent(1000, 59.9)
    assert budget.is_spent(1000, 60.0)
    # At half the time half of the decay's part is left, whatever the speed.
    schedule = WarmupStableDecay(peak=1.0, warmup=0, decay=1.0)
    assert schedule(777, budget.horizon(777, 30.0)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 2.0}, "peak=1.0 and floor=2.0"),
        ({"warmup": -1}, "warmup is a number of tokens"),
        ({"decay": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"shape": "sqrt"}, "got 'sqrt'"),
        ({"shape": "exponential"}, "give it a floor"),
    ],
)
def test_senseless_schedules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(**{"peak": 1.0, "warmup": 0} | options)
