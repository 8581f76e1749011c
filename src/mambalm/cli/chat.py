"""`mambalm chat`: a conversation in the terminal, each turn continued from the state."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mambalm.cli.options import (
    Adapter,
    ConvertState,
    Device,
    Dtype,
    FrequencyPenalty,
    MinP,
    Model,
    PresencePenalty,
    Quantization,
    RepetitionPenalty,
    StoreFolder,
    StoreGib,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
    load_model,
    open_store,
    require_state,
)
from mambalm.data.tokenizer import load_tokenizer
from mambalm.generation import Sampling, Settings, end_tokens
from mambalm.generation.conversation import Conversation
from mambalm.generation.session import Session

HELP = """\
/undo          take back the last question and its answer
/system TEXT   begin anew with this system prompt (without TEXT: with none)
/save FILE     keep the conversation and its state
/load FILE     go on with a saved conversation, or behind any state file
/help          this list
/exit          leave, as Ctrl-D does; Ctrl-C ends an answer, and twice leaves"""


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    state: Annotated[Path | None, typer.Option(help="A saved conversation, or a text read before it.")] = None,
    convert_state: ConvertState = False,
    prefix_store: StoreFolder = None,
    prefix_store_gib: StoreGib = 10.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Talk with a model. A turn reads what it adds and nothing else; /help lists what can be done."""
    if system is not None and state is not None:
        raise ValueError("--system begins a conversation and --state goes on with one: give one of them")
    if state is not None:
        require_state(state)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    settings = Settings(sampling=sampling, max_new_tokens=max_new_tokens, seed=seed)
    store = open_store(prefix_store, prefix_store_gib)
    network = load_model(model, dtype, device, quantization, adapter)
    encoder = load_tokenizer(tokenizer or model)
    settings = replace(settings, end_tokens=end_tokens(network))

    def open_file(path: Path) -> Conversation:
        require_state(path)
        return Conversation.load(Session(network, encoder), path, convert=convert_state, store=store)

    conversation = open_file(state) if state else Conversation(Session(network, encoder), system, store=store)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if conversation.uses_fallback:
        console.print(
            f"{tokenizer or model} has no chat template: using Falcon's ChatML form (<|im_start|>role ... <|im_end|>), "
            "which this model may not have been trained on."
        )
    Chat(conversation, settings, console, open_file).run()


class Chat:
    """The loop over the lines that a user types."""

    def __init__(
        self,
        conversation: Conversation,
        settings: Settings,
        console: Console,
        open_file: Callable[[Path], Conversation],
    ) -> None:
        """Talk in `conversation`; remarks go to `console`, answers to standard output."""
        self._conversation, self._settings = conversation, settings
        self._console, self._open_file = console, open_file
        self._interrupted = False
        self._commands = {
            "undo": self._undo,
            "system": self._system,
            "save": self._save,
            "load": self._load,
            "help": lambda _: self._remark(HELP),
        }

    def run(self) -> None:
        """Read lines until the input ends, /exit or a second Ctrl-C; what cannot be done is told."""
        while (line := self._line()) not in (None, "/exit"):
            assert line is not None
            command, _, argument = line.removeprefix("/").partition(" ")
            try:
                if line.startswith("/"):
                    self._command(command, argument.strip())
                elif line:
                    self._turn(line)
            except (ValueError, OSError) as error:
                self._remark(str(error))
            except KeyboardInterrupt:
                self._interrupted = True
                self._remark("Interrupted.")

    def _line(self) -> str | None:
        """What the user typed; None where that was the end."""
        while True:
            try:
                line = _typed().strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if self._interrupted:
                    break
                self._interrupted = True
                self._remark("\nCtrl-C once more, Ctrl-D or /exit leaves.")
            else:
                self._interrupted = False
                return line
        if sys.stdin.isatty():
            self._console.print()
        return None

    def _remark(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    def _turn(self, text: str) -> None:
        began = time.perf_counter()
        read = self._conversation.ask(text)
        heard, found = time.perf_counter(), self._conversation.found
        with contextlib.closing(self._conversation.answer(self._settings)) as answer:
            try:
                for piece in answer:
                    typer.echo(piece, nl=False)
            finally:
                typer.echo()
        wrote = _speed(self._conversation.written, time.perf_counter() - heard)
        known = f", had {found:,} in the prefix store" if found else ""
        self._remark(f"read {_speed(read, heard - began)}{known}, wrote {wrote}")

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise ValueError(f"there is no command /{name}; /help lists them")
        self._commands[name](argument)

    def _undo(self, _: str) -> None:
        self._remark(f"Taken back: {self._conversation.undo()}")

    def _system(self, text: str) -> None:
        self._conversation.restart(text or None)
        self._remark("A new conversation.")

    def _save(self, name: str) -> None:
        path = _named(name, "/save")
        self._conversation.save(path)
        self._remark(f"Saved {path}.")

    def _load(self, name: str) -> None:
        self._conversation = self._open_file(_named(name, "/load"))
        asked = sum(message["role"] == "user" for message in self._conversation.messages)
        self._remark(f"Loaded {name}: {asked} question{'' if asked == 1 else 's'}.")


def _typed() -> str:
    """A line of standard input, behind a prompt where somebody types it.

    Raises:
        EOFError: there is none.
    """
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, from here on input() edits lines and recalls them
    if sys.stdout.isatty():
        return input("> ")
    # Answers go elsewhere: the prompt must not.
    typer.echo("> ", nl=False, err=True)
    return input()


def _named(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"{command} needs the name of a file")
    return Path(name).expanduser()


def _speed(count: int, seconds: float) -> str:
    return f"{count:,} tokens ({count / max(seconds, 1e-9):,.1f} tokens/s)"
