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

from mambalm.cli.options import Adapter, Device, Dtype, Quantization, load_model
from mambalm.data.tokenizer import load_tokenizer
from mambalm.generation import Engine, Sampling, Settings, TextStream, beam_search, end_tokens
from mambalm.generation import generate as generate_text
from mambalm.generation.session import Session, continue_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or the name of a Hugging Face repository.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue; - reads standard input.")] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(help="A file to continue; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that sum to p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least p times as probable as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens come less often again.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of tokens written.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once for each time.")] = 0.0,
    copies: Annotated[int, typer.Option(help="Continuations of each prompt, which is read once.")] = 1,
    beams: Annotated[int, typer.Option(help="Above 1: beam search, keeping so many; writes the best `copies`.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="Write JSON lines, with so many likeliest tokens each.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    state: Annotated[Path | None, typer.Option(help="Read the prompts behind this state file, each by itself.")] = None,
    convert_state: Annotated[bool, typer.Option(help="Accept a state of another device or dtype.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens of the prompt that are read at once.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's folder or name; by default MODEL's.")] = None,
) -> None:
    """Continue one prompt as a stream, or several as a batch."""
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    # A state can be continued as it is.
    texts = _read_prompts(prompts or ([] if state is None or prompt_file else [""]), prompt_file or [])
    settings = Settings(
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        chunk_size=chunk_size,
        copies=copies,
        logprobs=logprobs,
    )
    _check(settings, beams, stop, state)
    network = load_model(model, dtype, device, quantization, adapter)
    encoder = load_tokenizer(tokenizer or model)
    settings = replace(settings, end_tokens=end_tokens(network))
    if beams > 1:
        _write_beams(Engine(network), encoder, texts, settings, beams)
    elif logprobs is not None:
        _write_tokens(Engine(network), encoder, texts, settings, stop or [])
    elif state is not None:
        session = Session(network, encoder, chunk_size=chunk_size, rungs=0)
        session.load(state, convert=convert_state)
        _write_texts(continue_texts(session, texts, settings, stop or []), len(texts) * copies)
    else:
        _write_texts(generate_text(network, encoder, texts, settings, stop or []), len(texts) * copies)


def _check(settings: Settings, beams: int, stop: Sequence[str] | None, state: Path | None) -> None:
    """Refuse options that do not go together, and a state that is not there."""
    if beams < 1:
        raise ValueError(f"--beams is {beams}; it must be at least 1")
    if beams > 1 and (settings.sampling != Sampling() or settings.logprobs is not None or stop or state is not None):
        raise ValueError("--beams goes with none of the sampling options, --logprobs, --stop and --state: leave it out")
    if beams > 1 and settings.copies > beams:
        raise ValueError(f"--beams {beams} finds {beams} texts and --copies asks for {settings.copies}: ask for fewer")
    if settings.logprobs is not None and state is not None:
        raise ValueError("--logprobs does not go with --state: leave one of them out")
    if state is not None and not state.is_file():
        raise ValueError(f"{state} is no state file: name one that `mambalm read` or /save of `mambalm chat` wrote")


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


def _write_tokens(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: Settings,
    stop: Sequence[str],
) -> None:
    """A line of JSON per token."""
    prompts = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts]
    rows = range(len(texts) * settings.copies)
    streams = [TextStream(tokenizer, prompts[row // settings.copies].tolist(), stop) for row in rows]
    for token in engine.generate(prompts, settings, lambda row: streams[row].stopped):
        likeliest = [{"id": id, "token": tokenizer.decode([id]), "logprob": value} for id, value in token.likeliest]
        line: dict[str, Any] = {
            "row": token.row,
            "id": token.id,
            "token": tokenizer.decode([token.id]),
            "logprob": token.logprob,
        }
        line |= {"text": streams[token.row].push(token.id), "likeliest": likeliest}
        typer.echo(json.dumps(line, ensure_ascii=False))


def _write_texts(pieces: Iterable[tuple[int, str]], rows: int) -> None:
    """A single row as it comes, several in their order at the end."""
    written = [""] * rows
    for row, piece in pieces:
        written[row] += piece
        if rows == 1:
            typer.echo(piece, nl=False)
    if rows == 1:
        typer.echo()
    else:
        for number, text in enumerate(written, 1):
            typer.echo(f"--- {number}\n{text}")


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
