"""Batches on their way, step by step: eagerly, or through captured graphs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mambalm.generation import cpu_step
from mambalm.generation.owned_state import longest
from mambalm.generation.reading import step
from mambalm.generation.sampling import Choice, Chooser
from mambalm.generation.steps import Captured, Graphs
from mambalm.layers.state import State

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM


class EagerRun:
    """A batch on its way, step by step."""

    def __init__(self, model: MambalmForCausalLM, logits: Tensor, state: State, chooser: Chooser) -> None:
        self._model, self._logits, self._state, self._chooser = model, logits, state, chooser
        self._rows = list(range(len(logits)))
        self._tokens: Tensor | None = None
        self._few: cpu_step.CPUStep | None = None

    def next(self, *, is_last: bool) -> tuple[list[int], Choice]:
        """The rows that go on, and their next tokens on the host."""
        if self._tokens is not None:
            self._read(self._tokens)
        choice = self._chooser(self._logits)
        self._tokens = choice.tokens
        return self._rows, Choice(*(None if part is None else part.cpu() for part in choice))  # type: ignore[arg-type]

    def _read(self, tokens: Tensor) -> None:
        if self._few is None and len(tokens) <= cpu_step.MOST_ROWS and cpu_step.refusal(self._model) is None:
            self._few = cpu_step.CPUStep(self._model, self._state)
        if self._few is not None:
            self._logits = self._few(tokens)
        else:
            self._logits, self._state = step(self._model, tokens, self._state)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, some of those of before in their order."""
        if len(rows) == len(self._rows) or self._tokens is None:
            return
        index = torch.tensor([self._rows.index(row) for row in rows], device=self._tokens.device)
        if self._few is not None:
            self._state, self._few = self._few.state(), None
        self._tokens, self._state = self._tokens[index], self._state.index(index)
        self._chooser, self._rows = self._chooser.index(index), rows

    def close(self) -> None:
        """Nothing is held."""


class _Arrival(NamedTuple):
    """Tokens on their way to the host: of these rows in these slots of the batch."""

    rows: list[int]
    slots: list[int]
    choice: Choice
    event: torch.cuda.Event


class CapturedRun:
    """A batch on its way through graphs, one step ahead of the host."""

    def __init__(self, graphs: Graphs, logits: Tensor, state: State, chooser: Chooser) -> None:
        self._graphs, self._plan = graphs, chooser.plan
        self._rows = list(range(len(logits)))
        self._slots = list(range(len(logits)))
        self._arrivals: deque[_Arrival] = deque()
        self._captured: Captured | None = None
        choice = chooser(logits)
        self._begin = choice.tokens, state, chooser
        self._send(choice)

    def next(self, *, is_last: bool) -> tuple[list[int], Choice]:
        """The rows that go on, and their next tokens on the host."""
        if not self._arrivals:  # the first tokens were told, which have not waited for the graph
            self._captured = self._loaded()
            self._step(self._captured)
        if self._captured is not None and not is_last:
            self._move(self._captured)
            self._step(self._captured)
        arrival = self._arrivals.popleft()
        arrival.event.synchronize()
        # A row that has stopped since the step was sent is not heard any more.
        going = set(self._rows)
        pairs = [(row, slot) for row, slot in zip(arrival.rows, arrival.slots, strict=True) if row in going]
        rows, slots = [row for row, _ in pairs], [slot for _, slot in pairs]
        return rows, Choice(*(None if part is None else part[slots] for part in arrival.choice))  # type: ignore[arg-type]

    def _loaded(self) -> Captured:
        """A graph with the rows that go on."""
        tokens, state, chooser = self._begin
        del self._begin
        if len(self._rows) < len(tokens):
            slots = torch.tensor(self._slots, device=tokens.device)
            tokens, state, chooser = tokens[slots], state.index(slots), chooser.index(slots)
        captured = self._graphs.take(len(self._rows), self._plan, longest(state))
        captured.load(tokens, state, chooser)
        self._slots = list(range(len(self._rows)))
        return captured

    def _step(self, captured: Captured) -> None:
        captured.replay()
        assert captured.choice is not None, "captured with a plan"
        self._send(captured.choice)

    def _send(self, choice: Choice) -> None:
        """Begin to copy a choice to the host."""
        host = [None if part is None else _pinned(part) for part in choice]
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(choice.tokens.device))
        self._arrivals.append(_Arrival(self._rows, self._slots, Choice(*host), event))  # type: ignore[arg-type]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, some of those of before in their order."""
        if len(rows) < len(self._rows):
            slot_of = dict(zip(self._rows, self._slots, strict=True))
            self._rows, self._slots = rows, [slot_of[row] for row in rows]

    def _move(self, before: Captured) -> None:
        """Take the smallest graph that holds the rows, and one with more room where there is none left."""
        if len(self._rows) > before.size // 2 and not before.owned.is_full:
            return
        after = self._graphs.take(len(self._rows), self._plan, before.owned.longest)
        slots = torch.tensor(self._slots, device=before.tokens.device)
        after.load(before.tokens[slots], before.state(slots), before.chooser(slots))
        # In this order: interrupted in between, a graph is lost, and never given back twice.
        self._captured, self._slots = after, list(range(len(self._rows)))
        self._graphs.give_back(before, self._plan)

    def close(self) -> None:
        """Let others use the graph."""
        if self._captured is not None:
            self._graphs.give_back(self._captured, self._plan)


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class CapturedReader:
    """Reads tokens by a graph; see `Reader`."""

    def __init__(self, graphs: Graphs, state: State) -> None:
        self._rows = state.batch_size
        self._graphs, self._captured = graphs, graphs.take(self._rows, None, longest(state))
        self._captured.load(None, state, None)

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Reader`."""
        if self._captured.owned.is_full:
            before = self._captured
            self._captured = self._graphs.take(self._rows, None, before.owned.longest)
            self._captured.load(None, before.state(torch.arange(self._rows, device=before.tokens.device)), None)
            self._graphs.give_back(before, None)
        self._captured.tokens[: self._rows].copy_(tokens)
        self._captured.replay()
        return self._captured.logits[: self._rows]

    def reorder(self, rows: Tensor) -> None:
        """See `Reader`."""
        self._captured.load(None, self._captured.state(rows), None)

    def state(self) -> State:
        """See `Reader`."""
        return self._captured.state(torch.arange(self._rows, device=self._captured.tokens.device))

    def __del__(self) -> None:
        # The reader may have failed before it had a graph.
        if hasattr(self, "_captured"):
            self._graphs.give_back(self._captured, None)
