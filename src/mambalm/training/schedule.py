"""Learning rates as functions of the tokens read, so that they do not move when the batch size does.

The horizon (the tokens of the whole run) is an argument of every call and not part of the schedule: a run that ends
by the clock knows it only as a forecast, which it corrects at every step, and not at all (infinity) at its first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol


class Schedule(Protocol):
    """Maps tokens read, of a horizon, to a learning rate."""

    def __call__(self, tokens: float, horizon: float) -> float:
        """The learning rate after ``tokens`` of ``horizon`` tokens."""
        ...


def _warm_up(tokens: float, warmup: float) -> float:
    """The linear rise from 0 to 1 over ``warmup`` tokens."""
    return min(1.0, tokens / warmup) if warmup > 0 else 1.0


def _check(peak: float, floor: float, warmup: float) -> None:
    if not 0 <= floor <= peak:
        raise ValueError(f"a learning rate falls from its peak to its floor, got peak={peak} and floor={floor}")
    if warmup < 0:
        raise ValueError(f"warmup is a number of tokens, got {warmup}")


@dataclass(frozen=True)
class _Falling:
    """Linear warm-up, then a fall from ``peak`` to ``floor`` at the horizon.

    Attributes:
        peak: the highest learning rate.
        warmup: tokens until it is reached.
        floor: the learning rate from the horizon on.
    """

    peak: float
    warmup: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self.peak, self.floor, self.warmup)

    def __call__(self, tokens: float, horizon: float) -> float:
        """The learning rate after ``tokens`` of ``horizon`` tokens."""
        done = min(1.0, max(0.0, tokens - self.warmup) / max(1.0, horizon - self.warmup))
        return (self.floor + (self.peak - self.floor) * self._kept(done)) * _warm_up(tokens, self.warmup)

    def _kept(self, done: float) -> float:
        """The part of the height above the floor that is left after a part of the fall."""
        raise NotImplementedError


class Cosine(_Falling):
    """Linear warm-up, then half a cosine from ``peak`` to ``floor`` at the horizon."""

    def _kept(self, done: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * done))


class Linear(_Falling):
    """Linear warm-up, then a line from ``peak`` to ``floor`` at the horizon; a constant where they are equal."""

    def _kept(self, done: float) -> float:
        return 1 - done


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a constant part, then a decay from ``peak`` to ``floor`` over the last part of the run.

    Attributes:
        peak: the highest learning rate.
        warmup: tokens until it is reached.
        decay: the fraction of the horizon that the decay takes, in (0, 1].
        floor: the learning rate from the horizon on.
        shape: "linear"; "exponential" (needs a floor above 0; Falcon-Mamba's, with floor = peak / 256); "1-sqrt",
            which falls as 1 - sqrt(x).
    """

    peak: float
    warmup: float
    decay: float = 0.2
    floor: float = 0.0
    shape: Literal["linear", "exponential", "1-sqrt"] = "linear"

    def __post_init__(self) -> None:
        _check(self.peak, self.floor, self.warmup)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a fraction of the run in (0, 1], got {self.decay}")
        if self.shape not in ("linear", "exponential", "1-sqrt"):
            raise ValueError(f"shape is 'linear', 'exponential' or '1-sqrt', got {self.shape!r}")
        if self.shape == "exponential" and self.floor == 0:
            raise ValueError("an exponential decay never reaches 0: give it a floor, such as peak / 256")

    def __call__(self, tokens: float, horizon: float) -> float:
        """The learning rate after ``tokens`` of ``horizon`` tokens."""
        done = min(1.0, max(0.0, tokens / horizon - (1 - self.decay)) / self.decay)
        if self.shape == "exponential":
            falling = self.peak * (self.floor / self.peak) ** done
        else:
            kept = 1 - (math.sqrt(done) if self.shape == "1-sqrt" else done)
            falling = self.floor + (self.peak - self.floor) * kept
        return falling * _warm_up(tokens, self.warmup)
