"""What the models return.

transformers calls the cache `cache` from 5.24 on, and `cache_params` before: the outputs know it by both names.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from mambalm.layers.state import State


def cache_name() -> str:
    """What this version of transformers calls the cache of a Mamba model, in arguments and in outputs."""
    return "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "cache_params"


class _Output(ModelOutput):
    """An output with a field `cache`, also called `cache_params`."""

    @property
    def cache_params(self) -> State | Cache | None:
        """The new `State` if one was given, else the cache; None without `use_cache`."""
        return self.cache  # type: ignore[attr-defined]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("cache" if isinstance(key, str) and key == "cache_params" else key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__("cache" if key == "cache_params" else key)


@dataclass
class BackboneOutput(_Output):
    """What a backbone returns.

    Attributes:
        last_hidden_state: (b, l, d), after the final norm; zero at padding.
        cache: the new `State` if one was given, else the cache; None without `use_cache`. Also `cache_params`.
        hidden_states: on request, the residual stream after each block, then `last_hidden_state`.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: State | Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class CausalLMOutput(_Output):
    """What a language model returns; see `BackboneOutput` for the last two.

    Attributes:
        loss: mean cross-entropy of the next token, when labels are given.
        logits: (b, l, v) float32, or fewer positions with `logits_to_keep`; None with `skip_logits`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: State | Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
