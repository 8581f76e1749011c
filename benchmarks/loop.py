"""The training loop beside the bare step: `python -m benchmarks.loop [RECIPE] [KEY=VALUE ...] [--output FILE]`.

The loop is that of `mambalm train`: it reads token files, clips, judges, logs and, in the last round, writes a
checkpoint. The bare step is forward, backward and AdamW on one batch that stays on the device, and waits for nothing.
Both take turns in one process, on the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.timing import provenance
from mambalm.data.documents import standard_library
from mambalm.data.inputs import Reading
from mambalm.data.samples import collate
from mambalm.data.token_files import METADATA
from mambalm.data.tokenization import Tokenization, tokenize
from mambalm.data.tokenizer import train_tokenizer
from mambalm.training.distributed import Ranks
from mambalm.training.interruption import StopRequest
from mambalm.training.metrics import MetricsLog
from mambalm.training.progress import ProgressBar
from mambalm.training.recipe import Recipe
from mambalm.training.recipe_files import load_recipe
from mambalm.training.session import Folder, Watch, open_trainer
from mambalm.training.trainer import Trainer

VOCABULARY, SAMPLED = 4096, 200  # of the tokenizer: tokens, documents that it is trained on
WARM_UP = 6


class Over(Exception):
    """Enough was measured."""


@dataclass
class Clock(StopRequest):
    """Asked before every step of the loop: notes when, and does bare steps between its rounds.

    Attributes:
        trainer: of the run.
        bare: does so many bare steps, and returns the seconds of one.
        steps: of a round, of either kind; the last round goes on until its checkpoint is written.
        rounds: how many.
        asked: when, by round.
        alone: seconds of a bare step, by round.
    """

    trainer: Trainer | None = None
    bare: Callable[[int], float] = float
    steps: int = 0
    rounds: int = 0
    asked: list[list[float]] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)

    def __bool__(self) -> bool:
        assert self.trainer is not None
        now, done = time.perf_counter(), self.trainer.position.step - WARM_UP
        if self.asked:
            self.asked[-1].append(now)
        if done < 0 or done < len(self.asked) * self.steps:
            return False
        if len(self.asked) == self.rounds:
            if self.trainer.checkpoints.is_writing:
                return False
            raise Over
        self.alone.append(self.bare(self.steps))
        if len(self.asked) == self.rounds - 1:
            print(json.dumps(self.speeds()), flush=True)
        self.asked.append([time.perf_counter()])
        return False

    def speeds(self) -> dict[str, Any]:
        """Milliseconds of a step of either kind: the median of the loop's, the mean of each round."""
        times = self.times[: self.rounds - 1]
        loop = statistics.median(second for each in times for second in each)
        bare = statistics.median(self.alone)
        return {
            "bare_ms": round(1e3 * bare, 3),
            "bare_ms_of_rounds": [round(1e3 * each, 3) for each in self.alone],
            "loop_ms": round(1e3 * loop, 3),
            "loop_ms_of_rounds": [round(1e3 * statistics.mean(each), 3) for each in times],
            "loop_over_bare": round(loop / bare - 1, 5),
        }

    def checkpoint(self) -> dict[str, float]:
        """What the checkpoint of the last round cost: seconds more than its steps take without."""
        times, loop = self.times[-1], self.speeds()["loop_ms"] / 1e3
        lost = sum(times) - len(times) * loop
        return {
            "checkpoint_seconds_lost": round(lost, 3),
            "checkpoint_of_a_minute": round(lost / 60, 5),
            "slowest_step_with_checkpoint_ms": round(1e3 * max(times), 1),
        }

    @property
    def times(self) -> list[list[float]]:
        """Seconds of every step of the loop, by round."""
        return [[b - a for a, b in pairwise(each)] for each in self.asked]


def prepare(folder: Path) -> None:
    """A tokenizer, and token files of the standard library, unless they are there."""
    if (folder / "tokens" / METADATA).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in standard_library()]
    train_tokenizer(texts[:SAMPLED], VOCABULARY).save_pretrained(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    workers = min(8, os.cpu_count() or 1)
    task = Tokenization(
        (str(folder / "text.jsonl"),), folder / "tokens", str(folder / "tokenizer"), Reading(), unit_bytes=2 << 20
    )
    tokenize(task, workers=workers)


def recipe_of(name: str, changes: list[str], folder: Path, context: int, batch: int, steps: int, rounds: int) -> Recipe:
    """The recipe with one stage of enough steps, on those token files; a checkpoint begins the last round."""
    changed = [
        f"tokenizer={folder / 'tokenizer'}",
        f"data.sources=[{{path: {folder / 'tokens'}}}]",
        "data.held_out=0",
        "schedule={kind: constant, peak: 1.0e-5, floor: 0, warmup: 0, decay: 0}",
        f"stages=[{{name: loop, tokens: 1T, context: {context}, batch: {batch}, micro_batch: {batch}}}]",
        f"checkpoints.every={WARM_UP + (rounds - 1) * steps + 1}",
        "evaluation.every=0",
        "logging.plot=0",
    ]
    return load_recipe(name, [*changed, *changes])


def bare_steps(trainer: Trainer) -> Callable[[int], float]:
    """What does some steps on one batch and returns the seconds of one; no parameter changes by them."""
    device, optimizer = trainer.ranks.device, trainer.stepper.optimizer
    stage = trainer.stage
    stream = trainer.reader.stream(0, {})
    batch = collate([stream[i] for i in range(stage.micro_batch)])
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)

    def step() -> None:
        optimizer.zero_grad()
        with trainer.policy.autocast():
            loss = trainer.model(inputs, targets=targets, skip_logits=True, use_cache=False).loss
        loss.backward()
        optimizer.step()

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def run(count: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        step()
        begin = wait()
        for _ in range(count):
            step()
        return (wait() - begin) / count

    return run


def main() -> None:
    """Measure, print and write a JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="mamba-130m")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", type=Path, help="where token files are, or are made and kept")
    parser.add_argument("--commit", default="", help="what was measured, where there is no git")
    parser.add_argument("--output", type=Path, help="a JSON file that gets a line")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        folder, output = options.data or Path(name) / "data", Folder(Path(name) / "run")
        prepare(folder)
        recipe = recipe_of(
            options.recipe, options.changes, folder, options.context, options.batch, options.steps, options.rounds
        )
        trainer = open_trainer(recipe, output, Ranks(device=torch.device(options.device)))
        output.path.mkdir()
        log, console = MetricsLog(output.path, 0), Console()
        clock = Clock(trainer=trainer, bare=bare_steps(trainer), steps=options.steps, rounds=options.rounds)
        try:
            with ProgressBar(console, recipe.name) as bar:
                Watch(trainer, output, log, bar, None).run(clock)
        except Over:
            log.close()
        trainer.checkpoints.wait()
    found = {
        "recipe": recipe.name,
        "changes": options.changes,
        "batch": options.batch,
        "context": options.context,
        "checkpointing": recipe.parallel.checkpointing,
        "tokens_per_second": round(1e3 * options.batch * options.context / clock.speeds()["loop_ms"]),
        **clock.speeds(),
        **clock.checkpoint(),
        **provenance(options.commit),
    }
    if options.device == "cuda":
        found["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    print(json.dumps(found), flush=True)
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
