"""`mambalm generate`: continue prompts, printing the text as it arrives."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from mambalm.cli.options import (
    INTERRUPTED,
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
    told,
)
from mambalm.data.tokenizer import load_tokenizer
from mambalm.generation import Engine, PrefixStore, Sampling, Settings, Token, beam_search, end_tokens
from mambalm.generation.session import Session, continue_texts
from mambalm.generation.text import generate_with_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambalm.models.common import MambalmForCausalLM


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue; - reads standard input.")
    ] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(help="A file to continue; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    copies: Annotated[int, typer.Option(help="Continuations of each prompt, which is read once.")] = 1,
    beams: Annotated[int, typer.Option(help="Above 1: beam search, keeping so many; writes the best `copies`.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="Write JSON lines, with so many likeliest tokens each.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    state: Annotated[Path | None, typer.Option(help="Read the prompts behind this state file, each by itself.")] = None,
    convert_state: ConvertState = False,
    prefix_store: StoreFolder = None,
    prefix_store_gib: StoreGib = 10.0,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens of the prompt that are read at once.")] = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Continue one prompt as a stream, or several as a batch."""
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    settings = Settings(
        sampling=sampling, max_new_tokens=max_new_tokens, seed=seed, chunk_size=chunk_size, copies=copies,
        logprobs=logprobs,
    )  # fmt: skip
    store = open_store(prefix_store, prefix_store_gib)
    _check(settings, beams, stop, state, store)
    # A state can be continued as it is.
    texts = _read_prompts(prompts or ([] if state is None or prompt_file else [""]), prompt_file or [])
    network = load_model(model, dtype, device, quantization, adapter)
    encoder = load_tokenizer(tokenizer or model)
    settings = replace(settings, end_tokens=end_tokens(network))
    if beams > 1:
        _write_beams(Engine(network), encoder, texts, settings, beams)
        return
    if state is None and store is None:
        pieces = generate_with_tokens(Engine(network), encoder, texts, settings, stop or [])
    else:
        session = _session(network, encoder, chunk_size, state, convert_state)
        pieces = continue_texts(session, texts, settings, stop or [], store)
    if logprobs is None:
        _write_texts(pieces, len(texts) * copies)
    else:
        _write_tokens(pieces, encoder)
    if store is not None:
        typer.echo(told(store), err=True)


def _session(
    network: MambalmForCausalLM,
    encoder: PreTrainedTokenizerBase,
    chunk_size: int | None,
    state: Path | None,
    convert: bool,
) -> Session:
    """A session behind a state file, if there is one."""
    session = Session(network, encoder, chunk_size=chunk_size, rungs=0)
    if state is not None:
        session.load(state, convert=convert)
    return session


def _check(
    settings: Settings, beams: int, stop: Sequence[str] | None, state: Path | None, store: PrefixStore | None
) -> None:
    """Refuse options that do not go together, and a state that is not there."""
    if beams < 1:
        raise ValueError(f"--beams is {beams}; it must be at least 1")
    from_states = state is not None or store is not None
    if beams > 1 and (settings.sampling != Sampling() or settings.logprobs is not None or stop or from_states):
        raise ValueError(
            "--beams goes with none of the sampling options, --logprobs, --stop, --state, --prefix-store: leave it out"
        )
    if beams > 1 and settings.copies > beams:
        raise ValueError(f"--beams {beams} finds {beams} texts and --copies asks for {settings.copies}: ask for fewer")
    if state is not None:
        require_state(state)


def _write_beams(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: Settings, beams: int
) -> None:
    """The best continuations of each text, with their scores where there are several."""
    number = 0
    for text in texts:
        found = beam_search(
            engine,
            torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long),
            beams,
            max_new_tokens=settings.max_new_tokens,
            end_tokens=settings.end_tokens,
            chunk_size=settings.chunk_size,
        )
        for beam in found[: settings.copies]:
            number += 1
            written = tokenizer.decode(list(beam.tokens), skip_special_tokens=True)
            single = len(texts) * settings.copies == 1
            typer.echo(written if single else f"--- {number} ({beam.score:.4f})\n{written}")


def _write_tokens(pieces: Iterable[tuple[Token, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    """A line of JSON per token; the texts of a row's lines are its text."""
    for token, text in pieces:
        likeliest = [{"id": id, "token": tokenizer.decode([id]), "logprob": value} for id, value in token.likeliest]
        line: dict[str, Any] = {
            "row": token.row,
            "id": token.id,
            "token": tokenizer.decode([token.id]),
            "logprob": token.logprob,
            "text": text,
            "likeliest": likeliest,
        }
        typer.echo(json.dumps(line, ensure_ascii=False))


def _write_texts(pieces: Iterable[tuple[Token, str]], rows: int) -> None:
    """A single row as it comes, several in their order at the end; Ctrl-C keeps what was written."""
    written, is_interrupted = [""] * rows, False
    try:
        for token, text in pieces:
            written[token.row] += text
            if rows == 1 and text:
                typer.echo(text, nl=False)
    except KeyboardInterrupt:
        is_interrupted = True
    if rows == 1:
        typer.echo()
    else:
        for number, text in enumerate(written, 1):
            typer.echo(f"--- {number}\n{text}")
    if is_interrupted:
        raise typer.Exit(INTERRUPTED)


def _read_prompts(prompts: list[str], files: list[Path]) -> list[str]:
    texts = [_decoded(sys.stdin.buffer.read(), "standard input") if prompt == "-" else prompt for prompt in prompts]
    texts += [_decoded(file.read_bytes(), str(file)) for file in files]
    if not texts:
        raise ValueError('no prompt; give one as in `mambalm generate MODEL "prompt"`, with --prompt-file or as -')
    return texts


def _decoded(text: bytes, name: str) -> str:
    """The text as it is, its line ends too, which are not for us to translate."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error}): convert it, as with `iconv -t UTF-8`") from error
