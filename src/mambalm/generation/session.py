"""Sessions: one reader of one text, which can be forked, rewound, saved, and read on from where it was."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mambalm.generation import state_file
from mambalm.generation.engine import Engine, Settings, Token, read
from mambalm.generation.fingerprint import Fingerprint
from mambalm.generation.reading import check_prompts, chosen_chunk_size, no_numbers, require_ours
from mambalm.generation.sampling import NO_TOKEN, Chooser
from mambalm.generation.snapshot import Snapshot
from mambalm.generation.text import TextStream, texts_of
from mambalm.layers.state import State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambalm.generation.prefix_store import PrefixStore
    from mambalm.models.common import MambalmForCausalLM


class Ladder:
    """Snapshots to go back to: close together near the newest, ever farther apart behind it.

    A snapshot goes when its neighbours' distances from the newest are within a factor of 2 of each other. So n tokens
    leave at most about 2 log2(n), and going back by d tokens lands at most d tokens (or the spacing of what was
    offered) too far. Above `limit`, the oldest go.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` snapshots; 0 keeps none."""
        self._limit = limit
        self._rungs: list[tuple[int, Snapshot]] = []

    def copy(self) -> Ladder:
        """A ladder of its own over the same snapshots."""
        other = Ladder(self._limit)
        other._rungs = list(self._rungs)
        return other

    @property
    def positions(self) -> list[int]:
        """Where the snapshots are, ascending."""
        return [position for position, _ in self._rungs]

    def offer(self, snapshot: Snapshot) -> None:
        """Keep the newest snapshot, and drop those that are no longer worth their memory."""
        newest = snapshot.position
        if not newest:
            return  # the beginning can always be gone back to
        self.drop_after(newest - 1)
        rungs = [*self._rungs, (newest, snapshot)]
        kept = rungs[:1]
        for (position, rung), (following, _) in pairwise(rungs[1:]):
            if newest + 1 - kept[-1][0] > 2 * (newest + 1 - following):
                kept.append((position, rung))
        kept += rungs[-1:] if len(rungs) > 1 else []
        self._rungs = kept[max(0, len(kept) - self._limit) :] if self._limit else []

    def drop_after(self, position: int) -> None:
        """Forget what is behind `position`."""
        self._rungs = [rung for rung in self._rungs if rung[0] <= position]

    def at_or_before(self, position: int) -> Snapshot | None:
        """The nearest snapshot that is not behind `position`."""
        return next((snapshot for at, snapshot in reversed(self._rungs) if at <= position), None)


class Session:
    """A model that reads one text.

    Attributes:
        model, tokenizer: who reads; the tokenizer is named in state files and may be None.
        snapshot: what has been read, as a value.
        ladder: what `rewind` goes back to.
        written: the tokens that the latest `write` wrote and the session has read.
    """

    def __init__(
        self,
        model: MambalmForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        chunk_size: int | None = None,
        rungs: int = 16,
    ) -> None:
        """Begin a text.

        Args:
            model: a causal language model of mambalm.
            tokenizer: its tokenizer.
            chunk_size: tokens that are read at once, from one multiple of it to the next; None: chosen for the model.
            rungs: states to keep for `rewind`, each of `snapshot.nbytes`.

        Raises:
            TypeError: the model is none of mambalm's.
            ValueError: the chunk size is below 1.
        """
        require_ours(model)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.chunk_size = chosen_chunk_size(model) if chunk_size is None else chunk_size
        self.snapshot = Snapshot.fresh(model)
        self.ladder = Ladder(rungs)
        self.written: list[int] = []

    @cached_property
    def engine(self) -> Engine:
        """What runs the steps; forks share it."""
        return Engine(self.model)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the model and tokenizer, taken once: the weights must not change during a session."""
        return Fingerprint.of(self.model, self.tokenizer)

    @property
    def position(self) -> int:
        """The number of tokens read."""
        return self.snapshot.position

    def chunk_ends(self, count: int) -> list[int]:
        """After how many of `count` further tokens to keep states for texts that begin alike, the last first.

        They are ends of chunks, which need no split: the last, and before it at distances that double.
        """
        last = (self.position + count) // self.chunk_size
        ends = ((last + 1 - 2**power) * self.chunk_size - self.position for power in range(last.bit_length()))
        return [end for end in ends if end > 0]

    def whole_chunks(self, count: int) -> int:
        """How many of `count` further tokens end at a multiple of the chunk size: the chunks then need no split."""
        return max(0, (self.position + count) // self.chunk_size * self.chunk_size - self.position)

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens, in constant memory.

        Chunks end at multiples of the chunk size counted from the text's first token: a text has the same chunks,
        and so the same rounding, whether it is read from its beginning or from a multiple on.

        Raises:
            ValueError: a token id is outside of the model's vocabulary; then nothing is read.
            ValueError: logits are NaN or infinite; the session is where they were not.
            TypeError: a text, or all that a tokenizer returned, in place of its token ids.
        """
        if isinstance(tokens, str | Mapping):
            raise TypeError(
                f"a session reads token ids, as in tokenizer(text)['input_ids'], not a {type(tokens).__name__}"
            )
        if len(tokens):
            check_prompts(self.model, [torch.as_tensor(tokens)])
        at, start = 0, self.position
        while at < len(tokens):
            self.ladder.offer(self.snapshot)
            piece = list(tokens[at : at + self.chunk_size - (start + at) % self.chunk_size])
            logits, state = read(self.model, [torch.tensor(piece)], self.snapshot.state, chunk_size=self.chunk_size)
            self.snapshot = self.snapshot.after(piece, logits, state)
            at += len(piece)

    @torch.no_grad()
    def write(self, settings: Settings) -> Generator[int, None, None]:
        """Yield the tokens that follow, and read each when the next is asked for.

        It ends before an end token, which it does not read, and after `max_new_tokens`. A caller that stops asking
        leaves the session behind the last token but one; `written` says what was read.

        Raises:
            ValueError: nothing has been read yet; or the logits became NaN or infinite, and the session is where it
                began to write.
        """
        start, self.written = self.snapshot, []
        if start.logits is None:
            raise ValueError("there is nothing to continue: read at least one token, such as the start-of-text token")
        self.ladder.offer(start)
        logits, written, is_whole = start.logits, list[int](), True
        seen = (start.counts > 0)[None]
        chooser = Chooser.of([settings.sampling], settings.seeds(1)[:1], seen, device=logits.device)
        reader = self.engine.reader(start.state)
        try:
            for _ in range(settings.max_new_tokens):
                token = chooser(logits).tokens
                chosen = int(token)
                if chosen == NO_TOKEN:
                    is_whole = False
                    raise no_numbers(f"after token {start.position + len(written):,}", self.model.dtype)
                written.append(chosen)
                if chosen in settings.end_tokens:
                    return
                yield chosen
                is_whole = False
                logits = reader(token)
                is_whole = True
        finally:
            # Ctrl-C within a step leaves the reader's state in pieces, and NaN none to keep: the session then stays
            # where it began to write.
            if is_whole:
                state = reader.state()
                self.written = written[: int(state.position) - start.position]
                self.snapshot = start.after(self.written, logits.clone(), state)

    def write_text(
        self, settings: Settings, stop: Sequence[str] = (), context: Sequence[int] = ()
    ) -> Generator[str, None, None]:
        """Yield the text that follows as it becomes certain; see `write`.

        Args:
            settings: how to generate.
            stop: the text ends before the first of these strings, which the session may have read a part of.
            context: the last tokens read, for tokenizers whose text depends on them.

        Raises:
            ValueError: the session has no tokenizer, or has read nothing.
        """
        if self.tokenizer is None:
            raise ValueError("the session has no tokenizer to write text with: give it one, or use write")
        stream = TextStream(self.tokenizer, context, stop)
        with closing(self.write(settings)) as tokens:
            for token in tokens:
                if text := stream.push(token):
                    yield text
                if stream.stopped:
                    break
        if text := stream.flush():
            yield text

    def fork(self) -> Session:
        """A second session with the same past: it costs no memory until one of them goes on."""
        _ = self.engine  # made once, for both
        other = copy.copy(self)
        other.ladder = self.ladder.copy()
        return other

    def rewind(self, position: int) -> int:
        """Go back to the nearest kept snapshot at or before `position`, the beginning at worst; return where it is.

        Raises:
            ValueError: the position is negative, or has not been read yet.
        """
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to token {position}: the session has read {self.position}")
        if position < self.position:
            self.restore(self.ladder.at_or_before(position) or Snapshot.fresh(self.model))
        return self.position

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same text; the ladder forgets what comes after it."""
        self.snapshot = snapshot
        self.ladder.drop_after(snapshot.position)

    def save(self, path: Path | str, notes: Mapping[str, Any] | None = None) -> None:
        """Write a state file, with notes that `load` gives back; see `state_file.save`."""
        state_file.save(Path(path), self.snapshot, self.fingerprint, notes)

    def load(self, path: Path | str, *, convert: bool = False) -> dict[str, Any]:
        """Go on from a state file, with an empty ladder; return its notes. See `state_file.load` for the errors."""
        self.snapshot, notes = state_file.load(Path(path), self.model, self.fingerprint, convert=convert)
        self.ladder.drop_after(-1)
        return notes


def continue_texts(
    session: Session,
    texts: Sequence[str],
    settings: Settings,
    stop: Sequence[str] = (),
    store: PrefixStore | None = None,
) -> Iterator[tuple[Token, str]]:
    """Continue each text behind what the session has read, as a batch; yield each token, with the text it made certain.

    Rows are those of `Settings.copies`. Behind something a text joins on without a special token before it, and an
    empty one continues the session as it is, which stays where it was. With a store, what it has of a text is not read
    again, and the states after the text and at some `Session.chunk_ends` of it are kept.

    Raises:
        ValueError: the session has no tokenizer, a text and the session have no tokens, or see `Engine.generate`.
    """
    if session.tokenizer is None:
        raise ValueError("the session has no tokenizer to read text with: give it one")
    streams, rows = list[TextStream](), list[Snapshot]()
    for number, text in enumerate(texts):
        behind = session.fork()
        tokens = session.tokenizer(text, add_special_tokens=not session.position, verbose=False)["input_ids"]
        if store is None or not tokens:
            behind.read(tokens)
        else:
            store.read(behind, tokens, behind.chunk_ends(len(tokens)))
        if behind.snapshot.logits is None:
            raise ValueError(
                f"prompt {number + 1} has no tokens; give it at least one, such as the start-of-text token"
            )
        rows += [behind.snapshot] * settings.copies
        streams += [TextStream(session.tokenizer, tokens, stop) for _ in range(settings.copies)]
    logits = torch.cat([row.logits for row in rows if row.logits is not None])
    seen = torch.stack([row.counts > 0 for row in rows]) if settings.sampling.penalizes else None
    chooser = session.engine.chooser(len(rows), settings, seen)
    state = State.cat([row.state for row in rows])
    tokens_written = session.engine.go_on(logits, state, chooser, settings, lambda row: streams[row].stopped)
    yield from texts_of(tokens_written, streams, settings)
