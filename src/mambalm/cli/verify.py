"""`mambalm verify`: the equalities, on a checkpoint or on a tiny random model of each family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import mambalm
from mambalm.cli.options import Device, Dtype, parse_device, parse_dtype
from mambalm.diagnostics.tiny import tiny_models
from mambalm.diagnostics.verify import QUANTITIES, Check
from mambalm.diagnostics.verify import verify as run_checks


def verify(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint's folder or hub name; by default tiny random models.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the longest of three documents.")] = 80,
    gradients: Annotated[bool, typer.Option(help="Compare gradients too; they need most of the memory.")] = True,
) -> None:
    """Check that logits, final state and gradients are the same however the tokens are fed; exit 1 if they are not."""
    place = parse_device(device)
    if model is None:
        models = tiny_models(parse_dtype(dtype) or torch.float32, place)
    else:
        models = {model: mambalm.load(model, dtype=parse_dtype(dtype), device=place)}
    failed = False
    for name, network in models.items():
        checks = run_checks(network, lengths=(length, 1, (length + 3) // 4), seed=seed, gradients=gradients)
        Console().print(_table(f"{name}, {str(network.dtype).removeprefix('torch.')}, {network.device}", checks))
        failed |= not all(check.passed for check in checks)
    if failed:
        raise typer.Exit(1)


def _table(title: str, checks: Sequence[Check]) -> Table:
    table = Table("form", *QUANTITIES, "result", title=f"{title}: relative errors")
    for form in dict.fromkeys(check.form for check in checks):
        found = {check.quantity: check for check in checks if check.form == form}
        cells = [_cell(found.get(quantity)) for quantity in QUANTITIES]
        passed = all(check.passed for check in found.values())
        table.add_row(form, *cells, "[green]equal[/]" if passed else "[red]FAILED[/]")
    table.add_row("over ranks", *["-"] * len(QUANTITIES), "not built")
    allowed = {check.quantity: f"{check.allowed:.1e}" for check in checks}
    table.add_section()
    table.add_row("allowed", *(allowed.get(quantity, "-") for quantity in QUANTITIES), "")
    return table


def _cell(check: Check | None) -> str:
    if check is None:
        return "not run"
    return f"{check.error:.1e}" if check.passed else f"[red]{check.error:.1e}, worst: {check.worst}[/]"
