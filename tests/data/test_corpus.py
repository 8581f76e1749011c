"""A source's documents as one sequence: both sides of the split, passages across documents and shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambalm.data import corpus as corpus_module
from mambalm.data.corpus import Corpus
from mambalm.data.token_files import TokenFileError
from tests.data.folders import counting, write_folder


@pytest.mark.parametrize("hashes", [True, False])
@settings(max_examples=15)
@given(
    lengths=st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_passages_are_slices_of_the_side(
    hashes: bool, lengths: list[list[int]], share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = counting(lengths)
    folder = write_folder(tmp_path_factory.mktemp("c") / "t", documents, hashes=hashes)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_BLOCK", 3)
        for split in ("train", "held_out"):
            try:
                corpus = Corpus.open(folder, held_out=share, split=split)
            except ValueError:
                continue
            whole = corpus.read(0, corpus.tokens)
            found += whole.tokens.tolist()
            kept = [d for shard in documents for d in shard if d and d[0] in whole.tokens]
            assert whole.tokens.tolist() == [token for d in kept for token in d]
            assert whole.tokens[whole.starts].tolist() == [d[0] for d in kept]
            assert [n for n in corpus.document_lengths() if n] == [len(d) for d in kept]
            for start in range(corpus.tokens):
                for count in range(1, corpus.tokens - start + 1):
                    passage = corpus.read(start, count)
                    assert np.array_equal(passage.tokens, whole.tokens[start : start + count])
                    inside = whole.starts[(whole.starts >= start) & (whole.starts < start + count)] - start
                    assert passage.starts.tolist() == inside.tolist()
    assert sorted(found) == sorted(token for shard in documents for d in shard for token in d)


def test_the_held_out_share_is_met_and_equal_texts_stay_together(tmp_path: Path) -> None:
    documents = [[i, i + 1] for i in range(4000)] + [[i, i + 1] for i in range(4000)]
    folder = write_folder(tmp_path / "t", [documents])
    held_out = Corpus.open(folder, held_out=0.1, split="held_out")
    firsts = held_out.read(0, held_out.tokens).tokens[::2]
    assert len(firsts) / 8000 == pytest.approx(0.1, abs=0.01)
    train = Corpus.open(folder, held_out=0.1)
    assert set(firsts).isdisjoint(train.read(0, train.tokens).tokens[::2])


def test_four_byte_tokens(tmp_path: Path) -> None:
    corpus = Corpus.open(write_folder(tmp_path / "t", [[[70_000, 1], [99_999]]], vocab_size=100_000))
    assert corpus.read(0, 3).tokens.tolist() == [70_000, 1, 99_999]


def test_it_is_pickled_without_its_files(tmp_path: Path) -> None:
    corpus = Corpus.open(write_folder(tmp_path / "t", counting([[500] * 20])))
    packed = pickle.dumps(corpus)
    assert len(packed) < 5000
    assert pickle.loads(packed).read(3, 4).tokens.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("00001.ds", lambda data: data[:-1], r"00001.ds has 13 bytes, expected 14"),
        ("00001.ds.index", lambda data: data[:-8], r"00001.ds.index has 8 bytes, expected 16"),
        ("00001.ds.index", lambda data: data[:8] * 2, r"00001.ds.index ends at token 3, but 00001.ds has 7"),
        ("tokens.json", lambda data: data[:50], r"tokens.json is damaged"),
        ("tokens.json", lambda data: data.replace(b"highest", b"lowest"), r"tokens.json is damaged .*lowest"),
        ("tokens.json", lambda data: data.replace(b"end_token", b"end"), r"tokens.json is damaged .*end_token"),
        ("tokens.json", lambda data: data.replace(b"tokens-1", b"tokens-9"), r"format 'mambalm-tokens-9'"),
    ],
)
def test_damage_is_named(name: str, damage: object, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", counting([[3], [3, 4]]))
    assert callable(damage)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(TokenFileError, match=message):
        Corpus.open(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", counting([[3, 4]]))
    with pytest.raises(ValueError, match="nothing held out: set held_out"):
        Corpus.open(folder, split="held_out")
    with pytest.raises(ValueError, match=r"which holds no document of .* out: raise it, or set it to 0"):
        Corpus.open(folder, split="held_out", held_out=1e-9)
    (folder / "00000.ds").unlink()
    with pytest.raises(TokenFileError, match=r"00000.ds is missing"):
        Corpus.open(folder)
    with pytest.raises(ValueError, match="has no documents"):
        Corpus.open(write_folder(tmp_path / "empty", [[]]))
