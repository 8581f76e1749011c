"""The state of a step that owns it: memory that stays where it is and moves on in place, as a captured graph needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambalm.layers.state import AttentionState, MambaState, RoomyAttentionState, State

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

# Attention layers begin with room for so many tokens at least, and for so many more than the rows have read; when it is
# used up, the rows move to a graph with twice as much. Of more rows than these both are fewer, by at most this factor:
# a step reads all of the room, used or not.
_ROOM, _AHEAD, _FEW_ROWS, _LESS = 1024, 512, 16, 4


class OwnedState:
    """Of so many rows of a model.

    Attributes:
        state: what the model's layers take; its tensors are the memory.
        room: tokens that the attention layers have room for; 0 in models without, which need none.
        longest: tokens that the row in use that has read most has read; counted in models with attention only.
    """

    def __init__(self, model: MambalmForCausalLM, rows: int, room: int, *, fused: bool = False) -> None:
        """Memory; for the fused step, the convolutions' inputs lie token by token, so that it reads many at once."""
        state = model.init_state(rows)
        layers = (_token_by_token(layer) if fused else layer for layer in state.layers)
        self.state = State(tuple(_with_room(layer, room) for layer in layers), state.position)
        self.room = room if needs_room(state) else 0
        self.longest = 0

    @property
    def is_full(self) -> bool:
        """Whether there is no room for one more token."""
        return bool(self.room) and self.longest >= self.room

    def parts(self) -> Iterator[Tensor]:
        """What a step replaces, in a fixed order; keys and values are written where they are."""
        yield from _parts(self.state)

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Let the first rows be what those of a state have read, for which there must be room."""
        rows = state.batch_size
        for own, given in zip(self.parts(), _parts(state), strict=True):
            own[:rows].copy_(given)
        for layer, other in zip(self.state.layers, state.layers, strict=True):
            if isinstance(layer, RoomyAttentionState) and isinstance(other, AttentionState):
                layer.fill(other)
        self.longest = longest(state)

    def replace(self, state: State) -> None:
        """Let it be what a model returned that read one token from it."""
        torch._foreach_copy_(list(self.parts()), list(_parts(state)))

    def value(self, rows: Tensor) -> State:
        """A copy of these rows."""
        layers = (
            layer.value(self.longest) if isinstance(layer, RoomyAttentionState) else layer
            for layer in self.state.layers
        )
        state = State(tuple(layers), self.state.position).index(rows)
        dense = (
            MambaState(layer.conv.contiguous(), layer.ssm) if isinstance(layer, MambaState) else layer
            for layer in state.layers
        )
        return State(tuple(dense), state.position)


def room_for(rows: int, tokens: int) -> int:
    """For how many tokens attention layers get room, of which a row of so many holds ``tokens``."""
    less = min(max(rows // _FEW_ROWS, 1), _LESS)
    return max(_ROOM // less, 1 << (tokens + max(_AHEAD // less, 1) - 1).bit_length())


def needs_room(state: State) -> bool:
    """Whether a layer keeps more with every token."""
    return any(isinstance(layer, AttentionState) for layer in state.layers)


def longest(state: State) -> int:
    """Tokens in the attention layers of the row that has most, for which the host waits; 0 without such layers."""
    lengths = next((layer.lengths for layer in state.layers if isinstance(layer, AttentionState)), None)
    return 0 if lengths is None else int(lengths.max())


def _with_room(layer: MambaState | AttentionState, room: int) -> MambaState | AttentionState:
    if isinstance(layer, MambaState):
        return layer
    shape = (len(layer.keys), room, *layer.keys.shape[2:])
    return RoomyAttentionState(layer.keys.new_zeros(shape), layer.keys.new_zeros(shape), layer.lengths, layer.conv)


def _token_by_token(layer: MambaState | AttentionState) -> MambaState | AttentionState:
    """Let a Mamba layer's last inputs (b, d, k - 1) be a view of memory (b, k - 1, d)."""
    if not isinstance(layer, MambaState):
        return layer
    return MambaState(layer.conv.transpose(1, 2).contiguous().transpose(1, 2), layer.ssm)


def _parts(state: State) -> Iterator[Tensor]:
    for layer in state.layers:
        both = (layer.conv, layer.ssm) if isinstance(layer, MambaState) else (layer.conv, layer.lengths)
        yield from (part for part in both if part is not None)
    yield state.position
