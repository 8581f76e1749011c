"""A recipe: all that determines a training run, validated before anything starts."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mambalm.data.mixture import Mixture, Source

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_count(value: Any) -> Any:
    """A number of tokens or sequences: 300G, 0.5M, 2e9 and 1_000 are counts; what is no text is left as it is.

    Raises:
        PydanticCustomError: a text that is none.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([\d_]+(?:\.\d+)?(?:[eE]\+?\d+)?) ?([kMGT]?)", value)
    if found is None:
        raise PydanticCustomError("count", "a count is a number, with k, M, G or T behind it if need be")
    return round(float(found[1].replace("_", "")) * _UNITS[found[2]])


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
CountOrZero = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """What is trained.

    Attributes:
        family: whose blocks.
        config: fields of the family's transformers configuration (`HybridConfig` for hybrids); those not named keep
            their defaults.
        start: a checkpoint of any format that `mambalm.load` knows, to start from instead of random weights; ``config``
            is not read then.
        new_embeddings: draw the embeddings and the head anew for this recipe's tokenizer.
    """

    family: Literal["mamba", "falcon_mamba", "mamba2", "hybrid"] = "mamba"
    config: dict[str, Any] = {}
    start: str | None = None
    new_embeddings: bool = False


class SourceSection(Section):
    """One source of a mixture, as `mambalm.data.mixture.Source`."""

    path: str
    weight: float = 1.0
    kind: Literal["tokens", "chat"] = "tokens"


class DataSection(Section):
    """What a stage reads, as `mambalm.data.mixture.Mixture`."""

    sources: tuple[SourceSection, ...]
    packing: Literal["documents", "concatenated"] = "documents"
    held_out: float = Field(default=0.0, ge=0, lt=1)

    def mixture(self) -> Mixture:
        """The same for the room that reads it."""
        sources = [Source(source.path, source.weight, source.kind) for source in self.sources]
        return Mixture(sources, self.packing, self.held_out)


class ScheduleSection(Section):
    """The learning rate over the tokens of the stages that it covers.

    Attributes:
        kind: after the warm-up: half a cosine, a line, nothing, or warm-up, stable, decay.
        peak, floor: the highest learning rate, and that at the end.
        warmup: tokens of the linear rise.
        decay: tokens of the fall of "wsd", at the end.
        shape: of that fall.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"]
    peak: float = Field(gt=0)
    floor: float = Field(default=0.0, ge=0)
    warmup: CountOrZero = 0
    decay: CountOrZero = 0
    shape: Literal["exponential", "linear", "1-sqrt"] = "linear"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.floor > self.peak:
            raise ValueError(f"a learning rate falls from its peak to its floor, got {self.peak} and {self.floor}")
        if (self.kind == "wsd") != (self.decay > 0):
            raise ValueError("decay (tokens) belongs to kind: wsd, which needs it")
        if self.kind == "wsd" and self.shape == "exponential" and self.floor == 0:
            raise ValueError("an exponential decay never reaches 0: give it a floor, such as peak / 256")
        return self


class RampSection(Section):
    """A batch that grows.

    Attributes:
        start: sequences of the first batch; the batch is always a multiple of it.
        tokens: until it is full.
        batch_scaling: scale the learning rate by the root of the batch's part of the full one, which keeps the noise
            temperature of Adam, rate / sqrt(batch), constant (Falcon-Mamba).
    """

    start: Count
    tokens: Count
    batch_scaling: bool = False


class StageSection(Section):
    """A part of a run with its own data, context and batch.

    Attributes:
        name: for logs and messages.
        tokens: learned from in this stage.
        context: tokens of a sequence.
        batch: sequences of an optimisation step, over all ranks.
        micro_batch: sequences that a rank computes at once; as many of those as the batch takes are accumulated.
        ramp: how the batch grows at the beginning of the stage.
        data: instead of the recipe's.
        schedule: a new one, which begins here and covers the stages up to the next that has one.
    """

    name: str
    tokens: Count
    context: Count
    batch: Count
    micro_batch: Count = 1
    ramp: RampSection | None = None
    data: DataSection | None = None
    schedule: ScheduleSection | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.ramp and (self.batch % self.ramp.start or self.ramp.start > self.batch):
            raise ValueError(f"ramp.start={self.ramp.start} must divide the full batch of {self.batch} sequences")
        if self.ramp and self.ramp.tokens > self.tokens:
            raise ValueError(f"the ramp of {self.ramp.tokens} tokens is longer than the stage {self.name}")
        return self

    def batch_at(self, tokens: int) -> int:
        """Sequences of the step that begins after so many tokens of the stage."""
        if self.ramp is None or tokens >= self.ramp.tokens:
            return self.batch
        steps = (self.batch - self.ramp.start) // self.ramp.start
        return self.ramp.start * (1 + int(steps * tokens / self.ramp.tokens))


class OptimizerSection(Section):
    """AdamW and what guards it.

    Attributes:
        weight_decay: of the matrices alone; see `mambalm.training.optimizer.decays`.
        clip: the highest norm of the gradient.
        z_loss: weight of the squared log-normaliser in the loss.
        spike: a step whose loss is this many times the mean of the latest hundred is left out, as one that is not
            finite is.
        patience: so many steps in a row that are left out bring the last checkpoint back, further on in the data.
        rewinds: a run that needs more of those ends with an error.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    z_loss: float = Field(default=0.0, ge=0)
    spike: float = Field(default=2.0, gt=1)
    patience: int = Field(default=10, gt=0)
    rewinds: int = Field(default=3, ge=0)


class ParallelSection(Section):
    """How the model is spread over ranks and its activations kept; no influence on what is learned.

    Attributes:
        mode: one process, copies, shards, or copies of groups of shards.
        checkpointing: which activations are computed again in the backward.
        compile: every block by torch.compile.
        shard_size: ranks of one group of shards of hsdp; by default those of a host.
    """

    mode: Literal["single", "ddp", "fsdp", "hsdp"] = "single"
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    shard_size: int | None = Field(
        default=None, gt=0, description="ranks of one shard group of hsdp; by default those of a host"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.mode == "fsdp" and self.shard_size is not None:
            raise ValueError("parallel.shard_size is of mode hsdp; fsdp shards over all ranks")
        return self


class CheckpointSection(Section):
    """When the run is saved, and what is kept."""

    every: Count = 1000
    keep_last: int = Field(default=2, gt=0)
    keep_every: CountOrZero = 0


class LoggingSection(Section):
    """What is written down, every so many steps; 0: never.

    Attributes:
        every: the loss and the other numbers of the step.
        layers: root mean squares of Δ, B, C and state in every layer.
        plot: the curves as a picture.
        wandb: the project to log to as well; None: not at all.
        profile: the steps (first, last) that torch's profiler traces.
    """

    every: int = Field(default=10, gt=0)
    layers: int = Field(default=500, ge=0)
    plot: int = Field(default=500, ge=0)
    wandb: str | None = None
    profile: tuple[Count, Count] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.profile and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile takes the first step and the last, got {self.profile[0]} and {self.profile[1]}")
        return self


class EvaluationSection(Section):
    """The held-out loss and a sample of text, every so many steps; 0: at the end alone.

    Attributes:
        sequences: of the held-out split that are read.
        prompt: what the sample continues; None: no sample.
    """

    every: int = Field(default=1000, ge=0)
    sequences: Count = 64
    prompt: str | None = None
    new_tokens: Count = 64


class ForkSection(Section):
    """Another run's checkpoint to go on from, under this recipe's schedule: such as a decay of one's own."""

    run: str
    step: Count


class AdapterSection(Section):
    """LoRA on a checkpoint whose weights stay as they are.

    Attributes:
        rank, alpha, dropout: LoRA's; what an adapter adds is scaled by alpha / rank.
        targets: last names of projections; None takes all.
        four_bits: QLoRA: the large projections beneath in bitsandbytes' NF4.
    """

    rank: int = Field(16, gt=0)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    four_bits: bool = False


class Recipe(Section):
    """A training run."""

    name: str
    tokenizer: str
    model: ModelSection = ModelSection()
    adapter: AdapterSection | None = None
    data: DataSection
    schedule: ScheduleSection
    stages: tuple[StageSection, ...] = Field(min_length=1)
    optimizer: OptimizerSection = OptimizerSection()
    precision: Literal["bf16", "fp16", "v100", "fp32"] = "bf16"
    parallel: ParallelSection = ParallelSection()
    checkpoints: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    evaluation: EvaluationSection = EvaluationSection()
    fork: ForkSection | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need names of their own, got {', '.join(names)}")
        if self.adapter is not None and (self.model.start is None or self.model.new_embeddings):
            raise ValueError("an adapter needs a checkpoint that stays as it is: set model.start, not new_embeddings")
        if self.adapter is not None and self.adapter.four_bits and self.parallel.mode in ("fsdp", "hsdp"):
            raise ValueError(
                "4-bit weights are not sharded: set parallel.mode to single or ddp, or adapter.four_bits=false"
            )
        for first, last, schedule in self.schedules():
            tokens = sum(stage.tokens for stage in self.stages[first:last])
            if schedule.warmup + schedule.decay > tokens:
                raise ValueError(
                    f"warm-up and decay take {schedule.warmup + schedule.decay:,} tokens, the stages from "
                    f"{names[first]} on have {tokens:,}"
                )
        return self

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def offsets(self) -> list[int]:
        """Tokens of the run before each stage, and at the end."""
        return list(accumulate((stage.tokens for stage in self.stages), initial=0))

    @property
    def longest_context(self) -> int:
        """Tokens of the longest sequence of any stage."""
        return max(stage.context for stage in self.stages)

    def schedules(self) -> list[tuple[int, int, ScheduleSection]]:
        """(first stage, stage behind the last, schedule) in their order."""
        firsts = [i for i, stage in enumerate(self.stages) if i == 0 or stage.schedule is not None]
        ends = [*firsts[1:], len(self.stages)]
        return [(i, j, self.stages[i].schedule or self.schedule) for i, j in zip(firsts, ends, strict=True)]

    def data_of(self, stage: int) -> DataSection:
        """What a stage reads."""
        return self.stages[stage].data or self.data

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed: all but how it is computed, watched and saved."""
        free = {"name", "parallel", "checkpoints", "logging", "evaluation", "fork"}
        identity = self.model_dump(mode="json", exclude=free)
        for stage in identity["stages"]:
            del stage["micro_batch"]
        return identity
