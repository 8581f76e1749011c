"""Batches read by position: step i of a run is a function of i alone, so that a run resumes exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tokens to read and the tokens to predict, one position later; both int64 (b, l).

    ``starts`` is true where the rows do not continue those of the step before, so that no state may be handed on.
    """

    inputs: Tensor
    targets: Tensor
    starts: bool


class SegmentStreams:
    """One long token stream cut into segments, read ``batch_size`` side by side in random order, chunk after chunk.

    Within a segment row r of consecutive batches is consecutive text: the state can be handed on from each to the next
    (truncated backpropagation through time). Long segments teach long memories; short ones bring more variety into
    each stretch of steps, which learns faster. Every epoch has an order of its own.
    """

    def __init__(self, tokens: Tensor, *, batch_size: int, length: int, chunks: int = 1, seed: int = 0) -> None:
        """Cut ``tokens`` (int64, one axis) into segments of ``chunks`` times ``length`` tokens.

        Raises:
            ValueError: the stream is too short for one batch of segments.
        """
        self._tokens = tokens
        self._batch_size, self._length, self._chunks, self._seed = batch_size, length, chunks, seed
        self._segments = (tokens.numel() - 1) // (length * chunks)
        self.steps_per_epoch = self._segments // batch_size * chunks
        if not self.steps_per_epoch:
            raise ValueError(
                f"the corpus has {tokens.numel():,} tokens, and {batch_size} segments of {length * chunks} "
                f"need {batch_size * length * chunks + 1:,}: use more text or smaller batches"
            )

    def __getitem__(self, step: int) -> Batch:
        """The batch of optimisation step ``step``, counted from 0."""
        epoch, step = divmod(step, self.steps_per_epoch)
        group, chunk = divmod(step, self._chunks)
        order = torch.randperm(self._segments, generator=torch.Generator().manual_seed(self._seed + epoch))
        segments = order[group * self._batch_size : (group + 1) * self._batch_size]
        starts = (segments * self._chunks + chunk) * self._length
        window = self._tokens[starts[:, None] + torch.arange(self._length + 1)]
        return Batch(window[:, :-1], window[:, 1:], starts=chunk == 0)


def fingerprint(tokens: Tensor) -> str:
    """A hash of the tokens, to tell whether a run resumes on the data that it began with."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]
