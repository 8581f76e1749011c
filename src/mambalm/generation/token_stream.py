"""The tokens of a text of any length, in memory that does not grow with it, equal to those of the whole text.

A window of the text is tokenised and cut between two tokens well before its end, where letters, digits, white space or
other characters meet. The next window begins well before the cut, and the cut is taken only if both windows have a
boundary there and the same tokens after it. docs/sessions.md says why that suffices.
"""

from __future__ import annotations

import codecs
import hashlib
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = 2**14
_ATTEMPTS = 8


@dataclass(frozen=True)
class Mark:
    """Where a stream can be taken up again.

    Attributes:
        offset: bytes of the text that are no longer needed.
        skip: characters behind them whose tokens have been given out.
        digest: SHA-256 of the bytes before `offset`, by which the text is known again.
    """

    offset: int = 0
    skip: int = 0
    digest: str = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class _Tokens:
    """Token ids, and the character behind each token."""

    ids: list[int]
    ends: list[int]

    def before(self, at: int) -> int:
        """The number of tokens that end at or before character `at`."""
        return bisect_right(self.ends, at)


class TokenStream:
    """The tokens of a UTF-8 text, in lists, as `tokenizer(text)["input_ids"]` has them.

    Attributes:
        is_over: the text has ended, and with it what `mark` is good for: the last tokens are those of an end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: BinaryIO,
        *,
        begin: bool = True,
        mark: Mark | None = None,
        window: int = 2**14,
        margin: int = 2**10,
    ) -> None:
        """Stream the tokens of `source`.

        Args:
            tokenizer: a fast tokenizer.
            source: the text, from its first byte; it need not be seekable.
            begin: put the special tokens around the text that the tokenizer puts there.
            mark: `mark` of an earlier stream over the same text: its tokens so far are not given out again.
            window: characters that are tokenised at once, more where one run of the same kind is longer.
            margin: characters around a cut that must agree; no token may depend on text farther away, except through
                such a run.

        Raises:
            ValueError: the tokenizer is no fast one, or the text is not the one of the mark.
        """
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} tells no offsets; save it as a fast tokenizer")
        self._tokenizer, self._source = tokenizer, source
        self._window, self._margin = window, margin
        self._prefix, self._suffix = _surroundings(tokenizer) if begin else ([], [])
        self._hash = hashlib.sha256()
        self._offset = self._skip = 0
        self._buffer = ""
        self.is_over = False
        if mark is not None and mark != Mark():
            self._resume(mark)

    @property
    def mark(self) -> Mark:
        """Where the stream is, after the tokens given out so far."""
        return Mark(self._offset, self._skip, self._hash.hexdigest())

    def __iter__(self) -> Iterator[list[int]]:
        """Give out the tokens.

        Raises:
            ValueError: the text is not UTF-8.
        """
        decoder, wanted, count = codecs.getincrementaldecoder("utf-8")(), self._window, self._offset
        while data := self._source.read(_BLOCK):
            self._buffer += _decoded(decoder, data, count)
            count += len(data)
            if len(self._buffer) - self._skip < wanted:
                continue
            tokens = self._cut()
            # Without a cut (one endless run) the window grows until there is one.
            wanted = self._window if tokens else 2 * wanted
            if tokens:
                yield self._begun() + tokens
        self._buffer += _decoded(decoder, b"", count)
        self.is_over = True
        rest = self._encode(self._buffer)
        tokens = rest.ids[self._given_out(rest) :]
        self._drop(len(self._buffer))
        yield self._begun() + tokens + self._suffix

    def _begun(self) -> list[int]:
        prefix, self._prefix = self._prefix, []
        return prefix

    def _resume(self, mark: Mark) -> None:
        left = mark.offset
        while left and (data := self._source.read(min(left, 2**20))):
            self._hash.update(data)
            left -= len(data)
        if left or self._hash.hexdigest() != mark.digest:
            raise ValueError(f"the text is another one: its first {mark.offset:,} bytes are not those read before")
        self._offset, self._skip, self._prefix = mark.offset, mark.skip, []

    def _encode(self, text: str) -> _Tokens:
        encoding = self._tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
        return _Tokens(encoding.ids, [end for _, end in encoding.offsets])

    def _given_out(self, tokens: _Tokens) -> int:
        """How many of the window's tokens lie before what is still to be given out."""
        return tokens.before(self._skip) if self._skip else 0

    def _cut(self) -> list[int]:
        """The tokens up to the best cut, of which the buffer then keeps the margin; none where there is no cut."""
        tokens = self._encode(self._buffer)
        first = self._given_out(tokens)
        for index in islice(self._candidates(tokens, first), _ATTEMPTS):
            cut = tokens.ends[index - 1]
            before = tokens.before(cut - self._margin)
            start = tokens.ends[before - 1] if before else 0
            if self._agrees(start, cut, tokens.ids[index:]):
                self._drop(start)
                self._skip = cut - start
                return tokens.ids[first:index]
        return []

    def _candidates(self, tokens: _Tokens, first: int) -> list[int]:
        """The token indices before which to cut: before white space rather, the last ones first."""
        ends, text = tokens.ends, self._buffer
        stop = tokens.before(len(text) - self._margin)
        # Bytes of one character are tokens with the same end.
        found = [
            index
            for index in range(stop - 1, first, -1)
            if (at := ends[index - 1]) < ends[index] and _kind(text[at - 1]) != _kind(text[at])
        ]
        return sorted(found, key=lambda index: not text[ends[index - 1]].isspace())

    def _agrees(self, start: int, cut: int, following: list[int]) -> bool:
        """Whether a window that begins at `start` has the same boundary at `cut` and the same tokens behind it."""
        tokens = self._encode(self._buffer[start:])
        index = tokens.before(cut - start)
        return index > 0 and tokens.ends[index - 1] == cut - start and tokens.ids[index:] == following

    def _drop(self, length: int) -> None:
        """Forget the first characters of the buffer."""
        data = self._buffer[:length].encode()
        self._hash.update(data)
        self._offset += len(data)
        self._buffer, self._skip = self._buffer[length:], 0


def _kind(character: str) -> str:
    """The kind of a character, letters and their marks being one, and so is all white space.

    Within a run of one kind a boundary may depend on the run's far end, as where digits are grouped from the right.
    """
    kind = "space" if character.isspace() else unicodedata.category(character)[0]
    return "L" if kind == "M" else kind


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    ids, special = probe["input_ids"], probe["special_tokens_mask"]
    first, last = special.index(0), len(ids) - special[::-1].index(0)
    return ids[:first], ids[last:]


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, offset: int) -> str:
    """The characters that `data`, which begins at byte `offset` of the text, completes; b"" ends the text."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the text is not UTF-8 ({error.reason} near byte {offset:,}): convert it, as with `iconv -t UTF-8`"
        ) from error
