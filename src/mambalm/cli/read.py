"""`mambalm read`: read a text of any length in constant memory, and keep the state; killed, it resumes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import Console

from mambalm.cli.options import Adapter, Device, Dtype, Quantization, load_model, require_writable
from mambalm.data.tokenizer import load_tokenizer
from mambalm.generation import state_file
from mambalm.generation.session import Session
from mambalm.generation.token_stream import Mark, TokenStream
from mambalm.training.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INTERRUPTED = 130


def read(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or the name of a Hugging Face repository.")],
    text: Annotated[str, typer.Argument(help="A UTF-8 file; - reads standard input.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The state file to write.")],
    state: Annotated[Path | None, typer.Option(help="Go on from this state file.")] = None,
    convert_state: Annotated[bool, typer.Option(help="Accept a state of another device or dtype.")] = False,
    restart: Annotated[bool, typer.Option(help="Forget what a killed run had read.")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Time between two checkpoints.")] = 30.0,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens that are read at once; by default by the model and device.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's folder or name; by default MODEL's.")] = None,
) -> None:
    """Read a text and write the state after it. The same command resumes a run that was killed."""
    require_writable(output)
    if text != "-" and not Path(text).exists():
        raise ValueError(f"{text} does not exist: name a file, or - for standard input")
    if text != "-" and output.exists() and output.samefile(text):
        raise ValueError(f"{output} is the text itself: name another file for the state")
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
            _run(reading, checkpoint_seconds, ProgressBar(console, "Reading"), _size(text))
        except KeyboardInterrupt:
            left = "goes on from the last checkpoint" if reading.is_kept else "begins anew: no checkpoint was made yet"
            console.print(f"Interrupted; the same command {left}.")
            raise typer.Exit(_INTERRUPTED) from None
    seconds, count = max(time.monotonic() - began, 1e-9), session.position - first
    console.print(
        f"{output}: {session.position:,} tokens; read {count:,} of them in {seconds:,.1f} s, {count / seconds:,.0f} "
        "tokens/s"
    )


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

    @property
    def is_kept(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._partial.exists()

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
            yield

    def checkpoint(self) -> None:
        """Make what has been read safe."""
        notes = {
            "mark": asdict(self._stream.mark),
            "pending": self._pending,
            "base": self._base,
            "chunk_size": self.session.chunk_size,
        }
        self.session.save(self._partial, {"reading": notes})

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
    first = reading.session.position
    with bar:
        for _ in reading:
            now = time.monotonic()
            position = reading.session.position
            speed = f"{position:,} tokens, {(position - first) / max(now - began, 1e-9):,.0f} tokens/s"
            bar.update(None if size is None else reading.offset / max(size, 1), speed)
            if now - saved >= checkpoint_seconds:
                reading.checkpoint()
                saved = time.monotonic()
        reading.finish()


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
