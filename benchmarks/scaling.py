"""Training over several GPUs: `torchrun --nproc-per-node N -m benchmarks.scaling [--checkpoints] [--output FILE]`.

Every rank reads batch x length tokens a step, whatever their number: tokens per second and GPU should not fall. With
--checkpoints also what asynchronous checkpoints cost: a minute's steps with one against as many without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MambaConfig

from mambalm.models import MambaForCausalLM
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks, ranks
from mambalm.training.optimizer import adamw
from mambalm.training.parallelism import parallelise
from mambalm.training.precision import policy
from mambalm.training.recipe import ParallelSection
from mambalm.training.step import Stepper

SIZES = {"tiny": (64, 2), "130m": (768, 24), "1.4b": (2048, 48)}
VOCABULARY = 50280


def prepare(options: argparse.Namespace, taking_part: Ranks) -> tuple[Any, Stepper, Callable[[], None]]:
    """The model, what trains it, and one step."""
    device, precision = taking_part.device, policy("bf16", taking_part.device)
    width, depth = SIZES[options.model]
    with torch.device(device):
        config = MambaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=depth, residual_in_fp32=True)
        network = MambaForCausalLM(config).train()
    mode = options.mode if taking_part.world > 1 else "single"
    section = ParallelSection(mode=mode, checkpointing=options.checkpointing)
    model = parallelise(network, section, precision, taking_part)
    stepper = Stepper(adamw(model), 1.0, precision.autocast)
    generator = torch.Generator(device).manual_seed(taking_part.rank)
    ids = torch.randint(VOCABULARY, (options.batch, options.length), device=device, generator=generator)

    def step() -> None:
        found = stepper.gradients([lambda: model(ids, labels=ids, use_cache=False, skip_logits=True).loss])
        stepper.apply(1e-5)
        # As in a run, which judges a step while the device applies it.
        taking_part.sum(torch.stack([each.float() for each in found])).tolist()

    return model, stepper, step


def seconds_of(step: Callable[[], None], taking_part: Ranks, repeats: int) -> list[float]:
    """The wall time of some steps in a row."""
    times = []
    taking_part.barrier()
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times


def checkpoint_cost(
    model: Any, stepper: Stepper, step: Callable[[], None], taking_part: Ranks, folder: Path, repeats: int
) -> list[dict[str, Any]]:
    """Seconds that checkpoints add to the steps around them.

    The first has its memory made beforehand, as in a run, while steps go on. Steps run until a checkpoint is in its
    place, and are compared with ``repeats`` that ask as they do whether it is.
    """
    kept = Checkpoints(folder / "checkpoints", keep_last=1)
    state = {"model": model, "optimizer": stepper.optimizer, "progress": {}}

    def asked() -> float:
        """A step's time."""
        begin = time.perf_counter()
        seconds_of(step, taking_part, 1)
        _any(kept.is_writing, taking_part)
        return time.perf_counter() - begin

    def row(name: str, begin: float, returned: float, times: list[float]) -> dict[str, Any]:
        lost = time.perf_counter() - begin - len(times) * median
        return {
            "what": name,
            "save_returns_after_seconds": round(returned, 3),
            "written_after_seconds": round(time.perf_counter() - begin, 3),
            "median_step_ms": round(1e3 * statistics.median(times), 2),
            "slowest_step_ms": round(1e3 * max(times), 2),
            "steps_meanwhile": len(times),
            "overhead_seconds": round(lost, 3),
            "overhead_of_a_minute": round(lost / 60, 5),
        }

    median = statistics.median(asked() for _ in range(repeats))
    begin = time.perf_counter()
    kept.prepare(state, taking_part.device)
    returned, times = time.perf_counter() - begin, [asked()]
    while _any(kept.is_preparing, taking_part):
        times.append(asked())
    found = [row("memory made", begin, returned, times)]
    if taking_part.is_main:
        print(json.dumps(found[0]), flush=True)
    for number in (1, 2):
        taking_part.barrier()
        begin = time.perf_counter()
        kept.save(number, state)
        returned, times = time.perf_counter() - begin, [asked()]
        while _any(kept.is_writing, taking_part):
            times.append(asked())
        kept.wait()
        found.append(row(f"checkpoint {number}", begin, returned, times))
        if taking_part.is_main:
            print(json.dumps(found[-1]), flush=True)
    return found


def _any(here: bool, taking_part: Ranks) -> bool:
    return bool(taking_part.sum(torch.tensor(int(here), device=taking_part.device)))


def main() -> None:
    """Measure, and print and write a JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="1.4b")
    parser.add_argument("--mode", choices=["ddp", "fsdp", "hsdp"], default="fsdp")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="selective")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a rank")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpoints", action="store_true", help="measure those too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "scaling", help="for checkpoints")
    parser.add_argument("--output", type=Path, help="a JSON file that gets a line")
    options = parser.parse_args()
    with ranks(torch.device(options.device)) as taking_part:
        model, stepper, step = prepare(options, taking_part)
        first = seconds_of(step, taking_part, 4)
        median = statistics.median(seconds_of(step, taking_part, options.repeats))
        tokens = options.batch * options.length
        row: dict[str, Any] = {
            **{name: getattr(options, name) for name in ("model", "mode", "checkpointing", "batch", "length")},
            "ranks": taking_part.world,
            **({} if taking_part.world > 1 else {"mode": "single"}),
            "step_ms": round(1e3 * median, 2),
            "tokens_per_second_per_rank": round(tokens / median),
            "first_step_seconds": round(first[0], 2),
        }
        if taking_part.device.type == "cuda":
            row["device"], row["torch"] = torch.cuda.get_device_name(), torch.__version__
            row["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if taking_part.is_main:
            print(json.dumps(row), flush=True)
        if options.checkpoints:
            row["checkpoints"] = checkpoint_cost(model, stepper, step, taking_part, options.folder, options.repeats)
        if taking_part.is_main:
            print(json.dumps(row), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
