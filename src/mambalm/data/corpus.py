"""The documents of one source that are on one side of a split, as one long sequence of tokens read by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from mambalm.data.token_files import Metadata, ShardArrays, content_hash, open_shard

Split = Literal["train", "held_out"]
# Documents between two entries of the table of positions, which is all that is kept in memory.
_BLOCK = 1024


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of a corpus.

    Attributes:
        tokens: int64 (l).
        starts: int64, the positions in the passage at which a document begins.
        learned: bool (l), whether a token may be a target.
    """

    tokens: np.ndarray
    starts: np.ndarray
    learned: np.ndarray


class Corpus:
    """One side of a split of the documents of a source, in their order.

    A document is held out if its hash, read as a number from 0 to 1, is below the share that is to be held out: so the
    side does not depend on seed, order or machine, and two documents with the same text are on the same side.
    """

    def __init__(
        self,
        name: str,
        shards: list[Callable[[], ShardArrays]],
        *,
        fingerprint: str,
        vocab_size: int,
        held_out: float = 0.0,
        split: Split = "train",
    ) -> None:
        """Look at every document's length and hash once.

        Args:
            name: for messages.
            shards: what opens each shard; opened when it is read.
            fingerprint: a hash of the tokens.
            vocab_size: every token is below it.
            held_out: the share of documents that is held out.
            split: the side.

        Raises:
            ValueError: no document is on that side.
            TokenFileError: a file is damaged.
        """
        self.name, self.fingerprint, self.vocab_size = name, fingerprint, vocab_size
        self._shards, self._share, self._split = shards, held_out, split
        self._opened: dict[int, ShardArrays] = {}
        totals, where = [0], []
        for number in range(len(shards)):
            ends = self._open(number).ends
            for first in range(0, len(ends), _BLOCK):
                lengths, kept = self._block(number, first)[1:]
                where.append((number, first))
                totals.append(int(lengths[kept].sum()))
        self._where, self._totals = where, np.cumsum(totals)
        self.tokens = int(self._totals[-1])
        if not self.tokens:
            raise ValueError(self._empty())

    @classmethod
    def open(cls, folder: Path, *, held_out: float = 0.0, split: Split = "train") -> Corpus:
        """The corpus of a folder of token files."""
        metadata = Metadata.read(folder)
        opening: list[Callable[[], ShardArrays]] = [
            partial(open_shard, folder, shard, metadata.vocab_size) for shard in metadata.shards
        ]
        return cls(
            str(folder),
            opening,
            fingerprint=metadata.fingerprint,
            vocab_size=metadata.vocab_size,
            held_out=held_out,
            split=split,
        )

    def read(self, start: int, count: int) -> Passage:
        """Tokens ``start`` to ``start + count``.

        Raises:
            IndexError: the corpus does not have them.
        """
        if start < 0 or start + count > self.tokens:
            raise IndexError(f"{self.name} has {self.tokens:,} tokens, {start:,} to {start + count:,} were asked for")
        parts, learned, starts = [], [], []
        position = 0
        for shard, begin, end, opens in self._runs(start, count):
            parts.append(shard.tokens[begin:end])
            learned.append(np.ones(end - begin, bool) if shard.learned is None else shard.learned[begin:end])
            starts.append(opens - begin + position)
            position += end - begin
        return Passage(np.concatenate(parts).astype(np.int64), np.concatenate(starts), np.concatenate(learned))

    def document_lengths(self) -> np.ndarray:
        """int64 (documents): the tokens of every document of this side."""
        blocks = [self._block(*where) for where in self._where]
        return np.concatenate([lengths[kept] for _, lengths, kept in blocks])

    def _runs(self, start: int, count: int) -> Iterator[tuple[ShardArrays, int, int, np.ndarray]]:
        """(shard, begin, end, beginnings of documents) of the pieces of files that make up a passage."""
        block = int(np.searchsorted(self._totals, start, side="right")) - 1
        while count > 0:
            number, first = self._where[block]
            begins, lengths, kept = self._block(number, first)
            begins, lengths = begins[kept], lengths[kept]
            ends = np.cumsum(lengths) + self._totals[block]
            low, high = np.searchsorted(ends, [start, start + count - 1], side="right")
            begins, lengths, ends = begins[low : high + 1], lengths[low : high + 1], ends[low : high + 1]
            # Documents that follow one another in the file are read at once.
            cuts = np.flatnonzero(begins[1:] != begins[:-1] + lengths[:-1]) + 1
            for piece in np.split(np.arange(len(begins)), cuts):
                if not len(piece):
                    continue
                i, j = int(piece[0]), int(piece[-1])
                skipped = start - int(ends[i] - lengths[i])
                begin = int(begins[i]) + skipped
                end = min(begin + count, int(begins[j] + lengths[j]))
                yield self._open(number), begin, end, begins[i : j + 1][begins[i : j + 1] >= begin]
                start, count = start + end - begin, count - (end - begin)
            block += 1

    def _block(self, number: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the documents of a block begin, their lengths, and which are on this side."""
        shard = self._open(number)
        ends = shard.ends[first : first + _BLOCK].astype(np.int64)
        begins = np.concatenate([[int(shard.ends[first - 1]) if first else 0], ends[:-1]]).astype(np.int64)
        lengths = ends - begins
        if (lengths < 0).any():
            worst = first + int(np.argmax(lengths < 0))
            raise ValueError(
                f"{self.name}: the index of shard {number} goes backwards at document {worst}: copy it again"
            )
        if self._share <= 0:
            return begins, lengths, (lengths > 0) & (self._split == "train")
        if shard.hashes is None:
            pairs = zip(begins, ends, strict=True)
            hashes = np.array([content_hash(shard.tokens[i:j]) for i, j in pairs], dtype=np.uint64)
        else:
            hashes = shard.hashes[first : first + _BLOCK]
        held_out = hashes.astype(np.float64) < self._share * 2.0**64
        # An empty document is on neither side.
        return begins, lengths, (lengths > 0) & (held_out if self._split == "held_out" else ~held_out)

    def _open(self, number: int) -> ShardArrays:
        if number not in self._opened:
            self._opened[number] = self._shards[number]()
        return self._opened[number]

    def _empty(self) -> str:
        if not sum(len(self._open(number).ends) for number in range(len(self._shards))):
            return f"{self.name} has no documents: tokenise a text that is not empty"
        if self._share <= 0:
            return f"{self.name} has nothing held out: set held_out to a share of its documents, such as 0.01"
        if self._split == "held_out":
            return f"held_out is {self._share}, which holds no document of {self.name} out: raise it, or set it to 0"
        return f"held_out is {self._share}, which leaves no document of {self.name} to train on: lower it"

    def __getstate__(self) -> dict[str, object]:
        # A mapped file would be pickled with its contents.
        return {**vars(self), "_opened": {}}
