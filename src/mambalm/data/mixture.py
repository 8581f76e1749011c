"""Mixtures of sources by weight, read by position: sample i of a stage is a function of i and the recipe alone.

Nothing is remembered from one sample to the next, so that a run resumes at any sample, on any number of ranks, with any
batch size, and reads what the uninterrupted run would have read.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mambalm.data.chat import read_chats
from mambalm.data.corpus import Corpus, Split
from mambalm.data.packing import Packs, Pieces, Windows
from mambalm.data.permutation import Permutation
from mambalm.data.samples import Sample
from mambalm.data.token_files import Metadata, ShardArrays, require_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sequences after which the pattern of sources repeats: weights of up to five decimals are met exactly.
_PERIOD = 100_000
# Neighbours in a granule are alike; in one batch are sequences of this many granules.
_GROUP = 256


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        path: a folder of token files or, of chats, a JSONL file or such a folder.
        weight: its part of the sequences, relative to the other sources'.
        kind: "tokens", or "chat" for conversations, which are packed whole.
    """

    path: str
    weight: float = 1.0
    kind: Literal["tokens", "chat"] = "tokens"


@dataclass(frozen=True)
class Mixture:
    """What a stage reads.

    Attributes:
        sources: at least one.
        packing: "documents" reads each from a fresh state, and predicts none from another; "concatenated" reads on.
        held_out: the share of each source's documents that is kept from training, chosen by a hash of their text.
    """

    sources: Sequence[Source]
    packing: Literal["documents", "concatenated"] = "documents"
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a mixture needs a source: give at least one path")
        paths = [source.path for source in self.sources]
        if doubled := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"source {doubled[0]} is named twice: give it once, with the sum of the weights")
        if bad := [source.path for source in self.sources if not 0 < source.weight < float("inf")]:
            raise ValueError(f"source {bad[0]} needs a positive weight; leave it out if it is not to be read")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a share of the documents, from 0 to below 1, got {self.held_out}")
        if self.packing == "concatenated" and (chats := [s.path for s in self.sources if s.kind == "chat"]):
            raise ValueError(
                f"{chats[0]} holds conversations, which do not go on in one another: set packing: documents"
            )


def open_stream(
    section: Mixture,
    *,
    length: int,
    tokenizer: PreTrainedTokenizerBase | None,
    split: Split = "train",
    seed: int = 0,
    granule: int | None = None,
    after: Mapping[str, int] | None = None,
) -> MixedStream:
    """Open the stream of samples of a stage.

    Args:
        section: what is read, in which mixture.
        length: tokens of a sample.
        tokenizer: the model's; the token files must have been made with it. None (without chats) does not check.
        split: "held_out" reads what ``section.held_out`` keeps from training.
        seed: chooses the order.
        granule: tokens that stay together when the order is chosen: the longest sample of any stage, by default that of
            this one. Stages with one granule and seed can share the sources: with ``after`` none reads what an earlier
            one has read, until an epoch is over.
        after: granules of each source, by its path, that earlier stages have taken: `MixedStream.taken`.

    Raises:
        ValueError: a source cannot be used as the section says; the message names it and the remedy.
    """
    parts = []
    for source in section.sources:
        pieces, fingerprint, vocab_size = _open(section, source, length, tokenizer, split, granule)
        parts.append(Part(source.path, pieces, fingerprint, vocab_size, seed, (after or {}).get(source.path, 0)))
    weights = [source.weight for source in section.sources]
    how = (section.packing, section.held_out, split, seed, granule or length)
    return MixedStream(parts, weights, length, repr(how))


def _open(
    section: Mixture,
    source: Source,
    length: int,
    tokenizer: PreTrainedTokenizerBase | None,
    split: Split,
    granule: int | None,
) -> tuple[Pieces, str, int]:
    corpus = _corpus(source, tokenizer, section.held_out, split)
    pieces: Pieces
    if source.kind == "chat":
        packs = pieces = Packs(corpus, length)
        if packs.cut:
            warnings.warn(
                f"{source.path}: {packs.cut:,} conversations are longer than {length}, and are cut", stacklevel=4
            )
    else:
        # Stages do not take turns on what is held out.
        granule = granule if granule and split == "train" else length
        pieces = Windows(corpus, length, granule, documents=section.packing == "documents")
    return pieces, corpus.fingerprint, corpus.vocab_size


def _corpus(source: Source, tokenizer: PreTrainedTokenizerBase | None, held_out: float, split: Split) -> Corpus:
    path = Path(source.path).expanduser()
    if path.is_dir():
        if tokenizer is not None:
            require_tokenizer(path, Metadata.read(path), tokenizer)
        return Corpus.open(path, held_out=held_out, split=split)
    if source.kind == "tokens" or not path.is_file():
        raise ValueError(f"source {path} is no folder of token files: make it with `mambalm tokenize INPUT -o {path}`")
    if tokenizer is None:
        raise ValueError(f"source {path} is still to be tokenised: give a tokenizer")
    shard, fingerprint = read_chats(path, tokenizer)
    # A partial, unlike a function defined here, can be sent to another process.
    shards: list[Callable[[], ShardArrays]] = [partial(replace, shard)]
    return Corpus(str(path), shards, fingerprint=fingerprint, vocab_size=len(tokenizer), held_out=held_out, split=split)


class Part:
    """The sequences of one source in the order of the run: every one once in an epoch, each epoch in another order."""

    def __init__(self, path: str, pieces: Pieces, fingerprint: str, vocab_size: int, seed: int, after: int = 0) -> None:
        """The order that belongs to ``seed``, from granule ``after`` on."""
        self.path, self.fingerprint, self.vocab_size, self.after = path, fingerprint, vocab_size, after
        self._pieces, self._seed = pieces, seed
        # Small sources have small groups, so that a change of stage passes over little.
        self._group = max(1, min(_GROUP, pieces.granules // 16))
        self._order = lru_cache(4)(self._permutation)

    def __len__(self) -> int:
        return self._pieces.granules * self._pieces.per_granule

    def __getitem__(self, index: int) -> Sample:
        epoch, granule, part = self._place(index)
        return self._pieces.read(self._order(epoch)(granule), part)

    def taken(self, count: int) -> int:
        """Granules, counted from the run's first, of which the first ``count`` sequences have read something."""
        if not count:
            return self.after
        epoch, granule, part = self._place(count - 1)
        base = self._base(epoch)
        if part:
            granule = min(base + ((granule - base) // self._group + 1) * self._group, self._pieces.granules) - 1
        return epoch * self._pieces.granules + granule + 1

    def _base(self, epoch: int) -> int:
        """The first granule of this stage in an epoch."""
        first, granule = divmod(self.after, self._pieces.granules)
        return granule if epoch == first else 0

    def _place(self, index: int) -> tuple[int, int, int]:
        """(epoch, granule in the order of the epoch, part of it) of a sequence."""
        granules, parts = self._pieces.granules, self._pieces.per_granule
        epoch, base = divmod(self.after, granules)
        if index >= (granules - base) * parts:
            later, index = divmod(index - (granules - base) * parts, granules * parts)
            epoch, base = epoch + 1 + later, 0
        group, index = divmod(index, self._group * parts)
        first = base + group * self._group
        part, granule = divmod(index, min(self._group, granules - first))
        return epoch, first + granule, part

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self._pieces.granules, f"{self._seed}/{self.fingerprint}/{epoch}")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._order = lru_cache(4)(self._permutation)


class MixedStream:
    """The samples of a mixture; a `SampleStream`.

    Attributes:
        length: tokens of a sample.
        vocab_size: every token is below it.
        fingerprint: a hash of the sources' tokens, their weights and the order.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float], length: int, how: str) -> None:
        """Mix ``parts`` by ``weights``; ``how`` describes them further, for the fingerprint."""
        self.length, self._parts = length, parts
        self.vocab_size = max(part.vocab_size for part in parts)
        self._turns, self._ranks, self._quotas = _pattern(parts, weights)
        named = [(part.fingerprint, weight, part.after) for part, weight in zip(parts, weights, strict=True)]
        self.fingerprint = hashlib.sha256(repr((named, length, how)).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"samples are counted from 0, got {index}")
        period, slot = divmod(index, len(self._turns))
        turn = self._turns[slot]
        return self._parts[turn][int(period * self._quotas[turn] + self._ranks[slot])]

    def counts(self, count: int) -> dict[str, int]:
        """How many of the first ``count`` samples are of each source, by its path."""
        periods, rest = divmod(count, len(self._turns))
        numbers = periods * self._quotas + np.bincount(self._turns[:rest], minlength=len(self._parts))
        return {part.path: int(number) for part, number in zip(self._parts, numbers, strict=True)}

    def taken(self, count: int) -> dict[str, int]:
        """What the first ``count`` samples have taken of each source, for the ``after`` of the next stage."""
        counts = self.counts(count)
        return {part.path: part.taken(counts[part.path]) for part in self._parts}


def _pattern(parts: Sequence[Part], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(whose turn it is in each slot of a period, how many turns that source had before, turns of each in a period)."""
    shares = np.array(weights) / sum(weights) * _PERIOD
    quotas = np.floor(shares).astype(np.int64)
    # The largest remainders get what rounding down left over.
    quotas[np.argsort(quotas - shares, kind="stable")[: _PERIOD - quotas.sum()]] += 1
    if len(parts) == 1:
        quotas = np.array([1])
    if not quotas.all():
        raise ValueError(
            f"source {parts[int(np.argmin(quotas))].path} has a weight below 1 / {_PERIOD:,} of the mixture"
        )
    ranks = np.concatenate([np.arange(quota) for quota in quotas])
    turns = np.repeat(np.arange(len(parts)), quotas)
    # Turn j of n is due in the middle of the j-th n-th of the period: sources alternate as evenly as they can.
    due = np.argsort((ranks + 0.5) / quotas[turns], kind="stable")
    return turns[due], ranks[due], quotas
