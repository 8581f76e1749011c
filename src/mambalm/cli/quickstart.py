"""`mambalm quickstart`: a tokenizer and a small Mamba, trained on Python sources in minutes, beside xz and gzip."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import MambaConfig, PreTrainedTokenizerFast

from mambalm.data.documents import Document, Split, hold_out, read_documents, standard_library
from mambalm.data.streams import SegmentStreams, fingerprint
from mambalm.data.tokenizer import encode_documents, train_tokenizer
from mambalm.evaluation.bits_per_byte import CodeLength, bits_per_byte, chunk_bits, compressed
from mambalm.generation import Sampling, Settings, end_tokens, generate
from mambalm.models.mamba import MambaForCausalLM
from mambalm.training.budget import TimeBudget
from mambalm.training.curve import plot_bits_per_byte, smoothed
from mambalm.training.files import export, replacing
from mambalm.training.interruption import StopRequest, stop_requests
from mambalm.training.loop import Report, Run, train
from mambalm.training.optimizer import adamw
from mambalm.training.precision import autocast, fastest_dtype
from mambalm.training.progress import ProgressBar, duration
from mambalm.training.schedule import WarmupStableDecay


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; tuned for two CPU cores and three minutes (about a million tokens)."""

    vocab_size: int = 4096
    hidden_size: int = 320
    layers: int = 4
    state_size: int = 8
    batch_size: int = 16
    length: int = 64
    chunks: int = 4
    groups: int = 32
    learning_rate: float = 4e-3
    warmup_tokens: int = 20_000
    decay: float = 0.5
    weight_decay: float = 0.1
    held_out_bytes: int = 1_000_000
    seed: int = 0


# Tokens read at once in evaluation: enough for the matrix products, few for the caches.
_EVALUATION_CHUNK = 1024
# However slow the machine: this part of the time goes into training.
_LEAST_TRAINING = 0.3
# And at most this part is kept back for the evaluation.
_MOST_EVALUATION = 0.15
# What comes after training and evaluation: xz, the picture, the continued prompt.
_CLOSING_SECONDS = 5.0
_SAVE_EVERY = 30.0


@dataclass(frozen=True)
class Folder:
    """Where things are in the output folder."""

    path: Path

    @property
    def model(self) -> Path:
        """The checkpoint in transformers' format."""
        return self.path / "model"

    @property
    def training_state(self) -> Path:
        """What a resumed run needs beside it."""
        return self.path / "training_state.pt"

    def prepare(self, restart: bool) -> None:
        """Make the folder; empty it of an earlier run's files on ``restart``.

        Raises:
            OSError: it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(self.path / "writable") as probe:
                probe.touch()
            (self.path / "writable").unlink()
        except OSError as error:
            raise OSError(
                f"the output folder {self.path} cannot be written to; choose another with --output"
            ) from error
        if restart:
            self.training_state.unlink(missing_ok=True)
            shutil.rmtree(self.model, ignore_errors=True)


def quickstart(
    minutes: Annotated[float, typer.Option(help="Time for everything, evaluation included.")] = 3.0,
    output: Annotated[Path, typer.Option(help="The folder for the checkpoint, the curve and the figures.")] = Path(
        "quickstart"
    ),
    corpus: Annotated[Path | None, typer.Option(help="Train on the .py files of this folder instead.")] = None,
    prompt: Annotated[str, typer.Option(help="What the trained model continues.")] = "def read_lines(path):\n",
    restart: Annotated[bool, typer.Option(help="Forget an earlier run in the output folder.")] = False,
) -> None:
    """Train a tokenizer and a small Mamba on the standard library's sources, and measure it on modules held out.

    Interrupt it at any time: the checkpoint loads, and the same command goes on where it stopped.
    """
    started = time.perf_counter()
    if minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {minutes}")
    console, recipe, folder = Console(), Recipe(), Folder(output)
    split = _split(standard_library() if corpus is None else read_documents(corpus), recipe)
    folder.prepare(restart)
    tokenizer = _tokenizer(folder, split, recipe, console)
    run = _run(tokenizer, split, recipe)
    if folder.training_state.exists():
        run.load(folder.training_state)
    else:
        export(run.model, tokenizer, folder.model)
    if run.notes.get("minutes") != minutes:
        total = 60 * minutes
        # A forecast made while the machine is busy is too high: it may not take the time from the training.
        evaluation = min(_evaluation_seconds(run, tokenizer, split.held_out_stream), _MOST_EVALUATION * total)
        spent = time.perf_counter() - started + evaluation + _CLOSING_SECONDS
        run.notes = {"minutes": minutes, "training_seconds": max(total - spent, _LEAST_TRAINING * total)}
    # A resumed run has the seconds that it was given first, whatever its new start took.
    run.budget = TimeBudget(run.notes["training_seconds"])
    _describe(console, run, split, folder)
    if not run.is_over:
        request = _train(console, run, partial(_save, run, tokenizer, folder))
        if request:
            console.print(f"Interrupted. {folder.model} loads, and the same command goes on from step {run.step:,}.")
            raise typer.Exit(request.exit_code)
    _report(console, run, tokenizer, split, folder)
    _complete(console, run, tokenizer, prompt)
    console.print(f'\nTry: mambalm generate {folder.model} "import "', highlight=False)


def _split(documents: list[Document], recipe: Recipe) -> Split:
    """An eighth of a small corpus is held out, of a large one about a megabyte."""
    total = sum(document.nbytes for document in documents)
    return hold_out(documents, min(recipe.held_out_bytes, total // 8))


def _tokenizer(folder: Folder, split: Split, recipe: Recipe, console: Console) -> PreTrainedTokenizerFast:
    """The checkpoint's if a run is resumed, else a new one, of the training documents alone."""
    if folder.training_state.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder.model)
    with console.status("Training the tokenizer"):
        return train_tokenizer([document.text for document in split.training], recipe.vocab_size)


def _run(tokenizer: PreTrainedTokenizerFast, split: Split, recipe: Recipe) -> Run:
    """A run before its first step; its budget is for the caller to set."""
    tokens = torch.from_numpy(encode_documents(tokenizer, [document.text for document in split.training]))
    streams = SegmentStreams(
        tokens,
        batch_size=recipe.batch_size,
        length=recipe.length,
        chunks=recipe.chunks,
        groups=recipe.groups,
        seed=recipe.seed,
    )
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        state_size=recipe.state_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
    )
    torch.manual_seed(recipe.seed)
    model = MambaForCausalLM(config)
    return Run(
        model=model,
        optimizer=adamw(model, weight_decay=recipe.weight_decay),
        streams=streams,
        schedule=WarmupStableDecay(recipe.learning_rate, recipe.warmup_tokens, recipe.decay),
        budget=TimeBudget(0.0),
        identity={"corpus": fingerprint(tokens), **dataclasses.asdict(recipe)},
        compute_dtype=fastest_dtype(),
    )


def _evaluation_seconds(run: Run, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """A forecast of how long the evaluation takes, from the fastest of its first chunks: the others warm things up."""
    tokens = torch.from_numpy(encode_documents(tokenizer, [text]))
    run.model.eval()
    clock = [time.perf_counter()]
    with autocast(run.model.device, run.compute_dtype):
        chunks = itertools.islice(chunk_bits(run.model, tokens, _EVALUATION_CHUNK), 10)
        clock += [time.perf_counter() for _ in chunks]
    fastest = min(end - start for start, end in itertools.pairwise(clock))
    return fastest * len(tokens) / _EVALUATION_CHUNK


def _describe(console: Console, run: Run, split: Split, folder: Folder) -> None:
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    known, held_out, threads = len(split.training), len(split.held_out), torch.get_num_threads()
    console.print(
        f"{parameters / 1e6:.1f}M parameters, {threads} {'thread' if threads == 1 else 'threads'}, "
        f"matrix products in {str(run.compute_dtype).removeprefix('torch.')}; "
        f"{known} files to learn from, {held_out} held out ({len(split.held_out_stream.encode()):,} bytes)",
        highlight=False,
    )
    if run.is_over:
        console.print(f"The run in {folder.path} is finished: measuring it again (--restart trains anew).")
    elif run.step:
        console.print(f"Resuming at step {run.step:,}, after {duration(run.seconds)} of training.")


def _save(run: Run, tokenizer: PreTrainedTokenizerFast, folder: Folder) -> None:
    run.save(folder.training_state)
    export(run.model, tokenizer, folder.model)


def _train(console: Console, run: Run, save: Callable[[], None]) -> StopRequest:
    """Train until the budget is spent or a signal asks to stop, which is then in the result."""
    assert isinstance(run.budget, TimeBudget)
    budget, tokens, start = run.budget.seconds, run.tokens, time.perf_counter()
    with stop_requests() as request, ProgressBar(console, "Training") as bar:

        def show(report: Report) -> None:
            speed = (report.tokens - tokens) / (time.perf_counter() - start)
            loss = smoothed(run.losses[-50:], 20)[-1]
            left = duration(budget - run.seconds)
            bar.update(run.seconds / budget, f"loss {loss:.3f} · {speed:,.0f} tokens/s · {left} left")

        train(run, save=save, save_every=_SAVE_EVERY, on_step=show, should_stop=lambda: bool(request))
    return request


def _report(console: Console, run: Run, tokenizer: PreTrainedTokenizerFast, split: Split, folder: Folder) -> None:
    """Measure the model on the held-out stream; print, write and draw what came out."""
    text = split.held_out_stream
    run.model.eval()
    with ProgressBar(console, "Evaluating") as bar, autocast(run.model.device, run.compute_dtype):
        measured = bits_per_byte(
            run.model,
            tokenizer,
            text,
            chunk_size=_EVALUATION_CHUNK,
            on_chunk=lambda done, total: bar.update(done / total, f"{done:,} of {total:,} tokens"),
        )
    results = {"mamba": measured, **compressed(text)}
    console.print(_table(results))
    console.print(
        f"Each of the same {measured.nbytes:,} bytes, every one counted. The weights and the tokenizer that the model "
        "brings along are not; xz and gzip bring nothing.",
        highlight=False,
    )
    figures = {name: result.bits_per_byte for name, result in results.items()}
    summary = {"bits_per_byte": figures, "bytes": measured.nbytes, "tokens": run.tokens, "seconds": run.seconds}
    with replacing(folder.path / "results.json") as file:
        file.write_text(json.dumps(summary, indent=1) + "\n")
    bytes_per_token = sum(document.nbytes for document in split.training) / len(run.streams.tokens)
    curve = [loss / math.log(2) / bytes_per_token for loss in run.losses]
    lines = {f"{name}, held out": value for name, value in figures.items()}
    plot_bits_per_byte(curve, run.tokens // run.step, lines, folder.path / "loss.png")


def _table(results: dict[str, CodeLength]) -> Table:
    table = Table(title="Held-out modules")
    for column in ("", "bits per byte", "bytes"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        table.add_row(name, f"{result.bits_per_byte:.3f}", f"{math.ceil(result.bits / 8):,}")
    return table


def _complete(console: Console, run: Run, tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    settings = Settings(
        sampling=Sampling(temperature=0.7, top_p=0.95),
        max_new_tokens=128,
        end_tokens=end_tokens(run.model),
        seed=0,
    )
    console.rule("a prompt, continued")
    console.print(prompt, end="", markup=False, style="bold")
    for _, piece in generate(run.model, tokenizer, [prompt], settings):
        console.print(piece, end="", markup=False, highlight=False)
    console.print()
