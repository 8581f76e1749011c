"""The five forms in which a model can be fed the same documents; all give the same logits, final state and gradients.

A form is a function `(model, documents, initial) -> Reading`: `model` is called as a causal language model of mambalm
is, documents are token ids (l_i), i = 1..s, and `initial` is a `State` of s rows, what each document follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.layers.state import AttentionState, MambaState, State


@dataclass(frozen=True)
class Reading:
    """What a model made of s documents: logits (l_i, v) of each, and the state (s rows) after them."""

    logits: tuple[Tensor, ...]
    state: State


Model = Callable[..., Any]
Form = Callable[[Model, Sequence[Tensor], State], Reading]


def one_pass(model: Model, documents: Sequence[Tensor], initial: State) -> Reading:
    """Each document alone, in one call.

    Here and in the other forms: `documents` are token ids, (l_i) each, `initial` has a row for each.
    """
    return _alone(model, documents, initial, lambda document: [document])


def token_by_token(model: Model, documents: Sequence[Tensor], initial: State) -> Reading:
    """Each document alone, a call per token, the state handed on."""
    return _alone(model, documents, initial, lambda document: document.split(1))


def random_chunks(model: Model, documents: Sequence[Tensor], initial: State, *, seed: int = 0) -> Reading:
    """Each document alone, split at random places, some of them next to each other."""
    generator = torch.Generator().manual_seed(seed)

    def split(document: Tensor) -> Sequence[Tensor]:
        cuts = torch.randint(1, max(2, len(document)), (4,), generator=generator)
        # A second cut two tokens on makes a chunk shorter than the convolution.
        offsets = torch.cat((cuts, cuts[:1] + 2)).clamp(max=len(document)).unique()
        return [chunk for chunk in document.tensor_split(offsets) if len(chunk)]

    return _alone(model, documents, initial, split)


def padded(model: Model, documents: Sequence[Tensor], initial: State, *, side: str) -> Reading:
    """All documents as the rows of one batch, padded on the "left" or "right" to the longest."""
    longest = max(map(len, documents))
    fills = [longest - len(document) for document in documents]
    pads = [(fill, 0) if side == "left" else (0, fill) for fill in fills]
    ids = torch.stack([F.pad(document, pad) for document, pad in zip(documents, pads, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(d), pad) for d, pad in zip(documents, pads, strict=True)])
    output = model(ids, attention_mask=mask, cache_params=initial, use_cache=True)
    logits = [row[real.bool()] for row, real in zip(output.logits, mask, strict=True)]
    return Reading(tuple(logits), output.cache_params)


def packed(model: Model, documents: Sequence[Tensor], initial: State) -> Reading:
    """All documents laid end to end in one row, told apart by `cu_seqlens`."""
    lengths = [len(document) for document in documents]
    ids = torch.cat(list(documents))[None]
    offsets = torch.tensor([0, *lengths], device=ids.device).cumsum(0).to(torch.int32)
    output = model(ids, cu_seqlens=offsets, cache_params=initial, use_cache=True)
    return Reading(output.logits[0].split(lengths), output.cache_params)


FORMS: dict[str, Form] = {
    "one pass": one_pass,
    "random chunks": random_chunks,
    "token by token": token_by_token,
    "left-padded": partial(padded, side="left"),
    "right-padded": partial(padded, side="right"),
    "packed": packed,
}


def state_tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state by name, of keys and values only what was read; differentiable."""
    tensors = {}
    for index, layer in enumerate(state.layers):
        if isinstance(layer, MambaState):
            tensors[f"layers.{index}.ssm"] = layer.ssm
        if isinstance(layer, AttentionState):
            valid = torch.arange(layer.keys.shape[1], device=layer.lengths.device) < layer.lengths[:, None]
            tensors[f"layers.{index}.keys"] = layer.keys[valid]
            tensors[f"layers.{index}.values"] = layer.values[valid]
        if layer.conv is not None:
            tensors[f"layers.{index}.conv"] = layer.conv
    return tensors


def _alone(
    model: Model,
    documents: Sequence[Tensor],
    initial: State,
    split: Callable[[Tensor], Sequence[Tensor]],
) -> Reading:
    logits, states = [], []
    for row, document in enumerate(documents):
        state, pieces = initial.index(row), []
        for chunk in split(document):
            output = model(chunk[None], cache_params=state, use_cache=True)
            state = output.cache_params
            pieces.append(output.logits[0])
        logits.append(torch.cat(pieces))
        states.append(state)
    return Reading(tuple(logits), State.cat(states))
