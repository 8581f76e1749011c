"""Sequences of one length out of a corpus: consecutive windows, or whole conversations packed together."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from mambalm.data.corpus import Corpus
from mambalm.data.samples import IGNORED, Sample


class Pieces(Protocol):
    """A source cut into granules of ``per_granule`` sequences each."""

    @property
    def granules(self) -> int:
        """How many there are."""

    @property
    def per_granule(self) -> int:
        """Sequences of each."""

    def read(self, granule: int, part: int) -> Sample:
        """One sequence of a granule."""


class Windows:
    """Windows of consecutive tokens; every token but a granule's remainder and the corpus' tail is predicted once.

    With ``documents`` each document is read from a fresh state, and no target crosses from one to the next; a document
    that a window's end cuts goes on in the next window, from a fresh state too.
    """

    def __init__(self, corpus: Corpus, length: int, granule: int, *, documents: bool) -> None:
        """Windows of ``length`` tokens in granules of ``granule`` tokens.

        Raises:
            ValueError: the corpus is shorter than a granule, or the granule than a window.
        """
        if granule < length:
            raise ValueError(f"a granule of {granule} tokens holds no sequence of {length}: make it at least as long")
        if corpus.tokens <= granule:
            raise ValueError(
                f"{corpus.name} has {corpus.tokens:,} tokens on this side of the split, and a sequence needs "
                f"{granule + 1:,}: use more text or shorter sequences"
            )
        self._corpus, self._length, self._granule, self._documents = corpus, length, granule, documents
        self.granules, self.per_granule = (corpus.tokens - 1) // granule, granule // length

    def read(self, granule: int, part: int) -> Sample:
        """Window ``part`` of a granule."""
        length = self._length
        passage = self._corpus.read(granule * self._granule + part * length, length + 1)
        tokens = torch.from_numpy(passage.tokens)
        targets = tokens[1:].clone()
        targets[torch.from_numpy(~passage.learned[1:])] = IGNORED
        if not self._documents:
            return Sample(tokens[:-1], targets)
        starts = torch.from_numpy(passage.starts)
        targets[starts[starts > 0] - 1] = IGNORED
        inside = starts[(starts > 0) & (starts < length)].to(torch.int32)
        ends = torch.tensor([0, length], dtype=torch.int32)
        return Sample(tokens[:-1], targets, torch.cat([ends[:1], inside, ends[1:]]))


class Packs:
    """Whole documents put together, in their order, until another would not fit; what is left of a sequence is padding.

    For conversations, of which none may begin in the middle. One that is longer than a sequence loses its end. Padding
    is a document of its own, without targets.
    """

    per_granule = 1

    def __init__(self, corpus: Corpus, length: int) -> None:
        """Sequences of ``length`` tokens; ``cut`` is the number of documents that are longer."""
        self._corpus, self._length = corpus, length
        lengths = corpus.document_lengths()
        self._begins = np.cumsum(lengths) - lengths
        # The last token of a document has no target, so that one more than a sequence fits.
        self._used = np.minimum(lengths - 1, length)
        self.cut = int((lengths - 1 > length).sum())
        firsts: list[int] = []
        room = 0
        for number, used in enumerate(self._used):
            if not firsts or used > room:
                firsts.append(number)
                room = length
            room -= int(used)
        self._firsts = np.array([*firsts, len(lengths)])
        self.granules = len(firsts)

    def read(self, granule: int, part: int) -> Sample:
        """Pack ``granule``."""
        inputs = torch.zeros(self._length, dtype=torch.int64)
        targets = torch.full((self._length,), IGNORED)
        ends = [0]
        for number in range(self._firsts[granule], self._firsts[granule + 1]):
            count, begin = int(self._used[number]), ends[-1]
            if not count:
                continue
            passage = self._corpus.read(int(self._begins[number]), count + 1)
            tokens = torch.from_numpy(passage.tokens)
            inputs[begin : begin + count] = tokens[:-1]
            learned = torch.from_numpy(passage.learned[1:])
            targets[begin : begin + count] = torch.where(learned, tokens[1:], IGNORED)
            ends.append(begin + count)
        if ends[-1] < self._length:
            ends.append(self._length)
        return Sample(inputs, targets, torch.tensor(ends, dtype=torch.int32))
