"""`mambalm convert`: a checkpoint of any known format, written in transformers' or mamba_ssm's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mambalm.cli.options import Dtype
from mambalm.models import loading


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint's folder or file, or a Hugging Face repository's name.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[Literal["transformers", "mamba_ssm"], typer.Option(help="The format to write.")] = "transformers",
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DESTINATION holds.")] = False,
) -> None:
    """Rewrite a checkpoint in another format, bit for bit unless --dtype casts it."""
    written = loading.convert(source, destination, to, dtype, overwrite=overwrite)
    typer.echo(f"wrote {written} ({to})")
