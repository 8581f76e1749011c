"""From logits to the next token: pure functions on logits (b, v), a token per row out.

A filter returns new logits with the tokens that it forbids at -inf, always leaves each row its likeliest token, and is
independent of the other filters; `Sampling` says in which order they act.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: repetition penalty, temperature, top-k, top-p, min-p, in that order.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token and ignores the filters.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities sum to p; 1 keeps all.
        min_p: keep tokens at least p times as probable as the likeliest; 0 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the row has read
            or written; 1 leaves them.

    Raises:
        ValueError: a value outside of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (valid, wanted) in ranges.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of the mask `seen` (b, v) less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens, and those that tie with the last of them."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p (Holtzman et al., arXiv:1904.09751)."""
    if p == 1:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    # The sum before each token: the first is 0, so that the likeliest always stays.
    forbidden = probabilities.cumsum(-1) - probabilities >= p
    forbidden[..., 0] = False
    return logits.masked_fill(forbidden.scatter(-1, order, forbidden), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as probable as the likeliest one (Nguyen et al., arXiv:2407.01082)."""
    if p == 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def choose(logits: Tensor, sampling: Sampling, seen: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token (b,) of each row.

    Args:
        logits: (b, v), of any floating dtype.
        sampling: how to choose.
        seen: (b, v) bool, the tokens that the row has read or written.
        generators: one per row, on the logits' device, so that a row's draws do not depend on its neighbours.
    """
    logits = penalize_repetition(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = keep_top_k(logits / sampling.temperature, sampling.top_k)
    logits = keep_min_p(keep_top_p(logits, sampling.top_p), sampling.min_p)
    # argmax of p / q with q exponential is a draw from p (the exponential race), without a sum over the vocabulary.
    races = torch.empty_like(logits)
    for race, generator in zip(races, generators, strict=True):
        race.exponential_(generator=generator)
    return (logits.softmax(-1) / races).argmax(-1)
