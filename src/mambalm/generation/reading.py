"""Reading prompts of any length in constant memory: chunks, the state handed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambalm.layers.state import State

if TYPE_CHECKING:
    from mambalm.generation.chunk_graphs import ChunkGraphs
    from mambalm.models.common import MambalmForCausalLM

# What the activations of a chunk may take on a GPU, and the most tokens that gain speed when read at once.
_BUDGET, _LONGEST = 2**30, 8192
_CPU_CHUNK = 2048
# Activations of a token that live at once within a block: floats per hidden and per inner channel, by what was measured
# on an H200 (docs/decisions/2026-11-27-generation-engine.md).
_PER_HIDDEN, _PER_INNER = 8, 8


def chosen_chunk_size(model: MambalmForCausalLM) -> int:
    """Tokens of a prompt to read at once: a power of two that keeps a GPU busy in about a GiB of activations.

    It depends on nothing but the model and the kind of device, so that a text is always cut in the same places.
    """
    if model.device.type == "cpu":
        return _CPU_CHUNK
    hidden = model.config.hidden_size
    inner = getattr(model.config, "intermediate_size", None) or 2 * hidden
    per_token = (_PER_HIDDEN * hidden + _PER_INNER * inner) * model.dtype.itemsize
    return int(min(_LONGEST, max(256, 2 ** (_BUDGET // per_token).bit_length() // 2)))


@torch.no_grad()
def read(
    model: MambalmForCausalLM,
    prompts: Sequence[Tensor],
    state: State | None = None,
    *,
    chunk_size: int | None = None,
    graphs: ChunkGraphs | None = None,
) -> tuple[Tensor, State]:
    """Read a batch of prompts.

    Chunks end at multiples of the chunk size counted from each text's first token, so that the rounding of a text does
    not depend on where it was interrupted. Rows that do not fit a chunk's memory together are read one after the other.

    Args:
        model: a causal language model of mambalm.
        prompts: the token ids of each row, (l_i) with l_i at least 1, on any device.
        state: what each row has read before; None for nothing.
        chunk_size: tokens of each row that are read at once; None: `chosen_chunk_size`.
        graphs: the model's, for what is too short to keep the device busy; None: none.

    Returns:
        The logits (b, v) after each row's last token, and the state there.

    Raises:
        ValueError, TypeError: a prompt is empty or no tensor of integers (l), or a token id is outside of the model's
            vocabulary.
        ValueError: logits are NaN or infinite.
    """
    check_prompts(model, prompts)
    chunk_size = chosen_chunk_size(model) if chunk_size is None else chunk_size
    state = model.init_state(len(prompts)) if state is None else state
    groups = list(_groups(prompts, chunk_size))
    if len(groups) == 1:
        logits, after = _read_group(model, prompts, state, chunk_size, graphs)
    else:
        parts = [_read_group(model, prompts[rows], state.index(rows), chunk_size, graphs) for rows in groups]
        logits, after = torch.cat([found for found, _ in parts]), State.cat([reached for _, reached in parts])
    _check_logits(logits)
    return logits, after


def _groups(prompts: Sequence[Tensor], chunk_size: int) -> Iterator[slice]:
    """Neighbouring rows whose chunks have at most `_LONGEST` tokens together, or a row by itself."""
    start, tokens = 0, 0
    for row, prompt in enumerate(prompts):
        length = min(len(prompt), chunk_size)
        if tokens and tokens + length > max(_LONGEST, chunk_size):
            yield slice(start, row)
            start, tokens = row, 0
        tokens += length
    yield slice(start, len(prompts))


def _read_group(
    model: MambalmForCausalLM, prompts: Sequence[Tensor], state: State, chunk_size: int, graphs: ChunkGraphs | None
) -> tuple[Tensor, State]:
    # Whole chunks keep the device busy by themselves, and their memory is not to be held twice.
    short = 0 if graphs is None else chosen_chunk_size(model)
    at = [0] * len(prompts)
    first = [chunk_size - position % chunk_size for position in state.position.tolist()]
    logits: Tensor | None = None
    while any(start < len(prompt) for start, prompt in zip(at, prompts, strict=True)):
        stop = [start + (chunk_size if start else size) for start, size in zip(at, first, strict=True)]
        pieces = [prompt[i:j] for prompt, i, j in zip(prompts, at, stop, strict=True)]
        at = stop
        ids, mask = _pad_left(pieces, model.device)
        whole = all(len(piece) == ids.shape[1] for piece in pieces)
        found = graphs.read(ids, state) if graphs is not None and whole and ids.numel() < short else None
        if found is None:
            output = model(
                ids, attention_mask=None if whole else mask, cache_params=state, use_cache=True, logits_to_keep=1
            )
            found = output.logits[:, -1], output.cache_params
        last, state = found
        # Rows that ended in an earlier chunk keep the logits that they had there.
        logits = last if logits is None else torch.where(mask[:, -1:], last, logits)
    assert logits is not None, "every prompt has a token"
    return logits, state


@torch.no_grad()
def step(model: MambalmForCausalLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Read one more token (b) per row; return the logits (b, v) after it and the new state."""
    output = model(tokens[:, None], cache_params=state, use_cache=True)
    return output.logits[:, -1], output.cache_params


def require_ours(model: object) -> None:
    """Refuse a model that hands no state on.

    Raises:
        TypeError: it is none of mambalm's.
    """
    if not hasattr(model, "init_state"):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise TypeError(
            f"{kind} hands no state on: load the checkpoint with mambalm.load, or call mambalm.register() before "
            "AutoModelForCausalLM.from_pretrained"
        )


def check_prompts(model: MambalmForCausalLM, prompts: Sequence[Tensor] | Tensor) -> None:
    """Refuse what `read` cannot read; see there."""
    if isinstance(prompts, Tensor):
        shape = tuple(prompts.shape)
        raise TypeError(f"prompts is a tensor {shape}: give a list of tensors (l), as list(batch) is")
    if not prompts:
        raise ValueError("there is no prompt")
    vocabulary = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor) or prompt.ndim != 1:
            given = f"shape {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
            raise TypeError(f"prompt {row + 1} must be a tensor of token ids (l), got {given}")
        if prompt.is_floating_point() or prompt.dtype == torch.bool:
            raise TypeError(f"prompt {row + 1} is {prompt.dtype}; token ids are integers, as torch.long")
        if not len(prompt):
            raise ValueError(f"prompt {row + 1} has no tokens; give it at least one, such as the start-of-text token")
        if int(prompt.max()) >= vocabulary or int(prompt.min()) < 0:
            raise ValueError(
                f"prompt {row + 1} has token ids from {int(prompt.min())} to {int(prompt.max())}, but the model's "
                f"vocabulary has {vocabulary}; use the tokenizer that the model was trained with"
            )


def _check_logits(logits: Tensor) -> None:
    """Refuse what no token can be chosen from, and no state be kept of; single tokens may be forbidden (-inf)."""
    rows = (~(logits < torch.inf).all(1)).nonzero()[:, 0].tolist()
    if rows:
        raise no_numbers(f"after prompt {rows[0] + 1}", logits.dtype)


def no_numbers(where: str, dtype: torch.dtype) -> ValueError:
    """What to say of logits that are NaN or infinite."""
    return ValueError(
        f"the logits {where} are NaN or infinite: the weights or the state hold NaN, or a number was too large for "
        f"{str(dtype).removeprefix('torch.')}; load the model in float32, or for float16 in bfloat16"
    )


def _pad_left(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (b, l) with the rows' ends aligned, and the mask (b, l) of those that count."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return ids.to(device), mask.to(device)
