"""Batches: rows, or one packed row."""

from __future__ import annotations

import pytest
import torch

from mambalm.data.samples import Sample, collate


def sample(first: int, ends: list[int] | None = None) -> Sample:
    tokens = torch.arange(first, first + 5)
    return Sample(tokens[:-1], tokens[1:], None if ends is None else torch.tensor(ends, dtype=torch.int32))


def test_rows_without_documents() -> None:
    batch = collate([sample(0), sample(10)])
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14]]
    assert batch.cu_seqlens is None


def test_documents_become_one_packed_row() -> None:
    batch = collate([sample(0, [0, 3, 4]), sample(10), sample(20, [0, 1, 4])])
    assert batch.inputs.shape == batch.targets.shape == (1, 12)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 9, 12]
    assert batch.cu_seqlens.dtype == torch.int32


def test_unequal_lengths_are_refused() -> None:
    short = Sample(torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match=r"one length, got \[3, 4\]"):
        collate([sample(0), short])
    with pytest.raises(ValueError, match="got none"):
        collate([])
