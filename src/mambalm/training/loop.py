"""A run by the clock that hands states on, and all that has to be kept for it to go on exactly where it stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from mambalm.data.streams import Batch, SegmentStreams
from mambalm.layers.state import State
from mambalm.models.common import MambalmForCausalLM
from mambalm.training.budget import Budget
from mambalm.training.files import replacing
from mambalm.training.precision import autocast
from mambalm.training.schedule import Schedule
from mambalm.training.step import Stepper


def next_token_loss(model: MambalmForCausalLM, batch: Batch, state: State | None) -> tuple[Tensor, State]:
    """Mean cross-entropy in nats per token of the batch read on from ``state``, and the state after it."""
    device = model.device
    if state is None:
        state = model.init_state(batch.inputs.shape[0])
    output = model(batch.inputs.to(device), cache_params=state)
    loss = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.to(device).flatten())
    return loss, output.cache_params


@dataclass(frozen=True)
class Report:
    """What one step did.

    Attributes:
        step: its number, counted from 1.
        tokens: tokens read since the beginning of the run.
        loss: of the batch, before the step; nats per token.
        learning_rate: of the step.
        gradient_norm: before clipping.
    """

    step: int
    tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass
class Run:
    """A model in training: what is given, then what the steps change.

    Attributes:
        model: float32 parameters.
        optimizer: over the model's parameters.
        streams: where the batches come from.
        schedule: learning rate by tokens.
        budget: when the run ends.
        identity: what must be the same for a saved run to be resumed, by name.
        compute_dtype: of the matrix products.
        clip: highest norm of the gradient.
        step, tokens, seconds: done so far; seconds are those of training.
        states: by group of rows, what the model has read of them, detached: truncated backpropagation through time.
        losses: one number per step.
        notes: numbers that the caller wants kept with the run.
    """

    model: MambalmForCausalLM
    optimizer: torch.optim.Optimizer
    streams: SegmentStreams
    schedule: Schedule
    budget: Budget
    identity: dict[str, str | int | float] = field(default_factory=dict)
    compute_dtype: torch.dtype = torch.float32
    clip: float = 1.0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    states: dict[int, State] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.is_spent(self.tokens, self.seconds)

    def advance(self) -> Report:
        """Do one optimisation step.

        Raises:
            RuntimeError: the loss or its gradient is not finite; the parameters are as they were.
        """
        batch = self.streams[self.step]
        states: list[State] = []

        def read() -> Tensor:
            before = None if batch.starts else self.states[batch.group]
            loss, state = next_token_loss(self.model, batch, before)
            states.append(state.detach())
            return loss

        stepper = Stepper(self.optimizer, self.clip, lambda: autocast(self.model.device, self.compute_dtype))
        value, norm = (found.item() for found in stepper.gradients([read]))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise RuntimeError(
                f"step {self.step + 1}: loss {value}, gradient norm {norm}; resume with a lower learning rate"
            )
        tokens = self.tokens + batch.targets.numel()
        # At the middle of the step's tokens neither the first step of a warm-up nor the last of a decay is wasted.
        rate = self.schedule((self.tokens + tokens) / 2, self.budget.horizon(self.tokens, self.seconds))
        stepper.apply(rate)
        self.step, self.tokens, self.states[batch.group] = self.step + 1, tokens, states[0]
        self.losses.append(value)
        return Report(self.step, self.tokens, value, rate, norm)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs, atomically.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        kept = {
            "identity": self.identity,
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
            "states": {group: pytree.tree_leaves(state) for group, state in self.states.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "notes": self.notes,
            "random": torch.get_rng_state(),
        }
        with replacing(path) as file:
            torch.save(kept, file)

    def load(self, path: Path) -> None:
        """Go on where the run that was saved to ``path`` stopped, exactly: torch's random state is restored too.

        Raises:
            ValueError: the file is damaged, or of a run that differs in its ``identity``.
        """
        kept = _read(path)
        for name, value in self.identity.items():
            if kept["identity"].get(name) != value:
                raise ValueError(
                    f"{path} is of another run: its {name} is {kept['identity'].get(name)}, here it is {value}. "
                    "Restart, or write to another folder"
                )
        self.compute_dtype = getattr(torch, kept["compute_dtype"])
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        for name, value in kept["progress"].items():
            setattr(self, name, value)
        structure = pytree.tree_structure(self.model.init_state(1))
        self.states = {group: pytree.tree_unflatten(leaves, structure) for group, leaves in kept["states"].items()}
        self.losses, self.notes = kept["losses"].tolist(), kept["notes"]
        torch.set_rng_state(kept["random"])


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(kept, dict) or "identity" not in kept:
            raise ValueError("it holds something else")
        return kept
    except (FileNotFoundError, PermissionError):
        raise
    # What torch raises for a damaged file depends on which part of it is damaged.
    except Exception as error:
        raise ValueError(f"{path} is damaged or no saved run: restart, or put a copy of it in its place") from error


def train(
    run: Run,
    *,
    save: Callable[[], None],
    save_every: float,
    on_step: Callable[[Report], None],
    should_stop: Callable[[], bool],
) -> None:
    """Advance the run until its budget is spent or ``should_stop`` says so, and save it then.

    Args:
        run: changed in place.
        save: keeps the run.
        save_every: seconds between saves.
        on_step: told about each step.
        should_stop: asked after each step.
    """
    run.model.train()
    clock = saved = time.perf_counter()
    while not run.is_over and not should_stop():
        report = run.advance()
        now = time.perf_counter()
        run.seconds += now - clock
        clock = now
        on_step(report)
        if now - saved >= save_every:
            save()
            saved = time.perf_counter()
    save()
