"""`mambalm train`: a recipe, shipped or one's own, from its first token to the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mambalm.cli.options import Device, parse_device
from mambalm.generation import Sampling, Settings, end_tokens, generate
from mambalm.training import distributed
from mambalm.training.recipe_files import dump, load_recipe, shipped
from mambalm.training.session import REQUEUE, run
from mambalm.training.summary import summarise


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="The name of a shipped recipe, or a .yaml file. Without one: their names.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Argument(help="key=value: schedule.peak=1e-3, stages.decay.tokens=1G.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/NAME.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print what the run would do and take, and end.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an earlier run in the folder.")] = False,
    device: Device = None,
) -> None:
    """Train a model. Interrupted or killed, the same command goes on where the last checkpoint is.

    SIGINT and SIGTERM save and end with exit code 75, by which a scheduler knows to requeue. Under torchrun, every
    process is a rank.
    """
    console = Console()
    if recipe is None:
        console.print("\n".join(shipped()), highlight=False)
        return
    resolved = load_recipe(recipe, changes or [])
    if explain:
        console.print(dump(resolved), highlight=False, markup=False)
        console.print(summarise(resolved, distributed.world_size()))
        return
    with distributed.ranks(parse_device(device)) as ranks:
        if ranks.is_main:
            console.print(summarise(resolved, ranks.world))
        folder = output or Path("runs") / resolved.name
        request = run(resolved, folder, ranks, console, restart=restart, sample=_sample)
        if request:
            if ranks.is_main:
                console.print(f"Interrupted and saved; the same command goes on ({folder}).", highlight=False)
            raise typer.Exit(REQUEUE)
        if ranks.is_main:
            made = f"{folder / 'model'}"
            if resolved.adapter is not None:
                made = f"{resolved.model.start} --adapter {folder / 'adapter'}"
            console.print(f"Done: mambalm generate {made}", highlight=False, soft_wrap=True)


def _sample(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """A continuation, the same for the same weights."""
    sampling = Sampling(temperature=0.7, top_p=0.95)
    settings = Settings(sampling=sampling, max_new_tokens=new_tokens, end_tokens=end_tokens(model), seed=0)
    return "".join(piece for _, piece in generate(model, tokenizer, [prompt], settings))
