"""When a run ends: by the clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Budget(Protocol):
    """Says how many tokens the whole run will read, and when it is over."""

    def horizon(self, tokens: int, seconds: float) -> float:
        """Tokens of the whole run, as known after ``tokens`` read in ``seconds``."""
        ...

    def is_spent(self, tokens: int, seconds: float) -> bool:
        """Whether the run is over."""
        ...


@dataclass(frozen=True)
class TimeBudget:
    """A run of so many seconds of training, those before an interruption included."""

    seconds: float

    def horizon(self, tokens: int, seconds: float) -> float:
        """The tokens that will have been read if they keep coming as fast as they have so far."""
        return tokens / seconds * self.seconds if tokens and seconds else math.inf

    def is_spent(self, tokens: int, seconds: float) -> bool:
        """Whether the time is over."""
        return seconds >= self.seconds
