"""The steps that read one token per row: eager, a CPU's, and on a GPU captured as one graph, with the choice in it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mambalm.generation import gpu_step
from mambalm.generation.capture import capturing
from mambalm.generation.owned_state import OwnedState, room_for
from mambalm.generation.reading import step
from mambalm.generation.sampling import Choice, Chooser, Plan
from mambalm.layers.attention import Attention
from mambalm.layers.hooks import hooked
from mambalm.layers.mamba2 import Mamba2
from mambalm.layers.state import State
from mambalm.models.cache import is_recurrent
from mambalm.ops import backends

if TYPE_CHECKING:
    from mambalm.generation.gpu_step import Weights
    from mambalm.models.common import MambalmForCausalLM

# Batches are filled up to one of these sizes, so that there are few graphs, or to a multiple of the last.
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
# Graphs that are kept for later, each with the states of its rows: every size for two ways of choosing.
_MOST_IDLE = 2 * len(_SIZES)


class Reader(Protocol):
    """Reads tokens one by one, of one row or several."""

    def __call__(self, tokens: Tensor, /) -> Tensor:
        """Read a token per row (b); the logits after it (b, v), overwritten by the next call."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i be what row `rows[i]` was; rows (b), int64."""

    def state(self) -> State:
        """What was read, as a value."""


class EagerReader:
    """A reader for every model and device."""

    def __init__(self, model: MambalmForCausalLM, state: State) -> None:
        self._model, self._state = model, state

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Reader`."""
        logits, self._state = step(self._model, tokens, self._state)
        return logits

    def reorder(self, rows: Tensor) -> None:
        """See `Reader`."""
        self._state = self._state.index(rows)

    def state(self) -> State:
        """See `Reader`."""
        return self._state


def not_captured(model: MambalmForCausalLM) -> str | None:
    """Why the steps of a model cannot be a graph; None if they can."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}"
    devices = getattr(model, "hf_device_map", {}).values()
    if len(set(devices)) > 1 or any(map(hooked, model.modules())):
        return "modules have hooks, or are on several devices"
    blocks: Any = model.backbone.layers
    return next((reason for block in blocks if (reason := _waits(block.mixer, model.device, model.dtype))), None)


def _waits(mixer: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a layer's op waits for the host, which a graph cannot; None if it does not."""
    if isinstance(mixer, Attention):
        return None
    if isinstance(mixer, Mamba2):
        op, sizes = "ssd", {"h": mixer.nheads, "p": mixer.headdim, "g": mixer.ngroups, "n": mixer.d_state}
    else:
        op, sizes = "selective_scan", {"d": mixer.d_inner, "n": mixer.d_state}
    reasons = backends.explain(op, device, dtype, b=1, l=1, **sizes)
    runs = backends.requested(mixer.backend) or next(name for name, reason in reasons.items() if reason is None)
    if runs in ("gluon", "triton"):
        return None
    others = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
    return f"{op} runs on its {runs} backend, whose steps wait for the host" + (f" ({others})" if others else "")


class GenericStep:
    """Any model's forward, on a state that stays where it is; the interface is that of `FusedStep`."""

    def __init__(self, model: MambalmForCausalLM, owned: OwnedState) -> None:
        self._model, self._owned = model, owned

    def __call__(self, tokens: Tensor, logits: Tensor) -> None:
        """Read tokens (b), write the logits (b, v) after them."""
        after, state = step(self._model, tokens, self._owned.state)
        self._owned.replace(state)
        logits.copy_(after)


class Captured:
    """A step of `size` rows in a CUDA graph, on memory of its own, which ends with the choice of the next tokens.

    Attributes:
        size: rows; those that are not in use compute what nobody reads.
        tokens: int64 (size), what the next run reads, and after it what was chosen.
        logits: float32 (size, v), after the tokens read.
        choice: what the latest run chose; None where the plan is None.
        owned: what the rows have read.
    """

    def __init__(
        self,
        model: MambalmForCausalLM,
        size: int,
        room: int,
        plan: Plan | None,
        blocks: list[tuple[Weights, ...]] | None,
        pool: Any,
    ) -> None:
        """Compile what the step needs, and capture it.

        Args:
            model: one that `not_captured` has nothing against.
            size: rows.
            room: tokens that attention layers have room for.
            plan: how tokens are chosen; None: not at all.
            blocks: the blocks' weights as the fused kernels take them; None: the model's own forward.
            pool: of the memory that graphs share, since no two of an engine run at once.
        """
        device, vocabulary = model.device, model.config.vocab_size
        self.size = size
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.logits = torch.zeros(size, vocabulary, device=device)
        self.owned = OwnedState(model, size, room, fused=blocks is not None)
        self._chooser = None if plan is None else idle_chooser(plan, size, vocabulary, device)
        run = GenericStep(model, self.owned) if blocks is None else gpu_step.FusedStep(model, self.owned, blocks)
        self._run: GenericStep | gpu_step.FusedStep = run
        self.choice: Choice | None = None
        self._graph = self._capture(device, pool)

    def _capture(self, device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
            # Kernels compile and libraries make their workspaces now: a capture could not contain that.
            for _ in range(2):
                self._once()
            with capturing(graph, pool, stream):
                self._once()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph

    def _once(self) -> None:
        self._run(self.tokens, self.logits)
        if self._chooser is not None:
            self.choice = self._chooser(self.logits)
            # A row without a token reads any, until the host hears of it.
            torch.clamp(self.choice.tokens, min=0, out=self.tokens)

    @torch.no_grad()
    def load(self, tokens: Tensor | None, state: State, chooser: Chooser | None) -> None:
        """Begin with these rows, at most `size`: what they read next, what they have read, how they choose."""
        rows = state.batch_size
        self.owned.load(state)
        if tokens is not None:
            self.tokens[:rows].copy_(tokens.clamp(min=0))
        if self._chooser is not None and chooser is not None:
            for own_part, given_part in zip(self._chooser.tensors(), chooser.tensors(), strict=True):
                if own_part is not None and given_part is not None:
                    own_part[:rows].copy_(given_part)

    def replay(self) -> None:
        """Run once; there must be room for another token."""
        assert not self.owned.is_full, "the engine moves on to more room in time"
        self._graph.replay()
        self.owned.longest += 1

    def state(self, rows: Tensor) -> State:
        """A copy of what these rows have read."""
        return self.owned.value(rows)

    def chooser(self, rows: Tensor) -> Chooser:
        """A copy of how these rows choose."""
        assert self._chooser is not None, "captured without a choice"
        return self._chooser.index(rows)


class Graphs:
    """The captured steps of one model, made when they are asked for and kept for later; threads may share them.

    Attributes:
        pool: of the memory that graphs share, since no two run at once.
    """

    def __init__(self, model: MambalmForCausalLM, *, fused: bool) -> None:
        """None yet; `fused` steps take our kernels."""
        self._model, self._fused = model, fused
        self._weights: list[tuple[Weights, ...]] | None = None
        self._versions: list[tuple[object, ...]] = []
        # By size, room and plan, what was used last behind.
        self._idle: dict[tuple[int, int, Plan | None], list[Captured]] = {}
        # Again, since collecting garbage may give a graph back while another is made.
        self._lock = threading.RLock()
        self.pool = torch.cuda.graph_pool_handle()

    def take(self, rows: int, plan: Plan | None, tokens: int = 0) -> Captured:
        """A graph for that many rows that is not in use; `give_back` it.

        Args:
            rows: at least one.
            plan: how tokens are chosen; None: not at all.
            tokens: that attention layers hold at its begin, for the row that has read most.
        """
        size = next((size for size in _SIZES if size >= rows), -(-rows // _SIZES[-1]) * _SIZES[-1])
        room = 0 if is_recurrent(self._model.config) else room_for(size, tokens)
        with self._lock:
            weights = self._current_weights() if self._fused else None
            if idle := self._idle.get((size, room, plan)):
                return idle.pop()
            return Captured(self._model, size, room, plan, weights, self.pool)

    def give_back(self, captured: Captured, plan: Plan | None) -> None:
        """Let others use a graph again; of too many, one of the kind that was not used for longest is dropped."""
        key = captured.size, captured.owned.room, plan
        with self._lock:
            self._idle[key] = [*self._idle.pop(key, ()), captured]
            if sum(map(len, self._idle.values())) > _MOST_IDLE:
                next(idle for idle in self._idle.values() if idle).pop(0)
            self._idle = {key: idle for key, idle in self._idle.items() if idle}

    def _current_weights(self) -> list[tuple[Weights, ...]]:
        """The blocks' weights as the kernels take them; what is computed from parameters follows their changes."""
        blocks: Any = self._model.backbone.layers
        versions = list(map(gpu_step.version, blocks))
        if self._weights is None:
            self._weights = list(map(gpu_step.weights, blocks))
        elif versions != self._versions:
            for block, parts in zip(blocks, self._weights, strict=True):
                gpu_step.renew(block, parts)
        self._versions = versions
        return self._weights


def idle_chooser(plan: Plan, size: int, vocabulary: int, device: torch.device) -> Chooser:
    """The memory of a chooser of this plan."""
    keys, steps = torch.zeros(2, size, dtype=torch.int64, device=device)
    neutral = torch.tensor([0.0, 0, 1, 0, 1, 0, 0], device=device).repeat(size, 1)
    seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device) if plan.penalizes else None
    written = torch.zeros(size, vocabulary, dtype=torch.int32, device=device) if plan.penalizes else None
    return Chooser(plan, neutral, keys, steps, seen, written)
