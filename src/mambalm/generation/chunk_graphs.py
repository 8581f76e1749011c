"""Short prompts in CUDA graphs: two thousand tokens take the host longer to launch than the device to read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambalm.generation.capture import capturing
from mambalm.layers.state import AttentionState, MambaState, State
from mambalm.models.cache import is_recurrent
from mambalm.ops import backends

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

# Shapes that are kept.
_MOST_GRAPHS = 8


class ChunkGraphs:
    """The graphs of one model, one per number of rows and tokens; none if it has attention layers.

    A shape is read eagerly the first time and captured the second, so that prompts of ever new lengths cost nothing.
    The weights are read where they are: they may be changed in place but not replaced.
    """

    def __init__(self, model: MambalmForCausalLM, pool: Any) -> None:
        """Capture into the memory of a pool, whose graphs never run at once."""
        self._model, self._pool, self._backend = model, pool, backends.requested(None)
        self._lock = threading.Lock()
        self._seen: set[torch.Size] = set()
        self._graphs: OrderedDict[torch.Size, _Chunk] = OrderedDict()

    def read(self, ids: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Read ids (b, l) on from a state of b rows.

        Returns:
            The logits (b, v) after the last tokens, and the state there; None if there is no graph for that shape yet.
        """
        if not is_recurrent(self._model.config) or backends.requested(None) != self._backend:
            return None
        shape = ids.shape
        # A graph's memory is one thread's at a time.
        with self._lock:
            if shape not in self._graphs:
                if shape not in self._seen:
                    self._seen.add(shape)
                    return None
                if len(self._graphs) == _MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                self._graphs[shape] = _Chunk(self._model, ids, self._pool)
            self._graphs.move_to_end(shape)
            return self._graphs[shape](ids, state)


class _Chunk:
    """One graph, on memory of its own."""

    def __init__(self, model: MambalmForCausalLM, ids: Tensor, pool: Any) -> None:
        self._model = model
        self._ids = ids.clone()
        self._before = model.init_state(len(ids))
        self._graph = torch.cuda.CUDAGraph()
        current, stream = torch.cuda.current_stream(ids.device), torch.cuda.Stream(ids.device)
        stream.wait_stream(current)
        with torch.cuda.device(ids.device), torch.cuda.stream(stream), torch.no_grad():
            # Libraries make their workspaces for the stream now: a capture could not contain that.
            self._once()
            with capturing(self._graph, pool, stream):
                self._logits, self._after = self._once()
        current.wait_stream(stream)

    def _once(self) -> tuple[Tensor, State]:
        output = self._model(self._ids, cache_params=self._before, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], output.cache_params

    def __call__(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        self._ids.copy_(ids)
        _copy(state, self._before)
        self._graph.replay()
        after = State(tuple(map(_empty, self._after.layers)), torch.empty_like(self._after.position))
        _copy(self._after, after)
        return self._logits.clone(), after


def _empty(layer: MambaState | AttentionState) -> MambaState:
    assert isinstance(layer, MambaState), "no layer attends"
    return MambaState(torch.empty_like(layer.conv), torch.empty_like(layer.ssm))


def _copy(source: State, target: State) -> None:
    """Copy by a launch for each dtype."""
    for name in ("conv", "ssm"):
        theirs, ours = ([getattr(layer, name) for layer in state.layers] for state in (source, target))
        torch._foreach_copy_(ours, theirs)
    target.position.copy_(source.position)
