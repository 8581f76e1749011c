"""The run of a recipe: stages, steps, the guard, checkpoints, and what is written down on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambalm.data.mixture import MixedStream
from mambalm.data.samples import Batch
from mambalm.models.common import MambalmForCausalLM
from mambalm.training.adapters import Adapted
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.distributed import Ranks
from mambalm.training.guard import Guard, Verdict
from mambalm.training.held_out import HeldOut, sum_loss, token_bytes
from mambalm.training.layer_norms import layer_norms
from mambalm.training.metrics import peak_flops
from mambalm.training.optimizer import adamw
from mambalm.training.position import Position, Reader
from mambalm.training.precision import Policy
from mambalm.training.rates import LearningRates
from mambalm.training.step import Stepper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mambalm.training.recipe import DataSection, Recipe, StageSection

# Tokens of one sequence that the layers' norms are measured on.
_PROBE_TOKENS = 512


@dataclass(frozen=True)
class Report:
    """What one step did.

    Attributes:
        step: its number, counted from 1; of one left out, that of the step before it.
        values: what is written down of it, by name.
        verdict: whether it was applied.
    """

    step: int
    values: dict[str, float | str]
    verdict: Verdict


@dataclass
class Trainer:
    """A recipe's run: what is given, then what the steps change.

    Attributes:
        recipe: all that determines the run.
        network: the model.
        model: the same, spread over the ranks.
        tokenizer: of the token files.
        ranks: who takes part, on which device.
        policy: the precision.
        checkpoints: where the run is saved.
        adapted: the adapters, if they alone are trained.
        position: where it is.
        guard: what it has been spared.
    """

    recipe: Recipe
    network: MambalmForCausalLM
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks
    policy: Policy
    checkpoints: Checkpoints
    adapted: Adapted | None = None
    position: Position = field(default_factory=Position)
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        section = self.recipe.optimizer
        optimizer = adamw(self.model, weight_decay=section.weight_decay, betas=section.betas, eps=section.eps)
        self.stepper = Stepper(optimizer, section.clip, self.policy.autocast, self.policy.scaler)
        self.rates = LearningRates(self.recipe)
        vocabulary = self.network.config.vocab_size
        self.reader = Reader(self.recipe, self.tokenizer, vocabulary, self.ranks)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._batches: list[Batch] = []
        self._held_out: dict[int, MixedStream | None] = {}

    @property
    def is_over(self) -> bool:
        """Whether all stages are done."""
        return self.position.stage >= len(self.recipe.stages)

    @property
    def stage(self) -> StageSection:
        """The stage that the next step belongs to; of a finished run, the last."""
        return self.recipe.stages[min(self.position.stage, len(self.recipe.stages) - 1)]

    def advance(self) -> Report:
        """Do one step: apply it, leave it out, or bring the last checkpoint back.

        Raises:
            DivergedError: coming back did not help.
            ValueError: the data does not fit.
        """
        began = time.perf_counter()
        position, stage = self.position, self.stage
        count = stage.batch_at(position.stage_tokens)
        self._batches = self.reader.read(position, count)
        found = self._gradients(self._batches)
        tokens = count * stage.context
        # At the middle of the step's tokens neither the first step of a warm-up nor the last of a decay is wasted.
        rate = self.rates(position.stage, position.stage_tokens + tokens / 2, count)
        loss, norm, verdict = self._apply(found, rate, count)
        position.sequences += count
        if verdict is Verdict.APPLY:
            self._count(tokens)
        else:
            self.stepper.leave()
            if verdict is Verdict.REWIND:
                self._rewind(loss, norm)
        seconds = time.perf_counter() - began
        position.seconds += seconds
        values: dict[str, float | str] = {
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "batch": count,
            "context": stage.context,
            "tokens": position.tokens,
            "tokens_per_second": tokens / seconds,
            "stage": stage.name,
            "skipped": self.guard.skipped,
            "overflows": self.guard.overflows,
            "rewinds": self.guard.rewinds,
        }
        if (peak := self._peak) is not None:
            values["mfu"] = 6 * self.parameters * tokens / seconds / peak / self.ranks.world
        return Report(self.position.step, values, verdict)

    def _apply(self, found: Tensor, rate: float, count: int) -> tuple[float, float, Verdict]:
        """(loss, norm, verdict) of the step of which `_gradients` has ``found`` them; changes the parameters if so."""
        section, scaled = self.recipe.optimizer, self.stepper.scaler is not None
        if not scaled:
            # The device decides as the guard will: it has work while this waits for the numbers.
            self.stepper.apply(rate, unless=self.guard.refuses(section, found))
        self.reader.read_ahead(self.position, count)
        loss, norm = found.tolist()
        verdict = self.guard.judge(section, loss, norm, scaled)
        if scaled and verdict is Verdict.APPLY:
            self.stepper.apply(rate)
        return loss, norm, verdict

    def _gradients(self, batches: list[Batch]) -> Tensor:
        """float32 (loss, norm of the gradient) of this step, the same on every rank, not yet waited for."""
        device, world = self.ranks.device, self.ranks.world
        # Filled by the device: a copy of a number would be waited for.
        learned = torch.full((), sum(batch.learned for batch in batches), device=device)
        total = self.ranks.sum(learned).clamp(min=1)
        z_loss = self.recipe.optimizer.z_loss
        # Of dropout: by place, so that a resumed run draws what the uninterrupted one does; of its own on every rank.
        place = (self.position.stage, self.position.sequences, self.ranks.rank)
        _seed(Random(f"{self.recipe.seed} {place}").getrandbits(63), device)

        def loss_of(number: int, batch: Batch) -> Callable[[], Tensor]:
            def compute() -> Tensor:
                self._synchronise(number == len(batches) - 1)
                # Gradients are averaged over the ranks, and the mean is that over the tokens of all of them.
                return sum_loss(self.model, batch, device, total / world, z_loss)

            return compute

        loss, norm = self.stepper.gradients([loss_of(number, batch) for number, batch in enumerate(batches)])
        # The norm is that of all shards on every rank; what follows from it must not differ by its last bit.
        return self.ranks.sum(torch.stack([loss.float(), norm.float()])) / world

    def _synchronise(self, last: bool) -> None:
        """Gradients are exchanged with the last accumulated batch only."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        elif hasattr(self.model, "set_requires_gradient_sync"):
            sharded: Any = self.model
            sharded.set_requires_gradient_sync(last)

    def _count(self, tokens: int) -> None:
        position = self.position
        position.step += 1
        position.tokens += tokens
        position.stage_tokens += tokens
        if position.stage_tokens >= self.stage.tokens:
            position.taken = self.reader.taken(position)
            position.stage, position.stage_tokens, position.sequences = position.stage + 1, 0, 0

    def _rewind(self, loss: float, norm: float) -> None:
        """Bring the last checkpoint back, but stay where the data is: what did harm is not read again."""
        self.checkpoints.wait()
        saved = self.checkpoints.latest() is not None
        self.guard.count_rewind(self.recipe.optimizer, loss, norm, self.position.step + 1, saved=saved)
        guard, here = self.guard, self.position
        self.load()
        if self.position.stage == here.stage:
            self.position.sequences = here.sequences
        self.guard, self.position.seconds = guard, here.seconds
        self.reader.forget()

    @cached_property
    def _peak(self) -> float | None:
        cuda = self.ranks.device.type == "cuda"
        return peak_flops(torch.cuda.get_device_name(self.ranks.device)) if cuda else None

    def save(self) -> None:
        """Begin a checkpoint of this step; the run can go on meanwhile."""
        self.checkpoints.save(self.position.step, self._state())

    def prepare_checkpoints(self) -> None:
        """Make the memory that they are copied to; to be called after a step, when the optimizer has its moments."""
        self.checkpoints.prepare(self._state(), self.ranks.device)

    def load(self, step: int | None = None) -> None:
        """Go on from a checkpoint, by default the latest.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        state = self._state()
        self.checkpoints.load(state, step)
        self.position, self.guard = Position(**state["progress"]["position"]), Guard(**state["progress"]["guard"])
        if self.stepper.scaler is not None:
            self.stepper.scaler.load_state_dict(state["progress"]["scaler"])

    def _state(self) -> dict[str, Any]:
        scaler = self.stepper.scaler
        progress = {
            "position": asdict(self.position),
            "guard": self.guard.state(),
            "scaler": {} if scaler is None else scaler.state_dict(),
        }
        return {"model": self.model, "optimizer": self.stepper.optimizer, "progress": progress}

    def layer_norms(self) -> dict[str, float]:
        """The norms of Δ, B, C and state on the beginning of the step's first sequence."""
        tokens = self._batches[0].inputs[:1, :_PROBE_TOKENS].to(self.ranks.device)
        with self.policy.autocast():
            return layer_norms(self.network, tokens)

    def measure(self) -> dict[str, float]:
        """The held-out loss of the present stage; nothing where nothing is held out."""
        stream = self._held_out_of(min(self.position.stage, len(self.recipe.stages) - 1))
        if stream is None:
            return {}
        section = self.recipe.evaluation
        held_out = HeldOut(stream, section.sequences, self.stage.micro_batch, self._bytes, self.policy.autocast)
        return held_out.measure(self.model, self.ranks.device)

    def prepare(self) -> None:
        """Open the data of every stage that is left, so that what does not fit shows before the first step.

        Raises:
            ValueError: it cannot be opened.
        """
        opened: list[DataSection] = []
        for number in range(self.position.stage, len(self.recipe.stages)):
            data = self.recipe.data_of(number)
            if not opened:
                self.reader.open(self.position)
            elif data not in opened:
                self.reader.stream(number, {})
            opened.append(data)
            self._held_out_of(number)

    def _held_out_of(self, number: int) -> MixedStream | None:
        if number not in self._held_out:
            kept = self.recipe.data_of(number).held_out > 0
            self._held_out[number] = self.reader.stream(number, {}, "held_out") if kept else None
        return self._held_out[number]

    @cached_property
    def _bytes(self) -> Tensor:
        return token_bytes(self.tokenizer)


def _seed(number: int, device: torch.device) -> None:
    """Seed the host and this device; `torch.manual_seed` keeps a trace of every call for each kind that is not used."""
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)
