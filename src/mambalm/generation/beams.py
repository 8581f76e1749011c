"""Beam search: the continuations that are likely as a whole, by forking the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambalm.generation.reading import no_numbers, read

if TYPE_CHECKING:
    from mambalm.generation.engine import Engine
    from mambalm.layers.state import State


@dataclass(frozen=True)
class Beam:
    """A continuation.

    Attributes:
        tokens: its token ids, the ending one included.
        score: the sum of its tokens' log-probabilities, divided by their number to the power of the length penalty.
        is_finished: whether it ended by itself.
    """

    tokens: tuple[int, ...]
    score: float
    is_finished: bool


@torch.no_grad()
def beam_search(
    engine: Engine,
    prompt: Tensor,
    beams: int,
    *,
    max_new_tokens: int = 256,
    end_tokens: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
    state: State | None = None,
    chunk_size: int | None = None,
) -> list[Beam]:
    """The best continuations of a prompt, the best first; at most `beams`, as transformers' `generate` finds them.

    Args:
        engine: with the model.
        prompt: token ids (l).
        beams: how many continuations are followed, at least 2 and at most the vocabulary's size.
        max_new_tokens: tokens of a continuation at most.
        end_tokens: token ids that end one.
        length_penalty: above 0 favours long continuations, see `Beam.score`.
        state: what was read before the prompt; None: nothing.
        chunk_size: see `read`.

    Raises:
        ValueError: fewer than 2 beams or 1 token, more beams than the vocabulary has tokens, logits that become NaN or
            infinite, or see `read`.
    """
    if beams < 2 or max_new_tokens < 1:
        raise ValueError(f"{beams} beams of {max_new_tokens} tokens: give at least 2 beams and 1 token")
    vocabulary = engine.model.config.vocab_size
    if beams > vocabulary:
        raise ValueError(f"{beams} beams begin with as many tokens, of a vocabulary of {vocabulary}: give fewer")
    logits, state = read(engine.model, [prompt], state, chunk_size=chunk_size, graphs=engine.chunks)
    reader = engine.reader(state.index([0] * beams))
    # All beams are the same at first: only the first one's continuations count.
    scores = torch.full((beams,), -torch.inf, device=logits.device)
    scores[0] = 0
    logits = logits.expand(beams, -1)
    running: list[tuple[int, ...]] = [()] * beams
    finished: list[Beam] = []
    candidates = beams * (1 + max(1, len(end_tokens)))
    for length in range(1, max_new_tokens + 1):
        total = scores[:, None] + logits.float().log_softmax(-1)
        best = total.flatten().topk(min(candidates, total.numel()))
        if not bool(best.values[0].isfinite()):
            raise no_numbers(f"after {length - 1} tokens", logits.dtype)
        parents, tokens = best.indices // total.shape[1], best.indices % total.shape[1]
        found = [
            (score, parent, (*running[parent], token))
            for score, parent, token in zip(best.values.tolist(), parents.tolist(), tokens.tolist(), strict=True)
        ]
        # Only what is among the best of all may end; the rest is there so that enough goes on.
        ended = [ids[-1] in end_tokens for _, _, ids in found]
        finished += [
            Beam(ids, score / length**length_penalty, ends)
            for (score, _, ids), ends in zip(found[:beams], ended, strict=False)
            if ends or length == max_new_tokens
        ]
        finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
        going = [candidate for candidate, ends in zip(found, ended, strict=True) if not ends][:beams]
        is_decided = len(finished) == beams and going[0][0] / length**length_penalty <= finished[-1].score
        if length == max_new_tokens or is_decided:
            break
        index = torch.tensor([parent for _, parent, _ in going], device=logits.device)
        reader.reorder(index)
        running = [ids for _, _, ids in going]
        scores = torch.tensor([score for score, _, _ in going], device=logits.device)
        logits = reader(torch.tensor([ids[-1] for ids in running], device=logits.device))
    return finished
