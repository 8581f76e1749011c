"""`mambalm doctor`: what this machine has, and which backend each op would run on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mambalm.diagnostics import doctor as diagnosis
from mambalm.generation.cpu_step import MOST_ROWS


def doctor() -> None:
    """Print versions, devices, the C compiler, how a CPU multiplies and decodes, and each op's backends."""
    console = Console()
    table = Table("package", "version", title="Versions")
    for package, version in diagnosis.versions().items():
        extra = diagnosis.OPTIONAL.get(package) if version == "not installed" else None
        table.add_row(package, version if extra is None else f"{version}: pip install 'mambalm\\[{extra}]'")
    console.print(table)
    table = Table("device", "description", title="Devices")
    for device, description in diagnosis.devices().items():
        table.add_row(str(device), description)
    table.add_row("C compiler", diagnosis.compiler())
    console.print(table)
    table = Table("dtype", "multiplied by", title="Matrix products on the CPU, chosen by measurement")
    for row in diagnosis.products():
        table.add_row(*row)
    console.print(table)
    steps = f"Decode step of Mamba and Mamba-2 layers on the CPU, for 1 to {MOST_ROWS} rows (more: the model's forward)"
    table = Table("weights", "multiplied", title=steps)
    for row in diagnosis.decoding():
        table.add_row(*row)
    console.print(table)
    table = Table("op", "device", "backend", "runs?", title="Backends for float32: the first that can run is chosen")
    for backend in diagnosis.backends():
        if backend.chosen:
            table.add_section()
        status = "chosen" if backend.chosen else "can run, when asked for"
        table.add_row(backend.op, backend.device.type, backend.name, backend.reason or status)
    console.print(table)
