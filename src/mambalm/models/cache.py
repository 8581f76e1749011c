"""Between `mambalm.State` and transformers' `Cache`.

transformers keeps the last k inputs of a convolution of width k, mambalm the last k-1, which are all that the next
token needs: to transformers one zero is put in front, from it the oldest input is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from mambalm.layers.state import MambaState, State


class StateCache(Cache):
    """A transformers `Cache` that holds a `State`.

    `generate` carries it where transformers has no cache that could hold the state: for models with attention layers
    whose rows differ in length, and when generation resumes from a `State`.

    Attributes:
        state: what has been read, None before the first token.
    """

    def __init__(self, state: State | None = None) -> None:
        super().__init__(layers=[])
        self.state = state

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the forward pass for this cache: its tensors do not stay in place."""
        return False

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first token, as transformers' own."""
        return -1 if self.state is None else self.state.batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the row that has read most."""
        return 0 if self.state is None else int(self.state.position.max())

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything has been read."""
        return self.state is not None

    def reset(self) -> None:
        """Forget everything."""
        self.state = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was, (b)."""
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, (b') of b."""
        if self.state is not None:
            self.state = self.state.index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put each row so many times in a row."""
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.position.device)
            self.state = self.state.index(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state does not go back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a recurrent state cannot be cropped: keep the State from before the tokens and resume from it"
        )


def new_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache for a model of this config: transformers' own where its layers can hold the state."""
    return DynamicCache(config=config) if is_recurrent(config) else StateCache()


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether no layer is attention."""
    return all(kind == "linear_attention" for kind in config.layer_types)


def read_cache(cache: Cache) -> State | None:
    """The state that a transformers cache holds, detached; None when it has read nothing.

    transformers' recurrent layers count no tokens, so there `State.position` is 0.

    Raises:
        ValueError: the cache was not made for this model.
    """
    if isinstance(cache, StateCache):
        return cache.state
    held = _recurrent_layers(cache)
    started = [bool(layer.has_previous_state[0]) for layer in held]
    if not any(started):
        return None
    if not all(started):
        raise ValueError(f"layer {started.index(False)} of the cache holds no state while others do: make a new cache")
    layers = []
    for layer in held:
        conv = layer.conv_states[0]
        # Not [-(k-1):], which for k = 1 would keep all.
        inputs = conv[..., conv.shape[-1] - layer.conv_kernel_size[0] + 1 :]
        ssm = layer.recurrent_states[0]
        layers.append(MambaState(inputs.clone(), ssm.to(torch.promote_types(ssm.dtype, torch.float32), copy=True)))
    position = torch.zeros(layers[0].conv.shape[0], dtype=torch.int64, device=layers[0].conv.device)
    return State(tuple(layers), position)


@torch.no_grad()
def write_cache(cache: Any, state: State) -> None:
    """Put a state into a transformers cache, in place; the cache gets its own copy and no gradient.

    Raises:
        ValueError: the cache was not made for this model, or holds another number of rows.
    """
    if isinstance(cache, StateCache):
        cache.state = state.detach()
        return
    for index, (layer, new) in enumerate(zip(_recurrent_layers(cache), state.layers, strict=True)):
        if not isinstance(new, MambaState):
            raise ValueError(f"layer {index} of the state is attention, layer {index} of the cache is recurrent")
        old = layer.conv_states[0]
        if old is not None and old.shape[0] != state.batch_size:
            raise ValueError(
                f"the cache holds {old.shape[0]} rows and the state {state.batch_size}: "
                "make a new cache, or call its reorder_cache first"
            )
        # transformers appends the inputs to what it has and keeps the last k: k new ones replace them all.
        conv = F.pad(new.conv, (1, 0))
        cache.update_conv_state(conv, index, conv_kernel_size=conv.shape[-1])
        cache.update_recurrent_state(new.ssm, index)


def _recurrent_layers(cache: Any) -> list[Any]:
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache_params is {type(cache).__name__}, expected a mambalm.State or a transformers Cache: "
            "pass model.init_state(batch_size), or nothing"
        )
    layers: list[Any] = cache.layers
    others = {type(layer).__name__ for layer in layers if not isinstance(layer, LinearAttentionLayer)}
    if others or not layers:
        raise ValueError(
            f"the cache holds {', '.join(sorted(others)) or 'no'} layers, which cannot keep a recurrent state: "
            "pass model.init_state(batch_size), or nothing"
        )
    if any(layer.record_past for layer in layers):
        raise ValueError("the cache records past inputs to roll back: keep a mambalm.State to return to instead")
    return layers
