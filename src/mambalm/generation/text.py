"""From tokens to text, as it arrives: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mambalm.generation.engine import Engine, Settings, Token

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from mambalm.models.common import MambalmForCausalLM

# What stands for bytes that are no character, or not yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one row's new tokens.

    `push` returns the text that became certain, `flush` what was held back at the end; `stopped` tells that a stop
    string appeared, from which on the text is cut off.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        """Decode with `tokenizer` (a fast one) after the token ids `prompt`, up to the first of the strings `stop`.

        Raises:
            ValueError: a stop string is empty, or the tokenizer has no tokenizers backend.
            TypeError: `stop` is one string.
        """
        if isinstance(stop, str):
            raise TypeError(f"stop is the string {stop!r}: give a list of strings, such as [{stop!r}]")
        if not all(stop):
            raise ValueError("a stop string is empty; leave it out to stop at the end-of-text token only")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} cannot stream; save it as a fast tokenizer (tokenizer.json)")
        self._decoder = _Decoder(tokenizer.backend_tokenizer, prompt)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Read one token; return the text that is now certain."""
        if self.stopped:
            return ""
        self._held += self._decoder.push(token)
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        self.stopped = bool(found)
        return self._release(min(found) if found else len(self._held) - self._undecided())

    def flush(self) -> str:
        """The text held back because a stop string could have begun in it; empty once stopped."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = (n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n]))
        return max(lengths, default=0)


class _Decoder:
    """Whole characters of tokens that come one by one.

    A token's text depends on those before it: of the first of a text SentencePiece strips the space, and bytes make a
    character together. So the latest tokens are decoded with and without the new ones, and the difference is new.
    """

    # Enough of the prompt for the first new token not to be the first of a text.
    _CONTEXT = 8
    # Tokens without a whole character: of four bytes at most, so that more of them are none.
    _MOST_HELD = 8

    def __init__(self, backend: Tokenizer, prompt: Sequence[int]) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token for token, kind in added.items() if kind.special}
        self._old = [token for token in prompt[-self._CONTEXT :] if self._is_text(token)]
        self._new: list[int] = []
        # A prompt may end within a character, whose beginning is then needed once more.
        before = self._decoded(self._old)
        self._before, self._is_within = before.rstrip(_INCOMPLETE), before.endswith(_INCOMPLETE)

    def push(self, token: int) -> str:
        """The text that a token completes."""
        if not self._is_text(token):
            return ""
        self._new.append(token)
        text = self._decoded(self._old + self._new)
        if (text.endswith(_INCOMPLETE) or text == self._before) and len(self._new) < self._MOST_HELD:
            return ""
        # Bytes that make no character may change how those before them read, which have been given out.
        said = text.removeprefix(self._before) if text.startswith(self._before) else self._decoded(self._new)
        self._old, self._new = self._old * self._is_within + self._new, []
        self._before, self._is_within = self._decoded(self._old), False
        return said

    def _is_text(self, token: int) -> bool:
        """Whether a token can have a text: a model's vocabulary may be padded beyond the tokenizer's."""
        return token not in self._special and self._backend.id_to_token(token) is not None

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._backend.decode(tokens)
        return text


def generate(
    model: MambalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: Settings,
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:
    """Continue a batch of texts; yield (row, text) as the text becomes certain, with the rows of `Settings.copies`.

    Args:
        model: a causal language model of mambalm.
        tokenizer: its tokenizer.
        prompts: the texts, of any lengths.
        settings: how to generate.
        stop: a row ends before the first of these strings.

    Raises:
        ValueError: a prompt has no tokens or some that the model does not know, or a stop string is empty.
        TypeError: one string in place of a list of them.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a string: give a list of texts, such as [prompt]")
    for token, text in generate_with_tokens(Engine(model), tokenizer, prompts, settings, stop):
        if text:
            yield token.row, text


def generate_with_tokens(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: Settings,
    stop: Sequence[str] = (),
) -> Iterator[tuple[Token, str]]:
    """As `generate`; yield each token, with the text that it made certain."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    streams = [TextStream(tokenizer, ids, stop) for ids in encoded for _ in range(settings.copies)]
    ids = [torch.tensor(row, dtype=torch.long) for row in encoded]
    yield from texts_of(engine.generate(ids, settings, lambda row: streams[row].stopped), streams, settings)


def texts_of(tokens: Iterable[Token], streams: Sequence[TextStream], settings: Settings) -> Iterator[tuple[Token, str]]:
    """Each token with the text that it made certain in its row's stream, a row's last with all that was held back."""
    written = [0] * len(streams)
    for token in tokens:
        stream, is_end = streams[token.row], token.id in settings.end_tokens
        written[token.row] += 1
        text = "" if is_end else stream.push(token.id)
        if is_end or written[token.row] == settings.max_new_tokens:
            text += stream.flush()
        yield token, text
