"""Mixtures by position: every sequence once an epoch, weights met, nothing depends on who reads when."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambalm.data.mixture import MixedStream, Mixture, Source, open_stream
from mambalm.data.samples import IGNORED
from tests.data.folders import counting, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three sources whose tokens tell where they are from: 1 to 1000, 2001 to 2400, 3001 to 3070."""
    root = tmp_path_factory.mktemp("sources")
    lengths = ([[7, 50, 443], [1, 499]], [[400]], [[10] * 7])
    names = ("a", "b", "c")
    return [
        str(write_folder(root / name, counting(length, first)))
        for name, length, first in zip(names, lengths, (1, 2001, 3001), strict=True)
    ]


def mixed(folders: list[str], weights: list[float], length: int = 10, **arguments: object) -> MixedStream:
    sources = [Source(path, weight) for path, weight in zip(folders, weights, strict=False)]
    packing = arguments.pop("packing", "concatenated")
    return open_stream(Mixture(sources, packing), length=length, tokenizer=None, **arguments)  # type: ignore[arg-type]


@settings(max_examples=10)
@given(length=st.integers(1, 40), ratio=st.integers(1, 5), seed=st.integers(0, 99), packed=st.booleans())
def test_every_sequence_once_an_epoch(folders: list[str], length: int, ratio: int, seed: int, packed: bool) -> None:
    packing = "documents" if packed else "concatenated"
    stream = mixed(folders, [1], length, granule=length * ratio, seed=seed, packing=packing)
    count = 999 // (length * ratio) * ratio
    assert len(stream) == count
    orders = []
    for epoch in range(2):
        samples = [stream[epoch * count + i] for i in range(count)]
        orders.append([int(sample.inputs[0]) for sample in samples])
        assert sorted(torch.cat([sample.inputs for sample in samples]).tolist()) == list(range(1, count * length + 1))
    assert count < 20 or orders[0] != orders[1]


def test_targets_follow_inputs_and_cross_no_document(folders: list[str]) -> None:
    plain, packed = mixed(folders, [1], 30), mixed(folders, [1], 30, packing="documents")
    starts = {1, 8, 58, 501, 502}
    for index in range(len(plain)):
        sample = plain[index]
        assert sample.cu_seqlens is None
        assert torch.equal(sample.targets, sample.inputs + 1)
        sample = packed[index]
        expected = [IGNORED if token + 1 in starts else token + 1 for token in sample.inputs.tolist()]
        assert sample.targets.tolist() == expected
        inside = [i for i, token in enumerate(sample.inputs.tolist()) if token in starts and i]
        assert sample.cu_seqlens is not None
        assert sample.cu_seqlens.tolist() == [0, *inside, 30]


@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), st.integers(1, 300_000))
@settings(max_examples=15)
def test_weights_are_met_by_every_beginning(folders: list[str], weights: list[float], count: int) -> None:
    counts = mixed(folders, weights).counts(count)
    for path, weight in zip(folders, weights, strict=True):
        # Two turns of the pattern, and what rounding a weight to a hundred-thousandth can add up to.
        assert abs(counts[path] - count * weight / sum(weights)) <= 2 + count / 100_000


def test_each_source_goes_through_its_epochs_in_the_mixture(folders: list[str]) -> None:
    stream = mixed(folders, [5, 3, 2])
    seen: dict[int, list[int]] = {0: [], 2: [], 3: []}
    for i in range(300):
        token = int(stream[i].inputs[0])
        seen[token // 1000 if token > 1000 else 0].append(token)
    assert {key: len(value) for key, value in seen.items()} == {0: 150, 2: 90, 3: 60}
    assert list(stream.counts(300).values()) == [150, 90, 60]
    for first, epoch in ((0, 99), (2, 39), (3, 6)):
        for begin in range(0, len(seen[first]) - epoch, epoch):
            assert len(set(seen[first][begin : begin + epoch])) == epoch


def test_a_sample_depends_on_its_index_alone(folders: list[str]) -> None:
    stream, again = mixed(folders, [1, 2, 3], seed=3), mixed(folders, [1, 2, 3], seed=3)
    straight = [stream[i] for i in range(120)]
    # Four ranks, each in an order and process of its own.
    for rank in range(4):
        copy = pickle.loads(pickle.dumps(again))
        for i in reversed(range(rank, 120, 4)):
            assert torch.equal(copy[i].inputs, straight[i].inputs)
    assert stream.fingerprint == again.fingerprint
    others = (
        mixed(folders, [1, 2, 3], seed=4),
        mixed(folders, [1, 2, 4], seed=3),
        mixed(folders, [1, 2, 3], 12, seed=3),
        mixed(folders, [1, 2, 3], seed=3, packing="documents"),
        mixed(folders[:2], [1, 2], seed=3),
    )
    assert len({stream.fingerprint, *(other.fingerprint for other in others)}) == 6


@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=3), lengths=st.permutations([5, 10, 20]))
def test_a_stage_reads_nothing_that_an_earlier_one_has_read(
    folders: list[str], counts: list[int], lengths: list[int]
) -> None:
    """Within an epoch, whatever the lengths; what a change passes over is less than a group."""
    after: dict[str, int] = {}
    tokens: list[int] = []
    for count, length in zip(counts, lengths, strict=False):
        stage = mixed(folders, [1], length, granule=20, after=after)
        for i in range(count):
            after_one = stage.taken(i + 1)[folders[0]]
            if after_one > 999 // 20:
                break
            tokens += stage[i].inputs.tolist()
            assert len(set(tokens)) == len(tokens)
        after = stage.taken(count)
        if after[folders[0]] > 999 // 20:
            return
    group = (999 // 20) // 16 * 20
    assert after[folders[0]] * 20 <= len(tokens) + len(counts) * group


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "t", counting([[5] * 200])))
    mixture = Mixture([Source(folder)], held_out=0.2)
    seen = []
    for split in ("train", "held_out"):
        stream = open_stream(mixture, length=5, tokenizer=None, split=split, granule=50)  # type: ignore[arg-type]
        seen.append({token for i in range(len(stream)) for token in stream[i].inputs.tolist()})
    assert seen[0].isdisjoint(seen[1])
    assert min(map(len, seen)) > 100


def test_what_cannot_be_mixed_is_refused(folders: list[str], tmp_path: Path) -> None:
    cases = [
        (lambda: Mixture([]), "needs a source"),
        (lambda: Mixture([Source("a"), Source("a")]), "a is named twice"),
        (lambda: Mixture([Source("a", 0)]), "a needs a positive weight"),
        (lambda: Mixture([Source("a")], held_out=1), "from 0 to below 1, got 1"),
        (lambda: Mixture([Source("a", kind="chat")], "concatenated"), "set packing: documents"),
        (lambda: mixed([str(tmp_path / "no")], [1]), "is no folder of token files: make it with"),
        (lambda: mixed([str(tmp_path)], [1]), "has no tokens.json: finish"),
        (lambda: mixed(folders[2:], [1], 70), "has 70 tokens .* needs 71"),
        (lambda: mixed(folders, [1], 70, granule=20), "granule of 20 tokens holds no sequence of 70"),
        (lambda: mixed(folders, [1, 1e-6, 1]), "a weight below"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_the_pattern_is_even(folders: list[str]) -> None:
    stream = mixed(folders, [1, 1, 2])
    turns = [int(stream[i].inputs[0]) // 1000 for i in range(40)]
    assert all(turns[i : i + 4].count(3) == 2 for i in range(0, 40, 4))
    assert max(len(list(group)) for _, group in itertools.groupby(turns)) <= 2
