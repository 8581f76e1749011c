"""Prompts in, tokens out: the prompt is read in chunks that hand the state on, then each token is a chunk of length 1.

The activation memory is that of one chunk, whatever the length of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambalm.generation.cpu_step import CPUStep, refusal
from mambalm.generation.sampling import Sampling, choose
from mambalm.layers.state import State

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to generate.

    Attributes:
        sampling: how each token is chosen.
        max_new_tokens: tokens per row at most.
        end_tokens: token ids that end a row.
        seed: row i draws from a generator seeded with `seed + i`; None takes a fresh seed.
        chunk_size: tokens of each prompt that are read at once.

    Raises:
        ValueError: a size below 1.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    end_tokens: frozenset[int] = frozenset()
    seed: int | None = None
    chunk_size: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def end_tokens(model: MambalmForCausalLM) -> frozenset[int]:
    """The token ids that end a text, by the checkpoint's generation configuration, else by its configuration."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, Sequence) else (ids,))
    return frozenset()


@torch.no_grad()
def read(
    model: MambalmForCausalLM, prompts: Sequence[Tensor], state: State | None = None, *, chunk_size: int = 2048
) -> tuple[Tensor, State]:
    """Read a batch of prompts.

    Args:
        model: a causal language model of mambalm.
        prompts: the token ids of each row, (l_i) with l_i at least 1, on any device.
        state: what each row has read before; None for nothing.
        chunk_size: tokens of each row that are read at once.

    Returns:
        The logits (b, v) after each row's last token, and the state there.

    Raises:
        ValueError: a prompt is empty, or a token id is outside of the model's vocabulary.
    """
    _check_prompts(model, prompts)
    state = model.init_state(len(prompts)) if state is None else state
    logits = None
    for start in range(0, max(map(len, prompts)), chunk_size):
        ids, mask = _pad_left([prompt[start : start + chunk_size] for prompt in prompts], model.device)
        output = model(
            ids,
            attention_mask=None if bool(mask.all()) else mask,
            cache_params=state,
            use_cache=True,
            logits_to_keep=1,
        )
        state = output.cache_params
        last = output.logits[:, -1]
        # Rows that ended in an earlier chunk keep the logits that they had there.
        logits = last if logits is None else torch.where(mask[:, -1:], last, logits)
    assert logits is not None, "every prompt has a token"
    return logits, state


@torch.no_grad()
def step(model: MambalmForCausalLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Read one more token (b) per row; return the logits (b, v) after it and the new state."""
    output = model(tokens[:, None], cache_params=state, use_cache=True)
    return output.logits[:, -1], output.cache_params


def decode(
    model: MambalmForCausalLM,
    prompts: Sequence[Tensor],
    settings: Settings,
    is_finished: Callable[[int], bool] = lambda row: False,
) -> Iterator[tuple[int, int]]:
    """Continue a batch of prompts; yield (row, token) as the tokens come, the ending token included.

    A row stops by itself: at an end token, at `max_new_tokens`, or when `is_finished(row)`, which is asked after the
    row's token was yielded. The other rows go on in a smaller batch.

    Raises:
        ValueError: see `read`.
    """
    logits, state = read(model, prompts, chunk_size=settings.chunk_size)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt.to(seen.device)] = True
    generators = _generators(len(prompts), settings.seed, logits.device)
    rows = list(range(len(prompts)))
    single: CPUStep | None = None
    for remaining in reversed(range(settings.max_new_tokens)):
        tokens = choose(logits, settings.sampling, seen, [generators[row] for row in rows])
        chosen = tokens.tolist()
        yield from zip(rows, chosen, strict=True)
        kept = [
            i
            for i, (row, token) in enumerate(zip(rows, chosen, strict=True))
            if token not in settings.end_tokens and not is_finished(row)
        ]
        if not kept or not remaining:
            return
        if len(kept) < len(rows):
            index = torch.tensor(kept, device=tokens.device)
            tokens, seen, state = tokens[index], seen[index], state.index(index)
            rows = [rows[i] for i in kept]
        seen.scatter_(1, tokens[:, None], True)
        if single is None and len(rows) == 1 and refusal(model) is None:
            single = CPUStep(model, state)
        if single is not None:
            logits = single(tokens)
        else:
            logits, state = step(model, tokens, state)


def _check_prompts(model: MambalmForCausalLM, prompts: Sequence[Tensor]) -> None:
    if not prompts:
        raise ValueError("there is no prompt")
    vocabulary = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row + 1} has no tokens; give it at least one, such as the start-of-text token")
        if int(prompt.max()) >= vocabulary or int(prompt.min()) < 0:
            raise ValueError(
                f"prompt {row + 1} has token ids from {int(prompt.min())} to {int(prompt.max())}, but the model's "
                f"vocabulary has {vocabulary}; use the tokenizer that the model was trained with"
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


def _generators(count: int, seed: int | None, device: torch.device) -> list[torch.Generator]:
    first = torch.seed() if seed is None else seed
    # torch.seed() may be the largest number that a generator takes.
    return [torch.Generator(device).manual_seed((first + row) % 2**63) for row in range(count)]
