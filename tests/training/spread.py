"""One rank of small runs, started by torchrun: `python -m tests.training.spread FOLDER '[{"mode": "fsdp", ...}]'`.

The main rank prints what it saw of each job as one line of JSON. Keys of a job:

    folder          instead of FOLDER
    device          "cpu" or "cuda", of the first job for all
    mode, shard_size, checkpointing, compile, precision   as in a recipe
    family, vocabulary, start, adapter   the model: new, or a checkpoint, with adapters if so
    packed          rows are documents of one sequence
    steps, save_at, save_always   until which step, and after which of them it saves, besides the last
    die, kill       after which step the last rank fails, and whether by SIGKILL
    overflow        a step whose gradient is infinite on the last rank
    initial         instead of a run, compare the values that a sharded model begins with
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, MambaConfig

from mambalm import load
from mambalm.models import HybridConfig, Mamba2ForCausalLM, MambaForCausalLM, MambaHybridForCausalLM
from mambalm.training.adapters import Adapter, put_on
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks, ranks
from mambalm.training.optimizer import adamw
from mambalm.training.parallelism import is_sharded, parallelise
from mambalm.training.precision import policy
from mambalm.training.recipe import ParallelSection
from mambalm.training.step import Stepper

ROWS, LENGTH, VOCABULARY = 4, 17, 60
LARGE: dict[str, Any] = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 24, "state_size": 4}


def network(family: str = "mamba", vocabulary: int = VOCABULARY) -> Any:
    """A small model in float32, the same on every rank."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 2}
    if family == "mamba2":
        return Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1, state_size=8)).train()
    if family in ("transformer", "hybrid"):
        attention = {"num_heads": 2, "rotary_emb_dim": 4}
        layers = [0, 1] if family == "transformer" else [1]
        config = HybridConfig(**sizes, d_intermediate=24, attn_layer_idx=layers, attn_cfg=attention)
        return MambaHybridForCausalLM(config).train()
    return MambaForCausalLM(MambaConfig(**sizes, state_size=4, tie_word_embeddings=True)).train()


def section_of(job: dict[str, Any]) -> ParallelSection:
    """How the model is spread."""
    kept = ("mode", "checkpointing", "compile", "shard_size")
    return ParallelSection(**{name: job[name] for name in kept if name in job})


def made(job: dict[str, Any], section: ParallelSection) -> Any:
    """The model of a job, as a run's trainer makes it."""
    if "start" in job:
        return load(job["start"], dtype=None if is_sharded(section) else torch.float32).train()
    with torch.device("meta" if is_sharded(section) else "cpu"):
        return network(job.get("family", "mamba"), job.get("vocabulary", VOCABULARY))


class SmallRun:
    """A model on its ranks, and its steps over tokens that depend on the step alone."""

    def __init__(self, job: dict[str, Any], taking_part: Ranks) -> None:
        """Set up; see `main` for what a job says."""
        self.ranks = taking_part
        self.policy = policy(job.get("precision", "fp32"), taking_part.device)
        self.packed = job.get("packed", False)
        section = section_of(job)
        self.network = made(job, section)
        self.adapted = put_on(self.network, Adapter(rank=2, alpha=4)) if job.get("adapter") else None
        self.model = parallelise(self.network, section, self.policy, taking_part)
        self.stepper = Stepper(adamw(self.model), 0.5, self.policy.autocast, self.policy.scaler)
        self.step = 0

    def batch(self) -> torch.Tensor:
        """This rank's rows of the step's tokens."""
        generator = torch.Generator().manual_seed(1000 + self.step)
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
        share = ROWS // self.ranks.world
        return tokens[self.ranks.rank * share :][:share].to(self.ranks.device)

    def loss(self) -> torch.Tensor:
        """Of this rank's rows, such that the mean over the ranks is the mean over all tokens."""
        ids, offsets = self.batch(), None
        if self.packed:
            # Two documents a row, of the same lengths in every one.
            cut = torch.tensor([0, 5 + self.step % 3])
            starts = LENGTH * torch.arange(len(ids))[:, None] + cut
            offsets = torch.cat([starts.flatten(), torch.tensor([ids.numel()])]).to(ids.device, torch.int32)
            ids = ids.reshape(1, -1)
        return self.model(ids, labels=ids, cu_seqlens=offsets, use_cache=False, skip_logits=True).loss

    def advance(self) -> tuple[float, float]:
        """(loss, norm of the gradient) of a step."""
        loss, norm = self.stepper.gradients([self.loss])
        self.stepper.apply(5e-3)
        self.step += 1
        return self.ranks.sum(loss.float()).item() / self.ranks.world, norm.item()

    def overflow(self) -> dict[str, Any]:
        """What a scaled step does in which a gradient of the last rank's shard is infinite."""
        scaler = self.stepper.scaler
        assert scaler is not None
        before = [parameter.to_local().clone() for parameter in self.model.parameters()]
        self.stepper.optimizer.zero_grad()
        with self.policy.autocast():
            loss = self.loss()
        scaler.scale(loss).backward()
        mine = next(parameter for parameter in self.model.parameters() if parameter.to_local().numel())
        if self.ranks.rank == self.ranks.world - 1:
            mine.grad.to_local().view(-1)[0] = float("inf")
        scaler.unscale_(self.stepper.optimizer)
        scale = scaler.get_scale()
        self.stepper.apply(1.0)
        now = [parameter.to_local() for parameter in self.model.parameters()]
        changed = sum(not torch.equal(one, other) for one, other in zip(before, now, strict=True))
        return {"changed": int(self.ranks.sum(torch.tensor(changed))), "scale": scaler.get_scale() / scale}

    def changed_beneath(self, start: str) -> list[str]:
        """Names of weights under the adapters that are no longer those of the checkpoint."""
        before = dict(load(start).named_parameters())
        changed = []
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                if not torch.equal(value, before[name.replace(".base_layer", "")]):
                    changed.append(name)
        return changed

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self.model, "optimizer": self.stepper.optimizer, "progress": {"step": self.step}}


def work(folder: Path, job: dict[str, Any], taking_part: Ranks) -> dict[str, Any]:
    """Do the job: resume from ``folder``, advance until ``steps``, save."""
    run = SmallRun(job, taking_part)
    kept = Checkpoints(folder, keep_last=3)
    if kept.latest() is not None:
        state = run.state()
        kept.load(state)
        run.step = state["progress"]["step"]
    found: dict[str, Any] = {"first": run.step, "losses": [], "norms": []}
    while run.step < job["steps"]:
        loss, norm = run.advance()
        found["losses"].append(loss)
        found["norms"].append(norm)
        if job.get("save_always") or run.step == job.get("save_at"):
            kept.save(run.step, run.state())
        if run.step == job.get("die"):
            kept.wait()
            if taking_part.rank == taking_part.world - 1:
                if job.get("kill"):
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError(f"rank {taking_part.rank} fails as the test asks")
    if job.get("overflow"):
        found |= run.overflow()
    if run.adapted is not None:
        found["frozen_changed"] = run.changed_beneath(job["start"])
    if not job.get("save_always"):
        kept.save(run.step, run.state())
    kept.wait()
    return found


@torch.no_grad()
def compare_initial(folder: Path, job: dict[str, Any], taking_part: Ranks) -> dict[str, Any]:
    """Names of parameters that do not begin as those of a whole model do, and the memory that a large one took.

    ``folder`` holds a checkpoint "large" in bfloat16, and one of every family's initial values.
    """
    section, found = section_of(job), {"different": [], "peak": 0.0, "peak_of_checkpoint": 0.0}
    for family in ("mamba", "mamba2", "transformer"):
        expected = dict(network(family).named_parameters())
        again = made({"family": family}, section)
        for start in (again, load(folder / family)):
            values = parallelise(start, section, policy("fp32", taking_part.device), taking_part).named_parameters()
            found["different"] += [n for n, value in values if not torch.equal(value.full_tensor(), expected[n])]
    with torch.device("meta"):
        large = MambaForCausalLM(MambaConfig(**LARGE))
    whole = 4 * sum(parameter.numel() for parameter in large.parameters())
    for name, model in (("peak", large), ("peak_of_checkpoint", load(folder / "large"))):
        before = _memory()
        sharded = parallelise(model, section, policy("fp32", taking_part.device), taking_part)
        found[name] = (_memory(peak=True) - before) / whole
        del sharded, model
    return found


def _memory(peak: bool = False) -> int:
    """Bytes of this process in memory, or their maximum since this was last asked for; Linux alone."""
    status = Path("/proc/self/status").read_text()
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM" if peak else "VmRSS"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Do the jobs of the command line."""
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    with ranks(torch.device(jobs[0].get("device", "cpu"))) as taking_part:
        for job in jobs:
            # In functions of their own, as a run is: models go before the groups that they hold.
            do = compare_initial if job.get("initial") else work
            found = do(Path(job.get("folder", folder)), job, taking_part)
            if taking_part.is_main:
                print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
