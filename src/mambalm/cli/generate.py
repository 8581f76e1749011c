"""`mambalm generate`: continue prompts, printing the text as it arrives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import mambalm
from mambalm.cli.options import Device, Dtype, parse_device, parse_dtype
from mambalm.cli.tokenizer import load_tokenizer
from mambalm.generation import Sampling, Settings, end_tokens
from mambalm.generation import generate as generate_text
from mambalm.generation.session import Session, continue_texts


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
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    state: Annotated[Path | None, typer.Option(help="Read the prompts behind this state file, each by itself.")] = None,
    convert_state: Annotated[bool, typer.Option(help="Accept a state of another device or dtype.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    chunk_size: Annotated[int, typer.Option(help="Tokens of the prompt that are read at once.")] = 2048,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's folder or name; by default MODEL's.")] = None,
) -> None:
    """Continue one prompt as a stream, or several as a batch."""
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    # A state can be continued as it is.
    texts = _read_prompts(prompts or ([] if state is None or prompt_file else [""]), prompt_file or [])
    network = mambalm.load(model, dtype=parse_dtype(dtype), device=parse_device(device))
    encoder = load_tokenizer(tokenizer or model)
    settings = Settings(
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens(network),
        seed=seed,
        chunk_size=chunk_size,
    )
    if state is None:
        pieces = generate_text(network, encoder, texts, settings, stop or [])
    else:
        session = Session(network, encoder, chunk_size=chunk_size, rungs=0)
        session.load(state, convert=convert_state)
        pieces = continue_texts(session, texts, settings, stop or [])
    written = [""] * len(texts)
    for row, piece in pieces:
        written[row] += piece
        if len(texts) == 1:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if len(texts) == 1:
        typer.echo()
    else:
        for number, text in enumerate(written, 1):
            typer.echo(f"--- {number}\n{text}")


def _read_prompts(prompts: list[str], files: list[Path]) -> list[str]:
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    texts += [file.read_text(encoding="utf-8") for file in files]
    if not texts:
        raise ValueError('no prompt; give one as in `mambalm generate MODEL "prompt"`, with --prompt-file or as -')
    return texts
