"""What a recipe will do and take, before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mambalm.training.model import Size, size_of
from mambalm.training.rates import LearningRates

if TYPE_CHECKING:
    from mambalm.training.recipe import Recipe

_SHARDED = ("fsdp", "hsdp")


def summarise(recipe: Recipe, world: int) -> Group:
    """Parameters, memory of a rank and the token budget of every stage, for the terminal.

    Raises:
        ValueError: the model cannot be built, or a batch not be divided among ``world`` ranks.
    """
    size = size_of(recipe)
    shards = world if recipe.parallel.mode in _SHARDED else 1
    held = size.state_bytes / shards
    peak = held + max(size.activation_bytes)
    lines: list[RenderableType] = [
        Text(f"{recipe.name}: {size.parameters:,} parameters, {recipe.tokens:,} tokens, precision {recipe.precision}"),
        Text(
            f"{world} {'rank' if world == 1 else 'ranks'} ({recipe.parallel.mode}): {held / 1e9:.1f} GB of weights, "
            "gradients and moments for each, "
            f"about {peak / 1e9:.1f} GB with activations (checkpointing {recipe.parallel.checkpointing})"
        ),
        _stages(recipe, size, world),
    ]
    return Group(*lines)


def _stages(recipe: Recipe, size: Size, world: int) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("stage", "tokens", "context", "sequences", "accumulated", "steps", "learning rate"):
        table.add_column(column, justify="right" if column != "stage" else "left", no_wrap=True)
    rates = LearningRates(recipe)
    for number, stage in enumerate(recipe.stages):
        if stage.batch % world or stage.batch_at(0) % world:
            raise ValueError(f"stage {stage.name}: batches of {stage.batch_at(0)} and {stage.batch} sequences must be "
                             f"multiples of the {world} ranks")  # fmt: skip
        first = stage.batch_at(0)
        batch = f"{first} to {stage.batch}" if stage.ramp else str(stage.batch)
        table.add_row(
            stage.name,
            _short(stage.tokens),
            f"{stage.context:,}",
            batch,
            str(-(-stage.batch // world // stage.micro_batch)),
            f"{steps_of(recipe, number):,}",
            _rates(recipe, rates, number),
        )
    return table


def _rates(recipe: Recipe, rates: LearningRates, number: int) -> str:
    """A stage's first learning rate and its last, between them the highest where that is neither."""
    stage = recipe.stages[number]
    turns = [stage.tokens * part // 1000 for part in range(1001)]
    first, *between, last = (rates(number, tokens, stage.batch_at(tokens)) for tokens in turns)
    highest = max(between)
    shown = (first, highest, last) if highest > 1.01 * max(first, last) else (first, last)
    return " to ".join(f"{rate:.2g}" for rate in shown)


def _short(count: int) -> str:
    """A number with the unit that recipes write."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def steps_of(recipe: Recipe, number: int) -> int:
    """Optimisation steps of a stage."""
    stage, steps, tokens = recipe.stages[number], 0, 0
    while stage.ramp is not None and tokens < stage.ramp.tokens:
        tokens += stage.batch_at(tokens) * stage.context
        steps += 1
    return steps + max(0, -(-(stage.tokens - tokens) // (stage.batch * stage.context)))
