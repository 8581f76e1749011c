"""From logits to the next token: pure functions on logits (b, v), and `Chooser`, which keeps what they need per row.

A filter returns new logits with the tokens that it forbids at -inf, always leaves each row its likeliest token, and is
independent of the other filters; `Sampling` says in which order they act. Everything is a fixed sequence of tensor
operations without a look at their values, so that a GPU can do it within a captured graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

_MASK32 = 2**32 - 1
# Colder than the first, logits would overflow when divided, and nothing else would change; penalties beyond the second
# would leave float32.
_COLDEST, _LIMIT = 1e-30, 1e20
# More than any vocabulary has, and exact in float32.
_LARGEST_K = 2**24
# In place of a token where the logits allow none.
NO_TOKEN = -1
# Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators": SplitMix64 and its variant 13 finalizer.
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: penalties, temperature, top-k, top-p, min-p, in that order.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token and ignores the filters.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities sum to p; 1 keeps all.
        min_p: keep tokens at least p times as probable as the likeliest; 0 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the row has read
            or written; 1 leaves them.
        presence_penalty: subtracted from the logits of tokens that the row has written.
        frequency_penalty: subtracted from them once for each time.

    Raises:
        ValueError: a value outside of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 <= self.temperature <= _LIMIT, f"at least 0 and at most {_LIMIT:g}"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                1 / _LIMIT <= self.repetition_penalty <= _LIMIT,
                f"above 0, from {1 / _LIMIT:g} to {_LIMIT:g}",
            ),
            "presence_penalty": (abs(self.presence_penalty) <= _LIMIT, f"of at most {_LIMIT:g} either way"),
            "frequency_penalty": (abs(self.frequency_penalty) <= _LIMIT, f"of at most {_LIMIT:g} either way"),
        }
        for name, (valid, wanted) in ranges.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")

    @property
    def penalizes(self) -> bool:
        """Whether what was read or written counts."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Make the tokens of the mask `seen` (b, v) less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits: Tensor, written: Tensor, presence: float | Tensor, frequency: float | Tensor) -> Tensor:
    """Subtract `presence` for every token that was written, and `frequency` for each of the times (b, v)."""
    return logits - presence * (written > 0) - frequency * written


def keep_likeliest(logits: Tensor, k: int | Tensor = 0, p: float | Tensor = 1.0) -> Tensor:
    """Keep the k likeliest tokens and those that tie with the last of them (0: all), and of these the fewest likeliest
    whose probabilities sum to at least p (top-p: Holtzman et al. 2019, arXiv:1904.09751); both may be (b, 1)."""
    vocabulary = logits.shape[-1]
    ordered, order = logits.sort(descending=True, stable=True)
    k = torch.as_tensor(k, device=logits.device).expand(logits.shape[0], 1)
    last = torch.where(k > 0, k.clamp(max=vocabulary), vocabulary) - 1
    forbidden = ordered < ordered.gather(-1, last)
    probabilities = ordered.masked_fill(forbidden, -torch.inf).softmax(-1)
    # The sum before each token: the first is 0, so that the likeliest always stays. Rounding is nothing to p = 1.
    p = torch.as_tensor(p, device=logits.device)
    forbidden |= (probabilities.cumsum(-1) - probabilities >= p) & (p < 1)
    forbidden[..., 0] = False
    return logits.masked_fill(forbidden.scatter(-1, order, forbidden), -torch.inf)


def keep_min_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the tokens at least p times as probable as the likeliest one (Nguyen et al. 2024, arXiv:2407.01082).

    Logits are (b, v); p is a number for all rows, or (b, 1).
    """
    below = torch.as_tensor(p, device=logits.device, dtype=logits.dtype).log()
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + below, -torch.inf)


def race_times(keys: Tensor, steps: Tensor, vocabulary: int) -> Tensor:
    """Exponentially distributed numbers (b, v), a pure function of the row's key (b), its step (b) and the token.

    So a row draws the same on every device and whoever is beside it.
    """
    index = (steps[:, None] << 32) + torch.arange(vocabulary, device=keys.device)
    bits = _mixed(keys[:, None] + index * _signed(_GAMMA))
    # Below 1: the largest of the numbers are rounded up to 2^32, and an infinite time would lose a token that is alone.
    uniform = ((bits >> 32) & _MASK32).float().add(0.5) * (2.0**-32 * (1 - 2.0**-24))
    return -torch.log1p(-uniform)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, whose shift keeps the sign where that of the original brings in zeros."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_FIRST)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_SECOND)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def keys(seeds: Sequence[int]) -> Tensor:
    """The keys (b) of seeds: neighbours among these lead to streams that have nothing in common."""
    return _mixed(torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64) + _signed(_GAMMA))


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        tokens: int64 (b); `NO_TOKEN` where a row's logits are NaN or infinite, or all -inf.
        logprobs: float32 (b, 1 + n), of the token and of the n likeliest, by the model's own logits; None unless asked.
        likeliest: int64 (b, n).
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    likeliest: Tensor | None = None


@dataclass(eq=False)
class Chooser:
    """Chooses a token for every row of a batch, and keeps the score.

    Attributes:
        plan: which operations there are; two choosers with the same plan differ in tensors only.
        parameters: float32 (b, 7), the fields of `Sampling` in their order.
        keys, steps: int64 (b), of the random draws; `steps` goes up by one with each.
        seen, written: bool and int32 (b, v), tokens read or written and how often they were written; None without
            penalties.
    """

    plan: Plan
    parameters: Tensor
    keys: Tensor
    steps: Tensor
    seen: Tensor | None
    written: Tensor | None

    @classmethod
    def of(
        cls,
        rows: Sequence[Sampling],
        seeds: Sequence[int],
        seen: Tensor | None,
        *,
        device: torch.device,
        logprobs: int | None = None,
    ) -> Self:
        """A chooser for rows that sample like this.

        Args:
            rows: how each row samples.
            seeds: one per row.
            seen: (b, v) bool, the tokens that each row has read; needed where a row penalises.
            device: that of the logits.
            logprobs: how many of the likeliest tokens to report; None reports no log-probabilities.

        Raises:
            ValueError: a row penalises and `seen` is missing.
        """
        plan = Plan.of(rows, logprobs)
        if plan.penalizes and seen is None:
            raise ValueError("penalties need what each row has read: give `seen`")
        parameters = torch.tensor([_parameters(row) for row in rows], device=device)
        steps = torch.zeros(len(rows), dtype=torch.int64, device=device)
        seen = seen.to(device, copy=True) if plan.penalizes and seen is not None else None
        written = None if seen is None else torch.zeros(seen.shape, dtype=torch.int32, device=device)
        return cls(plan, parameters, keys(seeds).to(device), steps, seen, written)

    def __call__(self, logits: Tensor) -> Choice:
        """Choose by logits (b, v) of any floating dtype, and count what was chosen."""
        raw, plan = logits.float(), self.plan
        tokens = self._choose(raw)
        # NaN and infinity are the largest to argmax, so that the chosen one tells of the whole row.
        told = torch.where(raw.gather(1, tokens[:, None])[:, 0].abs() < torch.inf, tokens, NO_TOKEN)
        if self.seen is not None and self.written is not None:
            self.seen.scatter_(1, tokens[:, None], True)
            self.written.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
        self.steps += 1
        if plan.logprobs is None:
            return Choice(told)
        logprobs = raw.log_softmax(-1)
        best = logprobs.topk(plan.logprobs)
        return Choice(told, torch.cat([logprobs.gather(1, tokens[:, None]), best.values], 1), best.indices)

    def _choose(self, logits: Tensor) -> Tensor:
        temperature, top_k, top_p, min_p, repetition, presence, frequency = self.parameters[:, :, None].unbind(1)
        if self.seen is not None and self.written is not None:
            logits = penalize_repetition(logits, self.seen, repetition)
            logits = penalize_counts(logits, self.written, presence, frequency)
        if not self.plan.draws:
            return logits.argmax(-1)
        warm = logits / torch.where(temperature > 0, temperature, 1)
        if self.plan.orders:
            warm = keep_likeliest(warm, top_k.long(), top_p)
        warm = keep_min_p(warm, min_p)
        # The exponential race: the first to arrive, at rate p, is a draw from p, without a sum over the vocabulary.
        drawn = warm - race_times(self.keys, self.steps, logits.shape[-1]).log()
        return torch.where(temperature > 0, drawn, logits).argmax(-1)

    def index(self, rows: Tensor) -> Chooser:
        """The chooser of these rows."""
        seen = None if self.seen is None else self.seen[rows]
        written = None if self.written is None else self.written[rows]
        return Chooser(self.plan, self.parameters[rows], self.keys[rows], self.steps[rows], seen, written)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All that differs between choosers of one plan; the batch is the first axis."""
        return self.parameters, self.keys, self.steps, self.seen, self.written


def _parameters(row: Sampling) -> tuple[float, ...]:
    """The fields as float32 can hold them, for the same choices."""
    temperature = max(row.temperature, _COLDEST) if row.temperature else 0.0
    return dataclasses.astuple(dataclasses.replace(row, temperature=temperature, top_k=min(row.top_k, _LARGEST_K)))


@dataclass(frozen=True)
class Plan:
    """Which operations choosing takes.

    Attributes:
        penalizes: some row counts what was read and written.
        draws: some row draws.
        orders: some row keeps the likeliest tokens only.
        logprobs: how many of the likeliest tokens are reported with their log-probabilities; None: no reports.
    """

    penalizes: bool
    draws: bool
    orders: bool
    logprobs: int | None

    @classmethod
    def of(cls, rows: Sequence[Sampling], logprobs: int | None) -> Self:
        """What these rows need."""
        drawing = [row for row in rows if row.temperature > 0]
        orders = any(row.top_k > 0 or row.top_p < 1 for row in drawing)
        return cls(any(row.penalizes for row in rows), bool(drawing), orders, logprobs)
