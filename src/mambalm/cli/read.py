"""`mambalm read`: read a text of any length in constant memory, and keep the state; killed, it resumes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NoReturn

import typer
from rich.console import Console

from mambalm.cli.options import (
    INTERRUPTED,
    Adapter,
    ConvertState,
    Device,
    Dtype,
    Model,
    Quantization,
    Tokenizer,
    load_model,
    require_state,
    require_writable,
)
from mambalm.data.tokenizer import load_tokenizer
from mambalm.generation import state_file
from mambalm.generation.session import Session
from mambalm.generation.snapshot import Snapshot
from mambalm.generation.token_stream import Mark, TokenStream
from mambalm.training.progress import ProgressBar, duration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read(
    model: Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A UTF-8 file; - reads standard input.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The state file to write.")],
    state: Annotated[Path | None, typer.Option(help="Go on from this state file.")] = None,
    convert_state: ConvertState = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a killed run had read.")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Time between two checkpoints.")] = 30.0,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens that are read at once; by default by the model and device.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Read a text and write the state after it. The same command resumes a run that was killed."""
    require_writable(output)
    if text != "-" and not Path(text).exists():
        raise ValueError(f"{text} does not exist: name a file, or - for standard input")
    if text != "-" and output.exists() and output.samefile(text):
        raise ValueError(f"{output} is the text itself: name another file for the state")
    if state is not None:
        require_state(state)
    network = load_model(model, dtype, device, quantization, adapter)
    encoder = load_tokenizer(tokenizer or model)
    session = Session(network, encoder, chunk_size=chunk_size, rungs=0)
    if state is not None:
        session.load(state, convert=convert_state)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _opened(text) as source:
        reading = Reading(session, encoder, source, output, restart)
        if reading.resumed:
            console.print(f"Resuming at token {session.position:,}.")
        began, first = time.monotonic(), session.position
        try:
            with _terminable():
                _run(reading, checkpoint_seconds, ProgressBar(console, "Reading"), _size(text))
        except KeyboardInterrupt as interrupt:
            kept = reading.checkpoint()
            left = f"goes on from token {kept:,}" if kept else "begins anew: not enough was read to go on from"
            console.print(f"Interrupted; the same command {'without --restart ' if restart else ''}{left}.")
            raise typer.Exit(interrupt.args[0] if interrupt.args else INTERRUPTED) from None
    seconds, count = max(time.monotonic() - began, 1e-9), session.position - first
    read = f"{count:,} of them read" if first else "read"
    console.print(
        f"{output}: {session.position:,} tokens, {read} in {seconds:,.1f} s, {count / seconds:,.0f} tokens/s",
        markup=False,
    )


@dataclass(frozen=True)
class _Place:
    """Where a resumed run goes on: the state, the tokens that wait for their chunk to be full, where in the text."""

    snapshot: Snapshot
    pending: tuple[int, ...]
    mark: Mark


class Reading:
    """A session on its way through a text, with a checkpoint beside the output.

    The checkpoint is a state file too, NAME.partial. It lies at a multiple of the chunk size and notes where the
    stream of tokens is, and the tokens that are behind the state: a resumed run reads the same chunks, so it ends in
    the same bits.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: PreTrainedTokenizerBase,
        source: BinaryIO,
        output: Path,
        restart: bool,
    ) -> None:
        """Begin, or resume where a checkpoint is.

        Raises:
            ValueError: the checkpoint is of another text, model, beginning or chunk size.
        """
        self.session, self._output = session, output
        self._partial = output.with_name(f"{output.name}.partial")
        self._base = session.snapshot.digest.hex()
        self._pending: list[int] = []
        begin, mark = session.position == 0, None
        self.resumed = self._partial.exists() and not restart
        if self.resumed:
            notes = self._resume()
            self._pending, mark = notes["pending"], Mark(**notes["mark"])
        try:
            self._stream = TokenStream(tokenizer, source, begin=begin, mark=mark)
        except ValueError as error:
            raise self._refusal(str(error)) from error
        self._place = self._begin = self._here()

    @property
    def offset(self) -> int:
        """Bytes of the text that are dealt with."""
        return self._stream.mark.offset

    def __iter__(self) -> Iterator[None]:
        """Read on, piece by piece; between two a checkpoint can be made."""
        for tokens in self._stream:
            self._pending += tokens
            whole = self.session.whole_chunks(len(self._pending))
            self.session.read(self._pending[:whole])
            del self._pending[:whole]
            # The end of a text is no place to go on from: a longer one may be tokenised otherwise there.
            if not self._stream.is_over:
                self._place = self._here()
            yield

    def checkpoint(self) -> int:
        """Make what has been read safe; return how many tokens a resumed run need not read, 0 for none."""
        place = self._place
        if place is not self._begin:
            notes = {
                "mark": asdict(place.mark),
                "pending": place.pending,
                "base": self._base,
                "chunk_size": self.session.chunk_size,
            }
            state_file.save(self._partial, place.snapshot, self.session.fingerprint, {"reading": notes})
        return place.snapshot.position if self._partial.exists() else 0

    def _here(self) -> _Place:
        return _Place(self.session.snapshot, tuple(self._pending), self._stream.mark)

    def finish(self) -> None:
        """Write the output, and remove the checkpoint.

        Raises:
            ValueError: the text has no tokens.
        """
        self.session.read(self._pending)
        if not self.session.position:
            raise ValueError("the text is empty: there is nothing to read")
        self.session.save(self._output)
        state_file.remove(self._partial)

    def _resume(self) -> dict[str, Any]:
        try:
            notes = self.session.load(self._partial).get("reading")
        except state_file.StateFileError as error:
            raise self._refusal(str(error)) from error
        if notes is None:
            raise self._refusal("it is no checkpoint of `mambalm read`")
        if notes["base"] != self._base:
            raise self._refusal("its text began behind another --state")
        if notes["chunk_size"] != self.session.chunk_size:
            raise self._refusal(f"it was begun with --chunk-size {notes['chunk_size']}")
        return dict(notes)

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"cannot resume from {self._partial}: {reason}; --restart begins anew")


def _run(reading: Reading, checkpoint_seconds: float, bar: ProgressBar, size: int | None) -> None:
    began = saved = time.monotonic()
    first, start = reading.session.position, reading.offset
    with bar:
        for _ in reading:
            now = time.monotonic()
            position = reading.session.position
            text = f"{position:,} tokens, {(position - first) / max(now - began, 1e-9):,.0f} tokens/s"
            if size is not None and reading.offset > start:
                left = (now - began) * (size - reading.offset) / (reading.offset - start)
                text += f", {duration(left)} left"
            bar.update(None if size is None else reading.offset / max(size, 1), text)
            if now - saved >= checkpoint_seconds:
                reading.checkpoint()
                saved = time.monotonic()
        reading.finish()


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, by which schedulers end what runs too long, interrupt like Ctrl-C, with its own exit code."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(128 + number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _opened(text: str) -> Iterator[BinaryIO]:
    """The bytes of a file or of standard input, without any translation of line ends."""
    if text == "-":
        yield sys.stdin.buffer
        return
    with Path(text).open("rb") as file:
        yield file


def _size(text: str) -> int | None:
    """Bytes in all, where that can be known."""
    path = Path(text)
    return path.stat().st_size if text != "-" and path.is_file() else None
