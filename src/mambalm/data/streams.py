"""Batches read by position: step i of a run is a function of i alone, so that a run resumes exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tokens to read and the tokens to predict, one position later; both int64 (b, l).

    Attributes:
        group: which rows these are: they continue those of the latest batch of the same group.
        starts: the rows begin anew, so that no state may be handed on.
    """

    inputs: Tensor
    targets: Tensor
    group: int
    starts: bool


class SegmentStreams:
    """One long token stream cut into segments, which are read in random order, chunk after chunk.

    A batch is one chunk of each of ``batch_size`` segments, a group. From one chunk of a segment to the next the state
    can be handed on (truncated backpropagation through time). Neighbouring chunks are alike, and steps in a row on what
    is alike teach little: therefore ``groups`` groups take turns. Every epoch has an order of its own.
    """

    def __init__(
        self, tokens: Tensor, *, batch_size: int, length: int, chunks: int = 1, groups: int = 1, seed: int = 0
    ) -> None:
        """Cut ``tokens`` (int64, one axis) into segments of ``chunks`` times ``length`` tokens.

        Where they do not suffice for ``groups`` groups there are fewer.

        Raises:
            ValueError: the stream is too short for one group.
        """
        self.tokens = tokens
        self._segments = (tokens.numel() - 1) // (length * chunks)
        self._groups = min(groups, self._segments // batch_size)
        if not self._groups:
            raise ValueError(
                f"the corpus has {tokens.numel():,} tokens, and {batch_size} segments of {length * chunks} "
                f"need {batch_size * length * chunks + 1:,}: use more text or smaller batches"
            )
        self._batch_size, self._length, self._chunks, self._seed = batch_size, length, chunks, seed
        self.steps_per_epoch = self._segments // (batch_size * self._groups) * self._groups * chunks

    def __getitem__(self, step: int) -> Batch:
        """The batch of optimisation step ``step``, counted from 0."""
        epoch, step = divmod(step, self.steps_per_epoch)
        turn, group = divmod(step, self._groups)
        block, chunk = divmod(turn, self._chunks)
        first = (block * self._groups + group) * self._batch_size
        order = torch.randperm(self._segments, generator=torch.Generator().manual_seed(self._seed + epoch))
        starts = (order[first : first + self._batch_size] * self._chunks + chunk) * self._length
        window = self.tokens[starts[:, None] + torch.arange(self._length + 1)]
        return Batch(window[:, :-1], window[:, 1:], group, starts=chunk == 0)


def fingerprint(tokens: Tensor) -> str:
    """A hash of the tokens (n), to tell whether a run resumes on the data that it began with."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]
