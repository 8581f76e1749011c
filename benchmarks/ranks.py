"""All that needs several GPUs, in one short job: `python -m benchmarks.ranks [--gpus 4] [--output FILE]`.

Scaling from one GPU to all of them, what an asynchronous checkpoint costs, and a run that goes on over more and more
ranks beside one that stays on one. About three minutes; a part that fails or takes too long is named, the others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ["scaling", "resume"]
# Steps of the run that goes on: up to these, on one rank, then two, then four.
STEPS = {1: 2, 2: 4, 4: 6}


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        device: "cuda", or "cpu" to try the job.
        folder: for checkpoints.
        scaling: arguments of `benchmarks.scaling`.
        limit: seconds that a part may take.
        parts: "scaling" (with the checkpoints), "resume".
        output: where what was found is written after each part.
    """

    device: str
    folder: Path
    scaling: Sequence[str]
    limit: float
    parts: Sequence[str]
    output: Path | None

    def launch(self, gpus: Sequence[int], module: str, *arguments: str) -> list[dict[str, Any]]:
        """The objects that a module's main rank printed, run on these GPUs by torchrun.

        Of one that failed or took too long those until then, the last with the reason as "failed".

        Raises:
            RuntimeError: it failed, or took too long, before it printed any; the end of what it said.
        """
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(gpus))]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": _visible(gpus), "OMP_NUM_THREADS": "4"}
        try:
            done = subprocess.run(
                [*command, "-m", module, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=self.limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return _partly(error.stdout, f"more than {self.limit:.0f} s: {_end(error.stdout)}")
        return _partly(done.stdout, _end(done.stdout)) if done.returncode else _objects(done.stdout)

    def scale(self, gpus: Sequence[int], *more: str) -> dict[str, Any]:
        """The speed on these GPUs."""
        where = ("--device", self.device, "--folder", str(self.folder))
        lines = self.launch(gpus, "benchmarks.scaling", *where, *self.scaling, *more)
        if "failed" not in lines[-1]:
            return lines[-1]
        # The speed and the checkpoints so far.
        return lines[0] | {"failed": lines[-1].pop("failed"), "checkpoints": lines[1:]}

    def train(self, gpus: Sequence[int], name: str, **job: Any) -> dict[str, Any]:
        """A small run on these GPUs, gone on with from its last checkpoint."""
        mode = {1: "single", 2: "fsdp"}.get(len(gpus), "hsdp")
        job |= {"mode": mode, "device": self.device} | ({"shard_size": 2} if mode == "hsdp" else {})
        return self.launch(gpus, "tests.training.spread", str(self.folder / name), json.dumps([job]))[-1]


def _visible(gpus: Sequence[int]) -> str:
    """The names of GPUs, counted among those that we see ourselves."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ours.split(",") if ours else [str(gpu) for gpu in range(max(gpus) + 1)]
    if max(gpus) >= len(names):
        raise RuntimeError(
            f"GPU {max(gpus)} is asked for, and CUDA_VISIBLE_DEVICES={ours} shows {len(names)}: use --gpus"
        )
    return ",".join(names[gpu] for gpu in gpus)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _end(output: str | bytes | None) -> str:
    """The end of what the ranks said, before what torchrun says of it."""
    return re.split(r"^.*failed \(exitcode", _text(output), maxsplit=1, flags=re.MULTILINE)[0][-1500:]


def _partly(output: str | bytes | None, reason: str) -> list[dict[str, Any]]:
    if not (found := _objects(output)):
        raise RuntimeError(reason)
    found[-1]["failed"] = reason
    return found


def _objects(output: str | bytes | None) -> list[dict[str, Any]]:
    lines = (line.removeprefix("FOUND ") for line in _text(output).splitlines())
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def measure(job: Job, gpus: int) -> dict[str, Any]:
    """All parts; one and two GPUs at the same time where there are four."""
    begin, found = time.perf_counter(), {"failed": {}, "seconds": {}}

    def part(name: str, work: Any) -> None:
        try:
            found[name] = work()
            if reason := found[name].pop("failed", None):
                found["failed"][name] = reason
        except RuntimeError as error:
            found["failed"][name] = str(error)
        found["seconds"][name] = round(time.perf_counter() - begin, 1)
        print(name, json.dumps(found.get(name)), flush=True)
        if job.output:
            job.output.write_text(json.dumps(found, indent=1) + "\n")

    def small() -> dict[str, Any]:
        job.train([gpus - 1], "parts", steps=STEPS[1])
        return job.train([gpus - 1], "whole", steps=max(STEPS.values()))

    first = [("ranks_1", lambda: job.scale([0]))] if "scaling" in job.parts else []
    if gpus >= 4 and "scaling" in job.parts:
        first.append(("ranks_2", lambda: job.scale([1, 2])))
    if "resume" in job.parts:
        first.append(("whole", small))
    with ThreadPoolExecutor(len(first) if gpus >= 4 else 1) as pool:
        list(pool.map(lambda each: part(*each), first))
    if "scaling" in job.parts:
        part(f"ranks_{gpus}", lambda: job.scale(range(gpus), "--checkpoints"))
    for world in (2, 4) if "resume" in job.parts else ():
        if world <= gpus:
            part(f"resumed_{world}", lambda world=world: job.train(range(world), "parts", steps=STEPS[world]))
    return found


def report(found: dict[str, Any]) -> str:
    """A short table."""
    lines = [f"{'ranks':>5} {'tokens/s/GPU':>13} {'efficiency':>10} {'step ms':>8} {'GB':>6}"]
    one = found.get("ranks_1", {}).get("tokens_per_second_per_rank")
    for world in (1, 2, 4, 8):
        if row := found.get(f"ranks_{world}"):
            speed = row["tokens_per_second_per_rank"]
            share = f"{speed / one:.1%}" if one else "-"
            lines.append(f"{world:>5} {speed:>13,} {share:>10} {row['step_ms']:>8} {row.get('peak_GB', '-'):>6}")
            lines += [_cost(cost) for cost in row.get("checkpoints", ())]
    whole = found.get("whole", {}).get("losses", [])
    for world in (2, 4):
        if (row := found.get(f"resumed_{world}")) and whole:
            pairs = zip(row["losses"], whole[row["first"] :], strict=False)
            worst = max(abs(a - b) / b for a, b in pairs)
            lines.append(f"resumed on {world} ranks from step {row['first']}: losses differ by {worst:.1e} at most")
    lines += [f"FAILED {name}: {reason}" for name, reason in found["failed"].items()]
    return "\n".join(lines)


def _cost(cost: dict[str, Any]) -> str:
    return (
        f"      {cost['what']}: returns after {cost['save_returns_after_seconds']:.2f} s, done after "
        f"{cost['written_after_seconds']:.1f} s, {cost['overhead_of_a_minute']:.1%} of a minute"
    )


def main() -> int:
    """Measure, print a table and JSON; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--gpus", type=int, default=4, choices=[2, 4, 8])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=150, help="seconds of a part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, help="a JSON file, written after every part")
    options, scaling = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(options.device, Path(folder), scaling, options.limit, options.parts, options.output)
        found = measure(job, options.gpus)
    print(report(found), flush=True)
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
