"""One rank of a small run, started by torchrun: `python -m tests.training.spread FOLDER '{"mode": "fsdp", ...}'`.

The main rank prints what it saw as one line of JSON.
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

from mambalm.models import HybridConfig, Mamba2ForCausalLM, MambaForCausalLM, MambaHybridForCausalLM
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks, ranks
from mambalm.training.optimizer import adamw
from mambalm.training.parallelism import parallelise
from mambalm.training.precision import policy
from mambalm.training.recipe import ParallelSection
from mambalm.training.step import Stepper

ROWS, LENGTH, VOCABULARY = 4, 17, 60


def network(family: str = "mamba", vocabulary: int = VOCABULARY) -> Any:
    """A small model in float32, the same on every rank."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 2}
    if family == "mamba2":
        return Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1, state_size=8)).train()
    if family == "transformer":
        attention = {"num_heads": 2, "rotary_emb_dim": 4}
        config = HybridConfig(**sizes, d_intermediate=24, attn_layer_idx=[0, 1], attn_cfg=attention)
        return MambaHybridForCausalLM(config).train()
    return MambaForCausalLM(MambaConfig(**sizes, state_size=4, tie_word_embeddings=True)).train()


class SmallRun:
    """A model on its ranks, and its steps over tokens that depend on the step alone."""

    def __init__(self, job: dict[str, Any], taking_part: Ranks) -> None:
        """Set up; see `main` for what a job says."""
        self.ranks = taking_part
        self.policy = policy(job.get("precision", "fp32"), taking_part.device)
        section = ParallelSection(
            mode=job.get("mode", "single"),
            checkpointing=job.get("checkpointing", "none"),
            shard_size=job.get("shard_size"),
        )
        self.network = network(job.get("family", "mamba"), job.get("vocabulary", VOCABULARY))
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
        ids = self.batch()
        return self.model(ids, labels=ids, use_cache=False, skip_logits=True).loss

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

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self.model, "optimizer": self.stepper.optimizer, "progress": {"step": self.step}}


def work(folder: Path, job: dict[str, Any], taking_part: Ranks) -> dict[str, Any]:
    """Do the job: resume from ``folder``, advance until ``steps``, save; with ``die`` one rank fails on the way.

    With ``save_always`` it saves after every step, with ``save_at`` after that one too.
    """
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
    if not job.get("save_always"):
        kept.save(run.step, run.state())
    kept.wait()
    return found


def main() -> None:
    """Do the job of the command line."""
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    with ranks(torch.device(job.get("device", "cpu"))) as taking_part:
        # In a function of its own, as a run is: models go before the groups that they hold.
        found = work(folder, job, taking_part)
        if taking_part.is_main:
            print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
