"""The one optimisation step: gradients of accumulated losses, unscaled and clipped, then AdamW or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mambalm.training.optimizer import set_learning_rate


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to a norm of at most ``limit``; returns the norm before, over all ranks' shards."""
    norm = nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@dataclass
class Stepper:
    """How losses become a change of the parameters.

    Attributes:
        optimizer: over float32 parameters.
        clip: the highest norm of the gradient.
        compute: the context in which losses are computed.
        scaler: of the loss, for float16.
    """

    optimizer: torch.optim.Optimizer
    clip: float = 1.0
    compute: Callable[[], AbstractContextManager] = contextlib.nullcontext
    scaler: torch.amp.GradScaler | None = None

    def gradients(self, losses: Iterable[Callable[[], Tensor]]) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of some losses, computed one after the other, and clip them.

        Returns:
            (the sum of the losses, the norm of the gradient before clipping), each (), not yet waited for.

        Raises:
            ValueError: there is no loss.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for compute_loss in losses:
            with self.compute():
                loss = compute_loss()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        if total is None:
            raise ValueError("a step needs at least one loss")
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return total, clip_gradients(self._parameters(), self.clip)

    def apply(self, learning_rate: float, unless: Tensor | None = None) -> None:
        """Change the parameters. With a scaler, gradients that are not finite change nothing but its scale.

        ``unless``, float32 (), is for a fused optimizer and no scaler: where the device finds it 1, nothing changes. So
        the step can be launched before anybody waited for what decides on it.
        """
        set_learning_rate(self.optimizer, learning_rate)
        if self.scaler is None:
            optimizer: Any = self.optimizer
            optimizer.found_inf = unless
            optimizer.step()
            del optimizer.found_inf
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def leave(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
