"""`mambalm benchmark`: speed and memory of whole models, beside a Transformer of the same size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from mambalm.cli.options import (
    Device,
    Dtype,
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    parse_device,
    parse_dtype,
    require_writable,
)
from mambalm.data.tokenizer import load_tokenizer
from mambalm.diagnostics.benchmark import (
    MODES,
    Subject,
    checkpoint_subject,
    measure_generate,
    measure_memory,
    measure_restore,
    measure_throughput,
    random_subject,
    transformer_beside,
)
from mambalm.diagnostics.benchmark.figures import draw
from mambalm.diagnostics.benchmark.measuring import GIB, environment, release
from mambalm.diagnostics.benchmark.memory import Limits, require_mode
from mambalm.diagnostics.benchmark.summary import summary
from mambalm.generation import Sampling, Settings
from mambalm.models.shapes import SHAPES
from mambalm.training.files import replacing

Models = Annotated[
    list[str] | None, typer.Argument(help="Checkpoints' folders or hub names, of mambalm or any of transformers.")
]
Random = Annotated[
    list[str] | None, typer.Option("--random", help=f"A shape with random weights: {', '.join(SHAPES)}.")
]
Beside = Annotated[bool, typer.Option(help="Measure a Transformer of the same size, with random weights, as well.")]
Stock = Annotated[bool, typer.Option("--transformers", help="Use transformers' own classes for all models.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="The JSON file; the figure is the PNG beside it.")]
Chunk = Annotated[
    int | None, typer.Option(min=1, help="Tokens that are read at once; by default chosen, 2048 for transformers'.")
]
Commit = Annotated[str | None, typer.Option(help="What is measured, where mambalm was copied without git.")]

benchmark = typer.Typer(no_args_is_help=True, help="Measure whole models; each command writes a JSON file and a PNG.")


@benchmark.command()
def generate(
    models: Models = None,
    random: Random = None,
    prompt: Annotated[str | None, typer.Option(help="A text to continue; by default random tokens.")] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Random tokens of the prompt.")] = 100,
    genlen: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs, after one to warm up; medians are told.")] = 3,
    seed: Annotated[int, typer.Option(help="Of prompt and sampling.")] = 0,
    beside: Beside = True,
    transformers: Stock = False,
    dtype: Dtype = None,
    device: Device = None,
    tokenizer: Annotated[str | None, typer.Option(help="For --prompt: a tokenizer; by default MODEL's.")] = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time to the first token, and time per token after it."""
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    settings = Settings(sampling=sampling, max_new_tokens=genlen, seed=seed)
    ids = None
    encoder = None
    if prompt is not None:
        if not (tokenizer or models):
            raise ValueError("--prompt needs a tokenizer: name one with --tokenizer, or a MODEL that has one")
        encoder = load_tokenizer(tokenizer or (models or [""])[0])
        ids = torch.tensor([encoder(prompt)["input_ids"]] * batch)

    def measure(subject: Subject) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        given = torch.randint(subject.vocabulary, (batch, prompt_length), generator=generator) if ids is None else ids
        found = measure_generate(subject, given, replace(settings), repeats)
        tokens = found.pop("tokens")
        return found if encoder is None else {**found, "text": encoder.decode(tokens[0])}

    told = {"prompt": prompt, "genlen": genlen, "batch": batch, "repeats": repeats, "seed": seed}
    place = parse_device(device)
    subjects = _subjects(models, random, dtype, place, beside, transformers)
    _report("generate", subjects, measure, told, place, output, commit)


@benchmark.command()
def memory(
    models: Models = None,
    random: Random = None,
    memory_gib: Annotated[float, typer.Option(help="The cap, weights included, in GiB.")] = 24.0,
    mode: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(MODES)}; by default all.")] = None,
    shortest: Annotated[int, typer.Option(help="The first prompt, a power of two.")] = 2**10,
    longest: Annotated[int, typer.Option(help="The last prompt, a power of two.")] = 2**20,
    seconds: Annotated[float, typer.Option(help="Time for each mode of each model.")] = 120.0,
    chunk_size: Chunk = None,
    beside: Beside = True,
    transformers: Stock = False,
    dtype: Dtype = None,
    device: Device = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """The longest prompt that can be read under a cap on memory: at once, in chunks, token by token."""
    for name in mode or ():
        require_mode(name)
    limits = Limits(
        bytes=int(memory_gib * GIB), shortest=shortest, longest=longest, seconds=seconds, chunk_size=chunk_size
    )

    def measure(subject: Subject) -> dict[str, Any]:
        modes = [measure_memory(subject, name, limits) for name in mode or MODES]
        for one in modes:
            if one.get("longest") == 0:
                limit = f"{memory_gib:g} GiB are" if one["stopped_by"] == "memory" else f"{seconds:g} seconds are"
                typer.echo(f"{subject.name}, {one['mode']}: {limit} too little for {shortest:,} tokens", err=True)
        return {"modes": modes}

    told: dict[str, Any] = {
        "memory_gib": memory_gib,
        "shortest": shortest,
        "longest": longest,
        "chunk_size": chunk_size,
        "seconds": seconds,
    }
    place = parse_device(device)
    subjects = _subjects(models, random, dtype, place, beside, transformers)
    _report("memory", subjects, measure, told, place, output, commit)


@benchmark.command()
def throughput(
    models: Models = None,
    random: Random = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 130_000,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured at each sampled position.")] = 256,
    seconds: Annotated[float, typer.Option(help="Write all tokens if by the samples that takes no longer.")] = 250.0,
    chunk_size: Chunk = None,
    beside: Beside = True,
    transformers: Stock = False,
    dtype: Dtype = None,
    device: Device = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Speed and memory from the first token to the last, at batch 1."""

    def measure(subject: Subject) -> dict[str, Any]:
        return measure_throughput(subject, tokens, steps=steps, chunk_size=chunk_size, seconds=seconds)

    told: dict[str, Any] = {"tokens": tokens, "steps": steps, "seconds": seconds, "chunk_size": chunk_size}
    place = parse_device(device)
    subjects = _subjects(models, random, dtype, place, beside, transformers)
    _report("throughput", subjects, measure, told, place, output, commit)


@benchmark.command()
def restore(
    models: Models = None,
    random: Random = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens that the state has read.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Saves and restores; medians are told.")] = 7,
    dtype: Dtype = None,
    device: Device = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time to save a state and to restore it from the page cache; mambalm's models only."""
    place = parse_device(device)
    subjects = _subjects(models, random, dtype, place, False, False)
    told = {"length": length, "repeats": repeats}
    _report("restore", subjects, lambda one: measure_restore(one, length, repeats), told, place, output, commit)


def _subjects(
    models: list[str] | None,
    random: list[str] | None,
    dtype: str | None,
    device: torch.device,
    beside: bool,
    transformers: bool,
) -> Iterator[Subject]:
    """The models one after the other, each followed by its Transformer if it is none itself."""
    if not models and not random:
        raise ValueError("there is nothing to measure: name a MODEL, or a shape with --random")
    wanted = parse_dtype(dtype)
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    makers: list[Callable[[], Subject]] = [
        lambda name=name: checkpoint_subject(name, wanted, device, transformers=transformers)  # type: ignore[misc]
        for name in models or []
    ]
    makers += [
        lambda name=name: random_subject(name, wanted or default, device, transformers=transformers)  # type: ignore[misc]
        for name in random or []
    ]
    for make in makers:
        subject = make()
        yield subject
        other = transformer_beside(subject) if beside and subject.is_recurrent else None
        del subject
        release(device)
        if other is not None:
            yield other
            del other
            release(device)


def _report(
    kind: str,
    subjects: Iterator[Subject],
    measure: Callable[[Subject], dict[str, Any]],
    settings: dict[str, Any],
    device: torch.device,
    output: Path | None,
    commit: str | None,
) -> None:
    """Measure all subjects; write, after each, what there is."""
    path = output or Path(f"{kind}.json")
    require_writable(path)
    if path.suffix == ".png":
        raise ValueError(f"{path} is where the figure goes: name the JSON file, such as {path.with_suffix('.json')}")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    report: dict[str, Any] = {
        "benchmark": kind,
        "environment": environment(device, commit),
        "settings": settings,
        "models": [],
    }
    for subject in subjects:
        console.print(f"{subject.name}: {subject.parameters:,} parameters", markup=False)
        report["models"].append({**subject.describe(), **measure(subject)})
        del subject
        typer.echo(summary(kind, report["models"][-1]))
        with replacing(path) as file:
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draw(kind, report, path.with_suffix(".png"))
    console.print(f"{path} and {path.with_suffix('.png')}", markup=False)
