"""What a model is trained on: samples, the streams that they are read from by position, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# A target of this value carries no loss, as in torch and transformers.
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        inputs: int64 (l).
        targets: int64 (l), the token after each input; -100 where none is learned.
        cu_seqlens: int32 (s+1), the offsets of the documents in it, first 0, last l; None where the model reads on from
            one document to the next.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Sequences for one step.

    Attributes:
        inputs, targets: int64, (b, l) without cu_seqlens and (1, b l) with.
        cu_seqlens: int32 (s+1), the offsets of the documents of all rows one after the other, or None.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    def pinned(self) -> Batch:
        """The same in memory that a GPU reads by itself: its copy is not waited for."""
        offsets = self.cu_seqlens
        return Batch(
            self.inputs.pin_memory(), self.targets.pin_memory(), None if offsets is None else offsets.pin_memory()
        )


class SampleStream(Protocol):
    """Samples by position: sample i is a function of i alone, whoever reads it, in whatever order."""

    @property
    def length(self) -> int:
        """Tokens of a sample."""

    @property
    def fingerprint(self) -> str:
        """A hash of all that determines the samples."""

    def __len__(self) -> int:
        """Samples of an epoch; those from there on are the next epoch's, in another order."""

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, from 0 and without an end."""


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples of one length: rows, or one packed row if any of them has documents.

    Raises:
        ValueError: there is no sample, or their lengths differ.
    """
    lengths = {sample.inputs.numel() for sample in samples}
    if len(lengths) != 1:
        raise ValueError(f"a batch needs samples of one length, got {sorted(lengths) or 'none'}")
    inputs = torch.stack([sample.inputs for sample in samples])
    targets = torch.stack([sample.targets for sample in samples])
    if all(sample.cu_seqlens is None for sample in samples):
        return Batch(inputs, targets)
    length = lengths.pop()
    whole = torch.tensor([0, length], dtype=torch.int32)
    ends = [(whole if s.cu_seqlens is None else s.cu_seqlens)[1:] + i * length for i, s in enumerate(samples)]
    return Batch(inputs.reshape(1, -1), targets.reshape(1, -1), torch.cat([whole[:1], *ends]).to(torch.int32))
