"""The learning rate of every step of a recipe: its schedules, and the batch's part in a ramp."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mambalm.training.schedule import Cosine, Linear, Schedule, WarmupStableDecay

if TYPE_CHECKING:
    from mambalm.training.recipe import Recipe, ScheduleSection


def schedule_of(section: ScheduleSection, horizon: int) -> Schedule:
    """The function that a section describes, over a horizon in tokens."""
    if section.kind == "cosine":
        return Cosine(section.peak, section.warmup, section.floor)
    if section.kind == "linear":
        return Linear(section.peak, section.warmup, section.floor)
    if section.kind == "constant":
        return Linear(section.peak, section.warmup, section.peak)
    return WarmupStableDecay(section.peak, section.warmup, section.decay / horizon, section.floor, section.shape)


class LearningRates:
    """Learning rates by tokens of the run, so that a ramp of the batch, or another batch, does not move them."""

    def __init__(self, recipe: Recipe) -> None:
        """Lay out the schedules of a recipe over its tokens."""
        self._recipe, self._offsets = recipe, recipe.offsets
        self._parts: list[tuple[int, int, Schedule]] = []
        for first, last, section in recipe.schedules():
            horizon = self._offsets[last] - self._offsets[first]
            self._parts += [(self._offsets[first], horizon, schedule_of(section, horizon))] * (last - first)

    def __call__(self, stage: int, tokens: float, batch: int) -> float:
        """The learning rate of a step of ``batch`` sequences after ``tokens`` tokens of the stage."""
        offset, horizon, schedule = self._parts[stage]
        rate = schedule(self._offsets[stage] + tokens - offset, horizon)
        section = self._recipe.stages[stage]
        scaled = section.ramp is not None and section.ramp.batch_scaling
        return rate * math.sqrt(batch / section.batch) if scaled else rate
