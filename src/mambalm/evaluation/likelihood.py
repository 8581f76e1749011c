"""How likely a model finds texts behind others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mambalm.evaluation.shared_prefixes import Tokens, batches, shared_batches
from mambalm.generation.reading import read
from mambalm.layers.state import State

if TYPE_CHECKING:
    from mambalm.generation.engine import Engine

# Logits that are held at once, float32: 256 MiB.
_LOGITS = 2**26


class Likelihood(NamedTuple):
    """Of a continuation.

    Attributes:
        logprob: the sum of its tokens' log-probabilities, in nats.
        is_greedy: whether every token is the likeliest at its place.
    """

    logprob: float
    is_greedy: bool


def likelihoods(
    engine: Engine, pairs: Sequence[tuple[Tokens, Tokens]], batch_size: int = 32
) -> Iterator[tuple[int, Likelihood]]:
    """How likely continuations are behind contexts; (index of the pair, likelihood) as they come, in no order.

    Each context, and each beginning that several contexts share, is read once, of any length, and the state handed on.

    Args:
        engine: with the model.
        pairs: token ids of contexts and continuations, at least one each.
        batch_size: rows that are read at once at most.

    Raises:
        ValueError: a context or a continuation is empty, or the vocabulary lacks a token of it.
    """
    of_context: dict[Tokens, list[int]] = {}
    vocabulary = engine.model.config.vocab_size
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {index + 1} has no tokens in its {'continuation' if context else 'context'}")
        if max(continuation) >= vocabulary:
            raise ValueError(
                f"pair {index + 1} has token {max(continuation)}, but the model's vocabulary has {vocabulary}; use the "
                "tokenizer that the model was trained with"
            )
        of_context.setdefault(context, []).append(index)
    contexts = list(of_context)
    for rows in shared_batches(engine, contexts, batch_size):
        logits, state = read(engine.model, rows.rests, rows.state, graphs=engine.chunks)
        todo = [(row, index) for row, number in enumerate(rows.numbers) for index in of_context[contexts[number]]]
        for part in batches(todo, batch_size):
            parents = [row for row, _ in part]
            found = _behind(engine, [pairs[index][1] for _, index in part], logits[parents], state.index(parents))
            yield from zip([index for _, index in part], found, strict=True)


@torch.no_grad()
def _behind(engine: Engine, continuations: Sequence[Tokens], logits: Tensor, state: State) -> list[Likelihood]:
    """The continuations' likelihoods, given the logits (b, v) before their first tokens and the state there."""
    device, count = logits.device, len(continuations)
    first = torch.tensor([tokens[0] for tokens in continuations], device=device)
    logprob, is_greedy = _of_targets(logits, first)
    step = max(1, _LOGITS // (engine.model.config.vocab_size * count))
    for at in range(0, max(map(len, continuations)) - 1, step):
        # Packed: what is shorter than others costs nothing.
        inputs = [tokens[at : min(at + step, len(tokens) - 1)] for tokens in continuations]
        targets = [tokens[at + 1 : at + 1 + step] for tokens in continuations]
        lengths = torch.tensor([len(tokens) for tokens in inputs])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
        ids = torch.tensor([token for tokens in inputs for token in tokens], device=device)
        output = engine.model(ids[None], cu_seqlens=offsets, cache_params=state, use_cache=True)
        state = output.cache_params
        wanted = torch.tensor([token for tokens in targets for token in tokens], device=device)
        found, greedy = _of_targets(output.logits[0], wanted)
        row = torch.arange(count).repeat_interleave(lengths).to(device)
        logprob = logprob.index_add(0, row, found)
        is_greedy = is_greedy.index_put((row[~greedy],), torch.zeros((), dtype=torch.bool, device=device))
    return [Likelihood(*found) for found in zip(logprob.tolist(), is_greedy.tolist(), strict=True)]


def _of_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n), float64, of targets (n) by logits (n, v); and which are the likeliest."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return (chosen - logits.logsumexp(-1)).double(), logits.argmax(-1) == targets
