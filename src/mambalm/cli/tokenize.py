"""`mambalm tokenize`: text to token files, on parallel processes; killed, it resumes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mambalm.data.inputs import Reading
from mambalm.data.shards import verify as verify_folder
from mambalm.data.token_files import Metadata
from mambalm.data.tokenization import Tokenization, collect
from mambalm.data.tokenization import tokenize as run
from mambalm.training.progress import ProgressBar

_INTERRUPTED = 130


def tokenize(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the token files.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Text, JSON lines (.gz, .zst), Parquet, folders, or data sets of the Hub (owner/name)."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's folder, or its name on the Hub.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Conversations; only the assistant's turns are learned.")
    ] = False,
    field: Annotated[str | None, typer.Option(help="Of JSON lines and tables; by default text, or messages.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Every line of a text file is a document.")] = False,
    pattern: Annotated[str | None, typer.Option(help="Which files of folders, such as '*.c'.")] = None,
    config: Annotated[str | None, typer.Option(help="The configuration of a data set of the Hub.")] = None,
    split: Annotated[str, typer.Option(help="The split of a data set of the Hub.")] = "train",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over documents that cannot be read.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one per core.")] = None,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Input of a shard; what a kill can lose.")] = 64,
    verify: Annotated[bool, typer.Option("--verify", help="Only check the token files in OUTPUT.")] = False,
    collect_shards: Annotated[
        bool, typer.Option("--collect", help="Only describe the .ds files in OUTPUT, written by a cluster's tasks.")
    ] = False,
) -> None:
    """Tokenise a corpus. The same command resumes a run that was killed; a folder that is complete is verified."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if verify:
        console.print(f"{output} is intact: {_counts(verify_folder(output))}")
        return
    if tokenizer is None:
        raise ValueError("no tokenizer: name one with --tokenizer, a folder or a repository of the Hub")
    if collect_shards:
        console.print(f"{output}: {_counts(collect(output, tokenizer))}")
        return
    if not inputs:
        raise ValueError("no input: name files, folders or data sets of the Hub")
    reading = Reading(field or ("messages" if chat else "text"), skip_bad, config, split, lines)
    task = Tokenization(tuple(inputs), output, tokenizer, reading, chat, pattern, shard_megabytes << 20)
    _run(task, workers or _cores(), console)


def _cores() -> int:
    """The cores that this process may use, where the system tells; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(task: Tokenization, workers: int, console: Console) -> None:
    began = time.monotonic()
    bar = ProgressBar(console, "Tokenising")

    def show(done: int, size: int, tokens: int) -> None:
        bar.update(done / max(size, 1), f"{tokens:,} tokens, {done / 1e6:,.0f} of {size / 1e6:,.0f} MB")

    try:
        with bar:
            outcome = run(task, workers=workers, on_progress=show)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on behind the last complete shard.")
        raise typer.Exit(_INTERRUPTED) from None
    seconds = time.monotonic() - began
    console.print(f"{task.folder}: {_counts(outcome.metadata)}")
    if outcome.text_bytes:
        speed = outcome.text_bytes / seconds / 1e6
        console.print(f"{speed:,.1f} MB/s with {workers} processes, {seconds:,.1f} s")
    if outcome.skipped:
        console.print(f"{outcome.skipped:,} documents could not be read, the first: {outcome.first_skipped}")
    if outcome.empty:
        console.print(f"{outcome.empty:,} documents had no text.")


def _counts(metadata: Metadata) -> str:
    ratio = metadata.text_bytes / max(metadata.tokens, 1)
    return (
        f"{metadata.documents:,} documents, {metadata.tokens:,} tokens, {metadata.text_bytes:,} bytes of text "
        f"({ratio:.2f} bytes per token), {len(metadata.shards)} shards"
    )
