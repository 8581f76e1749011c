"""Prompts in, tokens out: the prompt is read in chunks that hand the state on, then each token is a chunk of length 1.

On a GPU a step and the choice of its token are one captured graph per size of batch; the host reads a token while the
device is at the next. Rows leave where they stop, and the rest moves to a smaller graph.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mambalm.generation import cpu_step, gpu_step
from mambalm.generation.chunk_graphs import ChunkGraphs
from mambalm.generation.reading import no_numbers, read, require_ours, step
from mambalm.generation.runs import CapturedReader, CapturedRun, EagerRun
from mambalm.generation.sampling import NO_TOKEN, Choice, Chooser, Sampling
from mambalm.generation.steps import EagerReader, Graphs, Reader, not_captured
from mambalm.layers.state import State

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

__all__ = ["Engine", "Settings", "Token", "decode", "end_tokens", "read", "step"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to generate.

    Attributes:
        sampling: how each token is chosen.
        max_new_tokens: tokens per row at most.
        end_tokens: token ids that end a row; kept as a frozenset.
        seed: row i draws by `seed + i`, or by `seed[i]`; None takes a fresh seed.
        chunk_size: tokens of each prompt that are read at once; None: `reading.chosen_chunk_size`.
        copies: continuations per prompt, which is read once: row i continues prompt i // copies.
        logprobs: report each token's log-probability and those of so many likeliest tokens; None: neither.

    Raises:
        ValueError: a size below 1, or a negative number of log-probabilities.
        TypeError: end_tokens is one token.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    end_tokens: frozenset[int] = frozenset()
    seed: int | Sequence[int] | None = None
    chunk_size: int | None = None
    copies: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.end_tokens, int | str):  # type: ignore[unreachable]
            raise TypeError(f"end_tokens is {self.end_tokens!r}: give a set of token ids, such as end_tokens(model)")
        object.__setattr__(self, "end_tokens", frozenset(self.end_tokens))
        for name in ("max_new_tokens", "chunk_size", "copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}; it must be at least 0, or None for no report")

    def seeds(self, rows: int) -> list[int]:
        """A seed per row.

        Raises:
            ValueError: there are seeds for another number of rows.
        """
        if isinstance(self.seed, Sequence):
            if len(self.seed) != rows:
                raise ValueError(f"there are {len(self.seed)} seeds for {rows} rows: give one each, or one number")
            return list(self.seed)
        # torch.seed() would begin the caller's own random numbers anew.
        first = secrets.randbits(62) if self.seed is None else self.seed
        return [first + row for row in range(rows)]


class Token(NamedTuple):
    """A new token of a row.

    Attributes:
        row: of the batch.
        id: the token.
        logprob: by the model's own logits; None unless asked for.
        likeliest: (id, log-probability) of the likeliest tokens, the first first.
    """

    row: int
    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def end_tokens(model: MambalmForCausalLM) -> frozenset[int]:
    """The token ids that end a text, by the checkpoint's generation configuration, else by its configuration."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, Sequence) else (ids,))
    return frozenset()


class Engine:
    """Generates with one model, and keeps the graphs that it captured for it.

    The weights are read where they are: they may be changed in place but not replaced, and adapters not be exchanged,
    while the engine is in use.

    Attributes:
        model: the model.
        graphs: those of the steps; None where nothing is captured.
        chunks: the graphs that read short prompts; None where nothing is captured.
    """

    def __init__(self, model: MambalmForCausalLM) -> None:
        require_ours(model)
        self.model = model
        self._eager_because = not_captured(model)
        self._generic_because = self._eager_because or gpu_step.refusal(model)
        captures = self._eager_because is None
        self.graphs = Graphs(model, fused=self._generic_because is None) if captures else None
        self.chunks = None if self.graphs is None else ChunkGraphs(model, self.graphs.pool)

    def explain(self) -> str:
        """How the steps run, and why not faster."""
        if self._eager_because is None:
            if self._generic_because is None:
                return "captured, fused"
            return f"captured, the model's own forward ({self._generic_because})"
        if self.model.device.type == "cpu" and (reason := cpu_step.refusal(self.model)) is None:
            return f"the CPU step, batches of more than {cpu_step.MOST_ROWS} rows eagerly"
        return f"eager ({self._eager_because if self.model.device.type != 'cpu' else reason})"

    def generate(
        self,
        prompts: Sequence[Tensor],
        settings: Settings,
        is_finished: Callable[[int], bool] = lambda row: False,
        state: State | None = None,
    ) -> Iterator[Token]:
        """Continue a batch of prompts; yield the tokens as they come, the ending ones included.

        A row stops by itself: at an end token, at `max_new_tokens`, or when `is_finished(row)`, which is asked after
        the row's token was yielded. The other rows go on in a smaller batch.

        Args:
            prompts: token ids (l_i) of each.
            settings: how.
            is_finished: whether a row is to go on.
            state: what each prompt's row has read before; None: nothing.

        Raises:
            ValueError: see `read`; logits become NaN or infinite; a repetition penalty behind a state, which does not
                tell what it has read.
        """
        if state is not None and settings.sampling.repetition_penalty != 1 and bool(state.position.any()):
            raise ValueError(
                "repetition_penalty asks for all that was read, which a State does not tell: use a Session, which "
                "counts, or give `chooser` what was seen, and go_on"
            )
        logits, state = read(self.model, prompts, state, chunk_size=settings.chunk_size, graphs=self.chunks)
        copied = torch.arange(len(prompts), device=logits.device).repeat_interleave(settings.copies)
        if settings.copies > 1:
            logits, state = logits[copied], state.index(copied)
        seen = None
        if settings.sampling.penalizes:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, prompt in zip(seen, (prompts[i] for i in copied.tolist()), strict=True):
                row[prompt.to(seen.device, torch.long)] = True
        chooser = self.chooser(len(logits), settings, seen)
        yield from self.go_on(logits, state, chooser, settings, is_finished)

    def chooser(self, rows: int, settings: Settings, seen: Tensor | None = None) -> Chooser:
        """What chooses the tokens of so many rows, of which each has `seen` some, bool (b, v); see `Chooser.of`."""
        vocabulary = self.model.config.vocab_size
        if settings.logprobs is not None and settings.logprobs > vocabulary:
            raise ValueError(f"logprobs is {settings.logprobs}, of a vocabulary of {vocabulary} tokens: ask for fewer")
        sampling, seeds = [settings.sampling] * rows, settings.seeds(rows)
        return Chooser.of(sampling, seeds, seen, device=self.model.device, logprobs=settings.logprobs)

    def go_on(
        self,
        logits: Tensor,
        state: State,
        chooser: Chooser,
        settings: Settings,
        is_finished: Callable[[int], bool] = lambda row: False,
    ) -> Iterator[Token]:
        """Yield tokens from the logits (b, v) and the state on; see `generate`."""
        run: EagerRun | CapturedRun
        if self.graphs is None:
            run = EagerRun(self.model, logits, state, chooser)
        else:
            run = CapturedRun(self.graphs, logits, state, chooser)
        try:
            for remaining in reversed(range(settings.max_new_tokens)):
                rows, choice = run.next(is_last=not remaining)
                alive = []
                for token in _tokens(rows, choice):
                    if token.id == NO_TOKEN:
                        raise no_numbers(f"of row {token.row + 1}", self.model.dtype)
                    yield token
                    if token.id not in settings.end_tokens and not is_finished(token.row):
                        alive.append(token.row)
                if not alive:
                    return
                run.keep(alive)
        finally:
            run.close()

    def reader(self, state: State) -> Reader:
        """What reads one token per row on from a state, which stays as it is."""
        if state.batch_size <= cpu_step.MOST_ROWS and cpu_step.refusal(self.model) is None:
            return cpu_step.CPUStep(self.model, state)
        return EagerReader(self.model, state) if self.graphs is None else CapturedReader(self.graphs, state)


def decode(
    model: MambalmForCausalLM,
    prompts: Sequence[Tensor],
    settings: Settings,
    is_finished: Callable[[int], bool] = lambda row: False,
) -> Iterator[tuple[int, int]]:
    """`Engine.generate` with an engine of its own; yield (row, token)."""
    for token in Engine(model).generate(prompts, settings, is_finished):
        yield token.row, token.id


def _tokens(rows: Sequence[int], choice: Choice) -> Iterator[Token]:
    ids = choice.tokens.tolist()
    if choice.logprobs is None or choice.likeliest is None:
        yield from map(Token, rows, ids)
        return
    reports = zip(choice.logprobs.tolist(), choice.likeliest.tolist(), strict=True)
    for row, token, ((own, *others), likeliest) in zip(rows, ids, reports, strict=True):
        yield Token(row, token, own, tuple(zip(likeliest, others, strict=True)))
