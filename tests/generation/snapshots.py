"""What the tests of sessions and of their files share."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mambalm.diagnostics.tiny import VOCABULARY
from mambalm.generation.snapshot import Snapshot

TOKENS: list[int] = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def tensors(snapshot: Snapshot) -> Iterator[torch.Tensor]:
    assert snapshot.logits is not None
    yield from (snapshot.logits, snapshot.counts, snapshot.state.position)
    for layer in snapshot.state.layers:
        yield from (value for value in vars(layer).values() if value is not None)


def assert_same_bits(actual: Snapshot, expected: Snapshot) -> None:
    assert actual.digest == expected.digest
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
