"""Conversations: the model's chat template over a session, which reads only what each turn adds."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from mambalm.generation.engine import Settings
from mambalm.generation.session import Session
from mambalm.generation.snapshot import Snapshot, advance
from mambalm.generation.state_file import StateFileError

if TYPE_CHECKING:
    from mambalm.generation.prefix_store import PrefixStore

_END_OF_MESSAGE = "<|im_end|>"
# The form of falcon-mamba-7b-instruct (ChatML).
FALLBACK_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Message = dict[str, str]


class Conversation:
    """Messages, and a session that has read them as the template renders them.

    Before anything new is read, the session's tokens are a beginning of the rendered conversation's, or are made so:
    where a template changes what was rendered before, or an answer's tokens are not those of its text, the session goes
    back to the nearest kept state and reads from there.

    Attributes:
        messages: roles and contents, the system prompt first if there is one.
        uses_fallback: the tokenizer has no chat template, and `FALLBACK_TEMPLATE` serves.
        found: how many tokens that the latest message needed were not read, but found in the prefix store.
    """

    def __init__(self, session: Session, system: str | None = None, *, store: PrefixStore | None = None) -> None:
        """Begin a conversation behind whatever the session has read.

        Args:
            session: a session with a tokenizer, at any position.
            system: the system prompt.
            store: where to keep the states after the system prompt and every message, and to look for them.

        Raises:
            ValueError: the session has no tokenizer, or the template takes no system prompt.
        """
        if session.tokenizer is None:
            raise ValueError("the session has no tokenizer to render messages with: give it one")
        self._session, self._tokenizer, self._store = session, session.tokenizer, store
        self.found = 0
        self._base = session.position
        # The earliest point that can be gone back to: the conversation's beginning, unless it was loaded without it.
        self._floor = session.snapshot
        self._base_digest = session.snapshot.digest
        self._tokens: list[int] = []
        self.uses_fallback = getattr(session.tokenizer, "chat_template", None) is None
        self.messages: list[Message] = []
        self.restart(system)

    def restart(self, system: str | None = None) -> None:
        """Forget all messages; what the session had read before the conversation stays.

        Raises:
            ValueError: the template takes no system prompt; all is as it was.
        """
        if system is None:
            self.messages = []
            return
        message = {"role": "system", "content": system}
        self._text([message, {"role": "user", "content": system}], add_generation_prompt=True)
        self.messages = [message]

    def ask(self, text: str) -> int:
        """Read a message of the user's, up to where the assistant's begins; return how many tokens were read for it.

        Raises:
            ValueError: the template refuses the messages.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return self._catch_up(self._render(add_generation_prompt=True))
        except (ValueError, KeyboardInterrupt):
            self.messages.pop()
            raise

    def answer(self, settings: Settings) -> Generator[str, None, None]:
        """Yield the assistant's message as its text becomes certain; stopping early keeps what was yielded.

        Raises:
            ValueError: the last message is not the user's.
        """
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ValueError("there is nothing to answer: ask something first")
        # Nothing is left to read, unless the conversation was saved between question and answer.
        self._catch_up(self._render(add_generation_prompt=True))
        settings, stop = self._ending(settings)
        said = ""
        try:
            with closing(self._session.write_text(settings, stop, self._tokens)) as pieces:
                for text in pieces:
                    said += text
                    yield text
        finally:
            self._tokens += self._session.written
            self.messages.append({"role": "assistant", "content": said})

    @property
    def written(self) -> int:
        """The number of tokens of the latest answer."""
        return len(self._session.written)

    def undo(self) -> str:
        """Take back the last question and its answer; return the question.

        Raises:
            ValueError: there is none.
        """
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ValueError("there is nothing to undo: no question has been asked")
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return question

    def save(self, path: Path | str) -> None:
        """Write a state file that holds the messages too; the session then has read all of them.

        Raises:
            OSError: it cannot be written.
        """
        self._catch_up(self._render(add_generation_prompt=False))
        notes = {"messages": self.messages, "base": self._base, "base_digest": self._base_digest.hex()}
        self._session.save(path, {"conversation": notes})

    @classmethod
    def load(
        cls, session: Session, path: Path | str, *, convert: bool = False, store: PrefixStore | None = None
    ) -> Conversation:
        """Go on with a conversation that was saved, or begin one behind any other state file.

        Args:
            session: a session of the model; what it had read is forgotten.
            path: the file.
            convert: accept a state of another device or dtype.
            store: see `Conversation`.

        Raises:
            StateFileError: the file does not fit the model, see `state_file.load`, or not the chat template.
        """
        notes = session.load(path, convert=convert).get("conversation")
        conversation = cls(session, store=store)
        if notes is None:
            return conversation
        conversation.messages, conversation._base = notes["messages"], notes["base"]
        conversation._base_digest = bytes.fromhex(notes["base_digest"])
        conversation._tokens = conversation._render(add_generation_prompt=False)
        if advance(conversation._base_digest, conversation._tokens) != session.snapshot.digest:
            raise StateFileError(f"{path} was saved with another chat template: use the tokenizer of that time")
        if not conversation._base:
            conversation._floor = Snapshot.fresh(session.model)
        return conversation

    def _render(self, *, add_generation_prompt: bool) -> list[int]:
        """The tokens of the whole conversation; none without a message."""
        if not self.messages:
            return []
        return self._encode(self._text(self.messages, add_generation_prompt=add_generation_prompt))

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=FALLBACK_TEMPLATE if self.uses_fallback else None,
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        # The template writes the special tokens itself.
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    def _catch_up(self, tokens: Sequence[int]) -> int:
        """Let the session be where exactly these tokens of the conversation are read; return how many it had to read.

        Raises:
            ValueError: they depart from what was read before the earliest state that is there.
        """
        session, common = self._session, _common(self._tokens, tokens)
        if common < len(self._tokens):
            if self._base + common < self._floor.position:
                raise ValueError(
                    "the conversation began behind a text whose state is not here, so that nothing before the loaded "
                    "file can be undone: load an earlier file"
                )
            session.rewind(self._base + common)
            if session.position < self._floor.position:
                session.restore(self._floor)
        known = session.position - self._base
        try:
            self.found = self._read(tokens, known)
        finally:
            self._tokens = list(tokens[: session.position - self._base])
        return len(tokens) - known - self.found

    def _read(self, tokens: Sequence[int], known: int) -> int:
        """Read what is behind the known tokens; return how many of it the store had."""
        if self._store is None or known == len(tokens):
            self._session.read(tokens[known:])
            return 0
        return self._store.read(self._session, tokens[known:], [self._after_system(tokens) - known])

    def _after_system(self, tokens: Sequence[int]) -> int:
        """How many of the tokens are the system prompt's; 0 without one, or where the template renders none alone."""
        if self.messages[0]["role"] != "system":
            return 0
        try:
            return _common(self._encode(self._text(self.messages[:1], add_generation_prompt=False)), tokens)
        except ValueError:
            return 0

    def _ending(self, settings: Settings) -> tuple[Settings, list[str]]:
        """The settings with the template's end tokens, and the strings that end a message where it is no token."""
        ends = {self._tokenizer.eos_token_id} - {None}
        stop = []
        if self.uses_fallback:
            end = self._tokenizer(_END_OF_MESSAGE, add_special_tokens=False)["input_ids"]
            ends |= set(end) if len(end) == 1 else set()
            stop = [_END_OF_MESSAGE] if len(end) > 1 else []
        return replace(settings, end_tokens=settings.end_tokens | ends), stop


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
