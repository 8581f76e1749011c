"""The ways to read rows with a state: alone, in chunks, padded, packed; what comes of each, gradients included."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from mambalm import State
from mambalm.layers.state import AttentionState
from mambalm.models.common import MambalmForCausalLM
from tests.helpers import cu_seqlens, pieces
from tests.models.tiny import tokens

# A way to read several rows on from a state of as many: logits per row, and the new state.
Read = Callable[[MambalmForCausalLM, list[Tensor], State], tuple[list[Tensor], State]]


def alone(model: MambalmForCausalLM, rows: list[Tensor], state: State) -> tuple[list[Tensor], State]:
    """Each row by itself, in one pass: what all the other ways must give."""
    outputs = [model(row[None], cache_params=state[i]) for i, row in enumerate(rows)]
    return [output.logits[0] for output in outputs], State.cat([output.cache_params for output in outputs])


def in_chunks(offsets: list[int]) -> Read:
    """Each row by itself, split at the offsets."""

    def read(model: MambalmForCausalLM, rows: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        logits, states = [], []
        for i, row in enumerate(rows):
            after, parts = state[i], []
            for piece in pieces(offsets):
                output = model(row[None, piece], cache_params=after)
                after = output.cache_params
                parts.append(output.logits[0])
            logits.append(torch.cat(parts))
            states.append(after)
        return logits, State.cat(states)

    return read


def padded(left: bool, extra: int, longer_mask: int = 0) -> Read:
    """All rows in one batch, padded to the longest and `extra` more with tokens that must not be seen."""

    def read(model: MambalmForCausalLM, rows: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        longest = max(len(row) for row in rows) + extra
        ids = tokens(len(rows), longest, seed=99).to(model.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        # What was read before may be covered by the mask, too: its last columns count.
        whole = torch.cat([mask.new_ones(len(rows), longer_mask), mask], dim=1)
        output = model(ids, attention_mask=whole, cache_params=state)
        return [output.logits[i][mask[i] == 1] for i in range(len(rows))], output.cache_params

    return read


def packed(model: MambalmForCausalLM, rows: list[Tensor], state: State) -> tuple[list[Tensor], State]:
    """All rows in one, end to end."""
    lengths = [len(row) for row in rows]
    offsets = [sum(lengths[:i]) for i in range(len(rows) + 1)]
    output = model(torch.cat(rows)[None], cu_seqlens=cu_seqlens(offsets, model.device), cache_params=state)
    return list(output.logits[0].split(lengths)), output.cache_params


def contents(state: State) -> dict[str, Tensor]:
    """Every tensor of a state; of keys and values the valid entries only."""
    found = {"position": state.position}
    for index, layer in enumerate(state.layers):
        if isinstance(layer, AttentionState):
            valid = torch.arange(layer.keys.shape[1], device=layer.keys.device) < layer.lengths[:, None]
            found |= {f"{index} keys": layer.keys[valid], f"{index} values": layer.values[valid]}
        else:
            found |= {f"{index} ssm": layer.ssm}
        found |= {} if layer.conv is None else {f"{index} conv": layer.conv}
    return found


def leaves(state: State) -> list[Tensor]:
    return [t for layer in state.layers for t in vars(layer).values() if t is not None and t.is_floating_point()]


def outcome(model: MambalmForCausalLM, read: Read, lengths: list[int], prefix: int) -> dict[str, Tensor]:
    """Logits, final state, and the gradients of their weighted sum in the parameters and the first state."""
    state = model.init_state(len(lengths))
    if prefix:
        with torch.no_grad():
            state = model(tokens(len(lengths), prefix, seed=5).to(model.device), cache_params=state).cache_params
    state = state.clone()
    first = [leaf.requires_grad_() for leaf in leaves(state)]
    rows = [tokens(length, seed=length).to(model.device) for length in lengths]
    logits, final = read(model, rows, state)
    outputs = {"logits": torch.cat(logits)} | contents(final)
    fixed = torch.Generator().manual_seed(7)
    total = sum((out * torch.randn(out.shape, generator=fixed).to(out)).sum() for out in outputs.values())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = [*trained, *(f"first {i}" for i in range(len(first)))]
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, [*trained.values(), *first], materialize_grads=True)
    gradients = {f"d {name}": gradient for name, gradient in zip(names, found, strict=True)}
    return {name: out.detach() for name, out in outputs.items()} | gradients


def exact(model: MambalmForCausalLM, lengths: list[int], prefix: int) -> dict[str, Tensor]:
    return outcome(copy.deepcopy(model).double(), alone, lengths, prefix)


def joined(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, states and gradients as one vector each, every tensor in units of its norm.

    In the small tensors of a tiny model the error of rounding is a matter of luck; in all together it is not.
    """
    kinds: dict[str, list[Tensor]] = {"logits": [], "states": [], "gradients": []}
    for name, value in found.items():
        kind = "logits" if name == "logits" else "gradients" if name.startswith("d ") else "states"
        kinds[kind].append(value.double().flatten() / (truth[name].double().norm() or 1))
    return {kind: torch.cat(values) for kind, values in kinds.items()}


FORMS = [in_chunks([0, 5, 5, 6, 12]), in_chunks(list(range(13))), padded(True, 2), padded(False, 1, 3), packed]
NAMES = ["chunks", "tokens", "left", "right", "packed"]
