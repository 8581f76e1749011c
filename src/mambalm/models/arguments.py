"""What the models' arguments say, checked."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig


def check_activation(config: PreTrainedConfig) -> None:
    """Refuse an activation that the layers do not compute.

    Raises:
        ValueError: hidden_act is neither "silu" nor "swish", its other name.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r} is not supported: every Mamba model uses 'silu'")


def one_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The one of the two that is given.

    Raises:
        ValueError: both are, or neither, or its shape or dtype is not that of tokens (b, l) or embeddings (b, l, d).
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is None:
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3 or not inputs_embeds.is_floating_point():
            raise ValueError(f"inputs_embeds is {_described(inputs_embeds)}, expected floating point (b, l, d)")
        return inputs_embeds
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids is {_described(input_ids)}, expected integers (b, l)")
    return input_ids


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def one_cache(cache_params: Any, cache: Any) -> Any:
    """The one of the two that is given, or None: `cache` is what transformers calls `cache_params` from 5.24 on.

    Raises:
        ValueError: both are.
    """
    if cache_params is not None and cache is not None:
        raise ValueError("give one of cache_params and cache, which are two names of the same")
    return cache if cache_params is None else cache_params


def refuse_unused(unused: dict[str, Any]) -> None:
    """Refuse arguments that nothing would be done with.

    Raises:
        TypeError: one of them is set.
    """
    # transformers and PEFT pass arguments of attention models along, unset: only a set one would be lost.
    named = sorted(name for name, value in unused.items() if value is not None and value is not False)
    if named:
        raise TypeError(
            f"these arguments have no meaning for a Mamba model: {', '.join(named)}. "
            "Packed documents are given by cu_seqlens or position_ids, states by cache_params"
        )


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kept_positions(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of hidden (b, l, d) whose logits are asked for: the last so many (0: all), or those named.

    Raises:
        ValueError: positions that differ by row.
    """
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.dim() != 1:
        raise ValueError(f"logits_to_keep is {tuple(logits_to_keep.shape)}, expected a number or positions (n)")
    return hidden[:, logits_to_keep]
