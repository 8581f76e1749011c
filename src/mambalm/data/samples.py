"""What a model is trained on: samples, the streams that they are read from by position, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
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

    @property
    def learned(self) -> int:
        """How many targets carry a loss."""
        return int(np.count_nonzero(self.targets.numpy() != IGNORED))


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


def collate(samples: Sequence[Sample], *, pinned: bool = False) -> Batch:
    """A batch of samples of one length: rows, or one packed row if any of them has documents.

    ``pinned`` puts it into memory that a GPU reads by itself, so that its copy is not waited for. NumPy copies, since
    torch would wake a team of threads, which beside one that launches kernels costs more than the copy.

    Raises:
        ValueError: there is no sample, or their lengths differ.
    """
    lengths = {sample.inputs.numel() for sample in samples}
    if len(lengths) != 1:
        raise ValueError(f"a batch needs samples of one length, got {sorted(lengths) or 'none'}")
    length = lengths.pop()
    inputs, targets = (torch.empty(len(samples), length, dtype=torch.int64, pin_memory=pinned) for _ in range(2))
    np.stack([sample.inputs.numpy() for sample in samples], out=inputs.numpy())
    np.stack([sample.targets.numpy() for sample in samples], out=targets.numpy())
    if all(sample.cu_seqlens is None for sample in samples):
        return Batch(inputs, targets)
    whole = torch.tensor([0, length], dtype=torch.int32)
    ends = [(whole if s.cu_seqlens is None else s.cu_seqlens)[1:] + i * length for i, s in enumerate(samples)]
    offsets = torch.cat([whole[:1], *ends]).to(torch.int32)
    return Batch(inputs.reshape(1, -1), targets.reshape(1, -1), offsets.pin_memory() if pinned else offsets)
