"""Conversations for supervised fine-tuning: the tokenizer's template, and loss on the assistant's turns alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mambalm.data.inputs import InputError, Piece, Reading, plan
from mambalm.data.shards import Encoded
from mambalm.data.token_files import ShardArrays, content_hash, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[Mapping[str, Any]]


class ChatError(ValueError):
    """A conversation or a template cannot be used; the message says why, and the remedy."""


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ChatError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ChatError(f"{tokenizer.name_or_path} has no chat template: put a chat_template.jinja beside its files")


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation, int64 (l), and bool (l): which of them the assistant said.

    A template that marks what the assistant says ({% generation %}) is taken at its word. Of another the conversation
    is rendered up to each of the assistant's turns, without it and with it: what the turn adds is the assistant's.

    Raises:
        ChatError: the messages are malformed, none is the assistant's, or the template renders a turn differently when
            others follow, so that what is the assistant's cannot be told.
    """
    _check(messages)
    if _GENERATION.search(str(tokenizer.chat_template)):
        rendered: Any = tokenizer.apply_chat_template(
            _plain(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, said = np.array(rendered["input_ids"], np.int64), np.array(rendered["assistant_masks"], bool)
        if not said.any():
            raise ChatError("the chat template marks nothing as the assistant's: mend its {% generation %} block")
        return ids, said
    text = _render(tokenizer, messages)
    spans = [_span(tokenizer, messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoding["offset_mapping"]], np.int64)
    said = np.zeros(len(starts), bool)
    for begin, end in spans:
        said |= (starts >= begin) & (starts < end)
    return np.array(encoding["input_ids"], np.int64), said


def encode_chats(tokenizer: PreTrainedTokenizerBase, reading: Reading, pieces: Sequence[Piece]) -> Iterator[Encoded]:
    """Conversations as documents with the assistant's turns marked.

    Raises:
        InputError: one cannot be read or used; the message names its place.
    """
    require_template(tokenizer)
    dtype = token_dtype(len(tokenizer))
    for messages in reading.documents(pieces):
        try:
            ids, said = encode_conversation(tokenizer, messages)
        except ChatError as error:
            reading.bad(f"{reading.place}: {error}")
            continue
        text_bytes = sum(len(str(message["content"]).encode()) for message in messages)
        yield Encoded([ids.astype(dtype)], [said], text_bytes)


def read_chats(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[ShardArrays, str]:
    """The conversations of a file, held in memory, and a hash of them.

    Raises:
        InputError: one cannot be read or used, or there is none.
    """
    reading = Reading(text_field="messages")
    pieces = [piece for unit in plan([str(path)], reading, unit_bytes=1 << 62) for piece in unit]
    encoded = list(encode_chats(tokenizer, reading, pieces))
    if not encoded:
        raise InputError(f"{path} holds no conversation")
    documents = [document for batch in encoded for document in batch.documents]
    tokens = np.concatenate(documents)
    learned = np.concatenate([said for batch in encoded for said in batch.learned or []])
    ends = np.cumsum([len(document) for document in documents]).astype(np.uint64)
    hashes = np.array([content_hash(document) for document in documents], np.uint64)
    digest = hashlib.sha256(tokens.tobytes() + ends.tobytes() + learned.tobytes()).hexdigest()[:16]
    return ShardArrays(tokens, ends, hashes, learned), digest


def _check(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ChatError('a conversation is a list of messages: {"messages": [{"role": "user", "content": "..."}, ...]}')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ChatError(f"a message needs role and content, got {str(message)[:60]}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ChatError("no message is the assistant's, so that there is nothing to learn: leave the conversation out")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(_plain(messages), tokenize=False, add_generation_prompt=prompt))


def _plain(messages: Messages) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]


def _span(tokenizer: PreTrainedTokenizerBase, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    before = _render(tokenizer, messages[:turn], prompt=True)
    after = _render(tokenizer, messages[: turn + 1])
    if not (text.startswith(after) and after.startswith(before)):
        raise ChatError(
            f"the chat template of {tokenizer.name_or_path} renders message {turn} differently when others follow or "
            "when it is asked for, so that the assistant's part cannot be told: mark it in the template with "
            "{% generation %} and {% endgeneration %}"
        )
    return len(before), len(after)
