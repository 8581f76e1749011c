"""`mambalm export`: a checkpoint of a training run as a model in transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from mambalm.cli.options import Dtype, parse_dtype
from mambalm.training.export import export_checkpoint


def export(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; by default the latest.")] = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DESTINATION holds.")] = False,
) -> None:
    """Write the model that a run had at one of its checkpoints, in float32 unless --dtype casts it."""
    chosen = parse_dtype(dtype) or torch.float32
    written = export_checkpoint(run, destination, step=step, dtype=chosen, overwrite=overwrite)
    typer.echo(f"wrote {destination} (step {written})")
