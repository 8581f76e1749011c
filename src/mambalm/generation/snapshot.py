"""What one reader of tokens is at one moment: its state, the logits there, and what it has read, in a fixed size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from mambalm.layers.state import State

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM

NOTHING_READ = hashlib.sha256(b"mambalm tokens").digest()


def chain(digest: bytes, tokens: Iterable[int]) -> Iterator[bytes]:
    """The digest after each of the tokens: SHA-256 of the one before it and the token as 8 bytes, little-endian.

    It does not depend on how the tokens are split, and going on from a digest needs none of the tokens before it.
    """
    return islice(accumulate(tokens, _link, initial=digest), 1, None)


def advance(digest: bytes, tokens: Iterable[int]) -> bytes:
    """The digest after all of the tokens."""
    return reduce(_link, tokens, digest)


def _link(digest: bytes, token: int) -> bytes:
    return hashlib.sha256(digest + int(token).to_bytes(8, "little")).digest()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A value: nothing changes it, so that keeping one costs nothing but its memory.

    Attributes:
        state: the model's state, of one row.
        logits: (1, v) after the last token, on the model's device; None before the first.
        counts: int32 (v) on the CPU, how often each token was read: what penalties ask for.
        digest: of all tokens read, in order; see `chain`.
    """

    state: State
    logits: Tensor | None
    counts: Tensor
    digest: bytes

    @classmethod
    def fresh(cls, model: MambalmForCausalLM) -> Self:
        """Before the first token."""
        return cls(model.init_state(1), None, torch.zeros(model.config.vocab_size, dtype=torch.int32), NOTHING_READ)

    @property
    def position(self) -> int:
        """The number of tokens read."""
        return int(self.state.position.item())

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return self.state.nbytes + self.counts.nbytes + (0 if self.logits is None else self.logits.nbytes)

    def after(self, tokens: Sequence[int], logits: Tensor | None, state: State) -> Snapshot:
        """The snapshot when `tokens` were read, which led to these logits (1, v) and this state."""
        read = torch.tensor(tokens, dtype=torch.int64).bincount(minlength=len(self.counts)).int()
        return Snapshot(state, logits, self.counts + read, advance(self.digest, tokens))
