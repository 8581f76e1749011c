"""Batches by position: every token once an epoch, targets one later, segments continued."""

from __future__ import annotations

import pytest
import torch

from mambalm.data.streams import SegmentStreams, fingerprint

# 12 segments of 2 chunks of 5 tokens, and some that are too few for another.
TOKENS = torch.arange(12 * 10 + 7)


def test_an_epoch_predicts_every_token_once() -> None:
    streams = SegmentStreams(TOKENS, batch_size=3, length=5, chunks=2, groups=2)
    assert streams.steps_per_epoch == 8
    for epoch in range(2):
        batches = [streams[epoch * 8 + step] for step in range(8)]
        assert all(torch.equal(b.targets, b.inputs + 1) for b in batches)
        assert torch.cat([b.targets.flatten() for b in batches]).sort().values.tolist() == list(range(1, 121))
    assert not torch.equal(streams[0].inputs, streams[8].inputs)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_a_group_continue_within_a_segment(groups: int) -> None:
    streams = SegmentStreams(TOKENS, batch_size=3, length=5, chunks=2, groups=groups)
    assert streams.steps_per_epoch == 8
    for block in range(0, 8, 2 * groups):
        for group in range(groups):
            first, second = streams[block + group], streams[block + groups + group]
            assert (first.group, second.group) == (group, group)
            assert first.starts
            assert not second.starts
            assert torch.equal(second.inputs[:, 0], first.targets[:, -1])


def test_a_short_stream_has_fewer_groups() -> None:
    streams = SegmentStreams(TOKENS, batch_size=5, length=5, chunks=2, groups=100)
    assert streams.steps_per_epoch == 4
    assert {streams[step].group for step in range(4)} == {0, 1}


def test_a_batch_depends_on_its_step_and_the_seed_alone() -> None:
    one, two = (SegmentStreams(TOKENS, batch_size=3, length=5, seed=4) for _ in range(2))
    for step in range(20):
        _ = one[step]
    torch.manual_seed(123)
    assert torch.equal(one[11].inputs, two[11].inputs)
    assert not torch.equal(one[11].inputs, SegmentStreams(TOKENS, batch_size=3, length=5, seed=5)[11].inputs)


def test_a_stream_shorter_than_a_batch_is_refused() -> None:
    SegmentStreams(torch.arange(31), batch_size=3, length=5, chunks=2)
    with pytest.raises(ValueError, match=r"has 30 tokens, and 3 segments of 10 need 31: use more text"):
        SegmentStreams(torch.arange(30), batch_size=3, length=5, chunks=2)


def test_the_fingerprint_sees_every_token() -> None:
    changed = TOKENS.clone()
    changed[-1] += 1
    assert fingerprint(TOKENS) == fingerprint(TOKENS.clone()) != fingerprint(changed)
