"""What becomes of a step whose loss or gradient is not as it should be: never silence."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from mambalm.training.recipe import OptimizerSection


# Steps that the mean of the loss looks back on, and that must have been before a loss can be called a spike.
_MEMORY = 100


class Verdict(Enum):
    """What to do with a step."""

    APPLY = "applied"
    LEAVE = "left out"
    REWIND = "rewind"


class DivergedError(RuntimeError):
    """A run that going back did not mend."""


@dataclass
class Guard:
    """Watches losses and gradient norms; its numbers are kept with the run.

    Attributes:
        mean, seen: the running mean of the loss, and how many it is of.
        skipped: steps left out in all; in_row of them since the last that was applied.
        overflows: float16 gradients that were not finite, of which the scaler took care.
        rewinds: how often the last checkpoint was brought back.
    """

    mean: float = 0.0
    seen: int = 0
    skipped: int = 0
    in_row: int = 0
    overflows: int = 0
    rewinds: int = 0

    def limit(self, section: OptimizerSection) -> float:
        """The highest loss that is no spike."""
        return section.spike * self.mean if self.seen >= _MEMORY else math.inf

    def refuses(self, section: OptimizerSection, found: Tensor) -> Tensor:
        """Whether a step of ``found``, its float32 (loss, norm), will not be applied: 1 or 0, float32 () on its device.

        What `judge` says of it, without a scaler, before anybody has waited for the numbers.
        """
        return 1.0 - (found.isfinite().all() & (found[0].double() <= self.limit(section))).float()

    def judge(self, section: OptimizerSection, loss: float, norm: float, scaled: bool) -> Verdict:
        """Decide on a step by its loss and gradient norm; ``scaled`` gradients may overflow."""
        if math.isfinite(loss) and not math.isfinite(norm) and scaled:
            # The scaler looks for its scale that way; without an end to it the scale itself is lost.
            self.overflows += 1
            self.in_row += 1
            return Verdict.REWIND if self.in_row > 10 * section.patience else Verdict.APPLY
        if math.isfinite(loss) and math.isfinite(norm) and loss <= self.limit(section):
            self.seen += 1
            self.mean += (loss - self.mean) / min(self.seen, _MEMORY)
            self.in_row = 0
            return Verdict.APPLY
        self.skipped += 1
        self.in_row += 1
        return Verdict.REWIND if self.in_row >= section.patience else Verdict.LEAVE

    def count_rewind(
        self, section: OptimizerSection, loss: float, norm: float, step: int, *, saved: bool = True
    ) -> None:
        """Note that the last checkpoint is brought back.

        Raises:
            DivergedError: it was brought back as often as allowed, or there is none: nothing was ``saved``.
        """
        if not saved:
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {norm}, and there is no checkpoint yet to return to. Lower "
                "schedule.peak, lengthen schedule.warmup, or look at the data"
            )
        self.rewinds += 1
        self.in_row = 0
        if self.rewinds > section.rewinds:
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {norm}, and {section.rewinds} returns to a checkpoint "
                "did not help; the last checkpoint is intact. Lower schedule.peak or optimizer.clip, or look at the "
                "data"
            )

    def state(self) -> dict[str, Any]:
        """Its numbers."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
