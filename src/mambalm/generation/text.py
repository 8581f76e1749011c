"""From tokens to text, as it arrives: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from tokenizers.decoders import DecodeStream

from mambalm.generation.engine import Settings, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambalm.models.common import MambalmForCausalLM


class TextStream:
    """The text of one row's new tokens.

    `push` returns the text that became certain, `flush` what was held back at the end; `stopped` tells that a stop
    string appeared, from which on the text is cut off.
    """

    # Enough of the prompt for a decoder that treats the first token of a text differently (SentencePiece's space).
    _CONTEXT = 8

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        """Decode with `tokenizer` (a fast one) after the token ids `prompt`, up to the first of the strings `stop`.

        Raises:
            ValueError: a stop string is empty, or the tokenizer has no tokenizers backend.
        """
        if not all(stop):
            raise ValueError("a stop string is empty; leave it out to stop at the end-of-text token only")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} cannot stream; save it as a fast tokenizer (tokenizer.json)")
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in prompt[-self._CONTEXT :]:
            self._stream.step(self._backend, token)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Read one token; return the text that is now certain."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._backend, token) or ""
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
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    streams = [TextStream(tokenizer, ids, stop) for ids in encoded for _ in range(settings.copies)]
    ids = [torch.tensor(row, dtype=torch.long) for row in encoded]
    for row, token in decode(model, ids, settings, lambda row: streams[row].stopped):
        if token not in settings.end_tokens and (text := streams[row].push(token)):
            yield row, text
    for row, stream in enumerate(streams):
        if text := stream.flush():
            yield row, text
